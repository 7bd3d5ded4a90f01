"""What a reward model must beat: rules about length, and a logistic model that knows words but no order."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from preftune.data import Preference
from preftune.evaluation import stats
from preftune.evaluation.calibration import nll, sigmoid
from preftune.evaluation.compare import judged

WORD = re.compile(r"\w+|[^\w\s]")
VOCABULARY, MIN_COUNT, TRAINING_PAIRS = 5000, 3, 20_000
PENALTIES = (1.0, 10.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BagOfWords:
    """σ(weights · (word counts of one response - word counts of the other)). It never sees the prompt."""

    words: Mapping[str, int]
    weights: np.ndarray
    l2: float
    trained_on: int

    def advantages(self, pairs: Sequence[Preference]) -> np.ndarray:
        """Log-odds that the chosen response is the better one: (len(pairs),)."""
        return differences(pairs, self.words) @ self.weights


def fit_bag_of_words(pairs: Sequence[Preference], seed: int) -> BagOfWords | None:
    """Fit on training pairs only, the penalty chosen on a fifth of them. None without enough pairs."""
    pairs = pairs[:TRAINING_PAIRS]
    counts = Counter(word for p in pairs for text in (p.chosen, p.rejected) for word in set(tokens(text)))
    common = [word for word, n in counts.most_common(VOCABULARY) if n >= MIN_COUNT]
    if len(pairs) < 20 or not common:
        return None
    words = {word: i for i, word in enumerate(common)}
    x = differences(pairs, words)
    order = np.random.default_rng(seed).permutation(len(pairs))
    held_out, fitted_on = order[: len(order) // 5], order[len(order) // 5 :]
    losses = [nll(x[held_out] @ _fit(x[fitted_on], l2)).mean() for l2 in PENALTIES]
    l2 = PENALTIES[int(np.argmin(losses))]
    return BagOfWords(words=words, weights=_fit(x, l2), l2=l2, trained_on=len(pairs))


def tokens(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return WORD.findall(text.lower())


def differences(pairs: Sequence[Preference], words: Mapping[str, int]) -> csr_matrix:
    """Counts in chosen minus counts in rejected: (pairs, words)."""
    rows, columns, values = [], [], []
    for i, pair in enumerate(pairs):
        counts = Counter(tokens(pair.chosen))
        counts.subtract(tokens(pair.rejected))
        for word, n in counts.items():
            if n and word in words:
                rows.append(i)
                columns.append(words[word])
                values.append(float(n))
    return csr_matrix((values, (rows, columns)), shape=(len(pairs), len(words)))


def _fit(x: Any, l2: float) -> np.ndarray:
    """Least mean of -log σ(x · w) + l2 / (2 n) · |w|². No intercept: the two sides are alike."""
    from scipy.optimize import minimize  # slow to import; only an evaluation fits anything

    n = x.shape[0]

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = x @ w
        value = nll(margins).mean() + l2 / (2 * n) * float(w @ w)
        return value, -(x.T @ sigmoid(-margins)) / n + l2 / n * w

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


def rule_accuracy(advantages: np.ndarray, prompts: stats.Groups) -> dict[str, Any]:
    """A rule without a model; where it cannot decide it tosses a coin, so a tie counts half."""
    return stats.share_by_group(stats.wins(advantages, 0.0), prompts)


def baseline_tests(
    margins: np.ndarray,
    baselines: Mapping[str, np.ndarray],
    prompts: stats.Groups,
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The reward model against each rule on the same pairs. A tie of the model is wrong, as in its accuracy;
    pairs on which the rule cannot decide count half in the difference and not at all in the exact test. Where
    a prompt has several pairs, which McNemar's test takes for independent ones, the difference of whole
    prompts is tested instead.
    """
    repeats = len(np.unique(prompts)) < len(margins)
    records = []
    for name, advantages in baselines.items():
        right, theirs = margins > 0, stats.wins(advantages, 0.0)
        ours_only = int((right & (advantages < 0)).sum())
        theirs_only = int((~right & (advantages > 0)).sum())
        difference = right - theirs
        mean = stats.mean(difference, resamples, seed, prompts)
        records.append(
            {
                "baseline": name,
                "model_right_only": ours_only,
                "baseline_right_only": theirs_only,
                "n_discordant": ours_only + theirs_only,
                "n": mean["n"],
                "difference": mean["mean"],
                "interval": mean["interval"],
                "p_value": stats.sign_flip_test(stats.by_group(difference, prompts), resamples, seed)
                if repeats
                else stats.mcnemar_exact(ours_only, theirs_only),
            }
        )
    return list(judged(records, "baselines"))


def power(accuracy: float, n: int, tests: Sequence[Mapping[str, Any]], deff: float = 1.0) -> dict[str, Any]:
    """Pairs needed to separate this accuracy from chance, and from the strongest rule: `deff` times as many
    as if they were independent (the accuracy's design effect).
    """

    def times(needed: int | None) -> int | None:
        return None if needed is None else math.ceil(needed * deff)

    detectable = next(
        (p for p in np.arange(0.5005, 1, 0.0005) if (times(stats.pairs_needed(p)) or n + 1) <= n), None
    )
    result: dict[str, Any] = {
        "chance": {
            "n": n,
            "n_needed": times(stats.pairs_needed(accuracy)),
            "detectable": None if detectable is None else float(round(detectable, 4)),
        }
    }
    hardest = min(tests, key=lambda test: test["difference"], default=None)
    result["baseline"] = hardest and {
        "name": hardest["baseline"],
        "n": n,
        "n_needed": times(
            stats.paired_pairs_needed(hardest["model_right_only"], hardest["baseline_right_only"], n)
        ),
    }
    return result
