"""Gains by kind of prompt in the report: their tables, and the caution where a gain is a loss on some."""

from pathlib import Path
from typing import Any

from synthetic import make_run, spread

import prose
from preftune.report import load_run
from preftune.report.blocks import Fold, Grid, Paragraph
from preftune.report.sections.by_prompt import MAX_SOURCES
from preftune.report.sections.cautions import cautions
from preftune.report.sections.comparison import comparison
from preftune.rundir import RunDir, read_json, write_json

PPO = "policy_ppo"  # +0.5 [0.3, 0.7] over all prompts


def with_gains(path: Path, policy: str, **kinds: dict[str, dict[str, Any]]) -> RunDir:
    run = make_run(path)
    write_json(run.evaluation(policy), read_json(run.evaluation(policy)) | {"by_prompt": kinds})
    return run


def gains_of(run: RunDir) -> Fold | None:
    """The fold, where it stands: in the comparison."""
    blocks = comparison(load_run(run), {}).blocks
    folds = [
        block for block in blocks if isinstance(block, Fold) and block.title == "Gains by kind of prompt"
    ]
    return folds[0] if folds else None


def gain(mean: float, half: float, n: int, **more: Any) -> dict[str, Any]:
    return {"n": n, "score": spread(mean, half, n), **more}


def test_a_row_for_every_kind_the_largest_sources_first_and_turns_in_their_order(tmp_path: Path) -> None:
    sources = {"harmless": gain(0.1, 0.3, 30), "helpful": gain(0.7, 0.2, 70, held_out=spread(0.4, 0.1, 70))}
    turns = {"1": gain(0.3, 0.2, 40), "4+": gain(0.6, 0.2, 60)}
    fold = gains_of(with_gains(tmp_path, PPO, turns=turns, source=sources))
    assert fold is not None
    tables = [block.table for block in fold.blocks if isinstance(block, Grid)]
    assert [table.headers for table in tables] == [("Prompts of", "n", "PPO")] * 2  # score, second model
    assert tables[0].rows == (
        ("source helpful", "70", "+0.70 [0.50, 0.90]"),
        ("source harmless", "30", "+0.10 [-0.20, 0.40]"),
        ("human turns: 1", "40", "+0.30 [0.10, 0.50]"),
        ("human turns: 4+", "60", "+0.60 [0.40, 0.80]"),
    )
    assert [row[2] for row in tables[1].rows] == ["+0.40 [0.30, 0.50]", "–", "–", "–"]
    said = ["".join(map(str, block.prose)) for block in fold.blocks if isinstance(block, Paragraph)]
    prose.compare("report/by_prompt_section: gains by kind of prompt", *said)


def test_many_sources_are_cut_to_the_largest(tmp_path: Path) -> None:
    sources = {f"part-{i:02}": gain(0.5, 0.1, 10 + i) for i in range(40)}
    fold = gains_of(with_gains(tmp_path, PPO, source=sources))
    assert fold is not None
    (table,) = [block.table for block in fold.blocks if isinstance(block, Grid)]
    assert [row[1] for row in table.rows] == [str(49 - i) for i in range(MAX_SOURCES)]


def test_kinds_of_few_prompts_are_left_out(tmp_path: Path) -> None:
    few, enough = gain(9.0, 99.0, 9), gain(0.5, 0.2, 10)
    fold = gains_of(with_gains(tmp_path / "a", PPO, source={"few": few, "enough": enough}))
    assert fold is not None
    (table,) = [block.table for block in fold.blocks if isinstance(block, Grid)]
    assert [row[0] for row in table.rows] == ["source enough"]
    assert gains_of(with_gains(tmp_path / "b", PPO, source={"few": few, "fewer": few})) is None


def test_a_run_of_one_kind_of_prompts_has_no_such_table(tmp_path: Path) -> None:
    assert gains_of(make_run(tmp_path)) is None


def test_a_gain_that_is_a_loss_on_some_prompts_is_a_caution(tmp_path: Path) -> None:
    sources = {"harmless": gain(-0.5, 0.3, 30), "helpful": gain(0.9, 0.2, 70)}
    found = mixed(tmp_path, PPO, **sources)
    assert len(found) == 1
    assert "source harmless: -0.50 [-0.80, -0.20], n 30" in found[0]
    prose.compare("report/by_prompt_section: a gain that is a loss on some prompts", *found)


def mixed(path: Path, policy: str, **sources: dict[str, Any]) -> list[str]:
    return [text for text in cautions(load_run(with_gains(path, policy, source=sources))) if "mix" in text]


def test_no_caution_of_few_prompts_of_unclear_losses_or_where_no_gain_was(tmp_path: Path) -> None:
    few, unclear, lost = gain(-0.5, 0.3, 9), gain(-0.1, 0.3, 30), gain(-0.5, 0.3, 30)
    assert not mixed(tmp_path / "a", PPO, few=few, unclear=unclear, helpful=gain(0.9, 0.2, 61))
    assert not mixed(tmp_path / "b", "policy_grpo", lost=lost)  # +0.05 over all prompts: no gain to lose
    assert mixed(tmp_path / "c", PPO, lost=lost)
    corrected = {**lost, "score": {**lost["score"], "p_holm": 0.06}}  # by luck, among so many kinds
    assert not mixed(tmp_path / "d", PPO, lost=corrected)
