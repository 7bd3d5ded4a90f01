"""HH-RLHF transcripts: from two texts to (prompt, chosen, rejected), strictly.

The cut is at the last role marker, never at the common character prefix: that would move shared opening words
of both responses into the prompt in about a fifth of HH's rows.
"""

import re
from collections.abc import Sequence

from preftune.data.dialogue import Dialogue, Preference, Turn
from preftune.errors import DataError

MARKER = re.compile(r"\n\n(Human|Assistant):")

REASONS = {
    "no_roles": r"no '\n\nHuman:' or '\n\nAssistant:' marker in chosen or rejected",
    "text_before_roles": "text before the first role marker",
    "ends_on_human": "chosen or rejected does not end in an assistant turn",
    "diverges_early": "chosen and rejected differ before their last assistant turn",
    "empty_prompt": "no human turn before the response",
    "prompt_ends_on_assistant": "the prompt already holds the beginning of a reply",
    "empty_response": "chosen or rejected is blank",
    "identical": "chosen and rejected are the same text",
    "role_marker_in_response": r"a response goes on into another '\n\nHuman:' or '\n\nAssistant:' turn",
    "unsupported_role": "a message has a role other than system, user or assistant",
    "unread_parts": "a part that is not read here: a tool call, tools, reasoning, a picture or a history",
    "conversation_as_text": "a conversation as text that is not JSON; store it as a list of messages",
    "already_templated": "a text holds the control tokens of a chat template; give it without them",
    "no_preference": "the judgement is a tie, or there are no two replies with different ones",
    "response_too_long_became_equal": "after truncation chosen and rejected are the same tokens; raise "
    "data.max_response_length",
    "shorter_than_prompt_words": "the text has no words beyond data.prompt_words",
    "refused_by_template": "the model's chat template refuses the conversation",
    "changed_by_template": "the model's chat template leaves a part of the reply out",
    "longer_than_context": "prompt and response together are longer than the model's context",
}


class RejectedRow(DataError):
    """A well-formed row that cannot be used as a preference. `reason` is a key of `REASONS`; such rows are
    counted.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason, hint=REASONS.get(reason, ""))
        self.reason = reason


def parse_transcript(text: str) -> Dialogue:
    r"""The turns of `\n\nHuman: ...\n\nAssistant: ...`, texts verbatim. Raises RejectedRow without roles at
    the start.
    """
    before, *pieces = MARKER.split(text)
    if not pieces:
        raise RejectedRow("no_roles")
    if before:
        raise RejectedRow("text_before_roles")
    roles, texts = pieces[::2], pieces[1::2]
    return Dialogue(
        Turn("human" if role == "Human" else "assistant", content)
        for role, content in zip(roles, texts, strict=True)
    )


def parse_prompt(text: str) -> Dialogue:
    """A prompt given as one string: a transcript (an open "Assistant:" at its end is optional), else one
    human turn.

    Raises RejectedRow for a blank prompt and for one that ends in the beginning of a reply.
    """
    transcript = "\n\n" + text.lstrip("\n")
    if not MARKER.match(transcript):
        if not text.strip():
            raise RejectedRow("empty_prompt")
        return Dialogue([Turn("human", one_space(text))])
    turns = parse_transcript(transcript)
    if turns[-1].role == "human":
        return turns
    if turns[-1].text.strip():
        raise RejectedRow("prompt_ends_on_assistant")
    return Dialogue(turns[:-1])


def split_pair(chosen: str, rejected: str, *, normalize: bool = True) -> Preference:
    """Two transcripts, split at their last assistant turn. Raises RejectedRow as `parse_transcript` and
    `split_turns` do.
    """
    return split_turns(parse_transcript(chosen), parse_transcript(rejected), normalize=normalize)


def split_turns(chosen: Sequence[Turn], rejected: Sequence[Turn], *, normalize: bool = True) -> Preference:
    """Split two dialogues (non-empty) at their last assistant turn, which must be all that differs; turns
    shared by both are kept as they are.

    `normalize` strips trailing whitespace of the responses and makes their leading whitespace one space;
    without it `prompt.transcript() + chosen` is the chosen transcript byte for byte. Raises
    RejectedRow(reason).
    """
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise RejectedRow("ends_on_human")
    prompt = Dialogue(chosen[:-1])
    if prompt != Dialogue(rejected[:-1]):
        raise RejectedRow("diverges_early")
    if all(turn.role != "human" for turn in prompt):
        raise RejectedRow("empty_prompt")
    good, bad = chosen[-1].text, rejected[-1].text
    if not good.strip() or not bad.strip():
        raise RejectedRow("empty_response")
    if good.strip() == bad.strip():
        raise RejectedRow("identical")
    if MARKER.search(good) or MARKER.search(bad):
        raise RejectedRow("role_marker_in_response")
    if normalize:
        good, bad = one_space(good), one_space(bad)
    return Preference(prompt=prompt, chosen=good, rejected=bad)


def one_space(text: str) -> str:
    """The text with one leading space and no trailing whitespace: how an utterance follows "Assistant:"."""
    return " " + text.strip()
