"""Splits by names, as `datasets` reads them; whatever is passed by is said."""

from pathlib import Path

import pytest
from data_helpers import hh_row, write_jsonl

import prose
from preftune.config import DataConfig
from preftune.data import Dataset, load_dataset
from preftune.data.splits import KEYWORDS
from preftune.errors import DataError


def load(folder: Path, *names: str) -> Dataset:
    """A directory of files of one row each, whose question is the file's name."""
    for name in names:
        write_jsonl(folder / name, [hh_row(name)])
    return load_dataset(DataConfig(name=str(folder), held_out=1e-9))


def names(data: Dataset, split: str) -> set[str]:
    return {pair.prompt[0].text.strip() for pair in getattr(data, split)}


@pytest.mark.xdist_group("datasets")  # one worker imports it
def test_the_words_are_those_of_the_library() -> None:
    from datasets.data_files import DEFAULT_SPLITS, SPLIT_KEYWORDS

    assert {str(split): tuple(SPLIT_KEYWORDS[split]) for split in DEFAULT_SPLITS} == KEYWORDS


@pytest.mark.parametrize(
    ("train", "held", "split"),
    [
        ("train_prefs.jsonl", "test_prefs.jsonl", "test"),
        ("hh_train.jsonl", "hh_test.jsonl", "test"),
        ("train.jsonl", "test_set.jsonl", "test"),
        ("train/part-0.jsonl", "test/part-0.jsonl", "test"),
        ("data/train-0.jsonl", "data/dev (1).jsonl", "validation"),
        ("a.jsonl", "a.eval.jsonl", "test"),
        ("x/training/1.jsonl", "x/my-valid-rows/2.jsonl", "validation"),
    ],
)
def test_held_out_rows_are_not_trained_on(tmp_path: Path, train: str, held: str, split: str) -> None:
    data = load(tmp_path, train, held)
    assert names(data, "train") == {train}
    assert names(data, split) == {held}


def test_files_without_a_split_are_passed_by_where_others_are_named_train(tmp_path: Path) -> None:
    data = load(tmp_path, "train.jsonl", "test.jsonl", "testset.jsonl", "other/pairs.jsonl")
    assert names(data, "train") == {"train.jsonl"}
    assert "other/pairs.jsonl, testset.jsonl: not read" in data.report["notes"][0]
    prose.compare("data/splits: files without a split", *data.report["notes"])


def test_a_name_that_looks_like_a_split_is_said(tmp_path: Path) -> None:
    data = load(tmp_path, "pairs.jsonl", "mytest.jsonl")
    assert [file["split"] for file in data.report["files"]] == ["train", "train"]
    assert "mytest.jsonl: read as train" in data.report["notes"][0]
    prose.compare("data/splits: a name that looks like a split", *data.report["notes"])


def test_what_may_hold_rows_and_is_not_read_is_said(tmp_path: Path) -> None:
    data = tmp_path / "set"
    for name in ("more.jsonl.zst", "sub/more.csv.xz", "all.zip", "notes.txt", ".hidden.zip"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"x")
    (tmp_path / "other").mkdir()
    (data / "linked").symlink_to(tmp_path / "other", target_is_directory=True)
    (note,) = load(data, "train.jsonl").report["notes"]
    assert note.startswith("all.zip, linked, more.jsonl.zst, sub/more.csv.xz: not read: ")
    prose.compare("data/splits: what may hold rows and is not read", note)


@pytest.mark.parametrize("name", ["test/train.jsonl", "train_test.jsonl"])
def test_a_path_that_says_two_splits_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: file and folder names say test and train"):
        load(tmp_path, "train.jsonl", name)


def test_no_row_is_trained_on_for_three_purposes(tmp_path: Path) -> None:
    files = [
        f"data/{split}_{what}-00000-of-00001.jsonl"
        for split in ("train", "test")
        for what in ("gen", "prefs", "sft")
    ]
    data = load(tmp_path, *files)
    assert (names(data, "train"), names(data, "test")) == ({files[1]}, {files[4]})
    assert any(files[0] in note and "another purpose" in note for note in data.report["notes"])
    alone = load(tmp_path / "alone", "train_sft.jsonl")
    assert names(alone, "train") == {"train_sft.jsonl"}


def test_the_red_team_folder_of_hh_is_passed_by(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "red-team-attempts/red_team_attempts.jsonl", [{"transcript": "x"}])
    data = load(tmp_path, "helpful-base/pairs.jsonl")
    assert names(data, "train") == {"helpful-base/pairs.jsonl"}
    (note,) = data.report["notes"]
    assert note.startswith("red-team-attempts: not read: ")
    prose.compare("data/splits: the red-team folder", note)


def test_the_column_split_says_more_than_the_file(tmp_path: Path) -> None:
    rows = [hh_row(f"{split}{i}") | {"split": split} for i in range(3) for split in ("train", "validation")]
    data = load_dataset(DataConfig(name=str(write_jsonl(tmp_path / "a.jsonl", rows)), held_out=1e-9))
    assert names(data, "validation") == {"validation0", "validation1", "validation2"}
    assert any(note.startswith("rows of the split") and note.endswith(": 3") for note in data.report["notes"])
