"""No pickle is opened and no code of a model directory runs, whichever way it comes in; a damaged one ends in
an error for people.
"""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from preftune.data.corpus import train_tokenizer
from preftune.errors import PreftuneError
from preftune.models.load import context_length, load_causal_lm, load_tokenizer, scratch_gpt2
from preftune.models.locate import Source, fingerprint, locate
from preftune.models.scalar import init_scalar_model, load_scalar_model
from preftune.runs.save import read_side_file
from preftune.runs.standalone import load_policy, load_reward_model
from preftune.training.checkpoint import restore
from preftune.training.learner import Learner

MARKER = "payload-has-run"
PICKLES = (
    *(
        "pytorch_model.bin",
        "optimizer.pt",
        "training_args.bin",
        ".metadata",
        "reward_head.bin",
        "scheduler.pt",
    ),
    *("rng_state.pth", "model.pt", "adapter_model.bin", "pytorch_model-00001-of-00001.bin"),
)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def _tokenizer() -> Any:
    return train_tokenizer([], 300)


ENTRIES: dict[str, Callable[[Path], Any]] = {
    "locate": lambda path: fingerprint(locate(str(path))),
    "tokenizer": lambda path: load_tokenizer(Source(str(path))),
    "language model": lambda path: load_causal_lm(Source(str(path))),
    "context": lambda path: context_length(Source(str(path))),
    "new head": lambda path: init_scalar_model(Source(str(path)), _tokenizer(), 0),
    "reward model": lambda path: load_scalar_model(Source(str(path))),
    "policy handle": load_policy,
    "reward handle": load_reward_model,
    "side file": lambda path: read_side_file(Source(str(path))),
    "checkpoint": lambda path: restore(path, Learner()),
}


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that is as it should be."""
    path = tmp_path_factory.mktemp("models") / "plain"
    tokenizer = _tokenizer()
    scratch_gpt2(tokenizer, layers=1, width=16, heads=2, positions=32, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def directory(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def change(path: Path, file: str = "config.json", **values: Any) -> None:
    settings = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(settings | values))


def outcomes(path: Path) -> dict[str, str]:
    """What each entry point makes of a directory: "" or its error. Any other exception fails the test."""
    found = {}
    for name, load in ENTRIES.items():
        try:
            load(path)
        except PreftuneError as error:
            refusal = error
        else:
            refusal = None
        found[name] = refusal.message if refusal else ""
        assert refusal is None or refusal.code in (65, 66, 69, 74)
        assert refusal is None or refusal.hint
        assert len(str(refusal)) < 900
    return found


def test_a_plain_directory_loads(directory: Path) -> None:
    found = outcomes(directory)
    assert {name for name, error in found.items() if error} == {"reward model", "reward handle"}  # no head


@pytest.mark.parametrize("only", [False, True], ids=["beside safetensors", "alone"])
def test_no_pickle_is_opened(directory: Path, only: bool) -> None:
    marker = directory.parent / MARKER
    for name in PICKLES:
        (directory / name).write_bytes(pickle.dumps(Payload(marker)))
    if only:
        (directory / "model.safetensors").unlink()
    found = outcomes(directory)
    assert not marker.exists()
    assert bool(found["language model"]) == bool(found["locate"]) == only


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / MARKER)))  # noqa: S301
    assert (tmp_path / MARKER).exists()


def _index(path: Path, file: str) -> None:
    """An index that lists another file than safetensors for every weight."""
    (path / "model.safetensors").unlink()
    save_file({"x": torch.zeros(1)}, path / "x.safetensors")
    names = load_names(path)
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (path / "model.safetensors.index.json").write_text(json.dumps(content))


def load_names(path: Path) -> list[str]:
    return ["transformer.wte.weight", "transformer.wpe.weight"]


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "index names a pickle": (lambda path: _index(path, "pytorch_model.bin"), "pytorch_model.bin"),
    "index leaves the directory": (lambda path: _index(path, "../other.safetensors"), "other.safetensors"),
    "config names a pickle": (lambda path: change(path, transformers_weights="a.bin"), "_weights"),
    "auto_map": (lambda path: change(path, auto_map={"AutoConfig": "evil.Evil"}), "auto_map"),
    "auto_map, unknown type": (
        lambda path: change(path, auto_map={"AutoConfig": "evil.Evil"}, model_type="evil"), "auto_map"
    ),
    "auto_map of the tokenizer": (
        lambda path: change(path, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.E", None]}),
        "auto_map",
    ),
    "auto_map inside": (lambda path: change(path, text_config={"auto_map": {}}), "auto_map"),
    "trust_remote_code": (lambda path: change(path, trust_remote_code=True), "trust_remote_code"),
    "attention of the hub": (lambda path: change(path, attn_implementation="evil/kernel"), "attn_impl"),
    "attention of the hub, old name": (lambda path: change(path, _attn_implementation="a/b"), "attn_impl"),
    "CVE-2026-4372": (lambda path: change(path, _attn_implementation_internal="evil/kernel"), "_internal"),
    "CVE-2026-4372 inside": (
        lambda path: change(path, x=[{"_attn_implementation_internal": "evil/kernel"}]), "_internal"
    ),
    "Python file": (lambda path: None, "evil.py"),
    "adapter": (
        lambda path: (path / "adapter_config.json").write_text('{"base_model_name_or_path": "/other"}'),
        "adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_asks_for_code_is_refused_everywhere(directory: Path, name: str) -> None:
    marker = directory.parent / MARKER
    prepare, words = REFUSED[name]
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    prepare(directory)
    if words in ("auto_map", "evil.py"):
        (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    found = outcomes(directory)
    assert not marker.exists()
    for entry in set(ENTRIES) - {"checkpoint", "side file"}:
        assert words in found[entry], entry


ABSURD = [
    *(
        ("n_layer", 100_000),
        ("n_embd", 10**9),
        ("n_head", 10**6),
        ("vocab_size", 10**9),
        ("n_positions", 10**9),
    ),
    *(("text_config", {"num_hidden_layers": 100_000}), ("n_inner", 10**12)),
]


@pytest.mark.parametrize(("key", "value"), ABSURD)
def test_absurd_sizes_are_refused_before_anything_is_built(directory: Path, key: str, value: Any) -> None:
    """A library would build modules for hours. Real ones pass: the largest open models stay far below."""
    change(directory, **{key: value})
    began = time.process_time()
    found = outcomes(directory)
    assert time.process_time() - began < 5
    for entry in ("locate", "tokenizer", "language model", "new head", "reward model", "policy handle"):
        assert f"{directory / 'config.json'} claims" in found[entry], entry
        assert "is no model" in found[entry]


def _broken_weights(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / "model.safetensors").write_bytes(content) and None


DAMAGED: dict[str, Callable[[Path], Any]] = {
    "weights empty": lambda path: (path / "model.safetensors").write_bytes(b""),
    "weights cut": lambda path: os.truncate(path / "model.safetensors", 9000),
    "weights, header of 2^60 bytes": _broken_weights((1 << 60).to_bytes(8, "little") + b"{}"),
    "weights of another shape": lambda path: change(path, n_embd=32),
    "weights a pickle": _broken_weights(pickle.dumps(1)),
    "config a list": lambda path: (path / "config.json").write_text("[]"),
    "config cut": lambda path: (path / "config.json").write_text('{"a":'),
    "config not UTF-8": lambda path: (path / "config.json").write_bytes("{}".encode("utf-16")),
    "config deep": lambda path: (path / "config.json").write_text('{"a":' + "[" * 100_000),
    "config empty": lambda path: (path / "config.json").write_text("{}"),
    "config large": lambda path: (path / "config.json").write_bytes(b" " * (17 << 20)),
    "type a list": lambda path: change(path, model_type=[]),
    "type unknown": lambda path: change(path, model_type="evil"),
    "width a word": lambda path: change(path, n_embd="x"),
    "width negative": lambda path: change(path, n_embd=-1),
    "heads do not divide": lambda path: change(path, n_head=3),
    "architectures a number": lambda path: change(path, architectures=3),
    "quantised": lambda path: change(path, quantization_config={"quant_method": "torchao"}),
    "attention unknown": lambda path: change(path, attn_implementation="magic"),
}
NO_TOKENIZER: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: (path / "tokenizer.json").write_text('{"a":'),
    "of no kind": lambda path: (path / "tokenizer.json").write_text('{"version": "1.0"}'),
    "binary": lambda path: (path / "tokenizer.json").write_bytes(bytes(range(256))),
    "config a list": lambda path: (path / "tokenizer_config.json").write_text("[]"),
    "end token a number": lambda path: change(path, "tokenizer_config.json", eos_token=[1]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_models_end_in_an_error_for_people(directory: Path, name: str) -> None:
    DAMAGED[name](directory)
    found = outcomes(directory)
    assert str(directory) in found["language model"], found


@pytest.mark.parametrize("name", NO_TOKENIZER)
def test_damaged_tokenizers_end_in_an_error_for_people(directory: Path, name: str) -> None:
    NO_TOKENIZER[name](directory)
    found = outcomes(directory)
    assert str(directory) in found["tokenizer"]
    assert str(directory) in found["policy handle"]


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"mean": "a"}', '{"mean": NaN}', '{"std": 0}', '{"vocabulary_sha256": "x"}']
)
def test_a_side_file_is_checked(directory: Path, content: str) -> None:
    (directory / "preftune.json").write_text(content)
    found = outcomes(directory)
    assert found["side file"]
    assert found["policy handle"]


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for content in (b"", b"GGUF", b"GGUF" + bytes(100), os.urandom(1000)):
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        with pytest.raises(PreftuneError, match=r"model\.gguf") as caught:
            locate(str(file))
        assert caught.value.code in (65, 69)
