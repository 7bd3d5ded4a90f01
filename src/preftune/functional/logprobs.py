"""From logits to log-probabilities and entropy. With `full_kl`, the only functions that shift.

Alignment: column t of a result is about token t of `ids`, so it reads `logits[:, t - 1]`; column 0 has no
prediction and is 0; `logits[:, -1]` predicts a token that is not there and is unused. Shapes: B rows, T
columns, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_positive
from .masked import promote, zero_off


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in the dtype of the maths: (..., V) -> (..., V).

    ValueError: temperature not above 0.
    """
    check_positive(temperature=temperature)
    (logits,) = promote(logits)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def gather_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[ids], no shift: logits (..., V), ids (...) -> (...)."""
    return log_softmax(logits, temperature).gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)


def categorical_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H = -Σ_a π(a) log π(a) in nats, no shift; 0 log 0 = 0. logits (..., V) -> (...)."""
    logp = log_softmax(logits, temperature)
    return -(logp.exp() * zero_off(logp, logp > -torch.inf)).sum(-1)


def shift_in(x: Tensor) -> Tensor:
    """Put the column 0 that has no prediction in front: (B, T - 1) -> (B, T)."""
    return F.pad(x, (1, 0))


def predicting(logits: Tensor) -> Tensor:
    """The logits that predict a token of the row, all but the last column's: (B, T, V) -> (B, T - 1, V).

    ValueError: other than three dimensions, where another one than T would lose its end.
    """
    if logits.dim() != 3:
        raise ValueError(f"logits {tuple(logits.shape)} are not (B, T, V)")
    return logits[:, :-1]


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(ids_t | ids_<t) = log softmax(logits_{t-1} / temperature)[ids_t].

    logits (B, T, V), ids (B, T) -> (B, T).
    ValueError: other shapes, ids that are not integers, temperature not above 0.
    """
    if ids.is_floating_point():
        raise ValueError(f"ids are {ids.dtype}; token ids are integers")
    before = predicting(logits)
    if logits.shape[:2] != ids.shape:  # gather would take a part of the logits
        raise ValueError(f"logits {tuple(logits.shape)} and ids {tuple(ids.shape)} differ in rows or columns")
    return shift_in(gather_logprobs(before, ids[:, 1:], temperature))


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H_t = -Σ_a π_t(a) log π_t(a) in nats, of the distribution that token t was drawn from.

    logits (B, T, V) -> (B, T). ValueError: another shape, temperature not above 0.
    """
    return shift_in(categorical_entropy(predicting(logits), temperature))
