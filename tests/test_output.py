"""What a command prints, where nobody reads it, nothing can be written, or the streams are closed."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE
from preftune import exits
from preftune.cli import main
from preftune.runs.console import Console

ROOT = Path(__file__).resolve().parent.parent


def test_reader_that_goes_away_is_no_failure() -> None:
    command = f"{sys.executable} -m preftune options | head -n 1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.split("\n")[1] == "0"


CLOSED = "preftune.exits.open_streams(); print('heard'); open('{file}', 'w').write('of the file')"


def test_a_closed_stream_goes_nowhere_and_not_into_the_next_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    words = [sys.executable, "-c", f"import preftune.exits; {CLOSED.format(file=file)}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        ["bash", "-c", '"$@" <&- >&- 2>&-', "", *words], env=environment, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0
    assert file.read_text() == "of the file"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("words", ["options", "--help", "", "run nonesuch"])
def test_output_that_cannot_be_written_is_74_and_an_error_keeps_its_own(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(exits, "forget_output", lambda number=1: os.dup2(nowhere.fileno(), full.fileno()))
        with open(os.devnull, "w") as nowhere:
            assert main(words.split()) == (64 if "nonesuch" in words else 74)
    assert "internal" not in capsys.readouterr().err


def test_an_error_that_nobody_can_read_keeps_its_code() -> None:
    command = f"{sys.executable} -m preftune run nonesuch 2>/dev/full"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(["bash", "-c", command], env=environment, timeout=PATIENCE, check=False)
    assert done.returncode == 64


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_a_run_goes_on_when_its_output_is_lost(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(io.StringIO):
        def flush(self) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Lost())
    console = Console(log=tmp_path / "log")
    console.line("first")
    console.table(["a"], [["b"]])
    console.line("last")
    assert (tmp_path / "log").read_text().count("\n") == 2
    with pytest.raises((OSError, SystemExit)):  # of a comparison, what is printed is the result
        Console().line("first")
