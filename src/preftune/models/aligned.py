"""Equal weights give equal numbers, whether they were read from a file or made in memory.

Weights read from safetensors lie where the file has them, mapped into memory at an offset that depends on the
length of its header; tensors that torch makes begin at a multiple of 64 bytes. Matrix kernels choose their
vectors by the address, and sum in another order where it is no multiple of what they load at a time: a row
times a matrix 8 bytes off differs in its last bits, and a saved reward model scored otherwise than the one it
was saved from. All that is promised bit for bit (docs/reliability.md) needs them alike.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes, of torch's allocator on a CPU

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def aligned(model: Model) -> Model:
    """Move weights and buffers into memory as torch makes it; the same values, and the same objects.

    All of them, also what happens to lie well: then nothing depends on the file once it is read. What shared
    its memory (tied weights) still does. Changes the model in place and returns it.
    """
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in moved:
            moved[place] = tensor.detach().clone(memory_format=torch.contiguous_format)
        tensor.data = moved[place]
    return model
