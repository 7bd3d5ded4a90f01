"""Frozen linear layers in 4 bits, for adapters on top: QLoRA (Dettmers et al., arXiv:2305.14314).

NF4 in blocks of 64 weights with double quantisation, by bitsandbytes' layers in the place of the model's own.
The only file that knows of bitsandbytes. Products are computed in the precision of the role, from weights
that are dequantised for each: a trained model is saved as these, in float32, plus its adapter.

**Never run on a GPU.** What is tested is bitsandbytes on a CPU.
"""

import contextlib
import functools
import logging
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preftune.errors import BackendMissing, ConfigError, DataError

BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a weight, with the scale of its block and the scales' own
_plain: "weakref.WeakKeyDictionary[nn.Module, nn.Module]" = weakref.WeakKeyDictionary()
_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def backend() -> Any:
    """bitsandbytes. BackendMissing where it is not installed."""
    try:
        with no_code_from_the_hub():
            import bitsandbytes  # type: ignore[import-not-found]
    except ImportError as error:
        raise BackendMissing(
            'model.lora.quantize = "nf4" needs bitsandbytes', hint="pip install 'preftune[qlora]'"
        ) from error
    return bitsandbytes


@contextlib.contextmanager
def no_code_from_the_hub() -> Iterator[None]:
    """Within `with`, bitsandbytes (or peft, which imports it) can be imported: on CPUs with AVX512-BF16 it
    fetches a kernel from the hub and runs it where the package `kernels` is installed, and complains
    otherwise.
    """
    logger, modules = logging.getLogger("bitsandbytes.backends.cpu.ops"), sys.modules
    before, level = modules.get("kernels"), logger.level
    modules["kernels"] = None  # type: ignore[assignment]  # an import of it fails
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        modules.pop("kernels")
        if before is not None:
            modules["kernels"] = before


@torch.no_grad()
def quantise(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], earlier: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Put 4-bit layers in the place of some linear ones, by their names; biases stay in float32, and so does
    what earlier adapters added, B · A with A (r, in) and B (out, r). Changes the model in place.

    DataError where these are another model's.
    """
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _in_four_bits(name, layer, earlier.get(name)))
    _models.add(model)


def is_quantised(model: nn.Module) -> bool:
    return model in _models


@functools.cache
def _layer_class() -> Any:
    """bitsandbytes' layer with B · A beside its weights."""

    class Linear4bit(backend().nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            out, a, b = super().forward(x), self.earlier_a, self.earlier_b
            return out if a is None or b is None else out + linear(linear(x, a), b)

    return Linear4bit


def _in_four_bits(name: str, layer: nn.Module, earlier: tuple[Tensor, Tensor] | None) -> nn.Module:
    """The same layer, (out, in) as all of bitsandbytes' are. The given one is kept, empty, for `in_float`."""
    weight, bias = layer.get_parameter("weight"), dict(layer.named_parameters()).get("bias")
    values = weight.data.T.contiguous() if isinstance(layer, Conv1D) else weight.data
    quantised = _layer_class()(values.shape[1], values.shape[0], bias=False, quant_type="nf4", device="meta")
    a, b = earlier or (None, None)
    if a is not None and b is not None:
        if (len(b), len(a), a.shape[1]) != (len(values), b.shape[1], values.shape[1]):
            raise DataError(f"the adapter beside the model has another {name}", "move adapter/ away from it")
        values = values - b @ a
    for key, factor in {"earlier_a": a, "earlier_b": b}.items():
        frozen = None if factor is None else nn.Parameter(factor, requires_grad=False)
        quantised.register_parameter(key, frozen)
    # Without gradients it would repack the weights on some CPUs, for products in bfloat16 through which, in
    # eval mode, no gradient can pass later.
    quantised.support_avx512bf16_for_cpu = False
    options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True, "module": quantised}
    quantised.weight = backend().nn.Params4bit(values, **options).to(values.device)
    quantised.bias = bias
    weight.data = weight.data.new_empty(0)
    _plain[quantised.eval()] = layer
    return quantised


def computes_in(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """The precision of a quantised model's products, once it is on its device; any other model stays.

    The biases are rounded here: bitsandbytes would do it in the first pass, and no longer share them.
    ConfigError for a device that bitsandbytes does not know.
    """
    if model not in _models:
        return
    if device.type not in backend().supported_torch_devices:
        raise ConfigError(
            f"bitsandbytes has no 4-bit weights on {device.type}", 'set model.lora.quantize="none"'
        )
    for layer in _layers(model).values():
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        if layer.bias is not None and layer.bias.dtype != dtype:
            layer.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)


def in_float(layer: Any) -> Any:
    """The plain layer that a 4-bit one stands for, with the values that it computes with; itself if it is
    none.
    """
    if (plain := _plain.get(layer)) is None:
        return layer
    four: Any = layer.weight
    values = backend().functional.dequantize_4bit(four.data, four.quant_state)
    if layer.earlier_a is not None:
        values = values + layer.earlier_b @ layer.earlier_a
    plain.to(values.device)
    plain.get_parameter("weight").data = values.T.contiguous() if isinstance(plain, Conv1D) else values
    return plain


def scales(model: nn.Module) -> dict[str, Tensor]:
    """The scales and code book of a model's 4-bit weights, by name; {} for one that has none."""
    by_name: dict[str, Tensor] = {}
    for name, layer in _layers(model).items():
        state = layer.weight.quant_state.as_dict(packed=True)
        by_name |= {f"{name}.{key}": value for key, value in state.items()}
    return by_name


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if module in _plain}
