"""A second reward model, trained on other pairs, checks on the first."""

from pathlib import Path

import pytest

import preftune
from preftune.config import load_recipe
from preftune.data import Dialogue, Preference, Turn, prompt_hash
from preftune.data.dataset import make_dataset
from preftune.measure.conditions import second_judge, shares_prompts
from preftune.rundir import RunDir, read_json, read_jsonl
from preftune.runs.console import Console
from preftune.runs.reopen import reopen
from preftune.runs.session import Session
from preftune.runs.sources import dataset_of

POLICIES = ["base", "policy_sft", "policy_dpo", "best_of_4"]


def test_the_halves_share_no_prompt_and_leave_nothing_out(second_judge_run: RunDir) -> None:
    session = reopen(second_judge_run.path)
    first, second, everything = (session.training_rows(part) for part in ("first", "second", "all"))
    assert len(first) + len(second) == len(everything) == len(session.dataset.train)
    assert not {prompt_hash(row.prompt) for row in first} & {prompt_hash(row.prompt) for row in second}
    assert min(len(first), len(second)) > 0.35 * len(everything)
    assert sorted([*first, *second], key=lambda row: row.row) == sorted(everything, key=lambda row: row.row)


def test_texts_are_halved_too(tmp_path: Path) -> None:
    config = load_recipe("tiny", ["data.form=plain"]).config
    rows = [Preference(prompt=Dialogue(), chosen=f" text {i}", rejected="") for i in range(40)]
    dataset = make_dataset({"train": rows, "validation": [], "test": []}, {}, "text")
    session = Session(config=config, dataset=dataset, run=RunDir(tmp_path), console=Console())
    first, second = (session.training_rows(part) for part in ("first", "second"))
    assert min(len(first), len(second)) > 10
    assert len(first) + len(second) == 40


def test_the_settings_of_a_recipe_without_halves_are_those_of_before() -> None:
    """`part` must not appear where it is not used: it would make stages of older runs look changed."""
    config = load_recipe("tiny", ["stage.rm2.algorithm=reward", "stage.rm2.part=second"]).config
    dumps = {name: stage.model_dump(mode="json") for name, stage in config.stage.items()}
    assert "part" not in dumps["rm"]
    assert dumps["rm2"]["part"] == "second"


def test_every_policy_gets_a_held_out_score(second_judge_run: RunDir) -> None:
    model = preftune.load_reward_model(second_judge_run.models / "reward_model_rm2")
    for name in POLICIES:
        record = read_json(second_judge_run.evaluation(name))
        held_out = record["held_out_score"]
        assert (held_out["stage"], held_out["shares_pairs"]) == ("rm2", False)
        per_prompt = [row["held_out"] for row in record["prompts"]]
        assert held_out["mean"] == pytest.approx(sum(per_prompt) / 12)
        assert (record["held_out_difference_to_sft"] is None) == (name == "policy_sft")
    for row in read_jsonl(second_judge_run.samples_file("policy_dpo"))[:3]:  # scored again from the text
        again = model.score([row["prompt"]], [row["response"]], ended=row["ended"]).item()
        assert row["held_out"] == pytest.approx(again, abs=1e-4)
        assert row["held_out"] != pytest.approx(row["score"], abs=1e-3)
    families = {record["family"] for record in read_jsonl(second_judge_run.comparisons)}
    assert {"held_out vs policy_sft", "held_out vs chosen", "score vs chosen"} <= families


def test_both_reward_models_are_audited(second_judge_run: RunDir) -> None:
    first = read_json(second_judge_run.reward_evaluation)
    second = read_json(second_judge_run.evaluation("reward_model_rm2"))
    assert (first["stage"], second["stage"]) == ("rm", "rm2")
    assert second["held_out"] is True
    assert first["accuracy"]["value"] != second["accuracy"]["value"]
    bag = first["baselines"]["bag_of_words"]
    assert bag == second["baselines"]["bag_of_words"]  # the same rule on the same pairs
    assert bag["trained_on"] == len(dataset_of(load_recipe("tiny", []).config.data, 0).train)


def test_the_curve_of_best_of_n_rises_from_the_mean_of_the_pool(second_judge_run: RunDir) -> None:
    record = read_json(second_judge_run.best_of_n)
    curve = record["curve"]
    assert [each["n"] for each in curve] == list(range(1, 17))
    means = [each["score"]["mean"] for each in curve]
    assert means == sorted(means)
    assert all(each["held_out"]["n"] == each["gold"]["n"] == 12 for each in curve)
    assert record["reference"] == "policy_sft"


def session_with(path: Path, *words: str) -> Session:
    """A session with rm, rm2 and rows of two sources, a prompt each."""
    config = load_recipe("tiny", ["stage.rm2.algorithm=reward", "stage.grpo=none", *words]).config
    rows = [
        Preference(
            prompt=Dialogue([Turn("human", f" Q{i}?")]),
            chosen=" a",
            rejected=" b",
            row=i,
            source="harmless" if i % 2 else "helpful",
        )
        for i in range(40)
    ]
    dataset = make_dataset({"train": rows, "validation": [], "test": []}, {}, "pairs")
    return Session(config=config, dataset=dataset, run=RunDir(path), console=Console())


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        (["stage.rm.part=first", "stage.rm2.part=second"], False),
        (["stage.rm.sources=helpful", "stage.rm2.sources=harmless"], False),
        ([], True),
        (["stage.rm.part=first"], True),
        (["stage.ppo.reward_model=./judge"], None),
    ],
)
def test_whose_prompts_a_second_reward_model_shares_is_known_of_stages_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], shares: bool | None
) -> None:
    monkeypatch.setattr(Session, "is_trained", lambda session, name: True)
    session = session_with(tmp_path, *words)
    second = second_judge(session)
    assert second is not None
    assert shares_prompts(session, second) is shares


def test_a_third_reward_model_is_asked_for_its_own_prompts(tmp_path: Path) -> None:
    third = ["stage.rm3.algorithm=reward", "stage.rm3.part=second"]
    session = session_with(tmp_path, "stage.rm.part=first", *third)
    assert [shares_prompts(session, name) for name in ("rm2", "rm3")] == [True, False]


@pytest.mark.parametrize(
    "words",
    [
        ["stage.ppo2.algorithm=ppo", "stage.ppo2.reward_model=rm2", "stage.ppo2.max_new_tokens=16"],
        ["stage.pairs.algorithm=collect", "stage.pairs.judge=rm2", "stage.dpo.data=pairs"],
    ],
)
def test_a_reward_model_that_a_policy_learns_from_checks_on_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(Session, "is_trained", lambda session, name: True)
    assert second_judge(session_with(tmp_path, *words)) is None
    third = ["stage.rm3.algorithm=reward", "stage.rm3.part=second", "stage.rm.part=first"]
    session = session_with(tmp_path, *words, *third)
    assert second_judge(session) == "rm3"
    assert shares_prompts(session, "rm3") is False
