"""Records: whatever shape a damaged file has, its reader names file and field; runs of before still open."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from synthetic import make_run

from damages import FILES, HUGE, content, read_all, replaced, sample, written
from preftune.errors import DataError
from preftune.records.base import Estimate, read_record, read_records, write_record
from preftune.records.policy import PolicyRecord
from preftune.records.reward_model import RewardModelRecord
from preftune.records.run import TokenRow
from preftune.records.stage import MetricsRow, StageRecord
from preftune.records.verdict import BETTER, UNCLEAR, WORSE, outcome
from preftune.report import build, load_run
from preftune.rundir import RunDir, read_json, write_json, write_jsonl
from sweeps import ALL
from tiny import without_sums

OLD = Path(__file__).parent / "old_run"
DRAWN = ("stages/*/metrics.jsonl", "evaluation/*.json", "samples/*.jsonl")  # what figures are made of
WRONG: tuple[Any, ...] = ([], "words", {"a": []}, 3.5, True)


@pytest.fixture(scope="module")
def tiny_copies(tiny_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, RunDir]:
    """Two copies of a finished run without sums; a test that damages a file mends it."""
    root = tmp_path_factory.mktemp("damaged")
    run, other = (without_sums(RunDir(shutil.copytree(tiny_run.path, root / name))) for name in "ab")
    return run, other


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
    path = run.evaluations / file
    kind = RewardModelRecord if file == "reward_model.json" else PolicyRecord
    refused = []
    for value in damaged(read_json(path), wrong):
        path.write_text(json.dumps(value), encoding="utf-8")
        try:
            read_record(path, kind)
        except DataError as error:
            refused.append(error.message)
    assert len(refused) > 20
    assert all(str(path) in message for message in refused)
    if not isinstance(wrong, dict):  # an object may lack every key
        path.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(DataError, match=file):
            load_run(run)


@pytest.mark.parametrize(
    ("name", "at", "wrong"),
    [
        ("config.toml", ("evaluation",), "words"),
        ("config.toml", ("stage",), 3),
        ("config.toml", ("stage", "ppo"), []),
        ("origins.json", ("origins",), [["a"]]),
        ("origins.json", ("recipe",), ["tiny"]),
        ("run.json", ("versions",), "words"),
        ("data.json", ("rejected",), {"blank": []}),
        ("data.json", ("files",), ["words"]),
        ("data.json", ("splits", "train"), None),
        ("data.json", ("words", "train"), {"prompt": 3}),
        ("data.json", ("content_sha256",), "words"),
        ("data.json", ("duplicates",), json.loads("[" * 200 + "]" * 200)),
        ("samples/policy_ppo_samples.jsonl", (0, "score"), "high"),
        ("samples/policy_ppo_samples.jsonl", (0, "response"), 3.5),
        ("analysis/reward_model_mistakes.jsonl", (0, "tokens_chosen", 0), True),
        ("analysis/reward_model_mistakes.jsonl", (0, "tags"), 3),
        pytest.param("analysis/reward_model_mistakes.jsonl", (0, "margin"), HUGE, id="huge margin"),
        ("stages/ppo/metrics.jsonl", (0,), [1, 2]),
        ("stages/ppo/metrics.jsonl", (0, "grad_norm"), "words"),
        pytest.param("stages/ppo/metrics.jsonl", (0, "step"), HUGE, id="huge step"),
        ("stages/ppo/stage.json", ("steps",), 2.5),
    ],
)
def test_this_damage_is_refused_by_the_name_of_the_file(
    tiny_copies: tuple[RunDir, RunDir], name: str, at: tuple[str | int, ...], wrong: Any
) -> None:
    run, other = tiny_copies
    file = run.path / name
    whole = file.read_bytes()
    file.write_bytes(written(file, replaced(content(file), at, wrong)))
    try:
        with pytest.raises(DataError, match=re.escape(str(file))) as caught:
            read_all(run, other)
        assert caught.value.hint
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("evaluation/reward_model.json", ("accuracy",), None),
        ("evaluation/reward_model.json", ("n",), None),
        ("evaluation/reward_model.json", ("n",), 0),
        ("evaluation/policy_ppo.json", ("score", "interval"), [0.5, math.inf]),
        pytest.param("stages/ppo/metrics.jsonl", (0, "grad_norm"), HUGE, id="huge metric"),
    ],
)
def test_this_is_shown_as_not_known(
    tiny_copies: tuple[RunDir, RunDir], name: str, at: tuple[str | int, ...], value: Any
) -> None:
    run, other = tiny_copies
    file = run.path / name
    whole = file.read_bytes()
    file.write_bytes(written(file, replaced(content(file), at, value)))
    try:
        read_all(run, other, drawn=file if "metrics" in name else None)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("drawn", [False, True])
def test_whatever_a_damaged_file_holds_is_no_internal_error(
    tiny_copies: tuple[RunDir, RunDir], drawn: bool
) -> None:
    """For report, comparison and cards; figures take long, so fewer damages go through them, and each through
    those alone that show its file.
    """
    run, other = tiny_copies
    read_all(run, other)
    named, read = [], 0
    each, patterns = (1, DRAWN) if drawn else (6 if ALL else 2, FILES)
    for file, damage in sample(run.path, Random(drawn), each, patterns):
        whole = file.read_bytes()
        file.write_bytes(damage)
        try:
            read_all(run, other, drawn=file if drawn else None)
            read += 1
        except DataError as error:
            named.append(str(file) in error.message)
        file.write_bytes(whole)
    assert all(named)
    assert drawn or min(len(named), read) >= 5  # a key that nobody reads may hold anything


def test_a_size_that_is_no_number_is_refused(tiny_copies: tuple[RunDir, RunDir]) -> None:
    file = tiny_copies[0].stage_json("ppo")
    whole = file.read_bytes()
    write_json(file, read_json(file) | {"files": {"stages/ppo/metrics.jsonl": {"bytes": [], "sha256": 3}}})
    try:
        with pytest.raises(DataError, match=r"metrics\.jsonl is not what was written: .* instead of \[\]"):
            load_run(tiny_copies[0])
    finally:
        file.write_bytes(whole)


def test_the_field_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", {"policy": "policy_ppo", "kl": {"exact_per_sequence": {"mean": "much"}}})
    with pytest.raises(DataError, match=r"p\.json: kl\.exact_per_sequence\.value: .*number"):
        read_record(tmp_path / "p.json", PolicyRecord)


def test_a_metric_that_is_no_number_is_named_with_its_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "loss": math.nan}, {"step": 2, "loss": [3.0]}])
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: loss: .*number"):
        read_records(tmp_path / "metrics.jsonl", MetricsRow)


def test_a_stage_of_a_wrong_shape_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key"):
        StageRecord.write(tmp_path / "stage.json", {"stage": "sft", "key": 3})
    assert not (tmp_path / "stage.json").exists()


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


OF_VERSION_2 = {
    "score": "reward",
    "score_difference_to_sft": "reward_difference_to_sft",
    "score_difference_to_chosen": "reward_difference_to_chosen",
    "held_out_score": "held_out_reward",
}


def test_files_of_version_2_say_the_same_with_their_own_keys(tmp_path: Path) -> None:
    row = {
        "policy": "policy_ppo",
        "score": {"mean": 1.0, "interval": [0.5, 1.5], "n": 100, "sd": 2.0},
        "score_difference_to_sft": {"mean": 0.6, "interval": [0.1, 1.1], "n": 100},
        "score_difference_to_chosen": {"mean": -0.2, "interval": [-0.6, 0.2], "n": 100},
        "held_out_score": {"mean": 0.3, "interval": [0.1, 0.5], "n": 100, "stage": "rm2"},
    }
    old = {"version": 2} | {OF_VERSION_2.get(key, key): value for key, value in row.items()}
    assert not old.keys() & OF_VERSION_2.keys()
    file = tmp_path / "policy_ppo.json"
    write_json(file, old)
    before = read_record(file, PolicyRecord)
    write_record(file, row, PolicyRecord)
    assert read_json(file)["version"] == 3
    assert read_record(file, PolicyRecord) == before
    assert (before.score_sd, before.held_out_by) == (2.0, "rm2")
    assert before.score is not None
    assert before.score_difference is not None
    assert before.score_difference_to_chosen is not None
    assert before.held_out is not None
    means = [each.value for each in (before.score_difference, before.score_difference_to_chosen)]
    assert [before.score.value, *means, before.held_out.value] == [1.0, 0.6, -0.2, 0.3]
    tokens = {"stage": "ppo", "score": [0.5], "texts": ["a"]}
    rows = [TokenRow.model_validate({**tokens, key: 0.5}) for key in ("reward", "reply_score")]
    assert rows[0] == rows[1]
    assert rows[0].reply_score == 0.5


def test_a_run_of_version_0_1_still_opens(tmp_path: Path) -> None:
    """old_run is the recipe `tiny` as preftune wrote it before records had a version."""
    run = RunDir(shutil.copytree(OLD, tmp_path / "run"))
    view = load_run(run)
    assert "version" not in read_json(run.evaluation("policy_ppo"))
    ppo = view.policy("policy_ppo")
    assert ppo is not None
    assert (ppo.label, ppo.n_prompts) == ("PPO", 16)
    assert ppo.score == Estimate(
        value=1.1583473578793928, low=0.5666410594654735, high=1.9325947202072715, n=16
    )
    old = read_json(run.evaluation("policy_ppo"))
    assert "score" not in old
    assert ppo.score_sd == old["reward"]["sd"]
    assert ppo.score_difference is not None
    assert ppo.score_difference.value == old["reward_difference_to_sft"]["mean"]
    assert ppo.score_difference_to_chosen is not None
    assert ppo.score_difference_to_chosen.value == old["reward_difference_to_chosen"]["mean"]
    curve = read_json(run.best_of_n)["curve"]
    assert [point.score and point.score.value for point in view.best_of] == [
        point["reward"]["mean"] for point in sorted(curve, key=lambda point: point["n"])
    ]
    assert view.reward_model is not None
    build(run)
    assert run.report_page.is_file()
