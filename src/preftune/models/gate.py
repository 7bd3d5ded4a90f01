"""What kind of prompt is this? By it one of a reward model's experts judges the responses."""

from abc import ABC, abstractmethod
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
from transformers import PreTrainedModel

from preftune.errors import DataError
from preftune.models.fast.head import uncast
from preftune.models.fast.support import states_below
from preftune.models.layers import blocks_of
from preftune.models.locate import GATE

# Inverse of the L2 penalty, by what is read. Of 1 to 100, and of 0.0015 to 0.015, each the least loss on a
# fifth of HH's training prompts.
STRENGTH_OF_TOKENS = 3.0
STRENGTH_OF_STATES = 0.005


class PromptGate(nn.Module, ABC):
    """Multinomial logistic regression on a prompt: weight (K, D), bias (K,).

    Of K kinds, as a mixture of experts has (Jacobs et al. 1991, "Adaptive Mixtures of Local Experts"), but
    fitted to kinds that are known.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, model: PreTrainedModel, ids: Tensor, attention: Tensor, prompt: Tensor) -> Tensor:
        """Shares of the kinds, which sum to 1, by the prompt of each row: (K, B), float32.

        ids, attention and prompt (true on the prompt's tokens): (B, T); model: one of the experts.
        """
        logits = self.logits(model, ids, attention, prompt)
        return (logits + self.bias.to(logits.device)[:, None]).softmax(0)

    @abstractmethod
    def logits(self, model: PreTrainedModel, ids: Tensor, attention: Tensor, prompt: Tensor) -> Tensor:
        """Without the bias: (K, B)."""

    def save(self, directory: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, directory / GATE)


class TokenGate(PromptGate):
    """It reads which tokens occur in the prompt, 1/√k for each of k: for experts that have nothing in common.
    weight (K, V).
    """

    def logits(self, model: PreTrainedModel, ids: Tensor, attention: Tensor, prompt: Tensor) -> Tensor:
        weight, vocabulary = self.weight.to(ids.device), self.weight.shape[1]
        ids = torch.where(prompt & (ids < vocabulary), ids, vocabulary).sort(1).values
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]  # each token once
        new &= ids < vocabulary
        sums = torch.where(new, weight[:, ids.clamp(max=vocabulary - 1)], 0.0).sum(2)
        return sums / new.sum(1).clamp(min=1).sqrt()


class StateGate(PromptGate):
    """It reads the state of the prompt's last token below the blocks that are trained, the same for all
    experts. weight (K, d); blocks: how many those below are.
    """

    blocks: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, blocks: int) -> None:
        super().__init__(weight, bias)
        self.register_buffer("blocks", torch.tensor(blocks))

    def logits(self, model: PreTrainedModel, ids: Tensor, attention: Tensor, prompt: Tensor) -> Tensor:
        states = states_below(model, int(self.blocks), ids, attention, prompt)
        with uncast(ids.device):
            return self.weight.to(ids.device) @ states.float().T


def load_gate(directory: Path, kinds: int, expert: PreTrainedModel) -> PromptGate:
    """The gate of an ensemble of experts. DataError for a file that is not one of so many kinds, or whose
    states an expert does not have.
    """
    file, again = directory / GATE, "train the reward model again"
    try:
        tensors = load_file(file)
        weight, bias = tensors["weight"], tensors["bias"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{file} cannot be read: {error}", hint=again) from error
    blocks = tensors.get("blocks")
    if weight.ndim != 2 or len(weight) != kinds or bias.shape != (kinds,):
        raise DataError(f"{file} is not a gate of {kinds} kinds", hint=again)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise DataError(f"{file} holds numbers that are not finite", hint=again)
    if blocks is not None and (blocks.ndim or not 0 < blocks < len(blocks_of(expert))):
        raise DataError(f"{file} does not say how many blocks lie below it", hint=again)
    if blocks is not None and weight.shape[1] != expert.config.get_text_config().hidden_size:
        raise DataError(f"{file} reads states of another width than the experts have", hint=again)
    return TokenGate(weight, bias) if blocks is None else StateGate(weight, bias, int(blocks))


def fit_token_gate(prompts: Sequence[Sequence[int]], kinds: Sequence[int], vocabulary: int) -> TokenGate:
    """Fit a gate to the token ids of n prompts and their kinds, 0 to K - 1."""
    return TokenGate(*_fitted(_occurrences(prompts, vocabulary), vocabulary, kinds, STRENGTH_OF_TOKENS))


def fit_state_gate(states: Tensor, kinds: Sequence[int], blocks: int) -> StateGate:
    """Fit a gate to the states (n, d) of n prompts after so many blocks, in units of their spread, and their
    kinds, 0 to K - 1.
    """
    x = states.double().numpy()
    centre, spread = x.mean(0), x.std(0) + 1e-6
    weight, bias = _fitted((x - centre) / spread, len(centre), kinds, STRENGTH_OF_STATES)
    weight /= torch.from_numpy(spread)
    return StateGate(weight, bias - weight @ torch.from_numpy(centre), blocks)


def _fitted(
    x: csr_matrix | np.ndarray, width: int, kinds: Sequence[int], strength: float
) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) for features (n, D), D = width. Every kind weighs the same, however many
    prompts it has: which kind will be asked for more often is not for the training data to say.
    """
    y = np.asarray(kinds)
    count, many = len(y), int(y.max()) + 1
    rows = (count / (many * np.bincount(y, minlength=many)))[y]  # weights of the rows, 1 on average
    penalty = 1 / strength

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[:-many].reshape(many, width), flat[-many:]
        logs = log_softmax(x @ weight.T + bias, axis=1)
        error = np.exp(logs)
        error[np.arange(count), y] -= 1
        error *= rows[:, None]
        gradient = np.concatenate([(x.T @ error).T.ravel() + penalty * flat[:-many], error.sum(0)])
        nll = -(rows * logs[np.arange(count), y]).sum() + penalty / 2 * float(flat[:-many] @ flat[:-many])
        return nll, gradient

    fitted = minimize(loss, np.zeros(many * width + many), jac=True, method="L-BFGS-B").x
    weight, bias = fitted[:-many].reshape(many, width), fitted[-many:]
    return torch.from_numpy(weight), torch.from_numpy(bias)


def _occurrences(prompts: Sequence[Sequence[int]], vocabulary: int) -> csr_matrix:
    """(n, V): 1/√k for each of the k different tokens of a prompt."""
    tokens = [sorted(set(prompt)) for prompt in prompts]
    starts = np.cumsum([0, *map(len, tokens)])
    values = np.concatenate([np.full(len(ids), max(len(ids), 1) ** -0.5) for ids in tokens])
    columns = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokens])
    return csr_matrix((values, columns, starts), shape=(len(prompts), vocabulary))
