"""The head that predicts pairs best from states as they are: a logistic regression on differences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

FOLDS = 5
# Of the L2 penalty of standardised weights, in units of the number of pairs: strong to weak.
PENALTIES = tuple(np.geomspace(1.0, 1e-3, 7).tolist())


class FittedHead(NamedTuple):
    """The head (d,), the penalty, and loss and accuracy on pairs that a fold of its fit has not seen."""

    weight: np.ndarray
    penalty: float
    loss: float
    accuracy: float


def fit_head(differences: np.ndarray, prompts: Sequence[bytes]) -> FittedHead:
    """w that minimises -log σ(w·Δ) over n pairs, Δ (n, d) = state of the chosen minus of the rejected
    response, with an L2 penalty on w in units of Δ's root mean square. The penalty is that of the least loss
    in cross-validation, where pairs of one prompt share a fold; with fewer prompts than folds the strongest.
    """
    spread = np.sqrt(np.square(differences).mean(0)) + 1e-6
    x = differences / spread
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    folds = np.array([numbers[prompt] % FOLDS for prompt in prompts])
    margins = np.zeros((len(PENALTIES), len(x)))
    for fold in range(FOLDS) if len(numbers) >= FOLDS else ():
        held = folds == fold
        for i, weight in enumerate(_path(x[~held], PENALTIES)):
            margins[i, held] = x[held] @ weight
    losses = np.logaddexp(0, -margins).mean(1)
    best = int(losses.argmin())
    *_, weight = _path(x, PENALTIES[: best + 1])
    accuracy = float((margins[best] > 0).mean())
    return FittedHead(weight / spread, PENALTIES[best], float(losses[best]), accuracy)


def _path(x: np.ndarray, penalties: Sequence[float]) -> list[np.ndarray]:
    """The weights for each penalty, each fit begun where the one before ended."""
    weights = [np.zeros(x.shape[1])]
    for penalty in penalties:

        def loss(w: np.ndarray, penalty: float = penalty) -> tuple[float, np.ndarray]:
            margins = x @ w
            value = np.logaddexp(0, -margins).mean() + penalty / 2 * w @ w
            return float(value), penalty * w - x.T @ expit(-margins) / len(x)

        weights.append(minimize(loss, weights[-1], jac=True, method="L-BFGS-B").x)
    return weights[1:]
