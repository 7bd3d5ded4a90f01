"""What the steps of a stage consume: batches of training rows, or of prompts, as functions of the step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from preftune.config import OfflineConfig
from preftune.config.algorithms.base import Batch
from preftune.data import (
    Encoder,
    Preference,
    Unpaired,
    distinct_prompts,
    first_encoded,
    pad_pairs,
    pad_prompts,
    pad_sequences,
    pad_unpaired,
    rows_at,
    unpaired,
)
from preftune.data.batch import PairIds
from preftune.data.select import remarks
from preftune.errors import DataError
from preftune.runs.session import Session
from preftune.seeding import derive_seed

MANY = 2000  # rows that take a while to encode
HELD_OUT = 256  # rows that checkpoints are compared on


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """`batch_at(step)` is a step's batch of `rows` (of prompts: the first row of each), `names_at(step)` the
    names of its rows. `held_out()` makes a batch of rows that are not trained on, None if there can be none.
    `rejected` counts unusable rows by reason; `tokens`: those of all fixed rows, of which a step takes
    `rows_per_step`.
    """

    rows: Sequence[Preference]
    steps: int
    batch_at: Callable[[int], Any]
    names_at: Callable[[int], list[str]]
    held_out: Callable[[], Any]
    rejected: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    rows_per_step: int = 1


def make_feed(session: Session, name: str, encoder: Encoder) -> Feed:
    """The batches of a stage, of the kind that its algorithm takes."""
    if session.config.stage[name].online:
        return _prompts(session, name, encoder)
    config = cast(OfflineConfig, session.config.stage[name])
    candidates = session.training_rows(config.training_part(), name)
    if "/" not in name:  # for its members, an ensemble says what none of them learns from
        session.say_left_out(name)
    if (count := min(len(candidates), config.rows or len(candidates))) >= MANY:
        session.console.line(f"{name}: encoding {count:,} rows")
    rows, encoded, rejected = first_encoded(encoder, candidates, config.rows)
    for remark in remarks(encoder, encoded, rejected):
        session.console.line(f"{name}: {remark}")
    collate, alone = _collate(config.batch, encoder), session.data_of(name).kind == "unpaired"
    labelled = alone and config.batch == "unpaired"
    items = config.items_per_row if alone else 1  # rows that hold as many items as a pair
    rows_per_step = config.rows_per_step * items

    def numbers_at(step: int) -> list[int]:
        return rows_at(step, rows_per_step, len(rows), session.config.seed, name)

    def batch_at(step: int) -> Any:
        numbers = numbers_at(step)
        if labelled:
            return _labelled([(rows[i], encoded[i]) for i in numbers], encoder)
        return collate([encoded[i] for i in numbers])

    def held_out() -> Any:
        usable = [row for row in session.dataset.validation if _could_learn_from(row, config)]
        if not usable and labelled:
            return None
        if not usable:
            raise DataError(
                f"stage {name}: no validation row is such as it learns from, to compare checkpoints on",
                "leave out checkpoint.best, or hold out rows of its kind",
            )
        _, ids, _ = first_encoded(encoder, session.shuffled(usable), HELD_OUT)
        return collate(ids)

    return Feed(
        rows=rows,
        steps=config.steps_on(len(rows) / items),
        batch_at=batch_at,
        names_at=lambda step: [row_name(rows[i]) for i in numbers_at(step)],
        held_out=held_out,
        rejected=rejected,
        tokens=sum(_tokens(pair, config.batch, alone) for pair in encoded),
        rows_per_step=rows_per_step,
    )


def _collate(batch: Batch, encoder: Encoder) -> Callable[[Sequence[PairIds]], Any]:
    """What makes a batch of encoded pairs, of the kind that an algorithm takes."""
    pad_id = encoder.pad_id
    kinds: dict[str, Callable[[Sequence[PairIds]], Any]] = {
        "sequences": lambda pairs: pad_sequences(
            [pair.prompt for pair in pairs], [pair.chosen for pair in pairs], pad_id
        ),
        "pairs": lambda pairs: pad_pairs(pairs, pad_id),
        "unpaired": lambda pairs: unpaired(pairs, pad_id, encoder.max_length),
    }
    return kinds[batch]


def _could_learn_from(row: Preference, config: OfflineConfig) -> bool:
    """Whether a held-out row of the run is of the kind that a stage learns from. Labels are those of a pair,
    since of labelled replies only desirable ones are held out.
    """
    has_all = row.chosen and (row.rejected or config.batch == "sequences")
    return bool(has_all) and (config.data is not None or config.learns_from(row.source))


def _labelled(rows: Sequence[tuple[Preference, PairIds]], encoder: Encoder) -> Unpaired:
    """Replies without a rival, (B, T): a row with a `chosen` reply is desirable, one without undesirable."""
    desirable = [bool(row.chosen) for row, _ in rows]
    replies = [ids.chosen if liked else ids.rejected for liked, (_, ids) in zip(desirable, rows, strict=True)]
    prompts = [ids.prompt for _, ids in rows]
    return pad_unpaired(prompts, replies, desirable, encoder.pad_id, encoder.max_length)


def _prompts(session: Session, name: str, encoder: Encoder) -> Feed:
    """Distinct training prompts, each with the seed of its responses and its data row."""
    config, seed = session.config.stage[name], session.config.seed
    count = config.rows_per_step
    rows, prompts = distinct_prompts(encoder, session.data_of(name).train)

    def numbers_at(step: int) -> list[int]:
        return rows_at(step, count, len(prompts), seed, name)

    def batch_at(step: int) -> Any:
        seeds = [derive_seed(seed, name, step, "sample", i) for i in range(count)]
        numbers = numbers_at(step)
        return pad_prompts([prompts[i] for i in numbers], seeds, encoder.pad_id, numbers)

    return Feed(
        rows=rows,
        steps=config.steps_on(len(rows)),
        batch_at=batch_at,
        names_at=lambda step: [row_name(rows[i]) for i in numbers_at(step)],
        held_out=lambda: batch_at(0),
        rows_per_step=count,
    )


def _tokens(pair: PairIds, batch: Batch, alone: bool) -> int:
    """Tokens of what a pair, or a reply `alone`, becomes. Mismatched rows are about as many again."""
    if batch == "sequences":
        return len(pair.prompt) + len(pair.chosen)
    prompt_once = len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
    return (prompt_once if alone else pair.tokens) * (2 if batch == "unpaired" else 1)


def row_name(row: Preference) -> str:
    """Where a pair came from, for people: "harmless-base:17"."""
    return f"{row.source}:{row.row}" if row.source else str(row.row)
