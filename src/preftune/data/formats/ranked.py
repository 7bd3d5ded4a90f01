"""Rows that hold several rated replies to a prompt: the best one is preferred to each that is rated lower.

Only the best one is ever chosen, so that no reply is both liked and disliked; replies rated like the best one
are left out.
"""

from collections.abc import Sequence
from typing import Any

from preftune.data.checks import BadRow, is_empty, kind, number_of, text_of
from preftune.data.dialogue import Dialogue, Preference, Scored, Turn
from preftune.data.formats.messages import refuse_templated, with_system
from preftune.data.formats.pairs import Record, preference_of, prompt_of, refuse_unread
from preftune.data.hh import RejectedRow, one_space

# UltraFeedback: its overall_score holds slips (a 1 for a 10), the mean of the aspects does not.
SCORES = ("fine-grained_score", "overall_score", "score", "rating")
REPLIES = ("response", "answer", "text", "content")
MAX_REPLIES = 100


def best_against_lower(
    record: Record, prompt: Dialogue, rated: Sequence[tuple[float, str]]
) -> list[Preference]:
    """One preference for each reply that is rated lower than the best; RejectedRow if there is none."""
    best = max((score for score, _ in rated), default=0.0)
    chosen = next((reply for score, reply in rated if score == best), "")
    lower = [reply for score, reply in rated if score < best]
    if not lower:
        raise RejectedRow("no_preference")
    pairs, reason = [], ""
    for reply in lower:
        try:
            good, bad = (Dialogue([*prompt, Turn("assistant", one_space(r))]) for r in (chosen, reply))
            pairs.append(preference_of(record, good, bad))
        except RejectedRow as error:
            reason = error.reason
    if not pairs:
        raise RejectedRow(reason)
    return pairs


def nectar(record: Record) -> list[Preference]:
    """Nectar: `answers` with their `rank`, 1 the best."""
    return _ranked_replies(
        record, "answers", lambda item, name: -number_of(item.get("rank"), f"the rank of {name}")
    )


def ultrafeedback(record: Record) -> list[Preference]:
    """UltraFeedback as it was collected: `instruction` and rated `completions`."""
    return _ranked_replies(record, "completions", _score)


def _score(item: Record, name: str) -> float:
    key = next((key for key in SCORES if not is_empty(item.get(key))), None)
    if key is None:
        raise BadRow(f"{name} has none of the scores {', '.join(SCORES)}")
    return number_of(item[key], f'"{key}" of {name}')


def _ranked_replies(record: Record, column: str, score: Any) -> list[Preference]:
    prompt, items = prompt_of(record), record[column]
    if not isinstance(items, list) or not 0 < len(items) <= MAX_REPLIES:
        raise BadRow(f'"{column}" is no list of 1 to {MAX_REPLIES} replies')
    rated = []
    for number, item in enumerate(items, 1):
        name = f'reply {number} of "{column}"'
        if not isinstance(item, dict):
            raise BadRow(f"{name} is {kind(item)}, not an object")
        key = next((key for key in REPLIES if key in item), REPLIES[0])
        rated.append((score(item, name), text_of(item.get(key), f'"{key}" of {name}')))
    return best_against_lower(record, prompt, rated)


def helpsteer(record: Record) -> list[Scored]:
    """HelpSteer: one rated response a row; `pairs_of` makes pairs of the rows of a prompt."""
    refuse_unread(record)
    response = text_of(record["response"], '"response"')
    prompt = with_system(prompt_of(record), record)
    refuse_templated(*(turn.text for turn in prompt), response)
    if not response.strip():
        raise RejectedRow("empty_response")
    score = number_of(record["helpfulness"], '"helpfulness"')
    return [Scored(prompt=prompt, response=response, score=score)]


def pairs_of(rows: Sequence[Scored]) -> list[Preference]:
    """Pairs from rated replies to one prompt. Raises RejectedRow."""
    return best_against_lower({}, rows[0].prompt, [(row.score, row.response) for row in rows])
