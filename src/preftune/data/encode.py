"""Text to token ids, the same way for training, sampling and scoring.

The ids of a prompt do not depend on its reply. The ids of a reply are those that it has after its prompt in
the joined text: with a byte-level vocabulary the same as those of the reply alone, with a tokenizer that puts
a space in front of every text (Llama 2) not. Only `batch` pads.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from preftune.data.batch import (
    PairIds,
    Pairs,
    Prompts,
    Sequences,
    compact,
    pad_pairs,
    pad_prompts,
    pad_sequences,
)
from preftune.data.chat import MARK, Chat, Reply, check_unicode
from preftune.data.dialogue import Dialogue, Preference, Turn
from preftune.data.hh import RejectedRow
from preftune.errors import ConfigError
from preftune.isolated import no_panic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 64  # a text of more characters than this per allowed token is shortened before it is encoded
UNLIMITED = 1 << 20  # tokens of context, where a model states no limit
_QUESTION = Turn("human", " Hi")  # asked where a reply is wanted without its prompt
_OPENED = "\n\nAssistant:"  # the end of every transcript


class Encoder:
    """Encodes prompts and responses with one tokenizer.

    form "transcript": the HH transcript, ending in "Assistant:"; "chat": the tokenizer's own chat template
    (`template_arguments`: what else it is given) with the reply opened; "plain": the texts alone.

    `ends`: ids at which the model declares that a reply ends, beside the one that training appends
    (`eos_id`): the template's turn end, or the tokenizer's. Lengths are in tokens; `max_response_length`
    counts the end token, `max_length` (None: unlimited) is the model's context. `whole_turns`: replies go on
    to the end of what the template writes (see `after_end`). Text that spells a special token is encoded as
    plain text. Raises ConfigError if the tokenizer has no end token or, for "chat", no template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        form: Literal["transcript", "chat", "plain"],
        max_prompt_length: int,
        max_response_length: int,
        max_length: int | None = None,
        *,
        ends: Sequence[int] = (),
        template_arguments: Mapping[str, Any] = {},
        whole_turns: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end token", "use a model whose tokenizer defines eos_token"
            )
        if form == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                "data.form=chat, but the tokenizer has no chat template", "use data.form=transcript"
            )
        if min(max_prompt_length, max_response_length) < 1:
            raise ConfigError("data.max_prompt_length and data.max_response_length must be 1 or more")
        self.tokenizer = tokenizer
        self.form = form
        self.template_arguments = dict(template_arguments)
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.max_length = max_length
        self.whole_turns = whole_turns
        end: Any = tokenizer.eos_token_id  # the library allows lists; no causal model's tokenizer has one
        pad: Any = tokenizer.pad_token_id
        self._eos_id: int = end
        self._declared = tuple(ends)
        # Any id will do for padding, since masks come from lengths.
        self.pad_id: int = end if pad is None else pad
        begin = tokenizer("a").input_ids[:1]
        self._begin: list[int] = begin if begin == [tokenizer.bos_token_id] else []
        self._apart = self._is_apart()
        names: Any = tokenizer.convert_ids_to_tokens(list(ends))
        self._chat = Chat(tokenizer, template_arguments, names) if form == "chat" else None

    @cached_property
    def eos_id(self) -> int:
        """The end token that training appends: that of the template's turns, or the tokenizer's."""
        frame = self._chat.frame if self._chat else None
        end: Any = self.tokenizer.convert_tokens_to_ids(frame.end) if frame and frame.end else self._eos_id
        return end

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a reply, `eos_id` first."""
        return tuple(dict.fromkeys([self.eos_id, self._eos_id, *self._declared]))

    @cached_property
    def after_end(self) -> list[int]:
        """Ids of what the template writes behind a reply's end token, where whole turns are read: ChatML's
        line feed. Judges of TRL and of others are trained on whole conversations and read their score there,
        but not on padding: transformers' classifiers look past it.
        """
        frame = self._chat.frame if self._chat and self.whole_turns else None
        ids = self._encode(frame.end + frame.after_end, special=True)[1:] if frame and frame.end else []
        while ids and ids[-1] == self.tokenizer.pad_token_id:
            ids.pop()
        return ids

    def prompt(self, prompt: Dialogue, limit: int | None = None) -> list[int]:
        """Token ids of a prompt, at least one and at most `limit` (`max_prompt_length`).

        A prompt that is too long loses its oldest turns and then begins with a human turn; if the last human
        turn alone is too long, that turn loses its beginning.
        """
        return self._fit(prompt, limit or self.max_prompt_length)[0]

    def response(self, text: str, ended: bool = True, prompt: Dialogue | None = None) -> list[int]:
        """Token ids of a response, at most `max_response_length`, closed by the end token if `ended` and not
        cut. In chat form it is what the template writes after `prompt`, or after a short question.
        """
        return self._reply(Dialogue([_QUESTION]) if prompt is None else prompt, text, ended)[0]

    def accepts(self, prompt: Dialogue) -> bool:
        """Whether the prompt can be encoded: some chat templates refuse a system message."""
        try:
            return bool(self.prompt(prompt))
        except RejectedRow:
            return False

    @property
    def as_before(self) -> bool:
        """Whether ids and ends are the same as before templates and declared ends were read: stages from that
        time are then still valid.
        """
        return self._chat is None and self._apart and self.ends == (self._eos_id,)

    def text(self, text: str) -> list[int]:
        """Token ids of a prompt given as finished text, template and all; it is not shortened. In chat form
        the template's markers are the tokens that they are.
        """
        if self._chat is None:
            return self._begin + self._plain(text) or [self._eos_id]
        return self._encode(text, special=True) or [self._eos_id]

    def sequence(self, prompt: Dialogue, response: str, ended: bool = True) -> tuple[list[int], list[int]]:
        """Prompt and response ids. Raises RejectedRow: together they exceed `max_length`, or the chat
        template refuses them or leaves a part of the response out.
        """
        prompt_ids, turns = self._fit(prompt, self.max_prompt_length)
        response_ids = self._whole_reply(turns, response, ended)
        self._check_length(len(prompt_ids) + len(response_ids))
        return prompt_ids, response_ids

    def pair(self, preference: Preference) -> tuple[list[int], list[int], list[int]]:
        """Prompt, chosen and rejected ids; [] for a reply that is not there. Raises RejectedRow as `sequence`
        does, and if truncation has made the responses equal.
        """
        prompt_ids, turns = self._fit(preference.prompt, self.max_prompt_length)
        chosen, rejected = (
            self._whole_reply(turns, text, ended) if text else []
            for text, ended in zip((preference.chosen, preference.rejected), preference.ended, strict=True)
        )
        if chosen == rejected:
            raise RejectedRow("response_too_long_became_equal")
        self._check_length(len(prompt_ids) + max(len(chosen), len(rejected)))
        return prompt_ids, chosen, rejected

    def usable(self, preferences: Iterable[Preference]) -> tuple[list[Preference], dict[str, int]]:
        """The preferences that `pair` can encode, and the number of others by reason."""
        rejected = Counter[str]()
        encodable = [preference for preference, _ in self.encoded(preferences, rejected)]
        return encodable, dict(sorted(rejected.items()))

    def encoded(
        self, preferences: Iterable[Preference], rejected: Counter[str]
    ) -> Iterator[tuple[Preference, PairIds]]:
        """The preferences that `pair` can encode, with their ids; the others are counted by reason."""
        for preference in preferences:
            try:
                ids = self.pair(preference)
            except RejectedRow as error:
                rejected[error.reason] += 1
            else:
                yield preference, PairIds(*map(compact, ids))

    def pairs(self, preferences: Sequence[Preference]) -> Pairs:
        """A batch of pairs, (B, T) each; raises what `pair` raises."""
        return pad_pairs([PairIds(*self.pair(preference)) for preference in preferences], self.pad_id)

    def sequences(
        self, items: Sequence[tuple[Dialogue, str]], ended: bool | Sequence[bool] = True
    ) -> Sequences:
        """A batch of (prompt, response) texts, (B, T). `ended`: whether EOS follows, for all or for each."""
        flags = [ended] * len(items) if isinstance(ended, bool) else ended
        rows = [self.sequence(*item, flag) for item, flag in zip(items, flags, strict=True)]
        return pad_sequences([row[0] for row in rows], [row[1] for row in rows], self.pad_id)

    def prompts(self, prompts: Sequence[Dialogue], seeds: Sequence[int]) -> Prompts:
        """A left-padded batch for the sampler, (B, P), with the seed of each prompt's sampling."""
        return pad_prompts([self.prompt(prompt) for prompt in prompts], seeds, self.pad_id)

    def readable_prompt(self, prompt: Dialogue) -> str:
        """A prompt as people and reward functions read it: texts in plain form, else the transcript."""
        if self.form != "plain":
            return prompt.transcript()
        return "\n\n".join(turn.text.strip() for turn in prompt)

    def prompt_text(self, ids: Sequence[int]) -> str:
        """The text of prompt ids, without the token that begins every text."""
        ids, begin = list(ids), self._begin
        return self.text_of(ids[len(begin) :] if ids[: len(begin)] == begin else ids)

    def decode(self, ids: Sequence[int], prompt: Sequence[int] | None = None) -> str:
        """The text of response ids up to the first end token, which is left out; nothing is tidied up. In
        chat form, what the template writes around a reply is left out, too. `prompt`: the ids that the
        response follows.
        """
        ids = list(ids)
        ids = ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids))]
        text = self._text(ids, self._context if prompt is None else list(prompt))
        frame = self._chat.frame if self._chat else None
        if frame is None:
            return text
        text = text.removeprefix(frame.before).removesuffix(frame.after)
        return text if self._apart else text.removeprefix(" ")  # of a token behind a marker

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of all these ids, special tokens included; nothing is tidied up."""
        # Any: the library's annotation is that of a whole batch, too.
        text: Any = self.tokenizer.decode(
            [*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _check_length(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise RejectedRow("longer_than_context")

    def _fit(self, prompt: Dialogue, limit: int) -> tuple[list[int], Dialogue]:
        """Ids of what is kept of a prompt, and the turns that they are of."""
        if _size(prompt) <= CHARACTERS * limit:
            ids = self._whole_prompt(prompt)
            if len(ids) <= limit:
                return ids, prompt
        starts = [i for i, turn in enumerate(prompt) if turn.role == "human"]
        fitting: tuple[list[int], Dialogue] | None = None
        for start in reversed(starts):
            tail = Dialogue(prompt[start:])
            ids = self._whole_prompt(tail) if _size(tail) <= CHARACTERS * limit else None
            if ids is None or len(ids) > limit:
                break
            fitting = ids, tail
        return fitting or self._shortened(Dialogue(prompt[starts[-1] :] if starts else prompt), limit)

    def _whole_prompt(self, prompt: Dialogue) -> list[int]:
        if self._chat is not None:
            ids = self._template_ids(self._chat.prompt(prompt))
        else:
            ids = self._begin + self._plain(self.readable_prompt(prompt))
        return ids or [self._eos_id]  # a model needs one token to start from

    def _shortened(self, prompt: Dialogue, limit: int) -> tuple[list[int], Dialogue]:
        """A prompt whose first turn alone is too long, with that turn cut from the left."""
        if not prompt:
            return self._whole_prompt(prompt)[-limit:], prompt
        first, later_turns = prompt[0], prompt[1:]
        text = self._plain(first.text[-CHARACTERS * limit :])[-limit:]
        while True:
            cut = Turn(first.role, self.text_of(text).lstrip("\ufffd"))  # the cut may have halved a character
            shortened = Dialogue([cut, *later_turns])
            ids = self._whole_prompt(shortened)
            excess = len(ids) - limit
            if excess <= 0 or not text:
                return ids[-limit:], shortened
            text = text[excess:]

    def _whole_reply(self, prompt: Dialogue, text: str, ended: bool = True) -> list[int]:
        ids, complete = self._reply(prompt, text, ended)
        if not complete:
            raise RejectedRow("changed_by_template")
        return ids

    def _reply(self, prompt: Dialogue, text: str, ended: bool) -> tuple[list[int], bool]:
        """Ids of a reply, and whether the chat template left none of its text out."""
        limit = self.max_response_length
        bounded = text[: CHARACTERS * limit]
        if self._chat is None:
            reply, end = Reply(context=_OPENED, body=bounded, closing="", complete=True), [self.eos_id]
        else:
            reply, frame = self._chat.reply(prompt, bounded), self._chat.frame
            end = [] if frame and frame.end else [self.eos_id]
        if ended and len(bounded) == len(text):
            ids = self._behind(reply.context, reply.body + reply.closing) + end + self.after_end
            if len(ids) <= limit:
                return ids, reply.complete
        return self._behind(reply.context, reply.body)[:limit], reply.complete

    def _behind(self, context: str, text: str) -> list[int]:
        """Ids of a text as they are behind another. Where the two share a token, those of the text alone:
        the prompt's ids stay what the sampler begins with.
        """
        if self._chat is None and self._apart:
            return self._plain(text)
        encode = self._plain if self._chat is None else self._template_ids
        before, joined = encode(context), encode(context + text)
        if joined[: len(before)] == before:
            return joined[len(before) :]
        return self._inside(text) if self._chat is None else self._template_ids(text, first=False)

    def _inside(self, text: str) -> list[int]:
        """Ids of plain text that does not begin a text."""
        if self._apart:
            return self._plain(text)
        before, joined = self._plain("\n"), self._plain("\n" + text)
        return joined[len(before) :] if joined[: len(before)] == before else self._plain(text)

    def _is_apart(self) -> bool:
        """Whether a text has the same ids, and ids the same text, alone as behind others."""
        for before, text in ((_OPENED, " Yes."), ("\n", "Yes.")):
            first, second = self._plain(before), self._plain(text)
            if first + second != self._plain(before + text):
                return False
            if self.text_of(first) + self.text_of(second) != self.text_of(first + second):
                return False
        return True

    def _template_ids(self, text: str, first: bool = True) -> list[int]:
        """Ids of what a chat template wrote: its markers are tokens, hidden tokens plain text. `first`:
        whether the text begins a sequence.
        """
        assert self._chat is not None
        pieces = self._chat.control.split(text) if MARK in text or not first else [text]
        ids: list[int] = []
        run = ""  # what may be encoded at once: no hidden token is in it
        for i, piece in enumerate(pieces):
            goes_on = i == 0 and not first  # from what stands before the text
            if MARK in piece or (piece and goes_on):
                ids += self._encode(run, special=True) if run else []
                run = ""
                plain = self._chat.show(piece)
                anew = first if i == 0 else self._anew
                ids += self._plain(plain) if anew else self._inside(plain)
            else:
                run += piece
        return ids + (self._encode(run, special=True) if run else [])

    @cached_property
    def _anew(self) -> bool:
        """Whether text after a special token is encoded as if it began a text."""
        return self._encode(f"{self.tokenizer.eos_token}Yes", special=True)[1:] == self._plain("Yes")

    @cached_property
    def _context(self) -> list[int]:
        """The end of some prompt, to decode a reply behind."""
        if self._apart:
            return []
        return self._plain(_OPENED) if self._chat is None else self._whole_prompt(Dialogue([_QUESTION]))

    def _text(self, ids: list[int], before: list[int]) -> str:
        """Text of ids behind others."""
        if self._apart:
            return self.text_of(ids)
        start, text = self.text_of(before), self.text_of(before + ids)
        return text[len(start) :] if text.startswith(start) else self.text_of(ids)

    def _plain(self, text: str) -> list[int]:
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of exactly this text: no padding, cutting or extra tokens, whatever tokenizer.json or others
        have set.
        """
        if not text.isascii():
            check_unicode(text)
        with no_panic():
            encoded: Any = self.tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=not special,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                verbose=False,
            )
        return encoded.input_ids


def _size(prompt: Dialogue) -> int:
    return sum(len(turn.text) for turn in prompt)
