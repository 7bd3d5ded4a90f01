"""Whether a review reads as its author liked the film: a classifier fitted to authors' own labels.

It confirms what a rule such as VADER says by other means: what it knows comes from labelled reviews alone.
PREFTUNE_REVIEWS, in the environment, names their file: JSONL, plain or gzip, with `text` and `label` ("pos"
or "neg", 1 or 0), or a directory that holds it as train.jsonl or train.jsonl.gz.
"""

import gzip
import importlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from preftune.errors import DataError, InputMissing

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
    """(text, 1 for a review that its author labelled positive, else 0), of lines that are not blank.

    DataError for a row without both, and for a file that is no UTF-8 or damaged; InputMissing if it cannot be
    read.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _labelled(line, path, number)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text", "save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip data is damaged ({error})", "copy or download it again") from None
    except OSError as error:
        raise InputMissing(f"{path}: cannot be read: {error.strerror or error}") from None


def _labelled(line: str, path: Path, number: int) -> tuple[str, int]:
    try:
        row = json.loads(line)
        text, label = row["text"], LABELS[row["label"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = label = None
    if not isinstance(text, str) or label is None:
        hint = 'every row needs a text and a label, "pos" or "neg"'
        raise DataError(f"{path}, line {number}: no labelled review", hint)
    return text, label


@cache
def _fitted(file: str) -> Any:
    path = Path(file)
    if file and path.is_dir():
        path = next((f for f in (path / "train.jsonl", path / "train.jsonl.gz") if f.is_file()), path)
    if not file or not path.is_file():
        named = f"{VARIABLE}={file} is no file" if file else f"{VARIABLE} is not set"
        hint = f"set {VARIABLE} to labelled reviews: JSONL with text and label"
        raise InputMissing(f"preftune.judges.reviews:liked fits a classifier, and {named}", hint)
    rows = list(labelled(path))
    if len({label for _, label in rows}) < 2:
        raise DataError(
            f"{path}: its {len(rows)} reviews do not have both labels", 'it needs some "pos" and some "neg"'
        )
    return fit([text for text, _ in rows], [label for _, label in rows])


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ModuleNotFoundError:
        hint = "pip install 'preftune[judges]'"
        raise InputMissing("preftune.judges.reviews needs the package scikit-learn", hint) from None
