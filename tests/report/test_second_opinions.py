"""Claims beyond the score itself: at equal length, by a second model, against best-of-n and people."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_run, share, spread, verdict
from synthetic_newer import add_newer_parts

import prose
from preftune.records.verdict import BETTER, UNCLEAR, WORSE
from preftune.report.blocks import Grid
from preftune.report.claims import beats_baselines, length_outcome
from preftune.report.doctor.diagnose import diagnose
from preftune.report.load import load_run
from preftune.report.sections.cautions import cautions
from preftune.report.sections.reward_model import reward_model_blocks
from preftune.report.sentences import summary, verdict_sentences
from preftune.report.tables import length_table
from preftune.report.view import RunView
from preftune.rundir import RunDir, read_json, read_jsonl, write_json, write_jsonl, write_text


def whole(path: Path, accuracy: float = 0.68) -> RunDir:
    return add_newer_parts(make_run(path, accuracy=accuracy))


def part(run: RunDir | RunView, start: str) -> str:
    """The sentence of the verdict that begins with `start`; empty if none does."""
    view = run if isinstance(run, RunView) else load_run(run)
    return next((text for text in verdict_sentences(view) if text.startswith(start)), "")


def set_matched(run: RunDir, policy: str, mean: float, half: float = 0.2, n: int = 100) -> None:
    record = read_json(run.evaluation(policy))
    record["length_controlled"]["gain_length_matched"] = spread(mean, half, n)
    write_json(run.evaluation(policy), record)


def test_what_remains_at_equal_length_is_read_off_its_interval(tmp_path: Path) -> None:
    """Of 9 pairs of equal length nothing is claimed."""
    said = list[str]()
    for mean, n, expected in ((0.4, 100, BETTER), (0.1, 100, UNCLEAR), (-0.4, 100, WORSE), (0.4, 9, UNCLEAR)):
        run = whole(tmp_path / str(len(said)))
        set_matched(run, "policy_ppo", mean, n=n)
        view = load_run(run)
        assert [length_outcome(each) for each in view.policies if each.policy == "policy_ppo"] == [expected]
        said.append(part(view, "Between responses of equal length"))
        assert f"PPO ({mean:+.2f} [{mean - 0.2:.2f}, {mean + 0.2:.2f}])" in said[-1]
        assert ("the gain in score remains" in said[-1]) is (expected == BETTER)
        assert ("turns into a loss" in said[-1]) is (expected == WORSE)
    prose.compare("report/second_opinions: what remains at equal length", *said)


def test_equal_length_is_asked_only_of_what_gained(tmp_path: Path) -> None:
    words = part(whole(tmp_path), "Between responses of equal length")
    assert "PPO" in words
    assert "GRPO" not in words  # no detectable gain
    assert "DPO" not in words  # worse
    assert "best of 4" not in words  # not trained


def test_a_second_reward_model_takes_a_gain_back(tmp_path: Path) -> None:
    words = part(whole(tmp_path), "By a second reward model, trained on other prompts,")
    assert "PPO (-0.50 [-0.70, -0.30])" in words.split("worse than SFT")[0]
    assert "PPO gained in score was" in words


def edit_comparisons(run: RunDir, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    write_jsonl(run.comparisons, [change(row) for row in read_jsonl(run.comparisons)])


def test_a_second_reward_model_may_leave_a_gain_unconfirmed(tmp_path: Path) -> None:
    run = whole(tmp_path)
    edit_comparisons(run, lambda row: row | {"p_holm": 0.2} if row["measure"] == "held_out" else row)
    words = part(run, "By a second reward model")
    assert "PPO and best of 4 (SFT)" in words
    assert "lost" not in words
    prose.compare("report/second_opinions: a gain that is not confirmed", words)


def test_pairs_shared_with_the_first_model_are_not_called_other_pairs(tmp_path: Path) -> None:
    run = whole(tmp_path)
    assert "other prompts" in part(run, "By a second reward model")
    path = run.evaluation("reward_model_rm2")
    write_json(path, read_json(path) | {"held_out": False})
    words = part(run, "By a second reward model")
    assert words
    assert "other prompts" not in words
    prose.compare("report/second_opinions: a second model of shared pairs", words)


def test_training_is_set_against_choosing_the_best_of_a_few(tmp_path: Path) -> None:
    words = part(whole(tmp_path), "Against choosing without training")
    worse, _, unclear = words.partition("worse than best of 4")
    assert "GRPO (-0.40 [-0.60, -0.20]) and DPO (-0.85 [-1.05, -0.65])" in worse
    assert "PPO (+0.05 [-0.15, 0.25]) shows no detectable difference" in unclear
    assert "base" not in words


def test_nobody_is_said_to_beat_people_without_an_interval(tmp_path: Path) -> None:
    run = whole(tmp_path)
    words = part(run, "Against the chosen responses, by the same score")
    assert "PPO (-0.10 [-0.30, 0.10])" in words
    assert "no detectable difference" in words
    assert "better" not in words
    better = spread(0.5, 0.2, 100)
    edit_comparisons(run, lambda row: row | better if row["reference"] == "chosen" else row)
    words = part(run, "Against the chosen responses")
    assert "are better than" in words
    prose.compare("report/second_opinions: better than the chosen responses", words)


def test_a_judge_no_better_than_a_coin_has_no_say_on_length_or_people(tmp_path: Path) -> None:
    sound = verdict(load_run(whole(tmp_path / "sound")))
    words = verdict(load_run(whole(tmp_path / "coin", accuracy=0.51)))
    assert words.startswith("Nothing can be claimed")
    for silent in ("equal length", "without training", "the chosen responses, by"):
        assert silent in sound
        assert silent not in words


def set_test(run: RunDir, baseline: str, difference: float, p_holm: float) -> None:
    record = read_json(run.reward_evaluation)
    for row in record["baseline_tests"]:
        if row["baseline"] == baseline:
            row |= {"difference": difference, "p_holm": p_holm}
            row["interval"] = [difference - 0.02, difference + 0.02]
    write_json(run.reward_evaluation, record)


@pytest.mark.parametrize(
    ("difference", "p_holm", "better"), [(0.07, 0.01, True), (0.07, 0.2, False), (0.01, 0.01, False)]
)
def test_the_judge_beats_a_baseline_by_the_paired_test_only(
    tmp_path: Path, difference: float, p_holm: float, better: bool
) -> None:
    run = whole(tmp_path)
    set_test(run, "bag_of_words", difference, p_holm)
    view = load_run(run)
    assert beats_baselines(view) is better
    assert "word counts (61.0 %)" in verdict(view)
    assert ("not shown to be better" in verdict(view)) is not better
    found = [caution for caution in cautions(view) if "single words" in caution]
    assert len(found) == (not better)
    if found:
        words = part(view, "The reward model prefers")
        prose.compare("report/second_opinions: a judge like a bag of words", words, *found)


def test_a_part_of_the_data_that_the_judge_has_the_wrong_way_round_is_a_warning(tmp_path: Path) -> None:
    run = whole(tmp_path)
    assert not any("more often than not" in caution for caution in cautions(load_run(run)))
    record = read_json(run.reward_evaluation)
    record["by_source"] = {"helpful": share(0.65, 300), "harmless": share(0.38, 300)}
    write_json(run.reward_evaluation, record)
    (found,) = [caution for caution in cautions(load_run(run)) if "more often than not" in caution]
    assert found.startswith("On harmless ")
    assert "38.0 % [35.0, 41.0] right" in found
    prose.compare("report/second_opinions: a part of the data the wrong way round", found)


def test_nonsense_that_the_judge_likes_is_a_warning(tmp_path: Path) -> None:
    run = whole(tmp_path)
    found = "\n".join(cautions(load_run(run)))
    assert "to nothing (51.0 % [48.0, 54.0]" in found
    assert "its words shuffled" not in found  # 80 % lie below the chosen response
    record = read_json(run.reward_evaluation)
    record["sanity"][1]["below_chosen"] = share(0.3, 200)
    record["invariance"]["ok"] = False
    write_json(run.reward_evaluation, record)
    found = "\n".join(cautions(load_run(run)))
    assert "its words shuffled (30.0 % [27.0, 33.0]" in found
    assert "changes with padding or batch" in found
    prose.compare("report/second_opinions: nonsense that the judge likes", found)


def test_the_share_left_is_warned_of_only_where_a_gain_is_shown(tmp_path: Path) -> None:
    run = whole(tmp_path)
    unclear = spread(0.1, 0.2, 100) | {"p_holm": 0.6}
    edit_comparisons(run, lambda row: row | unclear if row["policy"] == "policy_ppo" else row)
    assert not any("of the gain of PPO" in caution for caution in cautions(load_run(run)))


def test_the_table_of_equal_length_says_over_how_many_prompts(tmp_path: Path) -> None:
    run = whole(tmp_path)
    set_matched(run, "policy_ppo", 0.1, n=37)
    record = read_json(run.evaluation("policy_ppo"))
    record["length_controlled"]["gain"]["n"] = 37
    write_json(run.evaluation("policy_ppo"), record)
    table = length_table(load_run(run))
    place = table.headers.index("Prompts (n)")
    assert {row[0]: row[place] for row in table.rows}["PPO"] == "37"


def test_a_gain_that_is_mostly_length_is_a_warning(tmp_path: Path) -> None:
    run = whole(tmp_path)
    words = "Less than half of the gain of PPO is left at equal length"
    assert any(caution.startswith(words) for caution in cautions(load_run(run)))
    record = read_json(run.evaluation("policy_ppo"))
    record["length_controlled"]["share_surviving"] = share(0.4, 100, 0.2)  # the interval reaches one half
    write_json(run.evaluation("policy_ppo"), record)
    assert not any(caution.startswith(words) for caution in cautions(load_run(run)))


def second_at(run: RunDir, accuracy: float) -> RunView:
    """The run with a second reward model of this accuracy, its interval 7 points wide on either side."""
    path = run.evaluation("reward_model_rm2")
    write_json(path, read_json(path) | {"accuracy": share(accuracy, 200, 0.07)})
    return load_run(run)


def test_a_second_model_no_better_than_a_coin_is_no_second_opinion(tmp_path: Path) -> None:
    sound = load_run(whole(tmp_path))
    assert "by a second reward model" in summary(sound)
    assert "PPO and DPO did worse" in summary(sound)
    run = second_at(whole(tmp_path), 0.48)
    assert "own score" in summary(run)
    words = part(run, "By the second")
    assert "(48.0 % [41.0, 55.0])" in words
    (found,) = (caution for caution in cautions(run) if "confirms nothing" in caution)
    prose.compare("report/second_opinions: a second model like a coin", summary(run), words, found)
    assert not any("Over-optimisation" in caution for caution in cautions(run))
    assert "over-optimisation" not in {finding.kind for finding in diagnose(run)}
    assert "over-optimisation" in {finding.kind for finding in diagnose(sound)}


@pytest.mark.parametrize(
    "taught", ['[stage.ppo2]\nalgorithm = "ppo"\nreward_model = "rm2"', '[stage.pairs]\njudge = "rm2"']
)
def test_a_second_model_that_a_policy_learnt_from_is_no_second_opinion(tmp_path: Path, taught: str) -> None:
    """An evaluation from before such a model was passed over."""
    made = whole(tmp_path)
    write_text(made.config, f"{made.config.read_text(encoding='utf-8')}\n{taught}\n")
    run = load_run(made)
    assert "own score" in summary(run)
    assert "learnt from the second" in part(run, "By the second reward model")
    assert any("learnt from the second" in caution for caution in cautions(run))


def test_only_the_record_behind_the_score_says_whose_pairs_it_saw(tmp_path: Path) -> None:
    run = whole(tmp_path)
    path = run.evaluation("reward_model_rm2")
    write_json(path, read_json(path) | {"held_out": None})
    write_json(run.evaluation("reward_model_rm3"), read_json(path) | {"stage": "rm3", "held_out": True})
    words = part(run, "By a second reward model")
    assert words
    assert "other prompts" not in words  # as where the record says so


@pytest.mark.parametrize(
    ("held_out", "words"),
    [(True, "other prompts"), (False, "shares prompts with the first"), ("absent", "not known")],
)
def test_what_other_models_were_trained_on_is_said_where_it_is_known(
    tmp_path: Path, held_out: bool | str, words: str
) -> None:
    run = whole(tmp_path)
    path = run.evaluation("reward_model_rm2")
    record = read_json(path) | {"held_out": held_out}
    write_json(path, {k: v for k, v in record.items() if v != "absent"})
    blocks = reward_model_blocks(load_run(run), ())
    tables = [block.table for block in blocks if isinstance(block, Grid)]
    (table,) = [table for table in tables if table.headers[-1] == "Trained on"]
    assert table.rows[0][-1] == words


def test_the_base_is_not_said_to_be_over_optimised(tmp_path: Path) -> None:
    """Nobody optimised it: a better score and a worse gold than SFT's are its own."""
    run = make_run(tmp_path, gold={"base": -0.5, "policy_ppo": 0.2})
    better = spread(0.6, 0.2, 100)
    edit_comparisons(
        run, lambda row: row | better if (row["policy"], row["measure"]) == ("base", "score") else row
    )
    view = load_run(run)
    assert "base (gpt2) (+0.60" in verdict(view)
    assert "What" not in verdict(view)
    assert not any("Over-optimisation" in caution for caution in cautions(view))
    assert not [finding for finding in diagnose(view) if finding.kind == "over-optimisation"]


def test_who_was_trained_on_gold_does_not_beat_by_gold(tmp_path: Path) -> None:
    run = make_run(tmp_path, gold={"policy_ppo": 0.3, "policy_dpo": 0.2, "policy_grpo": -0.2})
    said = [summary(load_run(run))]
    assert said[0].startswith("PPO and DPO beat SFT")
    text = run.config.read_text(encoding="utf-8")
    on_gold = text.replace('"ppo"\n', '"ppo"\nreward_functions = "m:f"\n')
    write_text(run.config, f'{on_gold}\n[evaluation]\ngold = "m:f"\n')
    said.append(summary(load_run(run)))
    assert said[1].startswith("DPO beats SFT by gold")
    assert "GRPO did worse" in said[1]
    everyone = on_gold
    for name in ("dpo", "grpo"):
        everyone = everyone.replace(f'"{name}"\n', f'"{name}"\nreward_functions = "m:f"\n')
    write_text(run.config, f'{everyone}\n[evaluation]\ngold = "m:f"\n')
    said.append(summary(load_run(run)))
    assert "own score" in said[2]
    prose.compare("report/second_opinions: two policies, one and none that gold has not trained", *said)


def test_that_none_is_shown_to_beat_best_of_n_is_no_claim_that_none_does(tmp_path: Path) -> None:
    run = second_at(whole(tmp_path), 0.48)
    assert "; none is shown to beat" in summary(run)
