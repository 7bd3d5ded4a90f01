"""Splits by prompt hash, and the account of every row that goes to data.json."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import hh_row, write_jsonl

from preftune.config import DataConfig
from preftune.data import Dataset, load_dataset, prompt_hash
from preftune.errors import DataError, InputMissing


def load(path: Path, **settings: Any) -> Dataset:
    return load_dataset(DataConfig(name=str(path), **settings))


def split_of(data: Dataset) -> dict[str, str]:
    """The split of each prompt; fails if a prompt is in two."""
    homes: dict[str, str] = {}
    for name in ("train", "validation", "test"):
        for pair in getattr(data, name):
            assert homes.setdefault(pair.prompt.transcript(), name) == name
    return homes


def test_files_named_after_splits_are_kept_as_they_are(tmp_path: Path) -> None:
    for n, name in enumerate(("train", "dev", "test"), 1):
        write_jsonl(tmp_path / f"sub/{name}.jsonl", [hh_row(f"{name} {i}") for i in range(n)])
    data = load(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (1, 2, 3)
    assert data.report["cut_from_train"] == []
    assert [pair.row for pair in data.test] == [0, 1, 2]
    assert {pair.source for pair in data.test} == {"sub"}


def test_missing_splits_are_cut_by_prompt_and_equal_prompts_stay_together(tmp_path: Path) -> None:
    rows = [hh_row(f"question {i % 400}", f"yes {i}") for i in range(800)]
    data = load(write_jsonl(tmp_path / "pairs.jsonl", rows), held_out=0.1)
    assert len(split_of(data)) == 400
    assert 50 < len(data.validation) < 110
    assert 50 < len(data.test) < 110
    assert len(data.train) + len(data.validation) + len(data.test) == 800
    for part in (data.train, data.validation, data.test):
        assert [pair.row for pair in part] == list(range(len(part)))
    assert data.report["cut_from_train"] == ["test", "validation"]
    assert set(data.report["prompt_overlap"].values()) == {0}
    assert data.report["splits"] == {
        "train": len(data.train), "validation": len(data.validation), "test": len(data.test)
    }  # fmt: skip


def test_a_prompt_stays_in_its_split_when_rows_are_added_or_shuffled(tmp_path: Path) -> None:
    rows = [hh_row(f"question {i}") for i in range(300)]
    few = split_of(load(write_jsonl(tmp_path / "a.jsonl", rows[:200])))
    many = split_of(load(write_jsonl(tmp_path / "b.jsonl", rows[::-1])))
    assert few.items() <= many.items()
    # Given a validation file, the test split is cut where it was.
    write_jsonl(tmp_path / "c/train.jsonl", rows)
    write_jsonl(tmp_path / "c/validation.jsonl", [hh_row("other")])
    one = split_of(load(tmp_path / "c"))
    assert {p for p, name in one.items() if name == "test"} == {p for p, n in many.items() if n == "test"}


@pytest.mark.parametrize(("prompts", "sizes"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1))])
def test_train_is_never_emptied(tmp_path: Path, prompts: int, sizes: tuple[int, ...]) -> None:
    rows = [hh_row(f"question {i}") for i in range(prompts)]
    data = load(write_jsonl(tmp_path / "a.jsonl", rows), held_out=0.4)
    assert len(data.train) >= 1
    small = load(tmp_path / "a.jsonl", held_out=1e-9)
    assert (len(small.train), len(small.validation), len(small.test)) == sizes


def test_a_few_prompts_give_a_test_split_too(tmp_path: Path) -> None:
    """No hash lies in its share, and the one that is taken instead lies in that of validation."""
    data = load(write_jsonl(tmp_path / "a.jsonl", [hh_row(f"question {i}") for i in range(3)]), held_out=0.12)
    assert data.report["cut_from_train"] == ["test", "validation"]


def test_a_test_file_alone_is_split_but_a_directory_without_train_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "test.jsonl", [hh_row(str(i)) for i in range(5)])
    assert load(path).train
    with pytest.raises(DataError, match="no training pairs, only 5 of test"):
        load(tmp_path)


def test_the_report_accounts_for_every_row(tmp_path: Path) -> None:
    rows = [
        hh_row("a"),
        hh_row("a"),
        hh_row("a", "no", "yes"),
        hh_row("b", "same", "same"),
        {"chosen": 1, "rejected": ""},
    ]
    train = write_jsonl(tmp_path / "helpful/train.jsonl", rows)
    write_jsonl(tmp_path / "harmless/validation.jsonl", [hh_row("a") | {"score": 1}])
    data = load(tmp_path, on_bad_row="skip")
    report = data.report
    assert json.loads(json.dumps(report)) == report
    assert report["rows_read"] == 6
    assert report["rows_kept"] == 4 == sum(report["splits"].values())
    assert report["rejected"] == {"identical": 1}
    assert report["reasons"].keys() == {"identical"}
    assert "the same text" in report["reasons"]["identical"]
    assert report["rows_skipped"] == 1
    assert report["skipped_examples"] == [f'{train}:5: "chosen" is a number, not text']
    assert report["ignored_columns"] == ["score"]
    assert report["files"][1]["sha256"] == hashlib.sha256(train.read_bytes()).hexdigest()
    assert report["files"][1]["bytes"] == train.stat().st_size
    assert report["duplicates"] == 2
    assert report["swapped"] == 1
    assert report["words"]["train"]["prompt"] == [3, 3, 3]  # "Human: a", "Assistant:"; median, 95 %, longest
    assert report["prompt_overlap"]["train/validation"] == 1
    assert report["sources"]["train"] == {"helpful": 3}
    assert data.train[0].source == "helpful"


def test_prompts_are_no_pairs_that_contradict_each_other(tmp_path: Path) -> None:
    assert (
        load(write_jsonl(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(9)])).report["swapped"] == 0
    )


def test_contents_are_hashed_without_regard_to_packing(tmp_path: Path) -> None:
    rows = [hh_row(str(i)) for i in range(30)]
    one = load(write_jsonl(tmp_path / "a.jsonl", rows)).report["content_sha256"]
    write_jsonl(tmp_path / "b/1.jsonl", rows[:10])
    write_jsonl(tmp_path / "b/2.jsonl", rows[10:])
    assert load(tmp_path / "b").report["content_sha256"] == one


def test_replies_that_did_not_end_are_in_the_hash_and_where_all_ended_it_is_that_of_before(
    tmp_path: Path,
) -> None:
    def hashed(name: str, **columns: Any) -> str:
        rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", **columns}]
        return load(write_jsonl(tmp_path / name / "train.jsonl", rows)).report["content_sha256"]["train"]

    texts = ["\n\nHuman: Q\n\nAssistant:", " a", " b"]
    before = b"".join(len(text).to_bytes(8, "big") + text.encode() for text in texts)
    plain = hashed("plain")
    assert plain == hashlib.sha256(before).hexdigest()
    assert plain == hashed("ended", ended_chosen=True, ended_rejected="true")
    cut = [hashed("a", ended_rejected=False), hashed("b", ended_chosen=False)]
    cut.append(hashed("c", ended_chosen=False, ended_rejected=False))
    assert len({plain, *cut}) == 4


def test_data_dir_names_a_subdirectory(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a/train.jsonl", [hh_row("a")])
    write_jsonl(tmp_path / "b/train.jsonl", [hh_row("b")])
    assert [pair.prompt[0].text for pair in load(tmp_path, data_dir="b").train] == [" b"]
    with pytest.raises(InputMissing):
        load(tmp_path, data_dir="c")


def test_missing_paths() -> None:
    for name in ("./none", "/none/at/all", "~/none", "none.jsonl", "a/b/c"):
        with pytest.raises(InputMissing, match="no such file or directory") as missing:
            load_dataset(DataConfig(name=name))
        assert "quickstart" in missing.value.hint


def test_real_rows(hh_directory: Path) -> None:
    data = load(hh_directory)
    report = data.report
    assert (report["rows_read"], report["rows_kept"]) == (14456, 14379)
    assert report["rejected"] == {
        "diverges_early": 31, "empty_response": 17, "ends_on_human": 1, "identical": 28
    }  # fmt: skip
    assert (len(data.train), len(data.validation), len(data.test)) == (12611, 1120, 648)
    assert report["cut_from_train"] == ["test"]
    assert set(report["prompt_overlap"].values()) == {0}
    assert len(report["sources"]["train"]) == 5
    # The replaced pipeline read a column that HH does not have, and trained on one constant prompt.
    assert all(pair.prompt.transcript().startswith("\n\nHuman:") for pair in data.train)
    assert (
        len({prompt_hash(pair.prompt) for pair in data.train}) == report["distinct_prompts"]["train"] == 12571
    )
