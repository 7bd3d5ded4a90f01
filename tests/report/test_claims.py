"""The words of the verdict come from intervals, corrected p-values and the judge's own accuracy."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_run, unscored, verdict

import prose
from preftune.records.base import Estimate
from preftune.records.verdict import BETTER, UNCLEAR, WORSE
from preftune.report import comparison_table, load_run
from preftune.report.blocks import Bullets, Grid
from preftune.report.claims import (
    beats_baselines,
    claims,
    detectable,
    outcome,
)
from preftune.report.contents import sections
from preftune.report.doctor.diagnose import diagnose
from preftune.report.sections.cautions import cautions
from preftune.report.sections.comparison import reading, significance
from preftune.report.sentences import short_stages, summary, verdict_sentences
from preftune.rundir import read_json, write_json


def interval(mean: float, low: float, high: float, n: int = 100) -> Estimate:
    return Estimate(value=mean, low=low, high=high, n=n)


@pytest.mark.parametrize(
    ("difference", "p_holm", "expected"),
    [
        (interval(0.4, 0.1, 0.7), 0.01, BETTER),
        (interval(0.4, 0.1, 0.7), None, BETTER),
        (interval(-0.4, -0.7, -0.1), 0.01, WORSE),
        (interval(0.4, -0.1, 0.9), 0.01, UNCLEAR),  # the interval holds zero, whatever p says
        (interval(0.4, 0.0, 0.9), 0.01, UNCLEAR),
        (interval(0.4, 0.1, 0.7), 0.06, UNCLEAR),  # lost to Holm's correction
        (interval(0.4, 0.1, 0.7), 0.05, UNCLEAR),  # not below the line, as in the records
        (interval(9.0, 8.0, 10.0, n=9), 0.01, UNCLEAR),  # too few prompts for an interval to mean anything
        (Estimate(value=0.4, n=100), 0.01, UNCLEAR),  # a point estimate claims nothing
    ],
)
def test_an_outcome_needs_interval_correction_and_prompts(
    difference: Estimate, p_holm: float | None, expected: str
) -> None:
    assert outcome(difference, p_holm) == expected


def test_verdict_names_better_worse_and_no_detectable_difference(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path))
    found = {claim.policy.label: (claim.outcome, claim.difference.text(sign=True)) for claim in claims(run)}
    assert found["PPO"] == (BETTER, "+0.50 [0.30, 0.70]")
    assert found["best of 4 (SFT)"] == (BETTER, "+0.45 [0.25, 0.65]")
    assert found["DPO"] == (WORSE, "-0.40 [-0.60, -0.20]")
    assert found["GRPO"] == (UNCLEAR, "+0.05 [-0.15, 0.25]")
    prose.compare("report/claims: a run with gains and losses", *verdict_sentences(run))


def test_the_summary_is_one_plain_sentence(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "scored": {},
        "gold that agrees": {"gold": {"policy_ppo": 0.1}},
        "gold that does not": {"gold": {"policy_ppo": -0.9}},
        "a judge like a coin": {"accuracy": 0.50},
    }
    said = {case: summary(load_run(make_run(tmp_path / case, **changes[case]))) for case in changes}
    assert "PPO beats" in said["gold that agrees"]
    assert "PPO did worse" in said["gold that does not"]
    assert "PPO" not in said["a judge like a coin"]
    prose.compare("report/claims: summaries", *(f"{case}: {words}" for case, words in said.items()))


def test_the_table_says_what_an_unclear_difference_would_have_taken(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path))
    (table,) = (block.table for block in significance(run).blocks if isinstance(block, Grid))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["GRPO"] == ("score", UNCLEAR, "+0.05 [-0.15, 0.25]", "0.020", "0.286", "812")
    assert rows["PPO"] == ("score", BETTER, "+0.50 [0.30, 0.70]", "0.020", "–", "–")


def test_of_too_few_prompts_nothing_would_be_found(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path, prompts=9))
    (table,) = (block.table for block in significance(run).blocks if isinstance(block, Grid))
    assert {row[2] for row in table.rows} == {UNCLEAR}
    assert {row[-2:] for row in table.rows} == {("–", "10 or more (1 missing)")}


def test_holm_takes_a_claim_back(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path, holm={"policy_ppo": 0.2}))
    found = {claim.policy.policy: claim.outcome for claim in claims(run)}
    assert found["policy_ppo"] == UNCLEAR
    assert found["best_of_4"] == BETTER


def test_wide_intervals_claim_nothing_and_say_what_was_detectable(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path, half=2.0))
    assert {claim.outcome for claim in claims(run)} == {UNCLEAR}
    assert "better" not in verdict(run).split("The reward model prefers")[0]
    least = detectable(claims(run)[0].difference)
    assert least == pytest.approx(2.0 * 2.8016 / 1.96, rel=1e-3)


def test_a_judge_no_better_than_chance_comes_first(tmp_path: Path) -> None:
    like_a_coin = load_run(make_run(tmp_path / "coin", accuracy=0.51))
    worse = load_run(make_run(tmp_path / "worse", accuracy=0.4))
    for run in (like_a_coin, worse):
        assert verdict(run).startswith("Nothing can be claimed")
        assert any("scores say nothing about quality" in caution for caution in cautions(run))
    assert "worse than chance" in verdict(worse)
    assert "worse than chance" not in verdict(like_a_coin)
    prose.compare(
        "report/claims: a judge like a coin", *verdict_sentences(like_a_coin), *cautions(like_a_coin)
    )
    prose.compare("report/claims: a judge worse than a coin", verdict_sentences(worse)[1], *cautions(worse))


def test_a_judge_no_better_than_a_length_rule_is_said(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path, accuracy=0.54))  # above chance; longer wins 53 %
    assert beats_baselines(run) is False
    assert "(53.0 %)" in verdict(run)
    assert any("little but length" in caution for caution in cautions(run))
    prose.compare("report/claims: a judge like a length rule", verdict_sentences(run)[1], *cautions(run))


def test_gold_exposes_over_optimisation(tmp_path: Path) -> None:
    gold = {"base": -0.5, "policy_ppo": -0.3, "policy_grpo": 0.0, "policy_dpo": 0.2, "best_of_4": 0.2}
    run = load_run(make_run(tmp_path, gold=gold))
    assert "PPO gained in score was" in verdict(run)
    assert "over-optimisation" in {finding.kind for finding in diagnose(run)}
    prose.compare("report/claims: gold exposes over-optimisation", verdict_sentences(run)[-1])


def test_without_a_reward_model_gold_is_what_is_said(tmp_path: Path) -> None:
    run = load_run(unscored(make_run(tmp_path, gold={"policy_dpo": 0.2})))
    assert "DPO (+0.200 [0.150, 0.250]) is better" in verdict(run)
    prose.compare("report/claims: gold alone", *verdict_sentences(run))
    assert not any("reward model" in caution for caution in cautions(run))
    limits = next(section for section in sections(run, {}) if section.key == "limits")
    assert "reward model" not in str(limits)


def test_the_limits_name_whom_the_reward_model_trained(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_json(run.stage_json("grpo"), read_json(run.stage_json("grpo")) | {"parents": ["sft", "rm"]})
    limits = next(section for section in sections(load_run(run), {}) if section.key == "limits")
    assert "by which GRPO learnt" in str(limits)
    (bullets,) = (block for block in limits.blocks if isinstance(block, Bullets))
    prose.compare("report/claims: the limits", *(" ".join(item) for item in bullets.items))


def test_a_kl_that_is_no_number_is_far(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    file = run.evaluation("policy_ppo")
    row = read_json(file)
    row["kl"]["exact_per_sequence"] = math.nan
    write_json(file, row)
    view = load_run(run)
    assert any(caution.startswith("PPO is far from SFT") for caution in cautions(view))
    assert ("KL beyond budget", "PPO") in {(found.kind, found.where) for found in diagnose(view)}


def test_a_short_run_does_not_show_learning(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path, steps=3, prompts=20))
    assert short_stages(run)[:2] == ["sft took 3 steps", "rm took 3 steps"]
    assert "(sft took 3 steps, rm" in verdict(run)
    assert any(caution.startswith("Only 20 prompts") for caution in cautions(run))
    prose.compare("report/claims: a short run", verdict_sentences(run)[-1], *cautions(run))


def test_cautions_name_length_endings_distance_and_repetition(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    record = read_json(run.evaluation("policy_ppo"))
    record["length"] = {"mean": 60.0, "median": 60.0, "interval": [55.0, 64.0]}
    record["eos_rate"] = {"value": 0.1, "interval": [0.05, 0.2], "n": 100}
    record["kl"]["exact_per_sequence"] = {"mean": 80.0, "interval": [70.0, 90.0]}
    record |= {"role_leakage": 0.4, "empty_share": 0.2, "repetition_4": 0.7}
    write_json(run.evaluation("policy_ppo"), record)
    text = "\n".join(cautions(load_run(run)))
    for words in ("writes longer responses", "is far from SFT", "repeats itself"):
        assert f"PPO {words}" in text
    first = cautions(load_run(run))[0]
    assert first.startswith("Gained in score, but ended")
    assert "PPO (10.0 % [5.0, 20.0])" in first
    assert text.count("10.0 %") == 1
    assert "40 % of the responses of PPO" in text
    assert "20 % of the responses of PPO" in text
    prose.compare("report/claims: cautions of length, endings, distance and repetition", text)


def test_few_endings_without_a_gain_are_only_few_endings(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("sft", "ppo"):  # as few as SFT has: no gain was bought with them
        record = read_json(run.evaluation(f"policy_{name}"))
        record["eos_rate"] = {"value": 0.1, "interval": [0.05, 0.2], "n": 100}
        write_json(run.evaluation(f"policy_{name}"), record)
    text = "\n".join(cautions(load_run(run)))
    assert "PPO ends only 10.0 %" in text
    assert "Gained in score" not in text  # as the test above finds it
    prose.compare("report/claims: few endings without a gain", text)


def test_a_sound_run_has_no_cautions(tmp_path: Path) -> None:
    assert cautions(load_run(make_run(tmp_path))) == ()


def test_table_has_a_row_for_each_policy_in_order(tmp_path: Path) -> None:
    table = comparison_table(load_run(make_run(tmp_path)))
    assert [row[0] for row in table.rows] == ["base (gpt2)", "SFT", "PPO", "GRPO", "DPO", "best of 4 (SFT)"]
    assert all(len(row) == len(table.headers) for row in table.rows)
    by_name = {row[0]: dict(zip(table.headers, row, strict=True)) for row in table.rows}
    assert by_name["SFT"]["Score − SFT"] == "reference"
    assert by_name["PPO"]["Verdict"] == "better"
    assert by_name["best of 4 (SFT)"]["KL to SFT (nats/response)"] == "≤ 0.64 (formula)"
    assert "Gold [95 %]" not in table.headers


def test_without_an_sft_stage_the_base_is_the_reference(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.evaluation("policy_sft").unlink()
    run.comparisons.unlink()
    for policy in ("base", "policy_ppo", "policy_grpo", "policy_dpo", "best_of_4"):
        record = read_json(run.evaluation(policy))
        record["score_difference_to_sft"] = None
        write_json(run.evaluation(policy), record)
    assert "compared with base (gpt2)" in verdict(load_run(run))
    prose.compare("report/claims: no policy compared with the base", verdict_sentences(load_run(run))[0])


def test_a_policy_that_was_trained_on_gold_is_called_a_ceiling(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path))
    stage = {"ppo": {"algorithm": "ppo", "reward_functions": "2 * mine:kind"}, "grpo": {"algorithm": "grpo"}}
    seen = replace(run, config={**run.config, "stage": stage, "evaluation": {"gold": "mine:kind, ./other"}})
    found = [caution for caution in cautions(seen) if "ceiling" in caution]
    assert len(found) == 1
    assert found[0].startswith("ppo ")
    assert "(mine:kind)" in found[0]
    assert not any("ceiling" in caution for caution in cautions(run))
    prose.compare("report/claims: a policy that was trained on gold", *found)


def configured(
    path: Path, evaluation: dict[str, str], stages: dict[str, dict[str, str]] | None = None
) -> Any:
    """The finished run with other settings."""
    run = load_run(make_run(path, gold={"policy_ppo": 0.1}))
    stage = stages or dict(run.config["stage"])
    return replace(run, config={**run.config, "stage": stage, "evaluation": evaluation})


@pytest.mark.parametrize(
    ("evaluation", "ppo", "data"),
    [
        ({"gold": "mine:kind"}, {"reward_functions": "2 * mine:kind"}, "pairs.jsonl"),
        ({"gold": "./judge"}, {"reward_model": "./judge"}, "pairs.jsonl"),
        ({"gold": "none"}, {"reward_functions": "preftune.world.gold:gold", "reward_model": "none"}, "world"),
    ],
    ids=["a function", "a directory", "the world's own"],
)
def test_gold_that_trained_a_policy_is_not_called_unseen(
    tmp_path: Path, evaluation: dict[str, str], ppo: dict[str, str], data: str
) -> None:
    unseen = configured(tmp_path, evaluation, {"ppo": {"algorithm": "ppo"}})
    assert "which training never saw, PPO" in verdict(unseen)
    labelled = configured(
        tmp_path, evaluation, {"pairs": {"judge": next(iter(ppo.values())).rpartition(" ")[2]}}
    )
    labelled = replace(labelled, config={**labelled.config, "data": {"name": data}})
    assert "never saw" not in verdict(labelled)
    seen = configured(tmp_path, evaluation, {"ppo": {"algorithm": "ppo", **ppo}})
    seen = replace(seen, config={**seen.config, "data": {"name": data}})
    assert "never saw" not in verdict(seen)
    assert "gold score, PPO" in verdict(seen)
    assert any(caution.startswith("ppo was trained on gold") for caution in cautions(seen))
    not_evaluated = replace(seen, policies=tuple(p for p in seen.policies if p.policy != "policy_ppo"))
    assert not any("ceiling" in caution for caution in cautions(not_evaluated))


def test_a_score_by_functions_is_called_theirs(tmp_path: Path) -> None:
    beside = configured(tmp_path, {"reward_functions": "mine:kind"})
    assert "score plus mine:kind, " in verdict(beside)
    alone = configured(tmp_path, {"reward_functions": "mine:kind"}, {"sft": {"algorithm": "sft"}})
    alone = replace(alone, reward_model=None)
    words = verdict(alone)
    assert "the score of mine:kind, " in words
    assert "reward model" not in words
    assert not any("reward model" in caution for caution in cautions(alone))
    assert "the score of mine:kind. " in reading(alone)
    prose.compare("report/claims: scored by functions", *verdict_sentences(beside)[:1], words, reading(alone))
    far = tuple(replace_score(policy, 9.0) for policy in alone.policies)
    found = "score outside what the reward model saw"
    assert found not in {each.kind for each in diagnose(replace(alone, policies=far))}
    assert found in {each.kind for each in diagnose(replace(alone, policies=far, config={}))}


def replace_score(policy: Any, mean: float) -> Any:
    return policy.model_copy(update={"score": interval(mean, mean - 1, mean + 1)})


def test_a_run_that_has_no_reward_model_lacks_none(tmp_path: Path) -> None:
    run = unscored(make_run(tmp_path))
    assert [words for words in load_run(run).missing if "reward model" in words]
    text = run.config.read_text(encoding="utf-8")
    run.config.write_text(text.split("[stage.rm]")[0] + '[stage.dpo]\nalgorithm = "dpo"\n', encoding="utf-8")
    view = load_run(run)
    assert not any("reward model" in words for words in view.missing)
    assert not any(section.key == "reward-model" for section in sections(view, {}))
    assert "reward model" not in verdict(view)


def test_the_reference_is_the_stage_that_imitates_whatever_its_name(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path))
    stages = {"warm": {"algorithm": "sft"}, "dpo": {"algorithm": "dpo"}}
    warm = next(p for p in run.policies if p.policy == "policy_sft").model_copy(
        update={"policy": "policy_warm"}
    )
    view = replace(run, config={"stage": stages}, comparisons=(), policies=(*run.policies, warm))
    assert view.reference == "policy_warm"
    assert replace(view, policies=run.policies).reference == "base"
    assert replace(view, config={}).reference == "policy_sft"
