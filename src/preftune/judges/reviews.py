"""Whether a review reads as its author liked the film: a classifier fitted to authors' own labels.

It confirms what a rule such as VADER says by other means: what it knows comes from labelled reviews alone.
PREFTUNE_REVIEWS, in the environment, names their file: JSONL, plain or gzip, with `text` and `label` ("pos"
or "neg", 1 or 0), or a directory that holds it as train.jsonl or train.jsonl.gz.
"""

import gzip
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from preftune.errors import BackendMissing, DataError, InputMissing

VARIABLE = "PREFTUNE_REVIEWS"
LABELS = {"pos": 1, "neg": 0, "positive": 1, "negative": 0, 1: 1, 0: 0}


def liked(prompt: str, response: str) -> float:
    """The probability, 0 to 1, that the author of the response liked the film; needs scikit-learn."""
    return float(_fitted(os.environ.get(VARIABLE, "")).predict_proba([response])[0, 1])


def fit(texts: Sequence[str], labels: Sequence[int]) -> Any:
    """Logistic regression on TF-IDF of words and pairs of words, with settings chosen on training reviews.

    Sublinear counts (1 + ln), n-grams of two reviews or more, C = 4 (Wang & Manning 2012 on such features).
    """
    text, linear, pipeline = map(_sklearn, ("feature_extraction.text", "linear_model", "pipeline"))
    return pipeline.make_pipeline(
        text.TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        linear.LogisticRegression(C=4.0, max_iter=500),
    ).fit(texts, labels)


def labelled(path: Path) -> Iterator[tuple[str, int]]:
    """(text, 1 for a review that its author labelled positive, else 0). DataError for a row without both."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                yield row["text"], LABELS[row["label"]]
            except (ValueError, KeyError, TypeError):
                hint = 'every row needs a text and a label, "pos" or "neg"'
                raise DataError(f"{path}, line {number}: no labelled review", hint) from None


@cache
def _fitted(file: str) -> Any:
    path = Path(file)
    if file and path.is_dir():
        path = next((f for f in (path / "train.jsonl", path / "train.jsonl.gz") if f.is_file()), path)
    if not file or not path.is_file():
        named = f"{VARIABLE}={file} is no file" if file else f"{VARIABLE} is not set"
        hint = f"set {VARIABLE} to labelled reviews: JSONL with text and label"
        raise InputMissing(f"preftune.judges.reviews:liked fits a classifier, and {named}", hint)
    texts, labels = zip(*labelled(path), strict=True)
    return fit(texts, labels)


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ModuleNotFoundError:
        hint = "pip install 'preftune[judges]'"
        raise BackendMissing("preftune.judges.reviews needs the package scikit-learn", hint) from None
