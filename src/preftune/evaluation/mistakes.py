"""Where the reward model contradicts the labels: in full, token by token, with automatic labels."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from preftune.data import Encoder, Preference
from preftune.evaluation import stats
from preftune.evaluation.calibration import sigmoid
from preftune.models.roles import RewardModel

Scored = dict[str, Any]  # a pair with what the reward model made of it, see reward_model.score_pairs
DETAILED, LONGEST = 200, 256  # rows with a score per token, and tokens of a response that are kept

_REFUSALS = (
    "i'm sorry",
    "i am sorry",
    "i can't",
    "i cannot",
    "i don't know",
    "i'm not sure",
    "i won't",
    "as an ai",
)


def mistakes(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Every pair whose rejected response scores no lower than the chosen one, the most confident first."""
    return [
        {
            "idx": s["pair"].row,
            "prompt": s["pair"].prompt.transcript(),
            "chosen": s["pair"].chosen,
            "rejected": s["pair"].rejected,
            "reward_chosen": s["chosen"],
            "reward_rejected": s["rejected"],
            "margin": s["chosen"] - s["rejected"],
            "confidence": float(sigmoid(s["rejected"] - s["chosen"])),
            "length_chosen": s["chosen_length"],
            "length_rejected": s["rejected_length"],
            "turns": turns(s["pair"]),
            "source": s["pair"].source,
            "tags": tags(s),
        }
        for s in in_order(scored)
    ]


def in_order(scored: Sequence[Scored]) -> list[Scored]:
    """The mistakes among them, the surest first."""
    wrong = [s for s in scored if s["chosen"] <= s["rejected"]]
    return sorted(wrong, key=lambda s: (s["chosen"] - s["rejected"], s["pair"].row))


def turns(pair: Preference) -> int:
    """How often the human speaks in the prompt."""
    return sum(turn.role == "human" for turn in pair.prompt)


def tags(s: Scored) -> list[str]:
    """Automatic labels for error patterns. They hold of the pair, whether or not it is a mistake."""
    chosen, rejected = s["pair"].chosen, s["pair"].rejected
    words = [set(text.lower().split()) for text in (chosen, rejected)]
    shared = len(words[0] & words[1]) / max(len(words[0] | words[1]), 1)
    refusal = [any(phrase in text.lower() for phrase in _REFUSALS) for text in (chosen, rejected)]
    start = [text.lower().split()[:4] for text in (chosen, rejected)]
    checks = {
        "tie": s["chosen"] == s["rejected"],
        "rejected is longer": s["rejected_length"] > s["chosen_length"],
        "rejected is shorter": s["rejected_length"] < s["chosen_length"],
        "chosen refuses": refusal[0] and not refusal[1],
        "rejected refuses": refusal[1] and not refusal[0],
        "both refuse": all(refusal),
        "nearly the same words": shared >= 0.6,
        "starts the same": start[0] == start[1] and len(start[0]) == 4,
        "very short": min(len(chosen.split()), len(rejected.split())) <= 3,
        "chosen truncated": bool(s.get("chosen_truncated")),
        "rejected truncated": bool(s.get("rejected_truncated")),
    }
    return [tag for tag, holds in checks.items() if holds]


def tag_counts(scored: Sequence[Scored], prompts: stats.Groups | None = None) -> dict[str, dict[str, Any]]:
    """For each tag: how many mistakes and how many pairs carry it, and how often those pairs are mistakes.
    `prompts`: those of the pairs; None where each has its own.
    """
    prompts = np.arange(len(scored)) if prompts is None else prompts
    wrong = np.array([s["chosen"] <= s["rejected"] for s in scored])
    carried = defaultdict[str, list[int]](list)
    for i, s in enumerate(scored):
        for tag in tags(s):
            carried[tag].append(i)
    mistaken = {tag: int(wrong[rows].sum()) for tag, rows in carried.items()}
    return {
        tag: {
            "mistakes": mistaken[tag],
            "share": mistaken[tag] / int(wrong.sum()) if wrong.any() else 0.0,
            "pairs": len(rows),
            "share_of_pairs": len(rows) / len(scored),
            "error_rate": stats.share_by_group(wrong[rows], prompts[rows]),
        }
        for tag, rows in sorted(carried.items(), key=lambda item: (-mistaken[item[0]], item[0]))
    }


@torch.no_grad()
def add_token_scores(
    rows: Sequence[dict[str, Any]],
    scored: Sequence[Scored],
    model: RewardModel,
    encoder: Encoder,
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Give the first 200 mistakes `tokens_chosen` and `tokens_rejected`: [text, raw score after it] for each
    response token. Only the last is the score; the others show where it was won or lost.
    """
    detailed = in_order(scored)[:DETAILED]
    for start in range(0, len(detailed), batch_size):
        chunk = detailed[start : start + batch_size]
        batch = encoder.pairs([s["pair"] for s in chunk])
        for name, side in (("tokens_chosen", batch.chosen), ("tokens_rejected", batch.rejected)):
            on_device = side.to(device)
            scores = model.per_position(on_device, on_device.response).cpu()  # once, not row by row
            for i in range(len(chunk)):
                response = side.response[i]
                pieces = zip(side.ids[i][response].tolist(), scores[i][response].tolist(), strict=True)
                rows[start + i][name] = [[_piece(encoder, t), score] for t, score in list(pieces)[-LONGEST:]]
        advance(len(chunk))


def _piece(encoder: Encoder, token: int) -> str:
    """A token as text; half a character of a byte-level vocabulary shows as U+FFFD."""
    text = encoder.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
