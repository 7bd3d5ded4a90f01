"""What preftune says is compared in one place, prose.txt; outcomes elsewhere. Read from the sources."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import prose

TESTS = Path(__file__).resolve().parent
FILES = sorted(TESTS.rglob("test_*.py"))


def names(path: Path, tree: ast.AST) -> Iterator[str]:
    """The sections that a file of tests asks for; a name that is no literal of its own place is shown."""
    place = path.relative_to(TESTS).with_name(path.stem.removeprefix("test_")).as_posix()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "prose.compare":
            name = ast.literal_eval(node.args[0])
            assert name.startswith(f"{place}: "), f"{path.name}:{node.lineno}: {name}, not `{place}: ...`"
            yield name


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.AST]:
    others = [path for path in FILES if path != Path(__file__)]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in others}


def test_every_section_is_asked_for_by_one_test(trees: dict[Path, ast.AST]) -> None:
    asked = Counter(name for path, tree in trees.items() for name in names(path, tree))
    assert not [name for name, times in asked.items() if times > 1]
    assert set(prose.read()) == set(asked)


def test_the_file_is_as_it_would_be_written(tmp_path: Path) -> None:
    """Sorted, without trailing spaces, each section under its heading."""
    copy = tmp_path / "prose.txt"
    prose.write(copy, prose.read())
    assert copy.read_text(encoding="utf-8") == prose.FILE.read_text(encoding="utf-8")


def test_other_words_fail_with_their_difference_until_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    file = tmp_path / "prose.txt"
    monkeypatch.setenv("PROSE", "write")
    prose.compare("b: two lines", "one  \ntwo", "## Three", file=file)
    prose.compare("a: first", "said", file=file)
    assert list(prose.read(file).items()) == [("a: first", "said"), ("b: two lines", "one\ntwo\n## Three")]
    monkeypatch.delenv("PROSE")
    prose.compare("b: two lines", "one", "two", "## Three", file=file)
    with pytest.raises(pytest.fail.Exception, match=r"make prose.*\n  one\n- two\n\+ 2\n"):
        prose.compare("b: two lines", "one", "2", "## Three", file=file)
    with pytest.raises(pytest.fail.Exception, match=r"no section `c: new`: PROSE=write"):
        prose.compare("c: new", "said", file=file)


@pytest.mark.parametrize(("name", "said"), [("no place", "a"), ("a: b", " \n"), ("a: b", "## c: d")])
def test_what_could_not_be_read_again_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(AssertionError):
        prose.compare(name, said, file=tmp_path / "prose.txt")


@pytest.mark.parametrize("call", ['prose.compare(f"a: {x}", "")', 'prose.compare("b: of another file", "")'])
def test_a_name_that_is_no_literal_of_its_file_is_found(call: str) -> None:
    with pytest.raises((ValueError, AssertionError)):
        list(names(TESTS / "test_a.py", ast.parse(call)))
    assert list(names(TESTS / "test_a.py", ast.parse('prose.compare("a: b", x)'))) == ["a: b"]
