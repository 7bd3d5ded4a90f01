"""Rules that say which of two replies is preferred, fitted to pairs: by length, by words.

Each takes pairs and a seed, and returns the function that gives margins of others, and what it settled on.
Settings are chosen on a tenth of the pairs, cut by prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from preftune.data import Preference, prompt_hash
from preftune.evaluation.baselines import fit_bag_of_words, tokens
from preftune.evaluation.calibration import nll

CHOOSE = 0.1  # of the training prompts


def held_for_choice(pair: Preference) -> bool:
    return int(prompt_hash(pair.prompt)[-8:], 16) < CHOOSE * 16**8


def log_lengths(pairs: Sequence[Preference]) -> np.ndarray:
    """ln of the words of chosen minus that of rejected: (n,)."""
    words = [[len(tokens(text)) for text in (pair.chosen, pair.rejected)] for pair in pairs]
    return np.log(words) @ np.array([1.0, -1.0])


def slope_on_length(margins: np.ndarray, lengths: np.ndarray) -> float:
    """What a pair's margin gains with the log ratio of lengths: least squares through 0, since the two sides
    of a pair are alike. Margin minus slope times ratio is the residual (Huang et al., arXiv:2409.17407,
    whose curve is a local regression; here a line).
    """
    return float(margins @ lengths / (lengths @ lengths))


Scores = Callable[[Sequence[Preference]], np.ndarray]  # margins of pairs, chosen minus rejected
Rule = Callable[[Sequence[Preference], int], tuple[Scores, dict[str, Any]]]


def logistic(x: Any, c: float) -> Any:
    """Weights of σ(x · w), every pair the right way round; turned about in every other row for scikit-learn,
    which wants both labels. No intercept: the two sides are alike.
    """
    from scipy.sparse import diags
    from sklearn.linear_model import LogisticRegression

    sign = np.where(np.arange(x.shape[0]) % 2, -1.0, 1.0)
    model = LogisticRegression(C=c, fit_intercept=False, max_iter=1000, tol=1e-5)
    return model.fit(diags(sign) @ x, sign).coef_[0]


def length(pairs: Sequence[Preference], seed: int) -> tuple[Scores, dict[str, Any]]:
    """Two weights: of the difference in words, and in their logarithms."""

    def features(of: Sequence[Preference]) -> np.ndarray:
        words = np.array([[len(tokens(text)) for text in (p.chosen, p.rejected)] for p in of], dtype=float)
        difference = np.array([1.0, -1.0])
        return np.stack([words @ difference / 100, np.log(words) @ difference], axis=1)

    weights = logistic(features(pairs), 1.0)
    return lambda of: features(of) @ weights, {"weights": weights.tolist()}


def bag(pairs: Sequence[Preference], seed: int) -> tuple[Scores, dict[str, Any]]:
    """The bag of words that every audit of preftune shows beside a reward model."""
    fitted = fit_bag_of_words(pairs, seed)
    assert fitted is not None
    return fitted.advantages, {"l2": fitted.l2, "words": len(fitted.words)}


def terms(pairs: Sequence[Preference], seed: int) -> tuple[Scores, dict[str, Any]]:
    """Words, and pairs of words, with the weighting and the penalty that are best on the tenth."""
    held = [pair for pair in pairs if held_for_choice(pair)]
    rest = [pair for pair in pairs if not held_for_choice(pair)]
    losses = {}
    for weighting in WEIGHTINGS:
        x, of = vectors(rest, weighting)
        y = of(held)
        cs = [c * (100 if weighting[0] == "tf-idf" else 1) for c in PENALTIES]  # whose rows have length 1
        losses |= {(*weighting, c): float(nll(y @ logistic(x, c)).mean()) for c in cs}
    *weighting, c = best = min(losses, key=lambda key: losses[key])
    x, of = vectors(pairs, tuple(weighting))
    weights = logistic(x, c)
    chosen = {"weighting": best[0], "ngrams": best[1], "C": c, "loss": losses[best], "held": len(held)}
    return lambda those: of(those) @ weights, chosen


def terms_by_kind(pairs: Sequence[Preference], seed: int) -> tuple[Scores, dict[str, Any]]:
    """`terms` twice: of harmless pairs and of helpful ones, whose labels contradict each other. It is told
    which kind a pair is, as no reward model is.
    """
    return of_kinds(pairs, seed, lambda of: [harmless(pair) for pair in of])


def terms_by_prompt(pairs: Sequence[Preference], seed: int) -> tuple[Scores, dict[str, Any]]:
    """The same, with the kind guessed from the words of the prompt: it sees what a reward model sees."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(
        tokenizer=tokens, token_pattern=None, lowercase=False, sublinear_tf=True, min_df=2
    )
    guess = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    guess.fit([pair.prompt.transcript() for pair in pairs], [harmless(pair) for pair in pairs])
    return of_kinds(pairs, seed, lambda of: guess.predict([pair.prompt.transcript() for pair in of]))


def of_kinds(
    pairs: Sequence[Preference], seed: int, kind_of: Callable[[Sequence[Preference]], Any]
) -> tuple[Scores, dict[str, Any]]:
    """`terms` of harmless and of helpful pairs, asked for those of which `kind_of` says that they are so."""
    made = {kind: terms([p for p in pairs if harmless(p) == kind], seed) for kind in (True, False)}

    def score(of: Sequence[Preference]) -> np.ndarray:
        both = np.stack([made[kind][0](of) for kind in (True, False)])
        return np.where(kind_of(of), *both)

    return score, {"harmless": made[True][1], "helpful": made[False][1]}


def harmless(pair: Preference) -> bool:
    return pair.source.startswith("harmless")


WEIGHTINGS = (("counts", 1), ("presence", 1), ("presence", 2), ("tf-idf", 1), ("tf-idf", 2))
PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1)


def vectors(pairs: Sequence[Preference], weighting: tuple[Any, ...]) -> tuple[Any, Any]:
    """Features of chosen minus those of rejected of `pairs`, and the function that makes them of others."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    kind, ngrams = weighting
    shared: dict[str, Any] = {"tokenizer": tokens, "token_pattern": None, "lowercase": False, "min_df": 3}
    shared["ngram_range"] = (1, ngrams)
    maker = (
        TfidfVectorizer(sublinear_tf=True, **shared)
        if kind == "tf-idf"
        else CountVectorizer(binary=kind == "presence", dtype=np.float64, **shared)
    )
    maker.fit([text for pair in pairs for text in (pair.chosen, pair.rejected)])

    def of(those: Sequence[Preference]) -> Any:
        return maker.transform([p.chosen for p in those]) - maker.transform([p.rejected for p in those])

    return of(pairs), of
