"""File names of a run, and readers and writers that survive kills, odd text and full disks."""

import errno
import json
import math
import os
from pathlib import Path

import pytest

from preftune.errors import DataError, InputMissing, PermissionMissing, StorageError
from preftune.rundir import (
    RunDir,
    append_jsonl,
    read_json,
    read_jsonl,
    short_name,
    write_json,
    write_jsonl,
    write_result,
    write_text,
)
from preftune.sums import check_own, faults, note, read_sealed


def test_layout() -> None:
    run = RunDir("r")
    names = {
        run.config: "config.toml",
        run.run: "run.json",
        run.data: "data.json",
        run.report_page: "report.html",
        run.analysis_text: "ANALYSIS.md",
        run.figures: "figures",
        run.log(2): "logs/attempt-2.log",
        run.model_dir("rm", trains_policy=False): "models/reward_model",
        run.model_dir("judge", trains_policy=False): "models/reward_model_judge",
        run.model_dir("ppo"): "models/policy_ppo",
        run.model_dir("base"): "models/base",
        run.stage_json("sft"): "stages/sft/stage.json",
        run.metrics("sft"): "stages/sft/metrics.jsonl",
        run.checkpoints("ppo"): "stages/ppo/checkpoints",
        run.samples_file("policy_ppo"): "samples/policy_ppo_samples.jsonl",
        run.samples_file("base", "gpt2"): "samples/base_gpt2_samples.jsonl",
        run.mistakes: "analysis/reward_model_mistakes.jsonl",
        run.evaluation("policy_dpo"): "evaluation/policy_dpo.json",
        run.reward_evaluation: "evaluation/reward_model.json",
        run.comparisons: "evaluation/comparisons.jsonl",
    }
    assert {path.relative_to("r").as_posix() for path in names} == set(names.values())
    assert all(path == Path("r") / name for path, name in names.items())


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("gpt2", "gpt2"),
        ("openai-community/gpt2", "gpt2"),
        ("/m/my model/", "my-model"),
        ("a/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4-1"),
        ("..", "model"),
    ],
)
def test_short_model_names(model: str, short: str) -> None:
    assert short_name(model) == short


def test_sample_files_are_found_by_policy(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for path in (
        run.samples_file("base", "gpt2"),
        run.samples_file("policy_sft"),
        run.samples_file("best_of_4"),
    ):
        write_jsonl(path, [])
    assert list(run.samples_files()) == ["base", "best_of_4", "policy_sft"]


def test_attempts_count_up(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.next_attempt() == 1
    write_text(run.log(9), "")
    write_text(run.log(10), "")
    write_text(tmp_path / "logs/attempt-2-old.log", "")
    assert run.next_attempt() == 11


def test_numbers_that_json_lacks_are_strings_in_the_file_and_floats_for_its_readers(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [math.nan, math.inf, (-math.inf, 1.5)], "p": Path("q"), "n": None})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": ["NaN", "Infinity", ["-Infinity", 1.5]],
        "p": "q",
        "n": None,
    }
    nan, *infinite = read_json(path)["a"]
    assert isinstance(nan, float)
    assert math.isnan(nan)
    assert infinite == [math.inf, [-math.inf, 1.5]]
    append_jsonl(tmp_path / "x.jsonl", {"loss": math.inf})
    assert read_jsonl(tmp_path / "x.jsonl") == [{"loss": math.inf}]


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "\\NaN", "\\\\Infinity", "nan", " NaN", "\\"])
def test_text_that_is_spelt_like_a_number_stays_text(text: str, tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"response": text, "all": [text, math.inf]})
    assert read_json(tmp_path / "x.json") == {"response": text, "all": [text, math.inf]}


def test_rows_keep_odd_text(tmp_path: Path) -> None:
    rows = [{"t": "line\u2028separator\u0085 and\r\n"}, {"t": "é 漢字 😀"}, {"t": "half \ud83d pair"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    append_jsonl(tmp_path / "x.jsonl", rows[0])
    assert read_jsonl(tmp_path / "x.jsonl") == [*rows, rows[0]]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b'{"t": "\xc3'])
def test_torn_last_line_is_dropped_and_appending_goes_on(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.jsonl"
    append_jsonl(path, {"step": 1})
    path.write_bytes(path.read_bytes() + torn)
    append_jsonl(path, {"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]


def test_torn_last_line_does_not_stop_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"t": "\xc3')
    assert read_jsonl(path) == [{"step": 1}]


def test_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2: "):
        read_jsonl(path)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"gone\.json"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text('{\n"a": }')
    with pytest.raises(DataError, match=r"bad\.json:2"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match="UTF-8"):
        read_json(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, StorageError), (errno.EIO, StorageError), (errno.EROFS, PermissionMissing)],
)
def test_failed_write_leaves_the_old_file_and_no_debris(
    code: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": True})

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(kind, match=r"cannot write .*x\.json"):
        write_json(path, {"old": False})
    assert read_json(path) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_run_is_checked_by_whatever_path_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "runs" / "mine")
    write_text(run.config, "seed = 1\n")
    note(run, [run.config])
    monkeypatch.chdir(run.path)
    for path in ("../mine", "../../runs/mine", ".", f"{run.path}/../mine"):
        check_own(RunDir(path), run.config)
    record = read_sealed(run.marker)
    write_text(tmp_path / "outside", "seed = 1\n")  # the same text, but not the run's
    for outside in ("../../outside", str(tmp_path / "outside")):
        assert len(faults(run, {"files": {outside: record["files"]["config.toml"]}})) == 1


def test_a_result_for_a_pipe_goes_into_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_result(pipe, {"n": 1})
    assert json.loads(os.read(reader, 100)) == {"n": 1}
    os.close(reader)
    assert pipe.is_fifo()
