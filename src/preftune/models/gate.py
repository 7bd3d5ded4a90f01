"""What kind of prompt is this? The shares by which a reward model's experts judge a response to it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import log_softmax
from torch import Tensor, nn

from preftune.data.batch import Sequences
from preftune.errors import DataError
from preftune.models.locate import GATE

STRENGTH = 3.0  # inverse of the L2 penalty: of 1 to 100, the least loss on a fifth of HH's training prompts


class PromptGate(nn.Module):
    """Multinomial logistic regression on which tokens occur in a prompt: weight (K, V), bias (K,).

    Of K kinds, as a mixture of experts weighs its experts (Jacobs et al. 1991, "Adaptive Mixtures of Local
    Experts"), but fitted to kinds that are known. It reads token ids, so that it needs no model of its own.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, sequences: Sequences) -> Tensor:
        """Shares of the kinds, which sum to 1, by the prompt of each row: (K, B), float32."""
        vocabulary = self.weight.shape[1]
        prompt = sequences.attention.bool() & ~sequences.response & (sequences.ids < vocabulary)
        ids = torch.where(prompt, sequences.ids, vocabulary).sort(1).values
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]  # each token once
        new &= ids < vocabulary
        found = torch.where(new, self.weight[:, ids.clamp(max=vocabulary - 1)], 0.0).sum(2)  # (K, B)
        scale = new.sum(1).clamp(min=1).sqrt()
        return (found / scale + self.bias[:, None]).softmax(0)

    def save(self, directory: Path) -> None:
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, directory / GATE)


def load_gate(directory: Path, kinds: int) -> PromptGate:
    """The gate of an ensemble of experts. DataError for a file that is not one of so many kinds."""
    file = directory / GATE
    try:
        tensors = load_file(file)
        weight, bias = tensors["weight"], tensors["bias"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{file} cannot be read: {error}", hint="train the reward model again") from error
    if weight.ndim != 2 or len(weight) != kinds or bias.shape != (kinds,):
        raise DataError(f"{file} is not a gate of {kinds} kinds", hint="train the reward model again")
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise DataError(f"{file} holds numbers that are not finite", hint="train the reward model again")
    return PromptGate(weight, bias)


def fit_gate(prompts: Sequence[Sequence[int]], kinds: Sequence[int], vocabulary: int) -> PromptGate:
    """Fit a gate to the token ids of prompts and their kinds, 0 to K - 1. Every kind weighs the same, however
    many prompts it has: which kind will be asked for more often is not for the training data to say.
    """
    y = np.asarray(kinds)
    count, many = len(y), int(y.max()) + 1
    x = _occurrences(prompts, vocabulary)
    rows = (count / (many * np.bincount(y, minlength=many)))[y]  # weights of the rows, 1 on average
    penalty = 1 / STRENGTH

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[:-many].reshape(many, vocabulary), flat[-many:]
        logs = log_softmax(x @ weight.T + bias, axis=1)
        error = np.exp(logs)
        error[np.arange(count), y] -= 1
        error *= rows[:, None]
        gradient = np.concatenate([(x.T @ error).T.ravel() + penalty * flat[:-many], error.sum(0)])
        nll = -(rows * logs[np.arange(count), y]).sum() + penalty / 2 * float(flat[:-many] @ flat[:-many])
        return nll, gradient

    fitted = minimize(loss, np.zeros(many * vocabulary + many), jac=True, method="L-BFGS-B").x
    weight, bias = fitted[:-many].reshape(many, vocabulary), fitted[-many:]
    return PromptGate(torch.from_numpy(weight), torch.from_numpy(bias))


def _occurrences(prompts: Sequence[Sequence[int]], vocabulary: int) -> csr_matrix:
    """(n, V): 1/√k for each of the k different tokens of a prompt."""
    tokens = [sorted(set(prompt)) for prompt in prompts]
    starts = np.cumsum([0, *map(len, tokens)])
    values = np.concatenate([np.full(len(ids), max(len(ids), 1) ** -0.5) for ids in tokens])
    columns = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokens])
    return csr_matrix((values, columns, starts), shape=(len(prompts), vocabulary))
