"""Input that cannot be used ends in an error for people before anything is trained."""

import json
from pathlib import Path

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


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", f"data.name={tmp_path / 'none.jsonl'}", *SMALL]) == 66
    assert "quickstart" in capsys.readouterr().err


def test_a_run_directory_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from preftune.pipeline.lock import held
    from preftune.rundir import RunDir

    with held(RunDir(tmp_path / "run")):
        assert main(["train", "tiny", "sft", "--out", str(tmp_path / "run")]) == 73
    assert "is in use by" in capsys.readouterr().err
    assert not (tmp_path / "run" / "stages").exists()
