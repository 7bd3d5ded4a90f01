"""Every command that README and docs show: `make test` parses it and runs one of each kind;
`make docs-check` runs them all, made small (`documented.small`).
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from documented import ROOT, TRAINING, Command, commands, filled, python_blocks, small
from preftune import cli
from preftune.config import load_recipe
from preftune.errors import DataError
from preftune.rundir import RunDir, write_jsonl

ALL = os.environ.get("PREFTUNE_DOCS") == "all"
COMMANDS = commands()
OURS = [command for command in COMMANDS if command.verb]
RUNNABLE = [command for command in OURS if not command.bare and "RECIPE" not in command.text]
# Kinds whose own tests run them: too slow to run here as well.
ELSEWHERE = {
    "train": "tests/runs",
    "run": "tests/runs",
    "study": "tests/study",
    "verify-resume": "tests/faults",
    "selftest": "tests/test_selftest.py",
    "label": "tests/label",  # it serves a page until it is stopped
    "chat": "tests/chat",  # it waits for what is typed
    "export": "tests/export",  # it needs a converter, and the hub
}
BRIEF = "def brief(prompt, response, **columns):\n    return -len(response) / 100\n"


def first_of_each_kind() -> list[Command]:
    found: dict[str, Command] = {}
    for command in RUNNABLE:
        found.setdefault(command.verb, command)
    return [command for verb, command in found.items() if verb not in ELSEWHERE]


@pytest.fixture
def places(tmp_path: Path, tiny_run: RunDir, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What stands for the placeholders, in a directory with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"What is {i} and {i}?", "chosen": f"It is {2 * i}.", "rejected": f"{i} it may be."}
        for i in range(60)
    ]
    named = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in rows]
    nested = [{"ask": r["prompt"], "answers.good": r["chosen"], "answers.bad": r["rejected"]} for r in rows]
    for name, content in (("pairs", rows), ("new_pairs", rows), ("named", named), ("mine", nested)):
        write_jsonl(tmp_path / f"{name}.jsonl", content)
    (tmp_path / "rewards.py").write_text(BRIEF)
    shutil.copyfile(ROOT / "src" / "preftune" / "recipes" / "tiny.toml", tmp_path / "mine.toml")
    for run in ("runs/mine200", "runs/first", "runs/second"):
        shutil.copytree(tiny_run.path, tmp_path / run)
    return {
        "PATH": "pairs.jsonl",
        "FILE": "pairs.jsonl",
        "RUN": "runs/first",
        "RUN_A": "runs/first",
        "RUN_B": "runs/second",
        "DIR": "out",
        "RECIPE": "tiny",
        "STAGE": "sft",
        "my_module:my_function": "rewards:brief",
        "/content/drive/MyDrive/preftune": "mirror",
    }


@cache
def verbs() -> dict[str, Any]:
    return typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", OURS, ids=str)
def test_the_command_line_understands_it(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    words = filled(command.words[1:], {"RECIPE": "tiny", "STAGE": "sft", "KEY=VALUE": "seed=1"})
    words = [word for word in words if word != "--debug"]
    if words[0].startswith("-"):
        assert cli.main(words) == 0
        return
    assert words[0] in verbs()
    if command.bare:
        return
    verbs()[words[0]].make_context(words[0], list(words[1:]))  # raises for an option or argument too many
    if {"--from", "--redo"} & set(words):  # these look for a run
        load_recipe(words[1], changes(words))
    elif words[0] in TRAINING and words[1] != "mine.toml":
        assert cli.main([*words, "--dry-run"]) == 0, capsys.readouterr().err
    if words[0] == "study":
        load_recipe(words[1], changes(words))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "make"], ids=str)
def test_the_target_is_in_the_makefile(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{word}:", makefile, re.M) for word in command.words[1:] if "=" not in word)


def changes(words: list[str]) -> list[str]:
    """The settings in a command line; not where it goes, the values of a sweep, or what a task is given."""
    return [
        word
        for before, word in itertools.pairwise(words[1:])
        if "=" in word and not word.startswith("out=") and "," not in word and before != "--resource"
    ]


def shrunk(words: list[str], model: str) -> list[str]:
    """The command line without preftune's name, with settings and options behind it that make it small."""
    if words[0] not in (*TRAINING, "plan", "study", "verify-resume"):
        return words
    less = small(
        words[1], changes(words), "named.jsonl" if "question" in " ".join(words) else "pairs.jsonl", model
    )
    if words[0] == "study":
        less += ["--seeds", "1", "--jobs", "1", "--pairs", "8", "--replies", "1", "--tokens", "0"]
        less += ["--no-reports"]
    if words[0] == "verify-resume":
        less += ["--kills", "1"]
    if words[0] in TRAINING and "mine.csv" in " ".join(words):
        less[-1:] = [less[-1], "data.name=mine.jsonl"]
    return [*words, *less]


WHOLE = [command for command in RUNNABLE if command.verb not in ("label", "chat", "export")]


@pytest.mark.parametrize("command", WHOLE if ALL else first_of_each_kind(), ids=str)
def test_it_runs(command: Command, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """`audit` ends with 65 where it finds a model not usable, as some of a run as small as this are."""
    words = filled(command.words[1:], places)
    if command.verb == "audit" and words[1] == "out":
        words[1] = "runs/first/models/reward_model"
    if command.verb in TRAINING:
        shutil.rmtree("runs/mine200")  # this command makes it
    model = str(Path("runs/first/models/policy_sft").resolve())
    code = cli.main(shrunk(words, model))
    assert code == 0 or (code, command.verb) == (DataError.code, "audit"), capsys.readouterr().err


@pytest.mark.skipif(not ALL, reason="make docs-check: minutes")
@pytest.mark.parametrize(("page", "text"), python_blocks(), ids=lambda value: value.partition("\n")[0])
def test_the_python_runs(page: str, text: str, places: dict[str, str]) -> None:
    if "google.colab" in text:
        pytest.skip("needs Colab")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_the_kinds_that_do_not_run_here_run_elsewhere() -> None:
    assert all((ROOT / place).exists() for place in ELSEWHERE.values())
    assert {command.verb for command in RUNNABLE} <= {*ELSEWHERE, *(c.verb for c in first_of_each_kind())}
