"""The judge that is fitted to authors' own labels."""

import gzip
import json
from pathlib import Path

import pytest

from preftune.errors import DataError, InputMissing
from preftune.judges import reviews

pytest.importorskip("sklearn", reason="scikit-learn (extra judges) is not installed")
GOOD, BAD = ("a wonderful film", "wonderful and moving"), ("a dull film", "dull and far too long")


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_it_learns_from_labels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": text, "label": "pos"} for text in GOOD] + [{"text": text, "label": 0} for text in BAD]
    write(tmp_path / "train.jsonl.gz", rows)
    monkeypatch.setenv(reviews.VARIABLE, str(tmp_path))
    assert reviews.liked("ignored", "wonderful") > 0.5 > reviews.liked("ignored", "dull")
    assert reviews.liked("", "never seen") == pytest.approx(0.5, abs=0.1)


def test_a_row_without_a_label_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "r.jsonl.gz", [{"text": "x", "label": 1}, {"text": "y", "label": "good"}])
    with pytest.raises(DataError, match=r"r\.jsonl\.gz, line 2: no labelled review"):
        list(reviews.labelled(file))


def test_marks_and_blank_lines_of_editors_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "x", "label": "pos"}\n\n{"text": "y", "label": "neg"}\n \n')
    assert list(reviews.labelled(file)) == [("x", 1), ("y", 0)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"text": "caf\xe9", "label": 1}', "is not UTF-8"),
        ("r.jsonl.gz", b"plain", "gzip data is damaged"),
        ("r.jsonl.gz", gzip.compress(b'{"text": "x", "label": 1}')[:-9], "gzip data is damaged"),
        ("r.jsonl", b'{"text": 3, "label": 1}', "line 1: no labelled review"),
        ("r.jsonl", b'{"text": "x", "label": 1}', "1 reviews do not have both labels"),
        ("r.jsonl", b"", "0 reviews do not have both labels"),
    ],
    ids=["Latin-1", "no gzip", "cut off", "a number", "one label", "nothing"],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv(reviews.VARIABLE, str(tmp_path / name))
    with pytest.raises(DataError, match=message) as caught:
        reviews.liked("", "x")
    assert str(tmp_path / name) in caught.value.message


@pytest.mark.parametrize("place", ["", "nowhere"])
def test_without_reviews_it_says_what_to_set(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(reviews.VARIABLE, place)
    with pytest.raises(InputMissing, match=reviews.VARIABLE):
        reviews.liked("", "x")
