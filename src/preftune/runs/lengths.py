"""How long the rows of a run are, before anything is trained."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from preftune.config import RunConfig
from preftune.data import Dataset, Encoder, Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 256


class Lengths(NamedTuple):
    """Mean tokens of prompts and replies, end token counted."""

    prompt: float
    chosen: float
    rejected: float


def mean_lengths(config: RunConfig, dataset: Dataset, of: Sequence[Preference] = ()) -> Lengths:
    """Means over some training rows, all or `of` these, in tokens of the base model (or of the one to be
    made).
    """
    from preftune.models.load import load_tokenizer
    from preftune.models.locate import locate
    from preftune.runs.sources import make_tokenizer

    data, scratch = config.data, config.model.scratch
    if scratch is not None:
        tokenizer = make_tokenizer(str(data.name), dataset.train, scratch.vocab_size)
    else:
        tokenizer = load_tokenizer(locate(config.model.base))
    encoder = _encoder(config, tokenizer)
    some = _some(of or dataset.train)
    rows = [row for row in some if not row.prompt or encoder.accepts(row.prompt)]
    if not rows:
        return longest(config)

    def mean(sizes: Iterable[int]) -> float:
        return sum(sizes) / len(rows)

    return Lengths(
        prompt=mean(len(encoder.prompt(row.prompt)) for row in rows),
        chosen=mean(len(encoder.response(row.chosen)) for row in rows),
        rejected=mean(len(encoder.response(row.rejected)) for row in rows),
    )


def chosen_lengths(config: RunConfig, dataset: Dataset, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Lengths of the chosen replies of some training rows, in tokens, end token counted."""
    encoder = _encoder(config, tokenizer)
    return [len(encoder.response(row.chosen)) for row in _some(dataset.train) if row.chosen]


def _some(rows: Sequence[Preference]) -> Sequence[Preference]:
    """At most so many of them, evenly spaced."""
    return rows[:: max(len(rows) // _ROWS, 1)][:_ROWS]


def _encoder(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> Encoder:
    data = config.data
    return Encoder(
        tokenizer,
        data.form,
        data.max_prompt_length,
        data.max_response_length,
        template_arguments=data.template_arguments,
    )


def longest(config: RunConfig) -> Lengths:
    """The longest that the settings allow: for a plan without data."""
    reply = float(config.data.max_response_length)
    return Lengths(prompt=float(config.data.max_prompt_length), chosen=reply, rejected=reply)
