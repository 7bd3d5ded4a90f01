"""Damaged files and rows: every refusal names file and line, and nothing hostile fills the memory."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_helpers import hh_row
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data import read_preferences, readers
from preftune.data.files import read_files
from preftune.data.rows import Tally
from preftune.errors import DataError, PreftuneError

GOOD = json.dumps(hh_row("Hi")).encode()
TEXT = "\n\nHuman: Hi\n\nAssistant:"


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"hello", "not JSON"),
    "cut off in the middle": (GOOD[:40], "not JSON"),
    "two objects": (GOOD + GOOD, "not JSON"),
    "raw control character": (GOOD.replace(b"Hi", b"\x00"), "not JSON: Invalid control character at column"),
    "a list": (b"[]", "is a list, not an object"),
    "a string": (b'"chosen"', "is text, not an object"),
    "null row": (b"null", "is null, not an object"),
    "no chosen": (b'{"rejected": "a"}', 'no "chosen"'),
    "no rejected": (b'{"chosen": "a"}', 'no "rejected"'),
    "nothing": (b"{}", 'no "chosen"'),
    "null": (b'{"chosen": null, "rejected": "a"}', '"chosen" is null'),
    "null prompt": (b'{"prompt": null, "chosen": "b", "rejected": "a"}', '"prompt" is null'),
    "a number": (b'{"chosen": "a", "rejected": 3}', '"rejected" is a number'),
    "true": (b'{"chosen": true, "rejected": "a"}', '"chosen" is true or false'),
    "an object": (b'{"chosen": {}, "rejected": "a"}', '"chosen" is an object'),
    "no messages": (b'{"chosen": [], "rejected": "a"}', "empty list"),
    "messages without role": (
        b'{"chosen": [{"content": "a"}], "rejected": "a"}',
        'not an object with "role"',
    ),
    "messages of text": (b'{"chosen": ["a"], "rejected": "a"}', 'not an object with "role"'),
    "null content": (
        b'{"chosen": [{"role": "user", "content": null}], "rejected": "a"}',
        "content of message 1",
    ),
    "list as role": (b'{"chosen": [{"role": [], "content": "a"}], "rejected": "a"}', "role of message 1"),
    "NaN": (b'{"chosen": NaN, "rejected": "a"}', "NaN is not JSON"),
    "infinity in another column": (b'{"score": -Infinity, "chosen": "b", "rejected": "a"}', "-Infinity"),
    "key twice": (b'{"chosen": "a", "chosen": "b", "rejected": "c"}', "appears twice"),
    "not UTF-8": (GOOD.replace(b"Hi", b"\xff\xfe"), "not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not UTF-8"),
    "lone surrogate": (b'{"chosen": "a\\ud800", "rejected": "b"}', "surrogate pair at character 2"),
    "too deep": (b'{"chosen": ' + b"[" * 100_000, "nested too deep"),
    "too long a number": (b'{"x": ' + b"1" * 10_000 + b"}", "not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("number", [1, 501])
def test_a_malformed_line_is_named(tmp_path: Path, name: str, number: int) -> None:
    line, message = BAD_LINES[name]
    path = tmp_path / "train.jsonl"
    path.write_bytes((GOOD + b"\n") * (number - 1) + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert caught.value.message.startswith(f"{path}:{number}: ")
    assert message in caught.value.message
    assert len(caught.value.message) < 300 + len(str(path))
    assert "data.on_bad_row=skip" in caught.value.hint


@pytest.mark.parametrize("name", BAD_LINES)
def test_malformed_lines_are_left_out_and_counted_on_request(tmp_path: Path, name: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"\n" + BAD_LINES[name][0] + b"\n" + GOOD + b"\n")
    (tally,) = read_files(path, on_bad_row="skip")
    assert (tally.read, len(tally.rows), tally.bad) == (3, 2, 1)
    assert f"{path}:2: " in tally.bad_examples[0]


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("a.csv", "prompt,chosen,rejected\nQ,a,b\nQ,a\n\nQ,b,c\n", "a.csv:3: 2 values"),
        ("a.json", '[{"prompt": "Q"}, {"prompt": NaN}, {"prompt": "R"}]', "a.json: row 2: NaN is not JSON"),
        (
            "a.json",
            '[{"prompt": "Q"}, {"a": 1, "a": {}}, {"prompt": "R"}]',
            "row 2: the key 'a' appears twice",
        ),
    ],
)
def test_malformed_rows_of_tables_and_arrays_are_too(
    tmp_path: Path, name: str, content: str, bad: str
) -> None:
    (tmp_path / name).write_text(content)
    (tally,) = read_files(tmp_path / name, on_bad_row="skip")
    assert (tally.read, len(tally.rows), tally.bad) == (3, 2, 1)
    assert bad in tally.bad_examples[0]
    with pytest.raises(DataError, match=bad):
        read_files(tmp_path / name)


def test_a_cut_off_last_line_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD[:-5])
    with pytest.raises(DataError, match=r"train.jsonl:2: .*cut off"):
        read_preferences(path)


@pytest.mark.parametrize("data", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_an_empty_file_is_an_error(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") and data else data)
    with pytest.raises(DataError, match="the file is empty") as caught:
        read_preferences(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-12],
        lambda data: data[: len(data) // 2],
        lambda data: data[:3],
        lambda data: data[:-8] + bytes(8),
        lambda data: data[:20] + bytes([data[20] ^ 255]) + data[21:],
        lambda _: GOOD,
        lambda data: data + b"more",
    ],
)
def test_damaged_gzip_names_file_and_line(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "train.jsonl.gz"
    lines = b"".join(json.dumps(hh_row(os.urandom(20).hex())).encode() + b"\n" for _ in range(50))
    path.write_bytes(damage(gzip.compress(lines)))
    with pytest.raises(DataError, match=r"train\.jsonl\.gz:\d+: "):
        read_preferences(path)


@pytest.mark.parametrize("content", [bytes(1 << 20), b"\n" * (1 << 20), GOOD + b"\n" * (1 << 20)])
def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(readers, "PACKED_FLOOR", 10_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"gzip bomb|MiB"):
        read_preferences(path)


def test_blank_lines_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_BLANK", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" * 1002)
    with pytest.raises(DataError, match=r"a\.jsonl:1002: more than 1,000 blank lines"):
        read_preferences(path)
    path.write_bytes(b"\n" * 1000 + GOOD)
    assert len(read_preferences(path)) == 1


def test_a_parquet_file_that_repeats_one_value_is_refused_in_little_memory(tmp_path: Path) -> None:
    path, text = tmp_path / "a.parquet", "x" * (1 << 20)
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array([text]))
    parquet.write_table(pa.table({"chosen": rows, "rejected": rows}), path)
    assert path.stat().st_size < 1 << 20
    allocated = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=r"a\.parquet: row \d+: \d+ bytes unpack to more than") as caught:
        read_preferences(path)
    assert "unpack" in caught.value.hint
    assert pa.total_allocated_bytes() - allocated < 100 << 20


def test_a_gzip_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match="MiB"):
        read_preferences(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, unpack = [0], gzip.GzipFile.readinto

    def counted(self: gzip.GzipFile, room: memoryview) -> int:
        read[0] += (count := unpack(self, room))
        return count

    monkeypatch.setattr(gzip.GzipFile, "readinto", counted, raising=False)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b"a" * (1 << 20))
    with pytest.raises(DataError, match=r":1: a line of more than 8 MiB"):
        read_preferences(path)
    assert 8 << 20 < read[0] < 10 << 20  # of 40 MiB


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_that_is_too_long_is_left_out_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", limit := 1000)
    monkeypatch.setattr(readers.lines, "__defaults__", (limit, *readers.lines.__defaults__[1:]))
    path = tmp_path / f"a{suffix}"
    for length in (limit + 1, 3 * limit, 3 * limit + 2):
        content = GOOD + b"\n" + b"a" * length + b"\n" + GOOD + b"\n" + b"a" * length
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
        (tally,) = read_files(path, on_bad_row="skip")
        assert (tally.read, len(tally.rows), tally.bad) == (4, 2, 2)
        assert "a line of more than" in tally.bad_examples[0]
    with pytest.raises(DataError, match=r":2: a line of more than"):
        read_files(path)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", GOOD])
def test_damaged_parquet(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: "):
        read_preferences(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"chosen": [TEXT + " a"]}, 'no "rejected" in this row'),
        ({"words": ["a"]}, 'no column "chosen" (it has: words)'),
        ({"text": ["a"]}, "its rows are texts for continuation"),
        ({"chosen": [TEXT + " a", None], "rejected": [TEXT + " b", "c"]}, 'row 2: "chosen" is null'),
        ({"chosen": [1], "rejected": ["c"]}, 'row 1: "chosen" is a number'),
        ({"chosen": [b"a"], "rejected": ["c"]}, 'row 1: "chosen" is bytes'),
    ],
)
def test_parquet_rows_are_checked_like_lines(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(table), path)
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def attempt(tmp: Path, data: bytes) -> None:
    """Reading either works or ends in one of our errors, whatever the bytes are."""
    for suffix in (".jsonl", ".jsonl.gz", ".parquet"):
        path = tmp / f"fuzz{suffix}"
        path.write_bytes(gzip.compress(data, 1) if suffix.endswith("gz") else data)
        try:
            read_preferences(path)
        except PreftuneError as error:
            assert str(path) in str(error)  # noqa: PT017


fuzz = settings(max_examples=300, derandomize=True, deadline=None)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(TEXT + " a"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
records = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "x"]), values, max_size=4)


@fuzz
@given(
    data=st.binary(max_size=200)
    | st.builds(lambda a, b: GOOD[:a] + b + GOOD[a:], st.integers(0, 99), st.binary(max_size=4))
)
def test_no_bytes_cause_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    attempt(tmp_path_factory.getbasetemp(), data)


@fuzz
@given(record=records)
def test_no_json_causes_a_traceback(record: dict[str, Any]) -> None:
    for mode in ("error", "skip"):
        tally = Tally(name="fuzz", on_bad_row=mode)
        try:
            tally.take(json.dumps(record).encode(), "fuzz:1")
        except DataError as error:
            assert str(error).startswith("fuzz:1: ")  # noqa: PT017
            assert mode == "error"
        else:
            assert len(tally.rows) + tally.rejected.total() + tally.bad == 1
