"""Checks that need no labels: does the score react as it should, and to nothing that it should not?"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from preftune.data import Encoder, Preference, RejectedRow, Sequences, pad_sequences
from preftune.evaluation import stats
from preftune.models.roles import RewardModel
from preftune.seeding import derive_seed

ROWS, PROBES = 200, 16
WIDTHS = (1, 7, 32)  # columns of extra padding
# Of the sd of scores. In float32 rounding is a hundred times smaller; half precision depends on company.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}

Row = tuple[list[int], list[int]]  # prompt and response ids


def _shuffled(pair: Preference, seed: int) -> str:
    words = pair.chosen.split()
    random.Random(seed).shuffle(words)
    return " " + " ".join(words)


def _repeated(pair: Preference, seed: int) -> str:
    words = pair.chosen.split()
    return " " + " ".join(words[:1] * max(len(words), 1))


KINDS: dict[str, tuple[str, Callable[[Preference, int], str]]] = {
    "chosen": ("chosen", lambda pair, seed: pair.chosen),
    "rejected": ("rejected", lambda pair, seed: pair.rejected),
    "shuffled_words": ("chosen, its words shuffled", _shuffled),
    "empty": ("nothing at all", lambda pair, seed: ""),
    "repeated_token": ("its first word, over and over", _repeated),
}


@torch.no_grad()
def sanity_rows(
    model: RewardModel,
    encoder: Encoder,
    pairs: Sequence[Preference],
    batch_size: int,
    device: torch.device,
    seed: int,
    resamples: int,
) -> list[dict[str, Any]]:
    """Raw scores of good, bad and absurd responses to the same prompts (at most 200).

    `below_chosen` is the share of prompts on which the row scores below the chosen response, ties half.
    """
    pairs = list(pairs[:ROWS])
    by_kind = {
        name: [
            _encoded(encoder, p, make(p, derive_seed(seed, "sanity", p.row)), _ends(p, name)) for p in pairs
        ]
        for name, (_, make) in KINDS.items()
    }
    usable = [i for i in range(len(pairs)) if all(rows[i] is not None for rows in by_kind.values())]
    scores: dict[str, np.ndarray] = {}
    for name, rows in by_kind.items():
        usable_rows = [row for i in usable if (row := rows[i]) is not None]
        scores[name] = _raw(model, encoder, usable_rows, batch_size, device)
    return [
        {
            "name": name,
            "label": KINDS[name][0],
            **stats.mean(values, resamples, seed),
            "sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            "below_chosen": None if name == "chosen" else stats.beats(scores["chosen"], values),
        }
        for name, values in scores.items()
        if len(values)
    ]


def _ends(pair: Preference, kind: str) -> bool:
    """Whether a response has an end token: made-up words if the chosen one has; of nothing it is all."""
    return kind == "empty" or pair.ended[kind == "rejected"]


def _encoded(encoder: Encoder, pair: Preference, text: str, ended: bool) -> Row | None:
    """None where the made-up response does not fit into the model's context."""
    try:
        return encoder.sequence(pair.prompt, text, ended)
    except RejectedRow:
        return None


def _batch(encoder: Encoder, rows: Sequence[Row]) -> Sequences:
    return pad_sequences([row[0] for row in rows], [row[1] for row in rows], encoder.pad_id)


def _raw(
    model: RewardModel, encoder: Encoder, rows: Sequence[Row], batch_size: int, device: torch.device
) -> np.ndarray:
    scores: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = _batch(encoder, rows[start : start + batch_size])
        scores += model.raw_scores(batch.to(device)).tolist()
    return np.array(scores)


@torch.no_grad()
def invariance(
    model: RewardModel, encoder: Encoder, pairs: Sequence[Preference], device: torch.device, sd: float
) -> dict[str, Any]:
    """Largest change of a raw score by padding, and by company in the batch, over 16 rows of ragged length.

    Padding is 1, 7 and 32 columns of another token than the pad token, as far as the context reaches.
    """
    rows = [(encoder.prompt(p.prompt), encoder.response(p.chosen, p.ended[0])) for p in pairs[:PROBES]]
    singles = [_batch(encoder, [row]).to(device) for row in rows]
    alone = torch.cat([model.raw_scores(single) for single in singles])
    together = model.raw_scores(_batch(encoder, rows).to(device))
    room = encoder.max_length or max(single.ids.shape[1] for single in singles) + max(WIDTHS)
    changes = [
        (model.raw_scores(padded(single, width, encoder.eos_id)) - score).abs().item()
        for single, score in zip(singles, alone, strict=True)
        for width in WIDTHS
        if single.ids.shape[1] + width <= room
    ]
    by_padding, tolerance = max(changes, default=0.0), TOLERANCE[model.dtype] * sd
    by_batch = (together - alone).abs().max().item()
    return {
        "n": len(rows),
        "padding_max_difference": by_padding,
        "batch_max_difference": by_batch,
        "tolerance": tolerance,
        "score_sd": sd,
        "ok": max(by_padding, by_batch) <= tolerance,
    }


def padded(batch: Sequences, columns: int, junk: int) -> Sequences:
    """The same rows with `columns` more of padding, filled with `junk`: masks rule, not ids."""
    pad = torch.nn.functional.pad
    return Sequences(
        pad(torch.where(batch.attention, batch.ids, junk), (0, columns), value=junk),
        pad(batch.attention, (0, columns)),
        pad(batch.response, (0, columns)),
    )
