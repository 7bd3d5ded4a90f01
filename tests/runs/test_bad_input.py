"""Input that cannot be used ends in an error for people before anything is trained."""

import importlib.metadata
import json
import random
import sys
import time
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from preftune.cli import main

SMALL = [
    "model.scratch.vocab_size=300",
    "model.scratch.steps=2",
    "data.max_prompt_length=30",
    "data.max_response_length=40",
]


def row(i: int) -> str:
    prompt = f"\n\nHuman: Question {i} please\n\nAssistant:"
    return json.dumps({"chosen": f"{prompt} Good answer {i}", "rejected": f"{prompt} Bad thing {i}"}) + "\n"


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("", 65, "the file is empty"),
        (row(0) + "{bad\n", 65, "data.jsonl:2"),
        (row(0) + '{"chosen": "x"}\n', 65, "data.jsonl:2"),
        (row(0), 65, "too small to hold out a validation split"),
    ],
)
def test_bad_files(
    content: str, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "data.jsonl", tmp_path / "run"
    file.write_text(content)
    assert main(["run", "tiny", f"data.name={file}", *SMALL, "--out", str(out)]) == code
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (out / "stages").exists()
    assert main(["plan", "tiny", f"data.name={file}", *SMALL]) == code
    assert words in capsys.readouterr().err


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", f"data.name={tmp_path / 'none.jsonl'}", *SMALL]) == 66
    assert "quickstart" in capsys.readouterr().err


def test_a_row_of_a_megabyte_goes_through_pretraining_and_a_changed_byte_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One word of a million letters, in a reply and in a prompt: cut, learnt from, in bounded time."""
    drawn = random.Random(0)
    word = "".join(drawn.choice("abcdefghij") for _ in range(1_000_000))
    turn = "\n\nHuman: {}\n\nAssistant:"
    long = [
        {"chosen": turn.format("Hi") + " " + word, "rejected": turn.format("Hi") + " No"},
        {"chosen": turn.format(word) + " Yes", "rejected": turn.format(word) + " No"},
    ]
    file, out = tmp_path / "data.jsonl", tmp_path / "run"
    file.write_text("".join(map(row, range(20))) + "".join(json.dumps(pair) + "\n" for pair in long))
    words = ["train", "tiny", "sft", f"data.name={file}", *SMALL, "stage.sft.rows=16", "--out", str(out)]
    began = time.process_time()
    assert main(words) == 0, capsys.readouterr().err
    assert time.process_time() - began < 60
    capsys.readouterr()
    file.write_text(file.read_text().replace("Good answer 7", "Good answer 8"))
    assert main(words) == 78
    assert "was made with other settings" in capsys.readouterr().err


def test_a_directory_that_may_not_be_written_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write anywhere, so the system's refusal is played."""

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["train", "tiny", "sft", "data.name=world", "--out", str(tmp_path / "run")]) == 77
    error = capsys.readouterr().err
    assert f"cannot write to {tmp_path / 'run'}: permission denied" in error
    assert "--out DIR" in error


def test_a_package_that_is_not_there_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    words = ["train", "hh-smollm2", "sft", "data.name=world", "--out", str(tmp_path / "run")]
    assert main(words) == 69
    assert "make smollm2" in capsys.readouterr().err


def test_a_run_directory_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from preftune.rundir import RunDir
    from preftune.runs.lock import held

    with held(RunDir(tmp_path / "run")):
        assert main(["train", "tiny", "sft", "--out", str(tmp_path / "run")]) == 73
    assert "is in use by" in capsys.readouterr().err
    assert not (tmp_path / "run" / "stages").exists()


LONG = "x" * 300
# What is typed, the exit code, and words of the error. Files that are named are made by `place`.
TYPED: list[tuple[list[str], int, str]] = [
    (["fly"], 64, "fly"),
    (["run"], 64, "recipe"),
    (["run", "tiny", "--nonsense"], 64, "nonsense"),
    (["run", "nonesuch"], 64, "quickstart"),
    (["run", "none.toml"], 64, "none.toml"),
    (["run", "folder.toml"], 64, "folder.toml"),
    (["run", f"{LONG}.toml"], 66, "too long"),
    (["run", "tiny", "seed"], 64, "key=value"),
    (["train", "tiny", "kto"], 64, "kto"),
    (["run", "tiny", "data.name=hf_" + "aB3" * 10], 64, "[redacted]"),
    (["run", "tiny", "data.name=empty"], 65, "no preference files"),
    (["run", "tiny", "data.name=a.csv"], 65, "a.csv"),
    (["run", "tiny", "data.name=pairs"], 65, "train.jsonl:1"),
    (["run", "tiny", "data.name=../../../../../../etc/passwd"], 65, "/etc/passwd"),
    (["report", "broken"], 65, "config.toml"),
    (["run", "tiny", "data.name=none.jsonl"], 66, "none.jsonl"),
    (["run", "tiny", "data.name=loop.jsonl"], 66, "loop.jsonl"),
    (["run", "tiny", f"data.name={LONG}"], 66, "too long"),
    (["run", "tiny", "data.name=~nobody-here/x"], 66, "~nobody-here/x"),
    (["run", "tiny", "data.name=csv"], 66, "owner/name"),
    (["run", "tiny", "data.name=nobody/none"], 66, "nobody/none"),
    (["run", "tiny", "data.name=data://../../etc/passwd"], 66, "etc/passwd"),
    (["run", "tiny", "model.base=a b"], 66, "a b"),
    (["run", "tiny", "model.base=empty"], 66, "config.json"),
    (["run", "tiny", "model.base=x.gguf"], 66, "x.gguf"),
    (["evaluate", "none"], 66, "none"),
    (["sample", "a.csv"], 66, "a.csv"),
    (["report", "none"], 66, "none"),
    (["run", "tiny", "--out", "a.csv"], 74, "a.csv"),
    (["run", "tiny", "--out", LONG], 74, "too long"),
    (["run", "tiny", "seed=x"], 78, "whole number"),
    (["run", "tiny", "nosuch.key=1"], 78, "nosuch.key"),
    (["run", "tiny", "name=../x"], 78, "no dots"),
    (["run", "tiny", "name=/etc/x"], 78, "no dots"),
    (["run", "tiny", "stage.a/b.algorithm=sft"], 78, "a/b"),
    (["run", "tiny", "data.name=pairs", "data.data_dir=../.."], 78, "data_dir"),
    (["run", "tiny", "data.name=pairs", "data.data_dir=/etc"], 78, "data_dir"),
    (["run", "binary.toml"], 78, "binary.toml"),
    (["run", "deep.toml"], 78, "too deep"),
    (["evaluate", "broken"], 78, "config.toml"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with what the commands of the table name."""
    for folder in ("empty", "pairs", "broken", "folder.toml"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a.csv").write_text("chosen,rejected")
    (tmp_path / "pairs/train.jsonl").write_text("{}")
    (tmp_path / "broken/config.toml").write_text("x = [")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 5000)
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize(("words", "code", "said"), TYPED, ids=lambda value: str(value)[:50])
def test_what_is_typed_wrong(
    words: list[str], code: int, said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert main(words) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") <= 8
    assert "Traceback" not in shown
    assert "aB3aB3" not in shown
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", ["donn\u00e9es", "with space", "a;b$(c)", "-dash", "\u202etxt", "a\nb"])
def test_odd_names_of_directories_are_only_names(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "train.jsonl").write_text(row(0) + "{bad\n")
    assert main(["run", "tiny", f"data.name={folder}", *SMALL, "--out", str(tmp_path / "run")]) == 65
    shown = capsys.readouterr().err
    assert "train.jsonl:2" in shown
    assert "\u202e" not in shown
    assert main(["train", "tiny", "sft", f"data.name={folder}", "data.on_bad_row=skip", "--dry-run"]) == 0


def test_a_terminal_that_knows_only_ascii(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, TextIOWrapper(BytesIO(), encoding="ascii"))
    assert main(["run", "tiny", "data.name=\u00e9.jsonl"]) == 66
    sys.stderr.seek(0)
    assert "\\xe9.jsonl" in sys.stderr.read()
