"""The hub: what stands in for it, and how soon a machine without network is told so."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from data_helpers import hh_row
from huggingface_hub import constants

from patience import PATIENCE
from preftune.config import DataConfig
from preftune.data import hub, read_dataset
from preftune.errors import DataError, InputMissing

SCRIPT = """
from preftune.config import DataConfig
from preftune.data import read_dataset
from preftune.errors import InputMissing
try:
    read_dataset(DataConfig(name="Anthropic/hh-rlhf", data_dir="harmless-base"))
except InputMissing as error:
    print(error, error.hint)
"""


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, datasets.Dataset]:
    """A reachable hub with the splits that a test puts into the dictionary."""
    splits: dict[str, datasets.Dataset] = {}
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(hub, "offline_asked_for", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, data_dir: datasets.DatasetDict(splits))
    return splits


def test_hub_rows_become_preferences(fake_hub: dict[str, datasets.Dataset]) -> None:
    fake_hub["train"] = datasets.Dataset.from_list([hh_row(f"q{i}") | {"id": i} for i in range(40)])
    fake_hub["test"] = datasets.Dataset.from_list([hh_row("t"), hh_row("u", "same", "same")])
    data = read_dataset(DataConfig(name="Anthropic/hh-rlhf", data_dir="harmless-base"))
    assert len(data.train) + len(data.validation) == 40
    assert [(pair.source, pair.row) for pair in data.test] == [("harmless-base", 0)]
    assert data.report["rejected"] == {"identical": 1}
    assert data.report["ignored_columns"] == ["id"]
    assert data.report["cut_from_train"] == ["validation"]


def test_malformed_hub_rows_are_named(fake_hub: dict[str, datasets.Dataset]) -> None:
    fake_hub["train"] = datasets.Dataset.from_list([hh_row("q"), {"chosen": None, "rejected": "a"}])
    with pytest.raises(DataError, match=r'Anthropic/hh-rlhf\[train\]: row 2: "chosen" is null'):
        read_dataset(DataConfig(name="Anthropic/hh-rlhf"))
    fake_hub["train"] = datasets.Dataset.from_list([{"words": "a"}])
    with pytest.raises(DataError, match='row 1: no "chosen"'):
        read_dataset(DataConfig(name="Anthropic/hh-rlhf"))


def test_a_failure_of_the_library_is_put_in_a_sentence(
    fake_hub: dict[str, datasets.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, data_dir: str | None) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputMissing, match=r"nobody/none: cannot be loaded: .* doesn't exist\n"):
        read_dataset(DataConfig(name="nobody/none"))


def without_hub(tmp_path: Path, **environment: str) -> str:
    """Output of a fresh process that asks for HH-RLHF with an empty cache."""
    source = str(Path(hub.__file__).parents[2])
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
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HTTPS_PROXY": "http://127.0.0.1:9"}):
        output = without_hub(tmp_path, **environment)
        assert "the hub cannot be reached" in output
        assert "data.name=PATH" in output
        assert "quickstart" in output


def test_an_endpoint_that_never_answers_is_asked_once_and_given_up(tmp_path: Path) -> None:
    """By the library it would be asked again and again, for minutes."""
    assert hub.PROBE_SECONDS < 5
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        output = without_hub(tmp_path, HF_ENDPOINT=address, NO_PROXY="127.0.0.1")
        silent.settimeout(0)
        silent.accept()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert address in output


def test_a_hub_that_fails_counts_as_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub.reachable()


def test_offline_is_set_for_the_library_and_taken_back() -> None:
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with hub._offline(datasets):
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_a_cached_data_set_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "datasets/Anthropic___hh-rlhf"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    assert not hub._maybe_cached("Anthropic/hh-rlhf")
    cached.mkdir(parents=True)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    seen: list[bool] = []

    def load(name: str, data_dir: str | None) -> datasets.DatasetDict:
        seen.append(constants.HF_HUB_OFFLINE)
        return datasets.DatasetDict(train=datasets.Dataset.from_list([hh_row("a"), hh_row("b")]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_dataset(DataConfig(name="Anthropic/hh-rlhf")).train
    assert seen == [True]
