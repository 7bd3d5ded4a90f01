"""LoRA (Hu et al., arXiv:2106.09685): small trained additions to the linear layers of a model that is frozen.

Each layer computes x·W + α/r · x·A·B, by peft's layers in the place of the model's own. The only file that
imports peft. Frozen weights that are equal in several models (policy and reference, critic and reward model)
lie in memory once. Sampler and saved models use W + α/r · A·B; W is restored to the last bit.
"""

import contextlib
import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preftune.errors import BackendMissing, DataError
from preftune.models.fast.cut import instead
from preftune.models.layers import hash_weight, token_embedding
from preftune.models.quantised import in_float, is_quantised, no_code_from_the_hub, scales
from preftune.rundir import read_object, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
_PREFIX, _NAME = "base_model.model.", "default"
# What a saved adapter may say without meaning another formula than the one above.
_PLAIN = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "auto_mapping", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
}
_VALUES = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal"), "revision": ("main",)}


@dataclass(frozen=True, slots=True)
class Adapter:
    """Rank r and α, and the hash of the weights below."""

    rank: int
    alpha: float
    digest: str


_adapters: "weakref.WeakKeyDictionary[nn.Module, Adapter]" = weakref.WeakKeyDictionary()
_Group = tuple[weakref.ref[PreTrainedModel], ...]
_alike: "weakref.WeakKeyDictionary[nn.Module, _Group]" = weakref.WeakKeyDictionary()


def adapt(model: PreTrainedModel, rank: int, alpha: float, seed: int) -> None:
    """Put an adapter into all linear layers but the heads, which changes no output yet: A is random, B is 0.
    Changes the model in place; adapter and scalar head are trained.

    BackendMissing without peft; DataError for a model without such layers.
    """
    try:
        with no_code_from_the_hub():
            import peft
    except ImportError as error:
        raise BackendMissing('trainable = "lora" needs peft', hint="pip install 'preftune[lora]'") from error
    layers = linear_layers(model)
    if not layers:
        raise DataError(f"{type(model).__name__} has no linear layers to adapt", 'set model.trainable="all"')
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # it is divided by r, whatever it is
        target_modules=list(layers),
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    digest = _digest(model)
    with torch.random.fork_rng(devices=[]), _as_peft_knows(model):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
    _adapters[model.eval()] = Adapter(rank, alpha, digest)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_own(name))


@contextlib.contextmanager
def _as_peft_knows(model: Any) -> Iterator[None]:
    """Within `with`, a quantised model has the attribute by which peft chooses its 4-bit layers."""
    model.is_loaded_in_4bit = is_quantised(model)
    try:
        yield
    finally:
        del model.is_loaded_in_4bit


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers below the head, by their names."""
    below = {module for module in model.base_model.modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: module for name, module in model.named_modules() if module in below}


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter that a model is trained by; None for one that has none."""
    return _adapters.get(model)


def same_adapter(model: nn.Module, copied: nn.Module) -> None:
    """Note that a copy of a model has the adapter of the original."""
    if (adapter := adapter_of(model)) is not None:
        _adapters[copied] = adapter


def below_adapter(model: nn.Module) -> list[nn.Parameter]:
    """The weights that an adapter leaves as they are; [] for a model without one."""
    return [p for name, p in model.named_parameters() if not _is_own(name)] if model in _adapters else []


def hold_once(models: Sequence[PreTrainedModel]) -> None:
    """Weights that are frozen and equal in several of the models lie in memory once, here and wherever they
    are moved (see `tie_alike`).
    """
    group = tuple(weakref.ref(model) for model in models)
    for model in models:
        _alike[model] = group
    for model in models:
        tie_alike(model)


def tie_alike(model: nn.Module) -> None:
    """Let a model's frozen weights be those of its group's first model that has equal ones on the same device
    (the first: if any would do, two models could swap their weights instead of sharing them).
    """
    untied = _frozen(model) if model in _alike else {}
    for member in (reference() for reference in _alike.get(model, ())):
        for name, source in _frozen(member).items() if member is not None and member is not model else ():
            weight = untied.get(name)
            if weight is None or weight.shape != source.shape or weight.device != source.device:
                continue
            if weight.data_ptr() == source.data_ptr() or torch.equal(weight, source):
                weight.data = source.data
                untied.pop(name)


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within `with`, a model with an adapter computes by its merged weights: one product a layer. A quantised
    one keeps its adapter beside its weights: merged, they would have to be rounded to 4 bits again.
    """
    layers = _wrapped_layers(model) if model in _adapters and not is_quantised(model) else {}
    before = {layer: layer.base_layer.weight.data for layer in layers.values()}
    with instead({layer: layer.base_layer for layer in layers.values()}):
        try:
            for layer in before:
                layer.base_layer.weight.data = _merged_weight(layer)
            yield
        finally:
            for layer, weight in before.items():
                layer.base_layer.weight.data = weight


@contextlib.contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Within `with`, `merged` leaves a model's adapter beside its weights: they are not there all at once."""
    adapter = _adapters.pop(model, None)
    try:
        yield
    finally:
        if adapter is not None:
            _adapters[model] = adapter


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by their names in a model without an adapter; within `merged`, with the adapter's added."""
    named = model.state_dict().items()
    return {name.replace(".base_layer.", "."): weight for name, weight in named if ".lora_" not in name}


def fold(model: PreTrainedModel) -> tuple[Adapter, dict[str, Tensor]] | None:
    """Take a model's adapter out and add it to the weights, for good: it is a plain model then. Returns the
    adapter with its weights (and the scalar head) by the names in its file; None where there is none.
    """
    adapter = _adapters.pop(model, None)
    if adapter is None:
        return None
    _alike.pop(model, None)
    tensors = {
        _PREFIX + name.replace(f".{_NAME}.", "."): p.detach().cpu().clone().contiguous()
        for name, p in model.named_parameters()
        if _is_own(name)
    }
    for name, layer in _wrapped_layers(model).items():
        layer.base_layer = in_float(layer.base_layer)
        layer.base_layer.weight.data = _merged_weight(layer)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base_layer)
    vars(model).pop("peft_config", None)
    return adapter, tensors


def save_adapter(folded: tuple[Adapter, Mapping[str, Tensor]], directory: Path, base: str) -> None:
    """Write what `fold` gave as peft reads it. `base`: the model that it belongs to, a hub id or a directory;
    one that begins with a dot is meant from `directory` on.
    """
    adapter, tensors = folded
    heads = sorted({name.removeprefix(_PREFIX).split(".")[0] for name in tensors if ".lora_" not in name})
    directory.mkdir()
    save_file(dict(tensors), directory / WEIGHTS, metadata={"format": "pt"})
    record = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "bias": "none",
        "inference_mode": True,
        **({"modules_to_save": heads} if heads else {}),
    }
    write_json(directory / CONFIG, record)


def earlier_changes(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What the adapters of all stages that led to a saved model have added to its linear layers, stacked:
    A (r, in) and α/r · B (out, r), by the layers' names; {} where no adapter lies beside it.

    To subtract it and add it again gives the model back, even if the adapter is another model's.
    """
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    visited = set[Path]()
    while (folder := directory / "adapter") not in visited and (folder / WEIGHTS).is_file():
        visited.add(folder)
        config, tensors = read_object(folder / CONFIG), load_file(folder / WEIGHTS)
        if _strange({**config, "modules_to_save": None}):
            break
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            a, b = tensors[key].float(), tensors[key.replace("lora_A", "lora_B")].float()
            b = b * (config["lora_alpha"] / config["r"])
            if (previous := changes.get(_layer_of(key))) is not None:
                a, b = torch.cat([previous[0], a]), torch.cat([previous[1], b], 1)
            changes[_layer_of(key)] = a, b
        base = str(config["base_model_name_or_path"])
        if not base.startswith("."):
            break
        directory = (folder / base).resolve()
    return changes


@torch.no_grad()
def merge_saved(model: PreTrainedModel, directory: Path, config: Mapping[str, Any]) -> None:
    """Add the adapter in a directory, whose `adapter_config.json` holds `config`, to a model's weights.

    DataError for one that is not plain LoRA on linear layers, or does not fit the model. Nothing in the
    config is a program: its patterns are not looked at, the names in the file of weights say what is adapted.
    """
    if strange := _strange(config):
        raise DataError(
            f"{directory / CONFIG}: {strange} is not supported", "merge it with peft's merge_and_unload"
        )
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    tensors = load_file(directory / WEIGHTS)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = _layer_of(key)
        a, b = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"), None)
        layer = dict(model.named_modules()).get(name)
        if getattr(layer, "weight", None) is token_embedding(model).weight:
            raise DataError(
                f"{directory / WEIGHTS} adapts {name}, which is the embedding, too: {_BOTH}", _APART
            )
        if not isinstance(layer, nn.Linear | Conv1D) or b is None or len(a) != config["r"]:
            raise DataError(f"{directory / WEIGHTS}: {key} does not fit the base model", _FITS)
        change = _change(a.float(), b.float(), scale, layer)
        if change.shape != layer.weight.shape:
            raise DataError(f"{directory / WEIGHTS}: {key} has another shape than the base model", _FITS)
        layer.weight.data = layer.weight.data + change
    if tensors:
        raise DataError(f"{directory / WEIGHTS} holds more than LoRA's weights: {min(tensors)[:80]}", _FITS)


_BOTH = "merged, it would change both"
_APART = "train it without this layer, or on a base whose tie_word_embeddings is false"
_FITS = "give the adapter of a language model, with the base that it was trained on in adapter_config.json"


def _strange(config: Mapping[str, Any]) -> str:
    """The first entry that asks for another formula; "" if there is none."""
    r, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA":
        return f"peft_type {str(config.get('peft_type'))[:40]!r}"
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        return "its r or lora_alpha"
    for key, value in sorted(config.items()):
        if value and key not in _PLAIN and value not in _VALUES.get(key, ()):
            return f"{key[:40]} = {str(value)[:40]}"
    return ""


def _is_own(name: str) -> bool:
    """Whether a parameter belongs to the adapter, or to a scalar head, which is trained beside it."""
    return ".lora_" in name or name.startswith("score.")


def _layer_of(key: str) -> str:
    """The layer whose A a saved adapter has under this key."""
    return key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")


def _wrapped_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that no optimizer changes, by their names in a model without an adapter."""
    adapted = model in _adapters
    return {
        name.replace(".base_layer.", "."): p
        for name, p in model.named_parameters()
        if not (adapted and _is_own(name))
    }


def _change(a: Tensor, b: Tensor, scale: float, layer: nn.Module) -> Tensor:
    """α/r · B·A, (out, in) as a linear layer has its weight, or (in, out) as GPT-2's has: a (r, in), b
    (out, r).
    """
    change = (b @ a) * scale
    return change.T if isinstance(layer, Conv1D) else change


@torch.no_grad()
def _merged_weight(layer: Any) -> Tensor:
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    change = _change(a, b, layer.scaling[_NAME], layer.base_layer)
    return (layer.base_layer.weight.detach() + change).contiguous()


def _digest(model: nn.Module) -> str:
    """SHA-256 over the weights that stay as they are."""
    digest = hashlib.sha256(b"lora")
    for name, weight in sorted({**dict(model.named_parameters()), **scales(model)}.items()):
        if not _is_own(name):
            hash_weight(digest, name, weight.detach())
    return digest.hexdigest()
