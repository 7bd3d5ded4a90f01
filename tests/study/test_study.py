"""A study from the recipe to study.json: what it runs, what it writes, what it does not do twice."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from study_helpers import POLICIES, SEEDS, study_json, values

import prose
from damages import sample
from preftune.config import PPOConfig, load_recipe
from preftune.errors import DataError
from preftune.rundir import read_json, read_jsonl, write_json
from preftune.runs.lengths import Lengths
from preftune.runs.sources import dataset_of, learners_rows, with_stage_data
from preftune.study.design import Request, load_design, make_design
from preftune.study.figures import draw
from preftune.study.launch import run_study
from preftune.study.page import _tokens, study_text
from preftune.study.places import facts_file
from preftune.study.pool import collapse, pool
from preftune.study.sweep import sweep_records
from preftune.study.values import COLUMNS, best_at_kl, best_table, read_seed

pytestmark = pytest.mark.xdist_group("study")  # one worker makes the study and goes on with it


# --- what a study runs --------------------------------------------------------------------------------------


def test_every_seed_is_a_run_directory_of_its_own(two_seeds: Path) -> None:
    for seed in SEEDS:
        config = load_recipe(str(two_seeds / f"seed-{seed}" / "config.toml")).config
        assert config.seed == seed
        models = {path.name for path in (two_seeds / f"seed-{seed}" / "models").iterdir()}
        assert {"base", "reward_model", "policy_sft", "policy_ppo", "policy_dpo", "policy_ceiling"} <= models
    bases = [(two_seeds / f"seed-{s}/models/base/model.safetensors").read_bytes() for s in SEEDS]
    assert bases[0] != bases[1]


def test_the_ceiling_is_the_same_ppo_on_gold_alone(two_seeds: Path) -> None:
    stages = load_recipe(str(two_seeds / "study.toml")).config.stage
    ppo, ceiling = stages["ppo"], stages["ceiling"]
    assert isinstance(ppo, PPOConfig)
    assert isinstance(ceiling, PPOConfig)
    changed = {k for k in PPOConfig.model_fields if getattr(ppo, k) != getattr(ceiling, k)}
    assert changed == {"reward_model", "reward_functions", "missing_eos_score"}
    assert ceiling.reward_model is None
    assert str(ceiling.reward_functions).endswith("* preftune.world.gold:gold")


def test_algorithms_get_equal_tokens(two_seeds: Path) -> None:
    study = study_json(two_seeds)
    spent = {name: study["policies"][name]["tokens_trained"] for name in ("ppo", "grpo", "dpo", "ceiling")}
    for tokens in spent.values():  # a step is a third to a half of the budget at this size
        assert tokens == pytest.approx(study["token_budget"], rel=0.6)
    stages = load_recipe(str(two_seeds / "study.toml")).config.stage
    recipe = load_recipe("tiny").config.stage
    assert stages["grpo"].steps > recipe["grpo"].steps  # type: ignore[union-attr]
    for seed in SEEDS:
        rows = read_jsonl(two_seeds / f"seed-{seed}" / "stages" / "grpo" / "metrics.jsonl")
        own = next(s for s in study["seeds"] if s["seed"] == seed)["policies"]["grpo"]
        assert own["tokens_trained"] == sum(row["tokens/trained"] for row in rows)
        assert own["tokens_sampled"] == sum(row["tokens/sampled"] for row in rows) > 0


@pytest.mark.parametrize(("pairing", "rows", "epochs"), [("best_worst", None, 2), ("all", 32, 1)])
def test_the_rounds_of_a_stage_share_its_budget(pairing: str, rows: int | None, epochs: int) -> None:
    """96 rows in all: 32 a round, of the 16 prompts that are collected each time, with one pair or six."""
    made = ("stage.pairs.algorithm=collect", "stage.pairs.judge=rm", "stage.pairs.rows=16")
    words = (*made, f"stage.pairs.pairing={pairing}", "stage.dpo.data=pairs", "stage.dpo.rounds=3")
    words = (*words, "stage.ppo=none", "stage.grpo=none", "data.pairs=40")
    config, lengths = load_recipe("tiny", words).config, Lengths(prompt=10.0, chosen=5.0, rejected=7.0)
    wanted = Request("tiny", words, tokens=96 * (2 * 10 + 5 + 7))
    stages = make_design(wanted, config, dataset_of(config.data, 0), lengths).config.stage
    rounds = [stages[name] for name in ("dpo", "dpo-2", "dpo-3")]
    assert [(each.rows, each.epochs) for each in rounds] == [(rows, epochs)] * 3  # type: ignore[union-attr]
    assert stages["pairs-3"] == config.stage["pairs-3"]


def test_a_stage_on_half_of_the_prompts_has_the_budget_of_the_others() -> None:
    """The tokens of all training pairs: the half has to be gone through as often as it goes into them."""
    words = ("stage.ppo=none", "stage.grpo=none", "stage.dpo.part=first", "stage.dpo.rows=none")
    config, lengths = (
        load_recipe("tiny", (*words, "data.pairs=40")).config,
        Lengths(prompt=10.0, chosen=5.0, rejected=7.0),
    )
    dataset = dataset_of(config.data, 0)
    half = len(learners_rows(dataset.train, config.stage["dpo"], "dpo")[0])
    assert 0 < half < len(dataset.train)
    batch = config.stage["dpo"].batch_size
    tokens = (len(dataset.train) // batch * batch) * (2 * 10 + 5 + 7)
    made = make_design(Request("tiny", words, tokens=tokens), config, dataset, lengths).config.stage["dpo"]
    assert (made.rows, made.epochs) == (None, round(len(dataset.train) / half))  # type: ignore[union-attr]


def test_labelled_replies_count_for_half_a_pair_in_a_budget(tmp_path: Path) -> None:
    """160 replies, desirable and not: the tokens of 80 pairs."""
    rows = [{"prompt": f"Tell me about {i}.", "completion": "Yes.", "label": i % 4 == 0} for i in range(200)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("stage.ppo=none", "stage.grpo=none", "stage.dpo=none", "stage.kto.algorithm=kto")
    words = (*words, f"stage.kto.data={tmp_path}", "stage.kto.batch_size=32", "data.pairs=40")
    config, lengths = load_recipe("tiny", words).config, Lengths(prompt=10.0, chosen=5.0, rejected=7.0)
    dataset = with_stage_data(config, dataset_of(config.data, 0), {})
    request = Request("tiny", words, tokens=80 * (2 * 10 + 5 + 7))
    kto = make_design(request, config, dataset, lengths).config.stage["kto"]
    assert (kto.rows, kto.epochs) == (160, 1)  # type: ignore[union-attr]
    assert kto.steps_on(160 / 2) == 160 / kto.batch_size


def test_half_of_collected_pairs_is_gone_through_twice_as_often() -> None:
    made = ("stage.pairs.algorithm=collect", "stage.pairs.judge=rm", "stage.pairs.rows=32")
    words = (*made, "stage.dpo.data=pairs", "stage.dpo.part=first", "stage.ppo=none", "stage.grpo=none")
    config, lengths = load_recipe("tiny", words).config, Lengths(prompt=10.0, chosen=5.0, rejected=7.0)
    request = Request("tiny", words, tokens=32 * (2 * 10 + 5 + 7))
    dpo = make_design(request, config, dataset_of(config.data, 0), lengths).config.stage["dpo"]
    assert (dpo.rows, dpo.epochs) == (None, 2)  # type: ignore[union-attr]


def test_three_rounds_have_one_token_at_least() -> None:
    words = ("stage.pairs.algorithm=collect", "stage.pairs.judge=rm", "stage.dpo.data=pairs",
             "stage.dpo.rounds=3", "data.pairs=40")  # fmt: skip
    config, lengths = load_recipe("tiny", words).config, Lengths(prompt=10.0, chosen=5.0, rejected=7.0)
    made = make_design(Request("tiny", words, tokens=1), config, dataset_of(config.data, 0), lengths)
    last = made.config.stage["dpo-3"]
    assert last.rows == last.batch_size  # type: ignore[union-attr]


def test_a_budget_of_its_own_and_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.study import launch

    monkeypatch.setattr(launch, "_run", lambda *a: None)
    monkeypatch.setattr(launch, "_numbers", lambda *a: None)
    monkeypatch.setattr(launch, "_write", lambda *a: None)
    run_study(Request("tiny", tokens=60_000), tmp_path / "a", seeds=1)
    run_study(Request("tiny", tokens=0), tmp_path / "b", seeds=1)
    more, same = load_design(tmp_path / "a"), load_design(tmp_path / "b")
    recipe = load_recipe("tiny").config.stage
    assert {n: same.config.stage[n] for n in recipe} == recipe
    assert same.tokens is None
    dpo, ppo = more.config.stage["dpo"], more.config.stage["ppo"]
    assert ppo.steps > 10 * recipe["ppo"].steps  # type: ignore[union-attr]
    assert (dpo.rows, dpo.epochs) == (None, 3)  # type: ignore[union-attr]


# --- what it writes -----------------------------------------------------------------------------------------


def test_the_shape_that_others_read(two_seeds: Path) -> None:
    study = study_json(two_seeds)
    assert set(study["policies"]) == POLICIES
    assert [seed["seed"] for seed in study["seeds"]] == list(SEEDS)
    assert study["gold"] == "the world's gold score"
    assert study["prompt_sets"] == ["training", "combinations", "wording"]
    for policy in study["policies"].values():
        for key in ("gold_gain", "gold_gain_low", "gold_gain_high", "kl", "eos_rate"):
            assert isinstance(policy[key], float)
            assert all(isinstance(each[key], float) for each in policy["sets"].values())
        assert policy["gold_gain_low"] <= policy["gold_gain"] <= policy["gold_gain_high"]
        assert 0 <= policy["eos_rate_low"] <= policy["eos_rate"] <= policy["eos_rate_high"] <= 1
    assert [each["n"] for each in study["best_of_n"]] == [1, 2, 3, 4]
    assert "NaN" not in (two_seeds / "study.json").read_text()


def test_numbers_follow_from_the_prompts_values(two_seeds: Path) -> None:
    study = study_json(two_seeds)
    for kind in study["prompt_sets"]:
        gains = [
            values(two_seeds, seed, "ppo", kind, "gold") - values(two_seeds, seed, "sft", kind, "gold")
            for seed in SEEDS
        ]
        pooled = study["policies"]["ppo"]["sets"][kind]
        assert pooled["gold_gain"] == pytest.approx(np.mean([gain.mean() for gain in gains]), abs=1e-6)
        own, sft = (
            np.array(
                [s["score"] for s in read_json(two_seeds / f"seed-3/study/{name}.json")["samples"][kind]]
            )
            for name in ("ppo", "sft")
        )
        seed = study["seeds"][0]["policies"]["ppo"]["sets"][kind]
        assert seed["win_rate"] == pytest.approx(np.mean((own > sft) + 0.5 * (own == sft)))
        assert seed["gold_gain"] == pytest.approx(gains[0].mean(), abs=1e-6)
        assert seed["gold_gain_low"] <= seed["gold_gain"] <= seed["gold_gain_high"]
    sft = study["policies"]["sft"]
    assert sft["gold_gain"] == sft["kl"] == sft["gold_gain_high"] == 0
    assert sft["gold_verdict"] is None


def test_gold_is_the_worlds_score_of_the_texts(two_seeds: Path) -> None:
    from preftune.world.gold import gold

    file = read_json(two_seeds / "seed-3" / "study" / "ppo.json")
    for kind, samples in file["samples"].items():
        by_rule = [gold(s["prompt"], s["response"], s["ended"]) for s in samples]
        two_replies = np.array(by_rule).reshape(-1, 2).mean(1)
        assert file["sets"][kind]["gold"] == pytest.approx(two_replies.tolist())


def test_prompt_sets_are_what_they_are_called(two_seeds: Path) -> None:
    from preftune.world.grammar import TUNING_FORMS, parse

    samples = read_json(two_seeds / "seed-3" / "study" / "sft.json")["samples"]
    questions = {kind: [parse(s["prompt"]) for s in rows] for kind, rows in samples.items()}
    assert all(q.form < TUNING_FORMS and not q.right.held_out for q in questions["training"])
    assert all(q.right.held_out for q in questions["combinations"])
    assert all(q.form >= TUNING_FORMS for q in questions["wording"])


def test_best_of_n_rises_in_score_and_starts_at_sfts_own_distribution(two_seeds: Path) -> None:
    study = study_json(two_seeds)
    scores = [each["score"] for each in study["best_of_n"]]
    assert scores == sorted(scores)
    assert study["best_of_n"][0]["kl"] == 0
    assert study["best_of_n"][3]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert study["policies"]["best_of_4"]["gold_gain"] == study["best_of_n"][3]["gold_gain"]


def test_equal_kl_lies_between_the_sizes_of_best_of_n(two_seeds: Path) -> None:
    found = read_seed(facts_file(two_seeds, 3), 3)
    gold = found.best["training"]["gold"]

    def at(kl: float) -> np.ndarray:
        reached = best_at_kl(found, "training", kl)
        assert reached is not None
        return reached

    np.testing.assert_allclose(at(0.0), gold[:, 0])
    np.testing.assert_allclose(at(found.best_kl[2]), gold[:, 2])
    middle = ((found.best_kl[1] ** 0.5 + found.best_kl[2] ** 0.5) / 2) ** 2
    np.testing.assert_allclose(at(middle), (gold[:, 1] + gold[:, 2]) / 2)
    assert best_at_kl(found, "training", found.best_kl[-1] + 0.01) is None
    assert best_table(found, "training", 4)[:, COLUMNS.index("win_rate")].max() <= 1


def test_whatever_a_damaged_file_of_a_seed_holds_is_refused_by_name(two_seeds: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(two_seeds, tmp_path / "study"))
    design, refused = load_design(out), list[str]()
    record = read_json(out / "seed-4/study/seed.json")
    write_json(out / "seed-4/study/seed.json", {k: v for k, v in record.items() if k != "record_sha256"})
    patterns = [f"seed-4/study/{name}.json" for name in ("seed", "sft", "ppo", "best_of_n")]
    for file, damage in sample(out, Random(0), 12, patterns):
        whole = file.read_bytes()
        file.write_bytes(damage)
        try:
            pool({seed: facts_file(out, seed) for seed in SEEDS}, design)
        except DataError as error:
            refused.append(error.message)
        file.write_bytes(whole)
    assert len(refused) >= 12
    assert all("seed-4/study/" in message for message in refused)


def test_the_reward_model_is_examined_on_fresh_pairs(two_seeds: Path) -> None:
    reward_model = study_json(two_seeds)["reward_model"]
    for kind in ("training", "combinations", "wording"):
        assert reward_model[kind]["n_pairs"] == 20
        assert 0.5 < reward_model[kind]["best_reachable"] < 1
        assert [each["seed"] for each in reward_model[kind]["by_seed"]] == list(SEEDS)
        assert {"truth", "manners", "concision", "relevance"} <= set(reward_model[kind]["gaps"])


def test_page_and_figures_show_every_policy_and_seed(two_seeds: Path) -> None:
    text = (two_seeds / "STUDY.md").read_text(encoding="utf-8")
    study = study_json(two_seeds)
    for policy in study["policies"].values():
        assert f"| {policy['label']} |" in text
    assert "preftune study tiny" in text
    assert "--seeds 2 --first-seed 3" in text
    for name in ("gains.svg", "kl.svg"):
        assert (two_seeds / "figures" / name).read_text(encoding="utf-8").count("<svg") == 1


def test_seeds_of_different_data_are_not_pooled(two_seeds: Path, tmp_path: Path) -> None:
    """Those of files; each seed of the world has data of its own."""
    out = Path(shutil.copytree(two_seeds, tmp_path / "study"))
    world, records = load_design(out), {seed: facts_file(out, seed) for seed in SEEDS}
    data = world.config.data.model_copy(update={"name": "pairs.jsonl"})
    design = replace(world, config=world.config.model_copy(update={"data": data}))
    assert pool(records, world)["seeds"]
    with pytest.raises(DataError, match=r"seed-4/study/seed\.json: of other data than seed 3"):
        pool(records, design)
    old = read_json(records[4])
    del old["content_sha256"]
    write_json(records[4], old)
    assert pool(records, design)["seeds"]


def test_values_of_how_much_is_trained_are_not_at_equal_tokens() -> None:
    study = {"token_budget": 100, "policies": {}, "sweep": {"key": "stage.ppo.steps"}}
    assert "Not for" in _tokens(study)
    assert "stage.ppo.steps" in _tokens(study)
    assert "Not for" not in _tokens(study | {"sweep": {"key": "stage.ppo.kl_coef"}})
    prose.compare("study/study: a budget of tokens, and values of how much is trained", _tokens(study))


def test_a_policy_whose_kl_is_not_known_is_left_off_the_axis(two_seeds: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(two_seeds, tmp_path / "study"))
    file = out / "seed-4" / "study" / "ppo.json"
    record = read_json(file)
    for each in record["sets"].values():
        each["kl"] = [math.nan] * len(each["kl"])
    write_json(file, record)
    swept = {"stage.ppo.kl_coef": {"0.05": "ppo", "1": "ceiling"}}
    design = replace(load_design(out), sweeps=swept)
    study = pool({seed: facts_file(out, seed) for seed in SEEDS}, design)
    assert (study["policies"]["ppo"]["kl"], study["policies"]["ppo"]["bon_kl_gain"]) == (None, None)
    (sweep,) = sweep_records(design, study)
    assert [(p["stage"], p["seed"]) for p in sweep["points"]] == [("ppo", 3), ("ceiling", 3), ("ceiling", 4)]
    study |= {"sweep": sweep, "command": "x"}
    assert "| PPO |" in study_text(study)
    assert "sweep.svg" in draw(study)


# --- collapsed seeds ----------------------------------------------------------------------------------------


def test_a_collapsed_seed_is_shown_and_stays_in_the_mean(two_seeds: Path, tmp_path: Path) -> None:
    out = tmp_path / "collapsed"
    shutil.copytree(two_seeds, out)
    file = out / "seed-4" / "study" / "ppo.json"
    record = read_json(file)
    for each in record["sets"].values():
        each["gold"] = [-9.0] * len(each["gold"])
        each["ended"] = [0.0] * len(each["ended"])
    write_json(file, record)
    study = pool({seed: facts_file(out, seed) for seed in SEEDS}, load_design(out)) | {
        "sweep": None,
        "command": "x",
    }
    assert study["policies"]["ppo"]["collapsed_seeds"] == [4]
    own = study["seeds"][1]["policies"]["ppo"]
    assert own["collapsed"]
    assert "gold below SFT" in own["collapsed_why"][0]
    per_seed = [seed["policies"]["ppo"]["gold_gain"] for seed in study["seeds"]]
    assert study["policies"]["ppo"]["gold_gain"] == pytest.approx(np.mean(per_seed))
    text = study_text(study)
    assert "* PPO, seed 4: gold below SFT" in text
    assert "(collapsed)" in text.split("## Seed by seed")[1]


def test_what_counts_as_a_collapse() -> None:
    usual = {"gold_gain_high": 0.0, "gold_gain": 0.0, "eos_rate": 0.8, "repetition_4": 0.05}
    fine = {"gold_gain": -0.1, "gold_gain_high": 0.2, "eos_rate": 0.5, "repetition_4": 0.14}
    assert collapse(fine, usual) == []
    for bad in ({"gold_gain_high": -0.01}, {"eos_rate": 0.39}, {"repetition_4": 0.16}):
        assert len(collapse({**fine, **bad}, usual)) == 1
    hardly = {**usual, "eos_rate": 0.05}
    assert collapse({**fine, "eos_rate": 0.0}, hardly) == []  # chance, where the reference itself hardly ends
