"""Products of few rows with large matrices by a kernel of our own, where it has been built.

    python -m preftune.models.fast.native        (needs a C++ compiler; takes seconds)

puts a library beside `native.cpp`, for this processor and this version of the source; nothing is compiled at
any other time, and without the file torch does the same work. The kernel reads the weights where they lie:
nothing is packed, so nothing can be out of date. Results differ from torch's by rounding; a row's do not
depend on the rows beside it, bit by bit.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preftune.models.fast.compiled import FLAGS, library, main
from preftune.models.fast.cut import instead
from preftune.models.fast.switch import Switch

MOST_ROWS = 64  # above, a library's product is as fast
_Product = Callable[[Tensor], Tensor]
_kernel = Switch()
without_kernel = _kernel.turned_off  # as if it were not built


def kernel_file() -> Path:
    """Where the kernel of this processor lies if it is built."""
    return library(torch.backends.cpu.get_cpu_capability())


def lacking() -> bool:
    """Whether a kernel that is made for this processor is not built."""
    return torch.backends.cpu.get_cpu_capability() in FLAGS and _built() is None


class Kernel:
    """The compiled functions."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.linear, self.conv1d = library.preftune_linear, library.preftune_conv1d
        for function in (self.linear, self.conv1d):
            pointers, sizes = [ctypes.c_void_p] * 4, [ctypes.c_long] * 3
            function.argtypes, function.restype = [*pointers, *sizes, ctypes.c_int], None
        self.attention = library.preftune_attend
        self.attention.argtypes = [*[ctypes.c_void_p] * 11, ctypes.c_float, ctypes.c_int]
        self.attention.restype = None
        self.width: int = library.preftune_width()  # floats in a vector

    def product(self, weight: Tensor, bias: Tensor | None, inputs_first: bool) -> _Product | None:
        """x (..., k) -> x times weight plus bias, for weight (n, k), or (k, n) with `inputs_first`.

        None where the kernel is not made for such weights.
        """
        k, n = weight.shape if inputs_first else weight.shape[::-1]
        plain = [w for w in (weight, bias) if w is not None]
        if not all(type(w.data) is Tensor and w.device.type == "cpu" for w in plain):
            return None
        if any(w.dtype != torch.float32 or not w.is_contiguous() for w in plain):
            return None
        if inputs_first and n % self.width:
            return None
        function = self.conv1d if inputs_first else self.linear

        def product(x: Tensor) -> Tensor:
            assert x.dtype == torch.float32, "a kernel would read what is not there"
            assert x.shape[-1] == k, "a kernel would read what is not there"
            x = x.contiguous()
            out = x.new_empty(*x.shape[:-1], n)
            tensors = (x, weight, bias, out)  # their addresses are asked for now: weights may have moved
            addresses = (None if t is None else t.data_ptr() for t in tensors)
            function(*addresses, x.numel() // k, n, k, torch.get_num_threads())
            return out

        return product

    def attend(
        self,
        token: tuple[Tensor, Tensor, Tensor],
        prompts: tuple[Tensor, Tensor],
        new: tuple[Tensor, Tensor],
        slots: Tensor,
        lengths: Tensor,
        written: int,
        scaling: float,
    ) -> Tensor:
        """One layer's attention as `GridDecoder.attend` has it; writes the rows' keys and values into `new`.

        token: query (n, H, 1, D), key and value (n, H_kv, 1, D) · prompts (G, H_kv, P, D) · new
        (G, H_kv, k, limit, D) · slots (n,) · lengths (G,) -> (n, 1, H, D).
        """
        query, key, value = (x.contiguous() for x in token)
        n, heads, _, width = query.shape
        sizes = (n, heads, key.shape[1], width, prompts[0].shape[2], *new[0].shape[2:4], written)
        out = query.new_empty(n, 1, heads, width)
        tensors = (query, key, value, *prompts, *new, slots, lengths, out)
        packed = (ctypes.c_long * len(sizes))(*sizes)
        addresses = (x.data_ptr() for x in tensors)
        self.attention(*addresses, packed, scaling, torch.get_num_threads())
        return out


@functools.cache
def _built() -> Kernel | None:
    path = kernel_file()
    try:
        return Kernel(path) if path.is_file() else None
    except OSError:  # a package's, on a system that lacks a library of the compiler's
        return None


def kernel() -> Kernel | None:
    """The kernel, where it is built, and of use here: without gradients and in float32."""
    if _kernel.off or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    return _built()


def layer_product(layer: nn.Module) -> _Product | None:
    """The kernel in the place of a linear layer's forward; None where there is none for it."""
    built = kernel()
    if built is None:
        return None
    if type(layer) is nn.Linear:
        return built.product(layer.weight, layer.bias, inputs_first=False)
    if type(layer) is Conv1D:
        return built.product(layer.weight, layer.bias, inputs_first=True)
    return None


def attention_kernel(query: Tensor, keys: Tensor, values: Tensor) -> Callable[..., Tensor] | None:
    """`Kernel.attend` for query (n, H, 1, D), keys and values (G, H_kv, P, D); None where it is not made for
    them: values of another width (DeepSeek's), above all.
    """
    built = kernel()
    if built is None or query.shape[-1] % built.width or values.shape[-1] != query.shape[-1]:
        return None
    fits = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (query, keys))
    return built.attend if fits else None


class FewRows:
    """A model whose linear layers go through the kernel within `with`, if it is given few rows."""

    def __init__(self, model: PreTrainedModel) -> None:
        products = ((module, layer_product(module)) for module in model.base_model.modules())
        self.products = {module: product for module, product in products if product is not None}

    def __call__(self, rows: int) -> contextlib.AbstractContextManager[None]:
        return instead(self.products if rows <= MOST_ROWS else {})


if __name__ == "__main__":
    main([torch.backends.cpu.get_cpu_capability()])
