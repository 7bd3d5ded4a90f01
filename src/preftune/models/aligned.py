"""Equal weights give equal numbers, whether they were read from a file or made in memory.

Weights read from safetensors are mapped into memory at an offset that depends on the length of the file's
header; tensors that torch makes begin at a multiple of 64 bytes. Matrix kernels sum in another order where an
address is not a multiple of their vector size: a row times a matrix 8 bytes off differs in its last bits, and
a saved reward model scored otherwise than the one it was saved from. All that is promised bit for bit
(docs/reliability.md) needs equal alignment.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes, of torch's allocator on a CPU

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def aligned(model: Model) -> Model:
    """Move all weights and buffers into memory that torch allocates; the same values in the same objects.

    Also those that happen to be aligned: then nothing depends on the file once it is read. Tied weights stay
    tied. Changes the model in place and returns it.
    """
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if memory not in moved:
            moved[memory] = tensor.detach().clone(memory_format=torch.contiguous_format)
        tensor.data = moved[memory]
    return model
