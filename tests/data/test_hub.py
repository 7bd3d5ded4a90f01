"""The hub: commits, files and faults with the real client against a small server on this machine."""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_helpers import hh_row
from huggingface_hub import constants

import prose
from hub_server import Hub, serving
from patience import PATIENCE
from preftune.config import DataConfig, load_recipe
from preftune.data import hub as hub_rows
from preftune.data import load_dataset, snapshot
from preftune.data.snapshot import resolve
from preftune.errors import ConfigError, DataError, InputMissing, PermissionMissing

SCRIPT = """
from preftune.config import DataConfig
from preftune.data import load_dataset
from preftune.errors import InputMissing
try:
    load_dataset(DataConfig(name="Anthropic/hh-rlhf", data_dir="harmless-base"))
except InputMissing as error:
    print(error, error.hint)
"""
NAME = "Anthropic/hh-rlhf"


def packed(rows: list[dict[str, Any]]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def rows(*names: str) -> list[dict[str, Any]]:
    return [hh_row(name) for name in names]


def files(**changes: bytes) -> dict[str, bytes]:
    """Like HH-RLHF: folders, and one file that holds no pairs."""
    content = {
        "README.md": b"pairs",
        "harmless-base/train.jsonl.gz": packed(rows(*(f"q{i}" for i in range(40)))),
        "harmless-base/test.jsonl.gz": packed([hh_row("t"), hh_row("u", "same", "same")]),
        "helpful-base/train.jsonl.gz": packed(rows(*(f"p{i}" for i in range(30)))),
        "red-team-attempts/red_team_attempts.jsonl.gz": packed([{"transcript": "no pair"}]),
    }
    return content | {name.replace("__", "/"): body for name, body in changes.items()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server, and a client that knows no other hub and has an empty cache."""
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(snapshot, "ASK_SECONDS", 1.0)
        found.put(f"datasets/{NAME}", files())
        yield found


def read(data_dir: str | None = None, commit: str | None = None) -> Any:
    return load_dataset(DataConfig(name=NAME, data_dir=data_dir), commit)


def test_hub_rows_become_preferences(hub: Hub) -> None:
    data = read("harmless-base")
    assert len(data.train) + len(data.validation) == 40
    assert [(pair.source, pair.row) for pair in data.test] == [("harmless-base", 0)]
    assert data.report["rejected"] == {"identical": 1}
    assert data.report["commit"] == hub.repositories[f"datasets/{NAME}"][-1][0]
    assert data.report["files"][0]["path"] == f"{NAME}/harmless-base/test.jsonl.gz"
    assert not [request for request in hub.requests if "helpful" in request or "red" in request]


def test_a_file_that_is_no_split_is_not_read_where_others_are(hub: Hub) -> None:
    data = read()
    assert len(data.train) + len(data.validation) == 70
    assert set(data.report["sources"]["train"]) == {"harmless-base", "helpful-base"}
    assert not [request for request in hub.requests if "red" in request]


def test_a_folder_is_the_root_of_what_is_read(hub: Hub) -> None:
    """Its own name says no split, as little as that of a local one."""
    hub.put(f"datasets/{NAME}", files(**{"test/train.jsonl.gz": packed(rows("q", "r", "s"))}))
    assert [file["split"] for file in read("test").report["files"]] == ["train"]


def test_a_readme_on_the_hub_says_which_files_are_which_split(hub: Hub) -> None:
    """Its names are not those that the files' own would give, and no other file is fetched."""
    splits = "[{split: test, path: helpful-base/*}, {split: train, path: h*/test*}]"
    readme = f"---\nconfigs:\n- {{config_name: default, data_files: {splits}}}\n---\n".encode()
    sha = hub.put(f"datasets/{NAME}", files(**{"README.md": readme}))
    data = read()
    assert [(Path(file["path"]).parent.name, file["split"]) for file in data.report["files"]] == [
        ("harmless-base", "train"),
        ("helpful-base", "test"),
    ]
    assert not [request for request in hub.requests if "harmless-base/train" in request]
    hub.requests.clear()
    assert read(commit=sha).report == data.report
    assert hub.requests == []


def test_reviews_as_the_hub_has_them_are_what_the_recipe_sentiment_reads(hub: Hub, tmp_path: Path) -> None:
    """stanfordnlp/imdb: parquet with text and a label of 0 or 1, three splits, one of them without labels."""
    content, splits = dict[str, bytes](), ("train", "test", "unsupervised")
    for split in splits:
        texts = [f"{split} review {i} says in eight words that it liked this film" for i in range(30)]
        labels = [-1 if split == "unsupervised" else i % 2 for i in range(30)]
        file = tmp_path / f"{split}.parquet"
        parquet.write_table(pa.table({"text": texts, "label": pa.array(labels, pa.int64())}), file)
        content[f"plain_text/{split}-00000-of-00001.parquet"] = file.read_bytes()
    paths = "".join(f"  - {{split: {split}, path: plain_text/{split}-*}}\n" for split in splits)
    head = f"---\nconfigs:\n- config_name: plain_text\n  data_files:\n{paths}  default: true\n---\n"
    hub.put("datasets/stanfordnlp/imdb", content | {"README.md": head.encode()})
    data = load_dataset(load_recipe("sentiment", ["data.name=stanfordnlp/imdb"]).config.data)
    assert (len(data.train) + len(data.validation), len(data.test)) == (30, 30)
    assert data.test[3].prompt[0].text == "test review 3 says in eight words that"
    assert data.test[3].chosen == " it liked this film"
    assert not [request for request in hub.requests if "unsupervised" in request]


def test_malformed_hub_rows_are_named(hub: Hub) -> None:
    bad = packed([hh_row("q"), {"chosen": None, "rejected": "a"}])
    hub.put(f"datasets/{NAME}", files(**{"harmless-base__train.jsonl.gz": bad}))
    with pytest.raises(DataError, match=r'harmless-base/train\.jsonl\.gz:2: "chosen" is null'):
        read("harmless-base")


def test_a_recorded_commit_is_read_whatever_the_hub_has_by_then(hub: Hub) -> None:
    first = read("harmless-base").report
    hub.put(f"datasets/{NAME}", files(**{"harmless-base__train.jsonl.gz": packed(rows("x", "y", "z"))}))
    hub.requests.clear()
    again = read("harmless-base", first["commit"]).report
    assert again == first
    assert hub.requests == []  # a known commit in the cache needs no network
    assert read("harmless-base").report["content_sha256"] != first["content_sha256"]


def test_offline_reads_what_was_read_before_and_refuses_what_was_not(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read("harmless-base").report
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert read("harmless-base").report == before
    with pytest.raises(InputMissing, match=r"lacks helpful-base/train\.jsonl\.gz .* HF_HUB_OFFLINE"):
        read()  # half of a data set is none
    assert hub.requests == []


def test_the_variable_that_says_so_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(InputMissing, match="and HF_DATASETS_OFFLINE is set"):
        read()


def test_a_cache_without_a_list_of_all_files_is_said(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program may have fetched a part of the data set."""
    whole = read("harmless-base").report
    assert "notes" not in whole or not any("in the cache" in note for note in whole["notes"])
    folder = snapshot._folder(NAME, "dataset")
    shutil.rmtree(folder / "preftune")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(whole["commit"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    note = next(note for note in read().report["notes"] if "cache" in note)
    assert note.startswith(f"{NAME}: only the 2 files")
    prose.compare("data/hub: a cache without a list of all files", note)
    assert note in capsys.readouterr().err


def test_a_configuration_has_no_use_with_a_folder(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in (NAME, str(tmp_path)):
        with pytest.raises(ConfigError, match=r"with data_dir, the README\.md .* is not read"):
            load_dataset(DataConfig(name=name, data_dir="sub", config="one"))


def test_a_mistyped_path_is_told_as_one(hub: Hub) -> None:
    with pytest.raises(InputMissing, match=r"^my/pairs: no such path here, and dataset 'my/pairs': there is"):
        load_dataset(DataConfig(name="my/pairs"))


def test_a_hub_that_refuses_or_has_lost_the_repository_is_told_and_the_cache_used(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read("harmless-base").report
    for fault, words in (((401, "RepoNotFound"), "no such repository"), ((500, ""), "answered 500")):
        hub.faults = {"^/api/datasets": fault}
        assert read("harmless-base").report == before
        told = capsys.readouterr().err
        assert words in told
        assert before["commit"][:12] in told


def test_a_warning_tells_no_password_of_the_endpoint(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read("harmless-base").report
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:geheim@127.0.0.1:9")
    assert read("harmless-base").report == before
    told = capsys.readouterr().err
    assert "127.0.0.1:9" in told
    assert "geheim" not in told


def test_a_cache_that_cannot_be_written_to_is_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, value: Any) -> None:
        raise PermissionMissing(f"cannot write {path}")

    before = read("harmless-base").report
    monkeypatch.setattr(snapshot, "write_json", refuse)
    assert read("harmless-base").report == before


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": 3}', "{"])
def test_a_damaged_list_of_files_is_asked_for_again(content: str, hub: Hub) -> None:
    before = read("harmless-base").report
    listing = snapshot._listing(NAME, "dataset", before["commit"])
    listing.write_text(content)
    assert read("harmless-base", before["commit"]).report == before
    assert json.loads(listing.read_text())["files"]


def test_a_damaged_index_of_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DataError, match=r"index\.json: expected a JSON object"):
        snapshot.shards(tmp_path)


@pytest.mark.parametrize(
    ("kind", "file", "limited"),
    [
        ("dataset", "train.json", False),
        ("dataset", "train.csv", False),
        ("dataset", "README.md", True),
        ("model", "model.safetensors", False),
        ("model", "tokenizer.json", True),
    ],
)
def test_data_and_weights_take_as_long_as_they_take(
    kind: Any, file: str, limited: bool, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    monkeypatch.setattr(snapshot, "_answer", lambda call, what, name, seconds: limits.append(seconds))
    snapshot.Snapshot(name=NAME, kind=kind, commit="0" * 40, files=(file,)).fetch([file])
    assert limits == [snapshot.SMALL_SECONDS if limited else None]


@pytest.mark.parametrize("name", ["data_dir", "missing"])
def test_a_wrong_folder_says_the_same_cold_and_warm(name: str, hub: Hub) -> None:
    said = []
    for _ in range(2):
        with pytest.raises(InputMissing, match="no such folder") as caught:
            read(name)
        said.append(str(caught.value))
        read("harmless-base")
    assert said[0] == said[1]
    assert "harmless-base, helpful-base" in said[0]


def test_a_data_set_without_a_file_that_is_read_here_is_named(hub: Hub) -> None:
    hub.put(f"datasets/{NAME}", {"README.md": b"x", "data/train.lance": b"y"})
    with pytest.raises(InputMissing, match=r"data/train\.lance"):
        read()


FAULTS: dict[str, tuple[tuple[int, str] | str, str, str]] = {
    "gated, not signed in": ((401, "GatedRepo"), "is gated: the hub answered 401", "accept its conditions"),
    "gated, not accepted": ((403, "GatedRepo"), "is gated: the hub answered 403", "HF_TOKEN"),
    "gone": ((401, "RepoNotFound"), "no such repository, or it is private", "HF_TOKEN"),
    "too many": ((429, ""), "the hub answered 429", "later"),
    "broken": ((500, ""), "the hub answered 500", "later"),
    "stalls": ("stall", "does not answer within 1 seconds", "later"),
}


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_hub_keeps_its_status_and_says_what_to_do(name: str, kind: Any, hub: Hub) -> None:
    fault, words, hint = FAULTS[name]
    hub.faults = {"^/api/": fault}
    with pytest.raises(InputMissing) as caught:
        resolve("some/thing", kind)
    assert words in caught.value.message
    assert hint in caught.value.hint


def test_a_fault_of_one_file_is_told_too(hub: Hub) -> None:
    fault, words, hint = FAULTS["gated, not accepted"]
    hub.faults = {"resolve/.*gz": fault}
    with pytest.raises(InputMissing) as caught:
        read("harmless-base")
    assert words in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("answer", ["../../x", "/etc/passwd", "a/../../b"])
def test_files_outside_of_the_repository_are_refused(answer: str, hub: Hub) -> None:
    hub.put("models/some/thing", {answer: b"x"})
    with pytest.raises(DataError, match="outside"):
        resolve("some/thing", "model")


def without_hub(tmp_path: Path, **environment: str) -> str:
    """Output of a fresh process that asks for HH-RLHF with an empty cache."""
    source = str(Path(hub_rows.__file__).parents[2])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=kept | {"HF_HOME": str(tmp_path), "PYTHONPATH": source} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert not done.stderr
    return done.stdout


def test_offline_and_dead_proxy_are_told_at_once(tmp_path: Path) -> None:
    for environment, words in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HTTPS_PROXY": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ):
        output = without_hub(tmp_path, **environment)
        assert words in output
        assert "data.name=PATH" in output
        assert "quickstart" in output


def test_an_endpoint_that_never_answers_is_asked_once_and_given_up(tmp_path: Path) -> None:
    """By the library it would be asked again and again, for minutes."""
    assert snapshot.PROBE_SECONDS < 5
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        output = without_hub(tmp_path, HF_ENDPOINT=address, NO_PROXY="127.0.0.1")
        silent.settimeout(0)
        silent.accept()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert address in output


def test_nobody_at_the_endpoint_counts_as_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not snapshot.reachable()


Change = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body[:-3], "bytes instead of"),
        (lambda body: body[:5], "cut off"),
        (lambda body: b"<html>" + body, "cut off"),
        (lambda body: body[:8] + b"!" + body[9:], "cannot be read"),
    ],
)
def test_a_damaged_safetensors_file_is_seen_by_its_header(change: Change, words: str, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(8)
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole)
    assert snapshot.safetensors_fault(file) == ""
    file.write_bytes(change(whole))
    assert words in snapshot.safetensors_fault(file)
