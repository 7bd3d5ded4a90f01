"""The table of planted bugs fits today's source and tests; planting them all is `make planted`."""

import ast
from collections.abc import Iterable

import pytest

from planted_bugs import PLANTED, Bug
from planted_run import FAILED, ROOT, broken

NO_CODE = {8, 24, 25}  # docs/correctness.md says what rules these out
NAMES = [f"{bug.number}: {bug.what}" for bug in PLANTED]


def functions(file: str) -> Iterable[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return (node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("bug", PLANTED, ids=NAMES)
def test_a_bug_can_be_planted(bug: Bug) -> None:
    """Its place occurs once, what comes out is Python, and the tests that must fail exist."""
    text = (ROOT / "src/preftune" / bug.file).read_text(encoding="utf-8")
    ast.parse(broken(text, bug))
    for test in bug.red:
        file, name = test.split("::")
        assert name in functions(file)


def test_every_bug_that_code_can_repeat_is_planted() -> None:
    assert {bug.number for bug in PLANTED} == set(range(1, 26)) - NO_CODE
    assert len({(bug.file, bug.source, bug.broken) for bug in PLANTED}) == len(PLANTED)


def test_a_place_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times, not once"):
        broken("", PLANTED[0])


def test_failures_are_read_from_what_pytest_prints() -> None:
    """Whatever their parameters and messages; an error while tests are collected is no failure."""
    printed = (
        "FAILED tests/a.py::test_b[1-x y] - assert 1 == 2\nFAILED tests/a.py::test_c\nERROR tests/d.py\n"
    )
    assert FAILED.findall(printed) == ["tests/a.py::test_b", "tests/a.py::test_c"]
