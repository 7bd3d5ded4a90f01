"""What a chat template makes of a conversation: the prompt, and the reply up to its turn's end.

The template sees the contents as they are. A special token that a message spells is hidden afterwards, so
that it can be encoded as the plain text it is: the text is filled in a second time with a mark in its place.
Where that changes anything else, the template itself looks for the token (`</think>`), and it stays.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from preftune.data.dialogue import ROLES, Dialogue
from preftune.data.hh import RejectedRow
from preftune.data.template import Refused, Template
from preftune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
MARK = "\ue000"  # a hidden token is its number between two of them
_QUESTION, _REPLY = "\ue001", "\ue002"  # contents that no template looks for


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What the template writes around every reply.

    surplus: what the opened reply begins with and a finished conversation does not have (an open `<think>`);
    it is left out, since a reply must continue its prompt · before: from there to the text (an empty think
    block, a space) · after: from the text to the end token · end: that token; "" if the template has none ·
    after_end: what follows that token, as the line feed of ChatML does.
    """

    surplus: str
    before: str
    after: str
    end: str
    after_end: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Text after the prompt `context`: `body`, and `closing` if it ends. Hidden tokens are hidden."""

    context: str
    body: str
    closing: str
    complete: bool  # whether the template left nothing of the text out


class Chat:
    """Conversations as text with one tokenizer's template. `ends`: the end tokens that the model declares."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any], ends: Sequence[str]
    ) -> None:
        unknown = sorted(name for name in arguments if name not in str(tokenizer.chat_template))
        if unknown:
            raise ConfigError(
                f"data.template_arguments: the chat template knows no {', '.join(unknown)}",
                "leave out what the model's template does not read",
            )
        added = tokenizer.added_tokens_decoder
        special = {str(token) for token in added.values() if token.special} | {*tokenizer.all_special_tokens}
        self.special = [*sorted(special, key=lambda token: (-len(token), token)), MARK]
        names = sorted({*special, *map(str, added.values())}, key=len, reverse=True)
        self.control = re.compile(
            "(" + "|".join(map(re.escape, names)) + ")"
        )  # tokens cut a text in sections
        self._ends = ends
        self._template = Template(tokenizer, arguments)

    def prompt(self, prompt: Dialogue) -> str:
        """The conversation with the reply opened. RejectedRow if the template refuses it."""
        messages = messages_of(prompt)
        return self._opened_prompt(messages, self._tokens_to_hide(messages))

    def reply(self, prompt: Dialogue, text: str) -> Reply:
        """The reply as the template writes it after this prompt. RejectedRow if it refuses to."""
        frame = self.frame
        if frame is None:
            raise Refused("it does not show a reply, or refuses a question and its answer")
        messages, answer = messages_of(prompt), {"role": "assistant", "content": text.strip()}
        tokens = self._tokens_to_hide([*messages, answer])
        opened = self._opened_prompt(messages, tokens)
        dialogue = self._fill([*messages, answer], tokens, False)
        if dialogue.startswith(opened):
            tail = dialogue[len(opened) :]
        else:  # templates that write a system message into the last turn: what follows a plain question
            question: Messages = [{"role": "user", "content": _QUESTION}]
            tail = self._fill([*question, answer], tokens, False)[len(self._opened_prompt(question, ())) :]
            if not dialogue.endswith(tail):
                raise Refused("it writes the prompt differently once there is a reply")
        cut = tail.rfind(frame.end) if frame.end else len(tail.rstrip())
        if cut < 0:
            raise Refused("it does not close this reply")
        body = tail[:cut].removesuffix(frame.after)
        letters = "".join(self._hide(answer["content"], tokens).split())
        context = opened[max((m.start() for m in self.control.finditer(opened)), default=0) :]
        complete = letters in "".join(body.split())
        return Reply(context=context, body=body, closing=frame.after + frame.end, complete=complete)

    @cached_property
    def frame(self) -> Frame | None:
        """None if the template shows no reply, or refuses every trial."""
        for system in ([], [{"role": "system", "content": "\ue003"}]):
            question: Messages = [*system, {"role": "user", "content": _QUESTION}]
            try:
                opened = self._template.fill(question)
                dialogue = self._template.fill([*question, {"role": "assistant", "content": _REPLY}], False)
            except RejectedRow:
                continue
            at = dialogue.rfind(_REPLY)
            common = len(os.path.commonprefix([opened, dialogue[: max(at, 0)]]))  # noqa: RUF071 (texts, no paths)
            if opened.rfind(_QUESTION) < common:
                after, end, after_end = self._closing(dialogue[at + len(_REPLY) :])
                before = dialogue[common:at]
                return Frame(
                    surplus=opened[common:], before=before, after=after, end=end, after_end=after_end
                )
        return None

    def _closing(self, tail: str) -> tuple[str, str, str]:
        """The end token in what follows a reply, the first that is declared or else the first at all, between
        what stands before and behind it.
        """
        markers = list(self.control.finditer(tail))
        for match in [m for m in markers if m[0] in self._ends] or markers:
            return tail[: match.start()], match[0], tail[match.end() :]
        return tail.rstrip(), "", ""

    def show(self, text: str) -> str:
        """The text with hidden tokens back in their places."""
        return re.sub(f"{MARK}([0-9]+){MARK}", lambda match: self.special[int(match[1])], text)

    def _hide(self, text: str, tokens: Sequence[str]) -> str:
        if not tokens:
            return text
        spelt = "|".join(map(re.escape, tokens))
        return re.sub(spelt, lambda match: f"{MARK}{self.special.index(match[0])}{MARK}", text)

    def _opened_prompt(self, messages: Messages, tokens: Sequence[str]) -> str:
        text = self._fill(messages, tokens, True)
        return text if self.frame is None else text.removesuffix(self.frame.surplus)

    def _fill(self, messages: Messages, tokens: Sequence[str], opened: bool) -> str:
        return self._template.fill(
            [{**m, "content": self._hide(m["content"], tokens)} for m in messages], opened
        )

    def _tokens_to_hide(self, messages: Messages) -> list[str]:
        """Special tokens that messages spell and the template does not look for."""
        contents = "\n".join(message["content"] for message in messages)
        spelt = [token for token in self.special if token in contents]
        if not spelt:
            return []
        opened = messages[-1]["role"] != "assistant"
        plain = self._template.fill(messages, opened)

        def same(tokens: Sequence[str]) -> bool:
            return self.show(self._fill(messages, tokens, opened)) == plain

        return spelt if same(spelt) else [token for token in spelt if token == MARK or same([token])]


def messages_of(prompt: Dialogue) -> Messages:
    """Messages as templates take them; neighbours of one role are merged, since most want them to take
    turns.
    """
    messages: Messages = []
    for turn in prompt:
        role = ROLES[turn.role]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + turn.text.strip()
        else:
            messages.append({"role": role, "content": turn.text.strip()})
    return messages or [{"role": "user", "content": ""}]  # templates refuse to fill in nothing


def check_unicode(text: str) -> None:
    """DataError if a text is no valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"a text holds half of a surrogate pair at character {error.start + 1}"
        raise DataError(message, "remove it: it is not valid Unicode") from None
