"""Rows that hold a preferred and another reply: HH and TRL pairs and their relatives, and two replies with a
verdict (PKU-SafeRLHF, HelpSteer, SHP, arena votes).
"""

from dataclasses import replace
from typing import Any

from preftune.data.checks import BadRow, is_empty, number_of, text_of
from preftune.data.dialogue import Dialogue, Preference, Turn
from preftune.data.formats.messages import dialogue_with, field, refuse_templated, steered_turns, with_system
from preftune.data.hh import MARKER, RejectedRow, parse_prompt, split_turns

Record = dict[str, Any]

# Columns that a prompt is looked for in, the first one that is there.
PROMPTS = ("prompt", "question", "instruction", "query", "conversations", "context", "input", "messages")
COLLECTED = "policy_sha256"  # a column of replies that preftune has collected
UNREAD_COLUMNS = ("tools", "functions", "images", "image", "videos", "audios", "history")


def pair(record: Record) -> list[Preference]:
    """`chosen` and `rejected`: HH transcripts, whole conversations, or replies beside a prompt."""
    chosen, rejected = field(record, "chosen"), field(record, "rejected")
    prompt = None
    if "prompt" in record or not _is_whole(chosen):
        prompt = prompt_in(record, beside=chosen)
    return [preference_of(record, dialogue_with(prompt, chosen), dialogue_with(prompt, rejected))]


def _is_whole(reply: str | list[Turn]) -> bool:
    if isinstance(reply, str):
        return MARKER.match(reply) is not None
    return any(turn.role == "human" for turn in reply)


def prompt_in(record: Record, beside: str | list[Turn] = "") -> Dialogue | None:
    """The row's prompt, whatever its column is called; None where there is none."""
    key = next((name for name in PROMPTS if name in record), None)
    if key is None:
        return None
    prompt = field(record, key)
    if isinstance(prompt, str) and (turns := steered_turns(prompt)):
        prompt = turns
    if isinstance(prompt, list):
        if prompt[-1].role == "assistant":
            raise RejectedRow("prompt_ends_on_assistant")
        return Dialogue(prompt)
    # A blank prompt column beside whole transcripts is a prompt left out, not an empty one.
    if not prompt.strip() and isinstance(beside, str) and MARKER.match(beside):
        return None
    if key == "instruction" and not is_empty(record.get("input")):  # Alpaca
        prompt += "\n" + text_of(record["input"], '"input"')
    return parse_prompt(prompt)


def prompt_of(record: Record) -> Dialogue:
    """`prompt_in`; BadRow where there is none."""
    prompt = prompt_in(record)
    if prompt is None:
        raise BadRow("no prompt in this row")
    return prompt


def refuse_unread(record: Record) -> None:
    if any(not is_empty(record.get(name)) for name in UNREAD_COLUMNS):
        raise RejectedRow("unread_parts")


def preference_of(record: Record, chosen: Dialogue, rejected: Dialogue) -> Preference:
    """The preference between two dialogues that differ in their last turn, with the row's system message. The
    texts that a stage has collected (in plain form) are kept as they were sampled.
    """
    refuse_unread(record)
    sampled = COLLECTED in record and all(isinstance(record.get(key), str) for key in ("chosen", "rejected"))
    preference = split_turns(chosen, rejected, normalize=not sampled)
    refuse_templated(*(turn.text for turn in preference.prompt), preference.chosen, preference.rejected)
    return replace(preference, prompt=with_system(preference.prompt, record))


def between(record: Record, first: Any, second: Any, preferred: int | None) -> list[Preference]:
    """The preference between two replies, of which number `preferred` is better; None: neither."""
    if preferred is None:
        raise RejectedRow("no_preference")
    prompt = prompt_of(record)
    good, bad = (first, second) if preferred == 0 else (second, first)
    read = {"chosen": good, "rejected": bad}
    good, bad = field(read, "chosen"), field(read, "rejected")
    return [preference_of(record, dialogue_with(prompt, good), dialogue_with(prompt, bad))]


def safe_rlhf(record: Record) -> list[Preference]:
    """PKU-SafeRLHF: the reply that was judged better; if a row says only which reply is safer, that one."""
    key = "better_response_id" if "better_response_id" in record else "safer_response_id"
    better = number_of(record[key], f'"{key}"')
    if better not in (0, 1):
        raise RejectedRow("no_preference")
    return between(record, record["response_0"], record["response_1"], int(better))


def strength(record: Record, names: tuple[str, str], key: str) -> list[Preference]:
    """HelpSteer, in -3..3: below 0 the first of two replies is better, above 0 the second."""
    value = number_of(record[key], f'"{key}"')
    preferred = None if value == 0 else int(value > 0)
    return between(record, record[names[0]], record[names[1]], preferred)


def shp(record: Record) -> list[Preference]:
    """Stanford SHP: `history` is the prompt; label 1 says that human_ref_A is better."""
    label = number_of(record["labels"], '"labels"')
    if label not in (0, 1):
        raise RejectedRow("no_preference")
    prompt = {"prompt": record["history"]}
    return between(prompt, record["human_ref_A"], record["human_ref_B"], 0 if label == 1 else 1)


def arena(record: Record) -> list[Preference]:
    """Chatbot Arena: two whole conversations and the winner, "model_a" or "model_b"; ties are left out."""
    winner = text_of(record["winner"], '"winner"')
    if winner not in ("model_a", "model_b"):
        raise RejectedRow("no_preference")
    loser = "model_b" if winner == "model_a" else "model_a"
    good, bad = (field(record, f"conversation_{name[-1]}") for name in (winner, loser))
    return [preference_of(record, dialogue_with(None, good), dialogue_with(None, bad))]
