"""Records: whatever shape a damaged file has, its reader names file and field; runs of before still open."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_run

from preftune.errors import DataError
from preftune.records.base import Estimate, read_record, write_record
from preftune.records.policy import PolicyRecord
from preftune.records.verdict import BETTER, UNCLEAR, WORSE, outcome
from preftune.report import build, load_run
from preftune.rundir import RunDir, read_json, write_json

OLD = Path(__file__).parent / "old_run"
WRONG: tuple[Any, ...] = ([], "words", {"a": []}, 3.5, True)


def damaged(value: Any, wrong: Any) -> Iterator[Any]:
    """The value with one of its entries, at any depth, replaced; lists at their first place."""
    if isinstance(value, dict):
        for key in value:
            yield {**value, key: wrong}
            yield from ({**value, key: inner} for inner in damaged(value[key], wrong))
    elif isinstance(value, list) and value:
        yield [wrong, *value[1:]]
        yield from ([inner, *value[1:]] for inner in damaged(value[0], wrong))


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("file", ["policy_ppo.json", "reward_model.json"])
def test_a_field_of_a_wrong_shape_is_refused_by_name_or_not_read(
    tmp_path: Path, file: str, wrong: Any
) -> None:
    run = make_run(tmp_path)
    path = run.comparisons.parent / file
    refused = []
    for value in damaged(read_json(path), wrong):
        path.write_text(json.dumps(value), encoding="utf-8")
        try:
            load_run(run)
        except DataError as error:
            refused.append(error.message)
    assert len(refused) > 20
    assert all(str(path) in message for message in refused)
    if not isinstance(wrong, dict):  # an object may lack every key
        path.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(DataError, match=file):
            load_run(run)


def test_the_field_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", {"policy": "policy_ppo", "kl": {"exact_per_sequence": {"mean": "much"}}})
    with pytest.raises(DataError, match=r"p\.json: kl\.exact_per_sequence\.value: .*number"):
        read_record(tmp_path / "p.json", PolicyRecord)


@pytest.mark.parametrize("version", [99, 0, -1, True, False, None, 2.0, "2", [2]])
def test_what_a_newer_version_wrote_is_not_guessed_at(tmp_path: Path, version: Any) -> None:
    write_json(tmp_path / "p.json", {"policy": "policy_ppo", "version": version})
    with pytest.raises(DataError, match=re.escape(f"version {version} of its keys")):
        read_record(tmp_path / "p.json", PolicyRecord)


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="policy"):
        write_record(tmp_path / "p.json", {"policy": 3}, PolicyRecord)
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (0.5, Estimate(value=0.5)),
        ({"mean": 1, "interval": [0, 2], "n": 3}, Estimate(value=1, low=0, high=2, n=3)),
        ({"value": 1.0, "interval": [-math.inf, 2.0]}, Estimate(value=1.0, low=None, high=2.0)),
        ({"value": 1.0, "interval": None}, Estimate(value=1.0)),
    ],
)
def test_an_estimate_is_read_in_every_form_that_files_hold(row: Any, expected: Estimate) -> None:
    assert Estimate.model_validate(row) == expected


@pytest.mark.parametrize(
    ("low", "high", "n", "p", "words"),
    [
        (0.1, 0.7, 100, 0.01, BETTER),
        (-0.7, -0.1, 100, 0.01, WORSE),
        (0.1, 0.7, 100, 0.05, UNCLEAR),
        (0.0, 0.7, 100, 0.01, UNCLEAR),
        (0.1, 0.7, 9, 0.01, UNCLEAR),
        (None, 0.7, 100, 0.01, UNCLEAR),
        (0.1, 0.7, None, None, BETTER),
        (math.nan, math.nan, None, None, UNCLEAR),
    ],
)
def test_the_verdict(
    low: float | None, high: float | None, n: int | None, p: float | None, words: str
) -> None:
    assert outcome(low, high, n, p) == words


def test_a_run_of_version_0_1_still_opens(tmp_path: Path) -> None:
    """old_run is the recipe `tiny` as preftune wrote it before records had a version."""
    run = RunDir(shutil.copytree(OLD, tmp_path / "run"))
    view = load_run(run)
    assert "version" not in read_json(run.evaluation("policy_ppo"))
    ppo = view.policy("policy_ppo")
    assert ppo is not None
    assert (ppo.label, ppo.n_prompts) == ("PPO", 16)
    assert ppo.reward == Estimate(
        value=1.1583473578793928, low=0.5666410594654735, high=1.9325947202072715, n=16
    )
    assert view.reward_model is not None
    build(run)
    assert run.report_page.is_file()
