"""A reward model under probe texts: where it reads its score, and what that score depends on."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.audit.checks import FAULT, NOTE, OK, PROBES, WARNING, Check, attempted
from preftune.audit.files import Directory, probe_ids
from preftune.errors import DataError
from preftune.models.scalar import score_head
from preftune.runs.save import read_side_file
from preftune.runs.stages import SIDE_FILE

WIDTHS = (1, 7, 32)
FEW = 4  # rows that are scored once more for each padding
TOLERANCE = 1e-3  # of the sd of scores over the probes
_LONG = 1024  # tokens; the probes of a model that states no context are cut to it
Rows = Sequence[Sequence[int]]


def check_reward_model(directory: Directory) -> list[Check]:
    """All checks that need the model to compute."""
    labels: Any = directory.model.config.num_labels
    if labels != 1:
        return [
            Check(
                name="gives one number",
                status=FAULT,
                found=f"{labels} labels",
                consequence="a reward is one number; argmax or a difference of labels would be a guess",
                remedy="train a head with num_labels=1",
            )
        ]
    checks = [
        Check(name="gives one number", status=OK, found="one label"),
        *attempted(directory, {"scores": _finite}),
    ]
    if checks[-1].status == FAULT:
        return checks
    return checks + attempted(
        directory,
        {
            "where the score is read": _position,
            "padding does not matter": _padding,
            "other rows in the batch do not matter": _company,
            "the end token": _end,
            "unit of the score": _unit,
            "plain sense": _sense,
        },
    )


def rows_of(directory: Directory, reply: int = 1, ended: bool = True) -> list[list[int]]:
    """Token ids of the probes with their good (1) or bad (2) reply, closed by EOS; cut to the context."""
    room = (directory.context or _LONG) - max(WIDTHS)
    rows = []
    for probe in PROBES:
        begin, tail = probe_ids(directory, probe[0], probe[reply], ended)
        rows.append(begin[-max(room - len(tail), 1) :] + tail)
    return rows


@torch.no_grad()
def scores(directory: Directory, rows: Rows, columns: int = 0, side: str = "right") -> Tensor:
    """What the model itself makes of a padded batch, `columns` wider than its longest row: (B,)."""
    ids, mask = padded(rows, _pad(directory), columns, side)
    return directory.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()


def padded(rows: Rows, pad: int, columns: int, side: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, T) each."""
    width = max(map(len, rows)) + columns
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, span] = torch.tensor(row)
        mask[i, span] = 1
    return ids, mask


def _pad(directory: Directory) -> int:
    """What a user's batch would be padded with."""
    for value in (directory.tokenizer.pad_token_id, getattr(directory.model.config, "pad_token_id", None)):
        if isinstance(value, int):
            return value
    return directory.end or 0


def _alone(directory: Directory, rows: Rows) -> Tensor:
    return torch.cat([scores(directory, [row]) for row in rows])


def _finite(directory: Directory) -> Iterator[Check]:
    values = _alone(directory, rows_of(directory))
    good = bool(values.isfinite().all())
    spread = float(values.std()) if good else 0.0
    flat = good and spread < 1e-6
    yield Check(
        name="scores",
        status=OK if good and not flat else FAULT,
        found=f"mean {values.mean():.3f}, sd {spread:.3g} over {len(values)} probe texts",
        consequence="every response gets the same reward or none: nothing is learnt",
        remedy="look at the head's weights; train it again",
    )


def _position(directory: Directory) -> Iterator[Check]:
    name = "where the score is read"
    if read_side_file(directory.source).get("pooling") == "mean":
        yield Check(
            name=name,
            status=WARNING,
            found=f"the mean over the response's tokens, says {SIDE_FILE}",
            consequence="preftune alone reads that: transformers, TRL and the other checks here read the "
            "last token's score, which is another",
            remedy='score with preftune.load_reward_model, or train with pooling = "last"',
        )
        return
    try:
        head = score_head(directory.model)
    except DataError as error:
        yield Check(name=name, status=NOTE, found=f"cannot be told: {error.message}")
        return
    row = rows_of(directory)[0]
    with torch.no_grad():
        hidden = directory.model.base_model(torch.tensor([row])).last_hidden_state
        per_position = head(hidden)[0, :, 0]
        score = scores(directory, [row])[0]
    gaps = (per_position - score).abs()
    position, last = int(gaps.argmin()), len(row) - 1
    exact = float(gaps[position]) <= TOLERANCE * max(float(per_position.std()), 1e-6)
    if not exact:
        yield Check(name=name, status=NOTE, found="at no single position: the model pools in another way")
    elif position == last:
        yield Check(name=name, status=OK, found="at the last token, EOS where there is one")
    else:
        yield Check(
            name=name,
            status=FAULT,
            found=f"{last - position} token(s) before the last one",
            consequence="it was trained to judge elsewhere than RL asks; with pad = EOS the end token "
            "is never judged",
            remedy="give it a pad token that is not EOS, in tokenizer and config, and train it again",
        )


def _padding(directory: Directory) -> Iterator[Check]:
    rows = rows_of(directory)[:FEW]
    alone = _alone(directory, rows)
    unit = max(float(alone.std()), 1e-6)
    tokenizer_side = str(directory.tokenizer.padding_side)
    for side in ("right", "left"):
        changes = [
            (torch.cat([scores(directory, [row], width, side) for row in rows]) - alone).abs().max()
            for width in WIDTHS
        ]
        worst = torch.stack(changes).max().item()  # of which a NaN is not lost
        found = f"scores change by up to {worst:.2g} (sd {unit:.2g})"
        if worst <= TOLERANCE * unit:
            yield Check(name=f"padding on the {side} does not matter", status=OK, found=found)
        else:
            yield _moved(side, tokenizer_side, found)


def _moved(side: str, tokenizer_side: str, found: str) -> Check:
    """Padding on the right must not matter, nor on the side on which the model's tokenizer pads."""
    name = f"padding on the {side} does not matter"
    if side == "right":
        return Check(
            name=name,
            status=FAULT,
            found=found,
            consequence="the reward of a response depends on the longest other one in its batch",
            remedy="check config.pad_token_id, or read the score by length yourself",
        )
    pads = tokenizer_side == side
    return Check(
        name=name,
        status=FAULT if pads else NOTE,
        found=f"{found}, and its tokenizer pads on that side" if pads else found,
        consequence="a batch padded on the left gets other scores: position ids are not taken from the mask",
        remedy='set the tokenizer\'s padding_side to "right", or pass position_ids of every batch'
        if pads
        else "pad on the right, or pass position_ids = attention_mask.cumsum(1) - 1",
    )


def _company(directory: Directory) -> Iterator[Check]:
    rows = rows_of(directory)
    alone = _alone(directory, rows)
    unit = max(float(alone.std()), 1e-6)
    worst = (scores(directory, rows) - alone).abs().max().item()
    fine = worst <= TOLERANCE * unit
    yield Check(
        name="other rows in the batch do not matter",
        status=OK if fine else FAULT,
        found=f"scores change by up to {worst:.2g} (sd {unit:.2g}) in a batch of {len(rows)}",
        consequence="results depend on the batch size; two evaluations will not agree",
        remedy="see padding",
    )


def _end(directory: Directory) -> Iterator[Check]:
    ended, open_ = (_alone(directory, rows_of(directory, 1, flag)) for flag in (True, False))
    unit = max(float(ended.std()), 1e-6)
    change = (ended - open_).abs().mean().item()
    blind = change <= TOLERANCE * unit
    yield Check(
        name="the end token",
        status=WARNING if blind else NOTE,
        found=f"with EOS and without it scores differ by {change:.3g} in the mean (sd {unit:.2g})",
        consequence="it cannot reward a response for ending: use missing_eos_score, or replies will not stop"
        if blind
        else "TRL drops EOS before it scores; score with EOS, as it was trained, where you can",
        remedy="set missing_eos_score in the PPO or GRPO stage" if blind else "",
    )


def _unit(directory: Directory) -> Iterator[Check]:
    values = torch.cat([_alone(directory, rows_of(directory, reply)) for reply in (1, 2)])
    mean, sd = float(values.mean()), float(values.std())
    side = read_side_file(directory.source)
    if "mean" in side and "std" in side:
        found = f"{SIDE_FILE} normalises by mean {float(side['mean']):.3g}, sd {float(side['std']):.3g}"
        yield Check(name="unit of the score", status=OK, found=found)
        return
    strange = abs(mean) > 2 * sd or not 0.2 <= sd <= 5
    yield Check(
        name="unit of the score",
        status=WARNING if strange else NOTE,
        found=f"not normalised: mean {mean:.3g}, sd {sd:.3g} over {len(values)} probe texts",
        consequence="a fixed penalty (missing EOS: -1) or kl_coef means something else in this unit",
        remedy=f'write {SIDE_FILE} with {{"mean": ..., "std": ...}} over responses of your SFT data',
    )


def _sense(directory: Directory) -> Iterator[Check]:
    good, bad = (_alone(directory, rows_of(directory, reply)) for reply in (1, 2))
    right = int((good > bad).sum())
    yield Check(
        name="plain sense",
        status=NOTE,
        found=f"prefers the sensible reply in {right} of {len(PROBES)} probe pairs (too few to judge it by)",
    )
