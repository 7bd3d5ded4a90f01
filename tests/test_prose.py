"""What preftune says is compared in one place, prose.txt; outcomes elsewhere. Read from the sources."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import prose

TESTS = Path(__file__).resolve().parent
FILES = sorted(TESTS.rglob("test_*.py"))
WORD = re.compile(r"[\"'`(\[]*[A-Za-z][A-Za-z'’-]+[\]\"'`),.;:!?]*")  # no number, path, option or markup
SENTENCE = 6  # words
# What an error says is its outcome, wherever it is looked at.
ERROR = re.compile(r"\b(caught|refused|errors?|err|stderr)\b")
# Files whose long strings are not what preftune says.
OTHERS = {
    "data/test_hub.py": "a text of a data set",
    "judges/test_judges.py": "texts that judges score",
    "world/test_world.py": "texts of the built-in world",
    "test_docs.py": "words of pages",
    "test_studies.py": "words of published studies",
}


def names(path: Path, tree: ast.AST) -> Iterator[str]:
    """The sections that a file of tests asks for; a name that is no literal of its own place is shown."""
    place = path.relative_to(TESTS).with_name(path.stem.removeprefix("test_")).as_posix()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "prose.compare":
            name = ast.literal_eval(node.args[0])
            assert name.startswith(f"{place}: "), f"{path.name}:{node.lineno}: {name}, not `{place}: ...`"
            yield name


def sentences(tree: ast.AST) -> Iterator[str]:
    """Asserted strings of six words or more that are no words of an error."""
    asserts = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    for test in asserts:
        parts = [] if ERROR.search(ast.unparse(test)) else [*ast.walk(test)]
        for part in parts:
            text = part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else ""
            if sum(WORD.fullmatch(word) is not None for word in text.split()) >= SENTENCE:
                yield f"{part.lineno}: {text}"


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.AST]:
    others = [path for path in FILES if path != Path(__file__)]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in others}


def test_every_section_is_asked_for_by_one_test(trees: dict[Path, ast.AST]) -> None:
    asked = Counter(name for path, tree in trees.items() for name in names(path, tree))
    assert not [name for name, times in asked.items() if times > 1]
    assert set(prose.read()) == set(asked)  # what nobody asks for is removed by hand


def test_no_test_compares_a_sentence_elsewhere(trees: dict[Path, ast.AST]) -> None:
    """Compare it by `prose.compare`, and assert the outcome: who, which number, which caution."""
    found = {path.relative_to(TESTS).as_posix(): list(sentences(tree)) for path, tree in trees.items()}
    assert not [f"{name}:{line}" for name, lines in found.items() if name not in OTHERS for line in lines]
    assert not [name for name in OTHERS if not found[name]]  # the table holds no more than it must


@pytest.mark.parametrize(
    ("code", "known"),
    [
        ('assert "PPO is better than SFT by gold" in text', True),
        ('assert f"{name} is not shown to be better than {other}" in text', True),
        ('assert [line for line in text if line != "Nothing can be claimed about the quality."]', True),
        ('assert "PPO (+0.40 [0.20, 0.60]) is better" in text', False),
        ('assert "stage.ppo.steps=1; stage.dpo.rows=2 out=a/b c=d e=f" in text', False),
        ('assert "a file of this name is not there" in caught.value.message', False),
        ('said = "PPO is better than SFT by gold"', False),
    ],
)
def test_a_sentence_that_is_compared_is_found(code: str, known: bool) -> None:
    assert bool(list(sentences(ast.parse(code)))) is known


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


@pytest.mark.parametrize("said", [" \n", "## c: d", "2026-11-30T22:17 a", "\x1b[1m"])
def test_what_could_not_be_compared_again_is_refused(tmp_path: Path, said: str) -> None:
    with pytest.raises(AssertionError):
        prose.compare("a: b", said, file=tmp_path / "prose.txt")
    with pytest.raises(AssertionError, match="a name is like"):
        prose.compare("no place", "a", file=tmp_path / "prose.txt")


@pytest.mark.parametrize("call", ['prose.compare(f"a: {x}", "")', 'prose.compare("b: of another file", "")'])
def test_a_name_that_is_no_literal_of_its_file_is_found(call: str) -> None:
    with pytest.raises((ValueError, AssertionError)):
        list(names(TESTS / "test_a.py", ast.parse(call)))
    assert list(names(TESTS / "test_a.py", ast.parse('prose.compare("a: b", x)'))) == ["a: b"]
