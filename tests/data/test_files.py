"""Reading files: the forms and oddities that are accepted, splits by name, folders, what is counted."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from data_helpers import hh_row, write_jsonl

from preftune.data import Turn, read_preferences
from preftune.data import files as files_module
from preftune.data.files import SUFFIXES, find_files, read_files
from preftune.data.splits import split_of
from preftune.errors import DataError, InputMissing, PermissionMissing

GOOD = json.dumps(hh_row("Hi")).encode()
TEXT = "\n\nHuman: Hi\n\nAssistant:"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ROWS: dict[str, dict[str, Any]] = {
    "HH": hh_row("Hi"),
    "TRL, strings": {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
    "TRL, transcript as prompt": {"prompt": TEXT, "chosen": " yes", "rejected": " no"},
    "TRL, messages": {
        "prompt": [user("Hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]
    },
    "TRL, messages, implicit prompt": {
        "chosen": [user("Hi"), assistant("yes")], "rejected": [user("Hi"), assistant("no")]
    },
    "prompt beside whole transcripts": hh_row("Hi") | {"prompt": TEXT},
    "blank prompt beside whole transcripts": hh_row("Hi") | {"prompt": ""},
    "string prompt beside whole conversations": {
        "prompt": "Hi", "chosen": [user("Hi"), assistant("yes")], "rejected": [user("Hi"), assistant("no")]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_every_form_in_every_kind_of_file(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"pairs{suffix}"
    line = json.dumps(ROWS[name]).encode() + b"\n"
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([ROWS[name]]), path)
    else:
        path.write_bytes(gzip.compress(line) if suffix.endswith("gz") else line)
    (pair,) = read_preferences(path)
    assert pair.prompt == (Turn("human", " Hi"),)
    assert (pair.chosen, pair.rejected) == (" yes", " no")


def test_longer_conversations_and_system_messages(tmp_path: Path) -> None:
    start = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("Why?")]
    row = {"prompt": start, "chosen": [assistant("So.")], "rejected": [assistant("No.")]}
    (pair,) = read_preferences(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert [turn.role for turn in pair.prompt] == ["system", "human", "assistant", "human"]
    assert pair.prompt.transcript().startswith("\n\nSystem: Be brief.\n\nHuman: Hi")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "yes", "rejected": "no"}, "no_roles"),
        ({"prompt": " ", "chosen": "yes", "rejected": "no"}, "empty_prompt"),
        ({"prompt": "Hi", "chosen": "", "rejected": "no"}, "empty_response"),
        ({"prompt": "Hi", "chosen": "no ", "rejected": " no"}, "identical"),
        ({"prompt": TEXT + " So", "chosen": "yes", "rejected": "no"}, "prompt_ends_on_assistant"),
        ({"prompt": "Hi", "chosen": "yes", "rejected": "no" + TEXT}, "role_marker_in_response"),
        (
            {"prompt": "Hi", "chosen": "yes", "rejected": "\n\nHuman: Ho" + TEXT + " no"},
            "role_marker_in_response",
        ),
        ({"prompt": [assistant("a")], "chosen": "yes", "rejected": "no"}, "prompt_ends_on_assistant"),
        ({"chosen": [assistant("yes")], "rejected": [assistant("no")]}, "empty_prompt"),
        ({"chosen": [user("Hi")], "rejected": [user("Hi"), assistant("no")]}, "ends_on_human"),
        ({"prompt": [{"role": "tool", "content": "a"}], "chosen": "b", "rejected": "c"}, "unsupported_role"),
    ],
)
def test_unusable_pairs_are_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [hh_row("Hi"), row])
    (tally,) = read_files(path)
    assert (tally.read, len(tally.rows), tally.bad) == (2, 1, 0)
    assert tally.rejected == {reason: 1}


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD + b"\n",
        GOOD + b"\r\n" + GOOD + b"\r\n",
        b"\n" + GOOD + b"\n  \n",
        GOOD,
        json.dumps(hh_row("a\u2028b\x85c\x0bd")).encode(),
        json.dumps(hh_row("a\u2028b\x85"), ensure_ascii=False).encode(),
        json.dumps(hh_row("a\0b")).encode(),
        json.dumps(hh_row("Hi") | {"meta": {"id": 1}, "score": None}).encode(),
    ],
    ids=["BOM", "CRLF", "blank", "no end", "U+2028", "raw U+2028", "NUL", "other columns"],
)
def test_harmless_oddities_are_accepted(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert read_preferences(path)[0].chosen == " yes"


def test_nothing_usable_is_an_error_with_counts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [hh_row("Hi", "same", "same")] * 3)
    with pytest.raises(DataError, match=r"none of the 3 rows .* 3 identical"):
        read_preferences(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write_jsonl(tmp_path / "a.jsonl", [hh_row("Hi")])
    monkeypatch.setitem(files_module.READERS, ".jsonl", refuse)
    with pytest.raises(PermissionMissing, match=r"a\.jsonl: cannot be read"):
        read_preferences(path)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", [hh_row("Hi")])
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionMissing, match="closed: cannot be read"):
        find_files(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl"])
def test_columns_that_are_not_read_are_there_for_reward_functions(tmp_path: Path, suffix: str) -> None:
    """And those of cut replies for all who train: a reply that did not end must not be taught to."""
    row = {
        "chosen": TEXT + " a",
        "rejected": TEXT + " b",
        "solution": "4",
        "level": 2,
        "ended_rejected": False,
    }
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [row])
    else:
        table = pa.Table.from_pylist([row])
        table = table.append_column("made", pa.array([1], pa.timestamp("ns")))  # Python has no nanoseconds
        write = parquet.write_table if suffix == ".parquet" else feather.write_feather
        write(table, path)
    (pair,) = read_preferences(path)
    assert {name: pair.columns[name] for name in ("solution", "level")} == {"solution": "4", "level": 2}
    assert pair.ended == (True, False)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("Test.jsonl.gz", "test"),
        ("validation.parquet", "validation"),
        ("valid.jsonl", "validation"),
        ("val.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("eval.jsonl", "test"),
        ("test-00000-of-00002.parquet", "test"),
        ("validation_1.jsonl", "validation"),
        ("testing.jsonl", "test"),
        ("my-test.jsonl", "test"),
        ("evaluation.jsonl", "test"),
        ("test_prefs.jsonl", "test"),
        ("hh_test.csv", "test"),
        ("test_set.json", "test"),
        ("hh.training.2.arrow", "train"),
        ("testset.jsonl", "train"),
        ("latest.jsonl", "train"),
        ("pairs.jsonl", "train"),
    ],
)
def test_split_by_file_name(name: str, split: str) -> None:
    assert (split_of(Path(name), SUFFIXES) or "train") == split


def test_a_directory_is_read_recursively_and_subfolders_become_sources(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [hh_row("root")])
    write_jsonl(tmp_path / "b/train.jsonl", [hh_row("b")])
    write_jsonl(tmp_path / "a/deep er/test.jsonl", [hh_row("a")])
    write_jsonl(tmp_path / ".hidden/train.jsonl", [hh_row("hidden")])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe.jsonl")
    pairs = read_preferences(tmp_path)
    assert [(pair.prompt[0].text, pair.source, pair.row) for pair in pairs] == [
        (" b", "b", 0), (" root", "", 1), (" a", "a/deep er", 0)
    ]  # fmt: skip


def test_a_data_set_may_be_called_data(tmp_path: Path) -> None:
    """It was passed by, whatever it held."""
    files = [write_jsonl(tmp_path / name, [hh_row("Hi")]) for name in ("data.json", "package.json")]
    assert find_files(tmp_path) == files


def test_what_cannot_be_found_or_opened(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no such file"):
        find_files(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"in this directory\nhint"):
        find_files(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(DataError, match="in this directory; linked: not read"):
        find_files(tmp_path)
    (tmp_path / "a.xlsx").write_text("chosen,rejected")
    with pytest.raises(DataError, match="not a kind of file"):
        find_files(tmp_path / "a.xlsx")
