"""The configurations in a data set's README.md, compared with what `datasets` makes of the same directory."""

from pathlib import Path

import pytest
from data_helpers import hh_row, write_jsonl

import prose
from preftune.config import DataConfig
from preftune.data import load_dataset, read_preferences
from preftune.data.dataset import read_training
from preftune.data.files import local_files
from preftune.errors import ConfigError, DataError

FILES = ("a.jsonl", "b.jsonl", "data/test/one.jsonl", "data/x-train-0.jsonl", "data/deep/er/two.jsonl")
SPLITS = """
- config_name: default
  data_files:
  - split: train
    path: data/test/*.jsonl
  - split: test
    path: [a.jsonl, "data/**/two.jsonl"]
"""
TWO = """
- config_name: one
  data_files: a.jsonl
- config_name: two
  data_files: [b.jsonl, "data/*.jsonl"]
  default: true
"""


def made(root: Path, configs: str, files: tuple[str, ...] = FILES) -> Path:
    for file in files:
        write_jsonl(root / file, [hh_row(f"{file} {i}") for i in range(8)])
    (root / "README.md").write_text(f"---\nlicense: mit\nconfigs:{configs}---\n# Pairs\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("configs", "wanted"),
    [
        (SPLITS, None),
        (TWO, None),
        (TWO, "one"),
        ("\n- config_name: only\n  data_files: '*.jsonl'\n", None),
        (TWO + "- config_name: three\n  data_dir: data/test\n  data_files: one.jsonl\n", "three"),
        ("\n- config_name: only\n  data_files: ./data/**\n", None),
    ],
)
@pytest.mark.xdist_group("datasets")  # one worker imports it
def test_files_and_splits_are_those_of_the_library(tmp_path: Path, configs: str, wanted: str | None) -> None:
    from datasets import load_dataset_builder

    root = made(tmp_path / "set", configs)
    found = load_dataset_builder(str(root), name=wanted, cache_dir=str(tmp_path / "cache")).config.data_files
    assert found is not None
    theirs = {str(Path(file)): str(split) for split, files in found.items() for file in files}
    assert {str(path): split for path, split in local_files(root, wanted).files} == theirs


def test_a_folder_alone_is_read_by_the_names_in_it(tmp_path: Path) -> None:
    configs = "\n- config_name: only\n  data_dir: sub\n"
    root = made(tmp_path, configs, ("train.jsonl", "sub/train.jsonl", "sub/test.jsonl"))
    assert local_files(root).files == [(root / "sub/test.jsonl", "test"), (root / "sub/train.jsonl", "train")]


def test_splits_for_other_purposes_are_told_by_the_readme(tmp_path: Path) -> None:
    items = "".join(
        f"\n  - {{split: train_{n}, path: {f}}}" for n, f in (("sft", "a.jsonl"), ("prefs", "b.jsonl"))
    )
    root = made(tmp_path, f"\n- config_name: default\n  data_files:{items}\n")
    chosen = local_files(root)
    assert chosen.files == [(root / "b.jsonl", "train")]
    assert "another purpose" in chosen.notes[0]


def test_the_rows_of_a_named_configuration_are_read(tmp_path: Path) -> None:
    root = made(tmp_path, TWO)
    data = load_dataset(DataConfig(name=str(root), config="one"))
    assert {Path(file["path"]).name for file in data.report["files"]} == {"a.jsonl"}


def test_a_configuration_of_a_single_file_is_said_to_have_no_use(tmp_path: Path) -> None:
    """It is not refused: runs were begun with one."""
    made(tmp_path, TWO)
    (note,) = local_files(tmp_path / "a.jsonl", "one").notes
    assert "data.config = one " in note
    prose.compare("data/readme: a configuration of a single file", note.replace(str(tmp_path), "DIR"))
    assert not local_files(tmp_path / "a.jsonl").notes


def test_data_besides_the_run_s_have_its_columns_and_configuration_where_they_are_there(
    tmp_path: Path,
) -> None:
    """And their own where not."""
    rows = [{"ask": f"Q{i}", "good": "a", "bad": "b"} for i in range(3)]
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    settings = DataConfig.model_validate({"name": "elsewhere", "columns": columns, "config": "one"})
    theirs, ours = tmp_path / "theirs", made(tmp_path / "ours", TWO)
    write_jsonl(theirs / "a.jsonl", rows)
    for path, question, count in ((theirs, " Q0", 3), (ours, " a.jsonl 0", 8)):
        read = read_training(settings.model_copy(update={"name": str(path)}), set())
        assert read.train[0].prompt[0].text == question
        pairs = read_preferences(path, "error", columns, "one")
        assert pairs[0].prompt[0].text == question
        assert len(pairs) == count
    write_jsonl(tmp_path / "text.jsonl", [hh_row("Q") | {"text": "x"}])
    assert read_preferences(tmp_path / "text.jsonl", "error", {"text": "story"})[0].chosen == " yes"
    write_jsonl(theirs / "a.jsonl", [{"ask": "Q"}])
    with pytest.raises(DataError) as caught:
        read_preferences(theirs, "error", {"prompt": "question"})
    assert "rename the columns in the file" in caught.value.hint
    assert "data.columns.chosen=NAME" not in caught.value.hint
    with pytest.raises(ConfigError) as refused:
        read_preferences(made(tmp_path / "set", TWO.replace("  default: true\n", "")))
    assert refused.value.hint == "name the file that is meant"


def test_what_the_readme_declares_needs_no_name_that_says_a_split(tmp_path: Path) -> None:
    """Nor does it harm: the names of folders are sources, where they say no split."""
    items = "".join(f"\n  - {{split: {n}, path: {n}_eval/a.jsonl}}" for n in ("train", "test"))
    configs = f"\n- config_name: default\n  data_files:{items}\n"
    root = made(tmp_path, configs, ("train_eval/a.jsonl", "test_eval/a.jsonl"))
    data = load_dataset(DataConfig(name=str(root)))
    assert {row.source for row in data.train} == {"train_eval"}
    assert {row.source for row in data.test} == {""}


@pytest.mark.parametrize(
    ("configs", "wanted", "message"),
    [
        (TWO.replace("  default: true\n", ""), None, "several configurations: 'one', 'two'"),
        (TWO, "three", "data.config = three, and README.md declares 'one', 'two'"),
        (" []\n", "three", "no README.md declares configurations"),
        (SPLITS.replace("a.jsonl", "c.jsonl"), None, "no file that can be read here is meant by 'c.jsonl'"),
        (SPLITS.replace("a.jsonl", "data/test/one.jsonl"), None, "'data/test/one.jsonl' is in two splits"),
        ("\n- config_name: [\n", None, "its head is not YAML"),
        (" 3\n", None, "configs is a number, not a list"),
        ("\n- 3\n", None, "has no config_name"),
        ("\n- {config_name: a, data_files: 3}\n", None, "a path in data_files is no text"),
        ("\n- {config_name: a, data_files: [{path: a.jsonl}]}\n", None, "names no split"),
        ("\n- {config_name: a, data_files: '**.jsonl'}\n", None, "'**.jsonl' is no pattern of paths"),
        ("\n- {config_name: a, data_dir: 3}\n", None, "data_dir is a number"),
    ],
)
def test_what_is_wrong_with_a_readme_is_said(
    tmp_path: Path, configs: str, wanted: str | None, message: str
) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        local_files(made(tmp_path, configs), wanted)
    assert message in caught.value.message
