"""A row of data as the stages see it: the very columns of the batch that a step consumes, with their parts.

No weights are needed: a base from scratch has its tokenizer before it is trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from preftune.config import StageSettings
from preftune.config.algorithms.base import names_a_stage
from preftune.data import Encoder, Pairs, Preference, Prompts, RejectedRow, Sequences, Unpaired
from preftune.data.dataset import row_key
from preftune.data.encode import UNLIMITED
from preftune.data.pieces import END, PADDING, REPLY, pieces, speakers
from preftune.errors import UsageError
from preftune.models.load import context_length, declared_ends, load_tokenizer
from preftune.rundir import BASE
from preftune.runs.feed import Feed, make_feed, row_name
from preftune.runs.session import Session
from preftune.runs.sources import make_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One column: its text, whose it is, whether the loss is taken there and a score read."""

    text: str
    part: str
    loss: bool = False
    score: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One row of a batch: `title` says which, `tokens` are its columns from left to right."""

    stage: str
    title: str
    tokens: tuple[Token, ...]
    notes: tuple[str, ...] = ()

    @property
    def segments(self) -> Iterator[tuple[Token, list[str]]]:
        """Neighbours that are alike but for their text, with the texts."""
        alike = groupby(self.tokens, lambda token: (token.part, token.loss, token.score))
        for _, group in alike:
            tokens = list(group)
            yield tokens[0], [token.text for token in tokens]


def row_to_show(session: Session, row: int | None) -> Preference:
    """Training row number `row`; by default the first in the order in which stages take them, of those whose
    prompt a chat template does not refuse.
    """
    if row is None:
        rows = session.training_rows()
        if session.config.data.form != "chat":
            return rows[0]
        encoder = _encoder(session, next(iter(session.config.stage.values())))
        return next((candidate for candidate in rows if encoder.accepts(candidate.prompt)), rows[0])
    rows = session.dataset.train
    if not 0 <= row < len(rows):
        raise UsageError(f"there is no training row {row}", f"they are numbered from 0 to {len(rows) - 1}")
    return rows[row]


def views(session: Session, stages: Sequence[str], row: Preference, *, only: bool) -> Iterator[View]:
    """What each stage sees of a row of the run's data, in the first step that takes it. A stage that does not
    take it, or has data of its own, shows the first row of its first step, unless `only` that row is wanted.
    """
    for name in stages:
        config = session.config.stage[name]
        title, data = f"{name} ({config.algorithm})", config.data
        if names_a_stage(data) and not session.run.preferences(str(data)).is_file():
            note = f"it learns from what {data} collects, which is not there yet"
            yield View(stage=name, title=title, tokens=(), notes=(note,))
            continue
        encoder = _encoder(session, config)
        if config.makes == "data":
            tokens = tuple(_prompt(encoder.prompts([row.prompt], [0]), 0, encoder, row))
            title = f"{title}: row {row_name(row)}"
            yield View(stage=name, title=title, tokens=tokens, notes=_sampling(config, encoder))
        else:
            feed = make_feed(session, name, encoder)
            yield from _views(session, name, encoder, feed, row if data is None else None, only)


def _encoder(session: Session, config: StageSettings) -> Encoder:
    """That of the base, which all stages share."""
    scratch = session.config.model.scratch
    if scratch is not None and not session.is_trained(BASE):
        tokenizer = make_tokenizer(str(session.config.data.name), session.dataset.train, scratch.vocab_size)
        return session.encoder_of(tokenizer, scratch.positions, config.new_tokens)
    source = session.source(BASE)
    ends = declared_ends(source)
    return session.encoder_of(load_tokenizer(source), context_length(source), config.new_tokens, ends)


def _views(
    session: Session, name: str, encoder: Encoder, feed: Feed, row: Preference | None, only: bool
) -> Iterator[View]:
    config = session.config.stage[name]
    title = f"{name} ({config.algorithm})"
    position = None if row is None else _first_step(feed, row, config.online)
    if position is None and only and row is not None:
        why = "no step takes this row: rows, steps or part, or its length, leave it out"
        yield View(stage=name, title=title, tokens=(), notes=(why,))
        return
    step, at = position or (0, 0)
    names = feed.names_at(step)
    data_row = next(r for r in feed.rows if row_name(r) == names[at])
    place = f"row {names[at]}, step {step + 1} of {feed.steps}"
    notes = tuple(_cuts(encoder, data_row))
    for label, tokens, more in _columns(feed.batch_at(step), at, len(names), encoder, data_row, config):
        yield View(stage=name, title=f"{title}: {place}{label}", tokens=tuple(tokens), notes=(*notes, *more))


def _first_step(feed: Feed, row: Preference, online: bool) -> tuple[int, int] | None:
    """The first step that takes a row, and its place there; where one row stands for a prompt, that one."""
    names = {row_name(row)}
    if online:
        names = {row_name(r) for r in feed.rows if row_key(r) == row_key(row)}
    for step in range(feed.steps):
        for at, name in enumerate(feed.names_at(step)):
            if name in names:
                return step, at
    return None


def _columns(
    batch: Any, at: int, rows: int, encoder: Encoder, row: Preference, config: StageSettings
) -> Iterator[tuple[str, list[Token], tuple[str, ...]]]:
    """Every row of the batch that data row `at` has become: what it is, its columns, what to say of it."""
    match batch:
        case Sequences():
            yield "", _sequence(batch, at, encoder, row, config), ()
        case Pairs():
            for side_name, side in (("chosen", batch.chosen), ("rejected", batch.rejected)):
                yield f", {side_name}", _sequence(side, at, encoder, row, config), _reading(config)
        case Unpaired():
            for index in range(at, len(batch), rows):
                label = "desirable" if bool(batch.desirable[index]) else "undesirable"
                yield f", {label}", _sequence(batch.sequences, index, encoder, row, config), ()
            mismatched = _sequence(batch.mismatched, at, encoder, row, config)
            yield ", with the reply to another prompt", mismatched, ()
        case Prompts():
            yield "", _prompt(batch, at, encoder, row), _sampling(config, encoder)


def _sequence(
    sequences: Sequences, at: int, encoder: Encoder, row: Preference, config: StageSettings
) -> list[Token]:
    """Columns of prompt and reply. The loss is taken at the reply's tokens; where a score is learnt, only
    through the one number that is read at the last token, or through the mean of those of the reply.
    """
    ids, attention, response = (
        x[at].tolist() for x in (sequences.ids, sequences.attention, sequences.response)
    )
    real = sum(attention)
    texts = pieces(encoder, ids[:real])
    written = [i for i in range(real) if response[i]]
    start = written[0] if written else real
    owners = speakers(texts[:start], row.prompt) + [REPLY] * (real - start)
    if written and ids[real - 1] in encoder.ends:
        owners[-1] = END
    tokens = [
        Token(
            text=text,
            part=owner,
            loss=response[i] and not config.scores,
            score=config.scores and (i == real - 1 or (response[i] and config.head.pooling == "mean")),
        )
        for i, (text, owner) in enumerate(zip(texts, owners, strict=True))
    ]
    return tokens + [Token(text="", part=PADDING)] * (len(ids) - real)


def _prompt(prompts: Prompts, at: int, encoder: Encoder, row: Preference) -> list[Token]:
    ids, attention = prompts.ids[at].tolist(), prompts.attention[at].tolist()
    padding = len(ids) - sum(attention)
    texts = pieces(encoder, ids[padding:])
    pairs = zip(texts, speakers(texts, row.prompt), strict=True)
    return [Token(text="", part=PADDING)] * padding + [Token(text=text, part=owner) for text, owner in pairs]


def _reading(config: StageSettings) -> tuple[str, ...]:
    if config.scores:
        return ()
    return (f"read as beta times the sum of log(policy / {config.reference_stage}) over the reply's tokens",)


def _sampling(config: StageSettings, encoder: Encoder) -> tuple[str, ...]:
    """What follows a prompt."""
    ends = ", ".join(repr(encoder.text_of([end])) for end in encoder.ends)
    models = " + ".join(name for name in (config.scored_by, config.judge_directory) if name)
    read = ["a language model is asked which of two replies is better"] * (config.asks is not None)
    read += [f"{models} scores the whole reply"] * bool(models)
    read += [f"{config.functions()} scores a reply as text"] * bool(config.functions())
    replies = f"{config.items_per_row} replies" if config.items_per_row > 1 else "a reply"
    return (
        f"{replies} of up to {config.new_tokens or 'evaluation.max_new_tokens'} tokens, until one of {ends}",
        "; ".join(read) + ("" if config.makes == "data" else "; the loss is taken at the reply's tokens"),
    )


def _cuts(encoder: Encoder, row: Preference) -> Iterator[str]:
    """What truncation took."""
    total, fitting = len(encoder.prompt(row.prompt, UNLIMITED)), len(encoder.prompt(row.prompt))
    if total > fitting:
        yield f"the prompt has {total} tokens: its oldest {total - fitting} are left out"
    for side, text in (("chosen", row.chosen), ("rejected", row.rejected)):
        with suppress(RejectedRow):  # the template refuses a reply that this stage does not read
            if text and encoder.response(text, prompt=row.prompt)[-1] not in encoder.ends:
                yield f"the {side} reply is cut at {encoder.max_response_length} tokens and has no end"
