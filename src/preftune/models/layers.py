"""Layers of a transformers model with the types that they have: its own annotations allow for much more."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.errors import DataError


def token_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The table of token vectors. DataError for a model that does not start with one."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise DataError(f"{type(model).__name__} has no token embedding", hint="use a decoder-only model")
    return embedding


def language_head(model: PreTrainedModel) -> nn.Module:
    """The layer from hidden states to logits. DataError for a model without one."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise DataError(f"{type(model).__name__} has no language model's head", hint="use a causal model")
    return head


def blocks_of(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The outermost list in the module tree that is as long as the model has layers; () without one."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    return next((tuple(blocks) for blocks in lists if len(blocks) == count), ())


def hash_weight(digest: Any, name: str, weight: Tensor) -> None:
    """Update a hash by a weight: its name, shape, type and numbers."""
    digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(weight.contiguous().cpu().view(torch.uint8).numpy().data)
