"""The reward-model section and the second look at the policies, with all that an evaluation may hold."""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_run
from synthetic_newer import add_newer_parts

import prose
from preftune.errors import DataError
from preftune.report import build, load_run
from preftune.report.blocks import Block, Fold, Grid, Table
from preftune.report.contents import sections
from preftune.report.text import percent
from preftune.report.writers.analysis import analysis_text, apart_texts
from preftune.rundir import RunDir, read_json, write_json

pytestmark = pytest.mark.usefixtures("with_figures")


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = add_newer_parts(make_run(tmp_path_factory.mktemp("newer")))
    build(run)
    files = (run.analysis_text, *run.analysis_details.glob("*.md"))
    return "".join(file.read_text(encoding="utf-8") for file in files)


def written(run: RunDir) -> str:
    """ANALYSIS.md and what it links, as they would be written, without the time that figures take."""
    view = load_run(run)
    parts = sections(view, {})
    return "".join([analysis_text(view, parts), *apart_texts(parts).values()])


def change(run: RunDir, **keys: Any) -> RunDir:
    write_json(run.reward_evaluation, read_json(run.reward_evaluation) | keys)
    return run


@pytest.mark.parametrize(
    "words",
    [
        "an accuracy of 54.4 % or more",
        "What to expect: 62 to 66 %",
        "| A logistic model of word counts | 61.0 % [58.0, 64.0] | +7.0 [3.0, 11.0] | better |",
        "68.1 % [65.0, 71.0]",
        "1.70; negative log-likelihood 0.660",
        "The margins claim too much.",
        "response length: +0.120 [0.060, 0.180]",
        "| chosen − rejected, tokens: -20 to -6 | 210 | 60.0 % [57.0, 63.0] |",
        "| human turns: 4+ | 80 | 61.0 % [58.0, 64.0] |",
        "| its words shuffled | -0.60 [-0.70, -0.50] | 80.0 % [77.0, 83.0] |",
        "| `rm2` | 1,000 | 66.0 % [63.0, 69.0] | other prompts |",
        "| `rejected is longer` | 7 | 58.0 % | 30.0 % | 41.0 % [38.0, 44.0] |",
        "figures/reward_model_reliability.svg",
        "figures/reward_model_groups.svg",
        "12 tokens 0.10 and none; 44 tokens 0.60 and 0.20.",
        "On other pairs, `else<where>.jsonl` (310 pairs)",
        "| `rm` | 310 | 58.0 % [55.0, 61.0] | -3.0 [-7.0, 1.0] | no detectable difference (a logistic model "
        "of word counts) | 68.0 % [65.0, 71.0] |",
        "| PPO | 53.0 % [50.0, 56.0] | 59.0 % [56.0, 62.0] | 40.0 % [30.0, 50.0] | +0.50 [0.30, 0.70] |",
        "| SFT | – | 59.0 % [56.0, 62.0] | 40.0 % [30.0, 50.0] | – |",
        "at most 4 tokens (ours)",
        "| PPO | 40.0 [37.0, 43.0] | 50.0 % [40.0, 60.0] | 100 | +0.50 [0.30, 0.70] | "
        "+0.00 [-0.20, 0.20] | 0.0 % [0.0, 20.0] |",
        "Win rate vs chosen",
        "worse: -0.50 [-0.70, -0.30]",
        "Backward KL / response",
        "figures/reward_kl_held_out.svg",
    ],
)
def test_everything_measured_is_said(analysis: str, words: str) -> None:
    assert words in analysis


def test_an_analysis_is_written_like_this(tmp_path: Path) -> None:
    """All of it but tables, examples and figures."""
    run = load_run(add_newer_parts(make_run(tmp_path)))
    text = re.sub(r"(?ms)^\*\*[^*]*\*\*\n\n```text.*?^```$", "", analysis_text(run, sections(run, {})))
    lines = [line for line in text.splitlines() if line and not line.startswith("|")]
    prose.compare("report/reward_model_section: ANALYSIS.md", *lines)


def test_a_group_without_a_pair_is_left_out(analysis: str) -> None:
    assert "over 20" not in analysis


@pytest.mark.parametrize(
    ("low", "high", "place"), [(0.3, 0.4, "above"), (0.9, 0.95, "below"), (0.5, 0.9, "within")]
)
def test_the_interval_is_placed_against_what_others_reached(
    tmp_path: Path, low: float, high: float, place: str
) -> None:
    band = {"low": low, "high": high, "text": "so much", "source": None}
    assert f"The interval measured here lies {place} it." in written(
        change(add_newer_parts(make_run(tmp_path)), expected_band=band)
    )


def test_an_unknown_band_says_so_and_places_nothing(tmp_path: Path) -> None:
    band = {"low": None, "high": None, "text": "none known at this size", "source": None}
    text = written(change(add_newer_parts(make_run(tmp_path)), expected_band=band))
    assert "What to expect: none known" in text
    assert "The interval measured here" not in text


def temperature_of(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("- Best temperature"))


def test_a_temperature_is_a_finding_only_where_it_helps_on_other_pairs(tmp_path: Path) -> None:
    run = add_newer_parts(make_run(tmp_path))
    found = written(change(run, temperature={"value": 1.7, "nll_before": 0.60, "nll_after": 0.61}))
    said = [temperature_of(found)]
    assert "It does not help" in said[0]
    assert "The margins claim" not in found
    low = written(change(run, temperature={"value": 0.5, "nll_before": 0.62, "nll_after": 0.61}))
    said.append(temperature_of(low))
    assert "The margins claim too little." in said[1]
    gain = {"mean": 0.01, "interval": [-0.02, 0.04], "n": 100}
    unsure = {"value": 1.7, "nll_before": 0.62, "nll_after": 0.61, "nll_gain": gain}
    found = written(change(run, temperature=unsure))
    said.append(temperature_of(found))
    assert "not shown to help" in said[2]
    assert "(+0.010 [-0.020, 0.040])" in said[2]
    assert "The margins claim" not in found
    said.append(temperature_of(written(change(run, temperature={"value": math.inf}))))
    assert "infinite" in said[3]
    prose.compare(
        "report/reward_model_section: temperatures that help nobody, that do, that may, none", *said
    )


def test_a_score_that_depends_on_padding_is_shouted(tmp_path: Path) -> None:
    moved = {
        "n": 16,
        "padding_max_difference": 0.3,
        "batch_max_difference": 0.0,
        "tolerance": 1e-4,
        "ok": False,
    }
    text = written(change(add_newer_parts(make_run(tmp_path)), invariance=moved))
    (line,) = (line for line in text.splitlines() if "DEPENDS" in line)
    prose.compare("report/reward_model_section: a score that depends on padding", line)


def test_an_old_run_has_the_same_sections_without_the_new_parts(tmp_path: Path) -> None:
    text = written(make_run(tmp_path))
    assert "| Always choosing the longer one | 53.0 % [50.0, 56.0] |" in text
    assert "| `rejected is longer` | 6 | 50.0 % |" in text
    for absent in (
        "What to expect",
        "Best temperature",
        "length-controlled",
        "Second reward model",
        "Response | Raw",
    ):
        assert absent not in text


def test_null_is_as_good_as_missing(tmp_path: Path) -> None:
    run = add_newer_parts(make_run(tmp_path))
    before = read_json(run.reward_evaluation)
    write_json(run.reward_evaluation, {key: None for key in before} | {"accuracy": before["accuracy"]})
    for policy in ("policy_ppo", "base"):
        row = read_json(run.evaluation(policy))
        write_json(run.evaluation(policy), {key: None for key in row} | {"policy": policy})
    write_json(run.evaluation("best_of_n"), {"curve": None})
    assert "Accuracy on held-out pairs: 68.0 %" in written(run)


def test_an_evaluation_that_makes_no_sense_names_its_file(tmp_path: Path) -> None:
    run = change(add_newer_parts(make_run(tmp_path)), reliability=[{"low": "x"}])
    with pytest.raises(DataError, match=r"reward_model\.json"):
        load_run(run)


def test_a_record_of_other_pairs_that_makes_no_sense_names_its_file(tmp_path: Path) -> None:
    run = add_newer_parts(make_run(tmp_path))
    write_json(run.pairs("elsewhere") / "pairs.json", {"file": "a", "n": "many"})
    with pytest.raises(DataError, match=r"pairs-elsewhere.pairs\.json"):
        load_run(run)


def test_an_evaluation_on_other_pairs_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    run = add_newer_parts(make_run(tmp_path))
    (run.pairs("elsewhere") / "pairs.json").unlink()
    assert "On other pairs" not in written(run)


def test_every_column_of_every_table_has_as_many_decimals_in_every_row(tmp_path: Path) -> None:
    """But that of claims in different units, where those of one unit have."""
    run = add_newer_parts(make_run(tmp_path))
    folder = run.pairs("elsewhere")
    judge = read_json(folder / "reward_model.json")
    other = judge | {
        "stage": "rm2",
        "baseline_tests": [judge["baseline_tests"][0] | {"interval": [0.049, 0.051]}],
    }
    write_json(folder / "reward_model_rm2.json", other)
    for policy, median in (("policy_ppo", 131.5), ("policy_sft", 9.5)):
        row = read_json(run.evaluation(policy))
        write_json(run.evaluation(policy), row | {"length": row["length"] | {"median": median}})
    tables = list(_tables(block for section in sections(load_run(run), {}) for block in section.blocks))
    assert len(tables) > 10
    for table in tables:
        for heading, *shown in zip(table.headers, *table.rows, strict=True):
            alone = [cell for cell in shown if re.fullmatch(r"[-+]?\d+\.\d+( %)?( \[.*\])?", cell)]
            decimals = {len(found) for cell in alone for found in re.findall(r"\d\.(\d+)", cell)}
            mixed = "In" in table.headers and heading in ("Difference [95 %]", "Would be found")
            assert len(decimals) <= 1 or mixed, (heading, shown)


def _tables(blocks: Iterable[Block]) -> Iterator[Table]:
    for block in blocks:
        if isinstance(block, Grid):
            yield block.table
        elif isinstance(block, Fold):
            yield from _tables(block.blocks)


def test_percent_of_nothing_is_a_dash() -> None:
    assert percent(None) == "–"


def test_a_calibration_error_within_what_chance_makes_is_no_finding(tmp_path: Path) -> None:
    run = add_newer_parts(make_run(tmp_path))
    found = written(change(run, ece=0.038, ece_if_calibrated=0.045))
    assert "up to 0.045 on so many" in found
    assert "not shown to be miscalibrated." in found
    assert "it is miscalibrated." not in found
    assert "it is miscalibrated." in written(change(run, ece=0.05))
    (line,) = (line for line in found.splitlines() if "calibration error" in line)
    prose.compare("report/reward_model_section: a calibration error within what chance makes", line)
