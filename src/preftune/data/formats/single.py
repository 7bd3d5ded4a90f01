"""Rows without a comparison: a reply that is judged by itself or to be imitated, a prompt, a text."""

from math import isfinite

from preftune.data.checks import BadRow, text_of, truth_of
from preftune.data.dialogue import Dialogue, Preference
from preftune.data.formats.messages import dialogue_with, field, refuse_templated, with_system
from preftune.data.formats.pairs import Record, prompt_in, prompt_of, refuse_unread
from preftune.data.hh import MARKER, RejectedRow, one_space

REPLIES = ("completion", "response", "output", "answer", "reply")
LABELS = ("label", "kto_tag", "desirable")


def reply(record: Record) -> list[Preference]:
    """`prompt` and `completion`, a text or a number, with a `label` or as something to imitate."""
    key = next(name for name in REPLIES if name in record)
    value = record[key]
    number = type(value) is int or (type(value) is float and isfinite(value))  # the answer to a sum
    text = _in_digits(value, key) if number else field(record, key)
    return [_labelled_reply(record, dialogue_with(prompt_in(record), text))]


def _in_digits(value: float, key: str) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        raise BadRow(f'"{key}" is a number of too many digits') from None


def conversation(record: Record) -> list[Preference]:
    """`messages` or `conversations`: the last reply is the completion, what stands before it the prompt."""
    key = next(name for name in ("messages", "conversations") if name in record)
    turns = field(record, key)
    return [_labelled_reply(record, Dialogue(dialogue_with(None, turns)))]


def _labelled_reply(record: Record, turns: Dialogue) -> Preference:
    refuse_unread(record)
    label = next((name for name in LABELS if name in record), None)
    desirable = True if label is None else truth_of(record[label], f'"{label}"')
    prompt, last = Dialogue(turns[:-1]), turns[-1]
    if last.role != "assistant":
        raise RejectedRow("ends_on_human")
    if all(turn.role != "human" for turn in prompt):
        raise RejectedRow("empty_prompt")
    if not last.text.strip():
        raise RejectedRow("empty_response")
    if MARKER.search(last.text):
        raise RejectedRow("role_marker_in_response")
    refuse_templated(*(turn.text for turn in turns))
    reply = one_space(last.text)
    chosen, rejected = (reply, "") if desirable else ("", reply)
    return Preference(prompt=with_system(prompt, record), chosen=chosen, rejected=rejected)


def prompt_only(record: Record) -> list[Preference]:
    """A prompt to sample replies to."""
    refuse_unread(record)
    prompt = prompt_of(record)
    refuse_templated(*(turn.text for turn in prompt))
    return [Preference(prompt=with_system(prompt, record), chosen="", rejected="")]


def text(record: Record) -> list[Preference]:
    """A text for continuation."""
    content = text_of(record["text"], '"text"')
    if not content.strip():
        raise RejectedRow("empty_response")
    refuse_templated(content)
    return [Preference(prompt=Dialogue(), chosen=content, rejected="")]
