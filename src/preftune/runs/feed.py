"""What the steps of a stage consume: batches of training rows, or of prompts, as functions of the step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from preftune.config import OfflineConfig
from preftune.data import Encoder, Preference, first_usable, pad_prompts, rows_at
from preftune.rollout.functions import rows_by_prompt
from preftune.runs.session import Session
from preftune.seeding import derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """`batch_at(step)` and the names of its data rows, out of `rows` rows or prompts in an order of their
    own; `rejected` counts those that cannot be used.
    """

    rows: int
    batch_at: Callable[[int], Any]
    names_at: Callable[[int], list[str]]
    rejected: dict[str, int] = field(default_factory=dict)
    by_prompt: Mapping[tuple[int, ...], Preference] = field(default_factory=dict)  # of prompts, their rows


def make_feed(session: Session, name: str, encoder: Encoder) -> Feed:
    """The batches of a stage, of the kind that its algorithm takes."""
    if session.config.stage[name].online:
        return _prompts(session, name, encoder)
    config = cast(OfflineConfig, session.config.stage[name])
    rows, rejected = first_usable(encoder, session.training_rows(config.training_part()), config.rows)
    made: dict[str, Callable[[Sequence[Preference]], Any]] = {
        "sequences": lambda part: encoder.sequences([(row.prompt, row.chosen) for row in part]),
        "pairs": encoder.pairs,
        "unpaired": encoder.unpaired,
    }

    def part_at(step: int) -> list[Preference]:
        places = rows_at(step, config.rows_per_step, len(rows), session.config.seed, name)
        return [rows[i] for i in places]

    return Feed(
        rows=len(rows),
        batch_at=lambda step: made[config.batch](part_at(step)),
        names_at=lambda step: [_row_name(row) for row in part_at(step)],
        rejected=rejected,
    )


def _prompts(session: Session, name: str, encoder: Encoder) -> Feed:
    """Distinct training prompts, each with the seed of its responses."""
    count, seed = session.config.stage[name].rows_per_step, session.config.seed
    rows = rows_by_prompt(encoder, session.dataset.train)
    prompts = list(rows)

    def part_at(step: int) -> list[tuple[int, ...]]:
        return [prompts[i] for i in rows_at(step, count, len(prompts), seed, name)]

    def batch_at(step: int) -> Any:
        seeds = [derive_seed(seed, name, step, "sample", i) for i in range(count)]
        return pad_prompts([list(prompt) for prompt in part_at(step)], seeds, encoder.pad_id)

    return Feed(
        rows=len(prompts),
        batch_at=batch_at,
        names_at=lambda step: [_row_name(rows[prompt]) for prompt in part_at(step)],
        by_prompt=rows,
    )


def _row_name(row: Preference) -> str:
    """Where a pair came from, for people: "harmless-base:17"."""
    return f"{row.source}:{row.row}" if row.source else str(row.row)
