"""Conversations: lists of messages in the shapes that are around, as turns.

A message is {role, content} or {from, value} (ShareGPT), its content a text or a list of text parts. What a
message holds besides and what would change its meaning (a tool call, reasoning, a picture) is not read, so
such a row is not used: trained on without that part it would be another row.
"""

import json
import re
from typing import Any

from preftune.data.checks import BadRow, is_empty, kind, quote, text_of
from preftune.data.dialogue import Dialogue, Role, Turn
from preftune.data.hh import MARKER, RejectedRow, one_space, parse_transcript

ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "human"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
SHAPES = (("role", "content"), ("from", "value"))
UNREAD = {
    *("tool_calls", "tool_call_id", "function_call", "tools", "reasoning_content", "reasoning", "thinking"),
    *("images", "image", "audio", "audios", "video", "videos"),
}
# A text that begins or ends in a template's control tokens has been through a template already.
OPENING = re.compile(
    r"<\|(im_start|start_header_id|begin_of_text|user|system|assistant|endoftext|start_of_role|end_of_text)\|>"
    r"|(<s>|<bos>)?\s*(\[INST\]|<start_of_turn>)|<<SYS>>|<extra_id_[01]>|<s>|<bos>|<｜"
)
CLOSING = re.compile(
    r"(<\|(im_end|eot_id|end|endoftext|end_of_text|im_start)\|>|</s>|<end_of_turn>|<eos>|\[/INST\]"
    r"|<\|(im_start|start_header_id)\|>\s*assistant(<\|end_header_id\|>)?|<｜[^｜]{1,40}｜>|<extra_id_1>\w*)$"
)
# Inside of a text they are used where a role follows, or a line's or another turn's end: a sentence may name
# them. One "<" in front of all is what makes the search fast.
WITHIN = re.compile(
    r"<(?:\|im_start\|>\s{0,3}(?:system|developer|user|human|assistant|tool)\b"
    r"|\|start_header_id\|>\s{0,3}\w{1,20}\s{0,3}<\|end_header_id\|>"
    r"|\|(?:system|user|assistant)\|>[^\S\n]{0,3}\n"
    r"|start_of_turn>\s{0,3}(?:user|model)\b"
    r"|(?:\|(?:im_end|eot_id|eom_id|end)\|>|end_of_turn>)(?:[^\S\n]{0,3}\n|\s{0,3}<)"
    r"|(?<=[\w.!?]<)(?:\|(?:im_end|eot_id|eom_id|endoftext|end_of_text)\|>|end_of_turn>)"
    r"|extra_id_1>(?:User|Assistant)\b"
    r"|</SYS>>|/s>\s{0,3}(?:<s>\s{0,3})?\[INST\])"
)
_STEERED = re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)\n")
JSON_LIMIT = 8 << 20  # characters


def field(record: dict[str, Any], key: str) -> str | list[Turn]:
    """A column that holds a text or a conversation. Raises BadRow or RejectedRow."""
    if key not in record:
        raise BadRow(f'no "{key}" in this row (it has: {quote(", ".join(map(str, record)) or "nothing")})')
    value = unwrapped(record[key])
    if isinstance(value, list):
        return messages(value, key)
    text = text_of(value, f'"{key}"')
    if text.lstrip().startswith(("[", "{")):
        parsed = conversation_in(text)
        if parsed is not None:
            return messages(parsed, key)
        if re.match(r"\s*\[?\{'(role|content|from|value)':", text):  # a list that Python has printed
            raise RejectedRow("conversation_as_text")
    return text


def unwrapped(value: Any) -> Any:
    """A message as a list of one; of annotated values (Argilla), the first one that was submitted."""
    if isinstance(value, dict):
        if any(value.get(role) is not None for role, _ in SHAPES):
            return [value]
        if "responses" in value or "suggestion" in value:
            responses, suggestion = value.get("responses"), value.get("suggestion")
            return unwrapped(responses if not is_empty(responses) else suggestion)
        for name in ("value", "text", "content"):
            if isinstance(value.get(name), str | list):
                return value[name]
        return value
    if isinstance(value, list) and value and all(map(_is_annotation, value)):
        usable = [item for item in value if item.get("status") in (None, "submitted")]
        return usable[0]["value"] if usable else value
    return value


def _is_annotation(item: Any) -> bool:
    return isinstance(item, dict) and "value" in item and "from" not in item


def conversation_in(text: str) -> list[Any] | None:
    """The messages of a conversation that is stored as JSON text; None for any other text."""
    if len(text) > JSON_LIMIT or not any(f'"{name}"' in text for pair in SHAPES for name in pair):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    turns = value if isinstance(value, list) else [value]
    shaped = all(isinstance(m, dict) and any(set(pair) <= m.keys() for pair in SHAPES) for m in turns)
    return turns if turns and shaped else None


def messages(value: list[Any], key: str) -> list[Turn]:
    """The turns of a list of messages. Raises BadRow, or RejectedRow for what is well formed and not read."""
    if not value:
        raise BadRow(f'"{key}" is an empty list')
    turns, reasons = list[Turn](), set[str]()
    for number, message in enumerate(value, 1):
        name = f'message {number} of "{key}"'
        shape = next((s for s in SHAPES if isinstance(message, dict) and set(s) <= message.keys()), None)
        if shape is None:
            raise BadRow(f'{name} is not an object with "role" and "content": {quote(repr(message))}')
        if any(field in UNREAD and not is_empty(message[field]) for field in message):
            reasons.add("unread_parts")
            continue
        role = text_of(message[shape[0]], f"the role of {name}").lower()
        content = message[shape[1]]
        if isinstance(content, list):
            text, complete = _parts(content, name)
            if not complete:
                reasons.add("unread_parts")
        else:
            text = text_of(content, f"the content of {name}")
        if role not in ROLES:
            reasons.add("unsupported_role")
        turns.append(Turn(ROLES.get(role, "human"), one_space(text)))
    for reason in ("unread_parts", "unsupported_role"):
        if reason in reasons:
            raise RejectedRow(reason)
    return turns


def _parts(parts: list[Any], name: str) -> tuple[str, bool]:
    """The text of content parts, and whether that is all there is."""
    texts, complete = [], True
    for content in parts:
        if isinstance(content, dict) and content.get("type", "text") == "text" and "text" in content:
            texts.append(text_of(content["text"], f"a part of the content of {name}"))
        elif isinstance(content, dict):
            complete = False
        else:
            raise BadRow(f"a part of the content of {name} is {kind(content)}, not an object")
    return "".join(texts), complete


def dialogue_with(prompt: Dialogue | None, value: str | list[Turn]) -> Dialogue:
    """Prompt and response as one dialogue. A response column may also repeat the prompt, or its last part, or
    hold the whole conversation.
    """
    if isinstance(value, str):
        if prompt is None:
            return parse_transcript(value)
        if not MARKER.match(value):
            return Dialogue([*prompt, Turn("assistant", value)])
        turns = parse_transcript(value)
        if turns[: len(prompt)] != tuple(prompt):
            raise RejectedRow("role_marker_in_response")
        return turns
    if prompt is None:
        return Dialogue(value)
    for start in range(len(value)):  # the whole conversation, maybe with a system message before the prompt
        if tuple(value[start : start + len(prompt)]) == tuple(prompt):
            return Dialogue(value)
    for start in range(1, len(prompt)):
        if tuple(prompt[start:]) == tuple(value[: len(prompt) - start]):
            return Dialogue([*prompt[:start], *value])
    return Dialogue([*prompt, *value])


def with_system(dialogue: Dialogue, record: dict[str, Any]) -> Dialogue:
    """The dialogue behind the row's system column, where it has no system message of its own."""
    for key in ("system", "system_prompt"):
        value = record.get(key)
        if not is_empty(value):
            text = text_of(value, f'"{key}"')
            if text.strip() and all(turn.role != "system" for turn in dialogue):
                return Dialogue([Turn("system", one_space(text)), *dialogue])
    return dialogue


def steered_turns(text: str) -> list[Turn] | None:
    """The turns of a prompt as HelpSteer2 has them: a question, then replies and questions that each begin
    with a line `<extra_id_1>Assistant` or `<extra_id_1>User`. None for any other text.
    """
    first, *marked = _STEERED.split(text)  # then who speaks, and what, in turn
    if not marked or "<extra_id_0>" in first:
        return None
    spoken = [("User", first)] * bool(first.strip()) + list(zip(marked[::2], marked[1::2], strict=True))
    if not spoken[-1][1].strip():  # the reply opened
        spoken.pop()
    return [Turn("human" if who == "User" else "assistant", one_space(text)) for who, text in spoken]


def refuse_templated(*texts: str) -> None:
    """Raises RejectedRow for a text that a chat template has been applied to."""
    for text in texts:
        if "<" in text or "[" in text:
            stripped = text.strip()
            if OPENING.match(stripped) or CLOSING.search(stripped[-80:]) or WITHIN.search(stripped):
                raise RejectedRow("already_templated")
