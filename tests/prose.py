"""What preftune says, in one place: prose.txt, a section for each name.

Outcomes (who is better, which number, which caution) are asserted by the tests; the words around them are
compared here. After rewording, `make prose` writes them anew, and `git diff tests/prose.txt` is what to read.
"""

import difflib
import os
import re
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("prose.txt")
HEADING = re.compile(r"^## ([a-z_/]+: .+)$", re.MULTILINE)  # the test's file, and what it is about
VARIES = re.compile(r"\d{4}-\d\d-\d\dT|pytest-of-|\x1b")  # a time, a path of tmp_path, a colour
START = "What preftune says. `make prose` writes this file (tests/prose.py).\n"
HOW = "PROSE=write python -m pytest FILE (or make prose) writes it"


def compare(name: str, *said: str, file: Path = FILE) -> None:
    """Compare what is said, a thought a line, with the section of this name; with PROSE=write, write it.

    A name is a literal and stands in one test only (tests/test_prose.py). Times, colours and paths of
    tmp_path are replaced by the caller.
    """
    text = "\n".join(line.rstrip() for line in "\n".join(said).splitlines()).strip("\n")
    assert HEADING.fullmatch(f"## {name}"), f"{name}: a name is like `report/claims: a sound run`"
    assert text, f"{name}: nothing is said"
    assert not VARIES.search(text), f"{name}: holds what another run says otherwise: {VARIES.pattern}"
    assert not HEADING.search(text), f"{name}: one of the lines looks like the heading of a section"
    sections = read(file)
    if os.environ.get("PROSE") == "write":
        assert "PYTEST_XDIST_WORKER" not in os.environ, "one process at a time writes prose.txt: without -n"
        write(file, sections | {name: text})
    elif name not in sections:
        pytest.fail(f"{file.name} has no section `{name}`: {HOW}", pytrace=False)
    elif sections[name] != text:
        lines = difflib.ndiff(sections[name].splitlines(), text.splitlines())
        pytest.fail(
            f"{name}: other words than in {file.name}; if they are meant, {HOW}\n" + "\n".join(lines),
            pytrace=False,
        )


def read(file: Path = FILE) -> dict[str, str]:
    """The sections by name."""
    _, *parts = HEADING.split(file.read_text(encoding="utf-8") if file.exists() else "")
    return {name: text.strip("\n") for name, text in zip(parts[::2], parts[1::2], strict=True)}


def write(file: Path, sections: dict[str, str]) -> None:
    parts = [f"## {name}\n{text}\n" for name, text in sorted(sections.items())]
    file.write_text("\n".join([START, *parts]), encoding="utf-8")
