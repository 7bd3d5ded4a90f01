"""Text to token ids, the same way for training, sampling and scoring.

Prompt and response are encoded apart and joined: the prompt ends in ":" and the response starts with a space,
so this is what encoding the joined text would give, and the boundary is never in doubt. Padding is in `batch`
alone.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
from preftune.data.dialogue import Dialogue, Preference, Turn
from preftune.data.hh import RejectedRow
from preftune.data.template import Template
from preftune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 64  # a text of more characters than this per allowed token is shortened before it is encoded
UNLIMITED = 1 << 20  # tokens of context, where a model states no limit
SLOT = re.compile("\ue000([0-9]+)\ue001")  # stands for a message while the chat template is filled in


class Encoder:
    """Encodes prompts and responses with one tokenizer.

    form "transcript": the HH transcript, ending in "Assistant:"; "chat": the tokenizer's own chat template
    with the reply opened. Lengths are in tokens; `max_response_length` counts the end token, `max_length`
    (None: unlimited) is the model's context. Text that spells a special token is encoded as plain text.
    Raises ConfigError if the tokenizer has no end token or, for "chat", no template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        form: Literal["transcript", "chat"],
        max_prompt_length: int,
        max_response_length: int,
        max_length: int | None = None,
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
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.max_length = max_length
        end: Any = tokenizer.eos_token_id  # the library allows lists; no causal model's tokenizer has one
        pad: Any = tokenizer.pad_token_id
        self.eos_id: int = end
        # Any id will do for padding, since masks come from lengths.
        self.pad_id: int = end if pad is None else pad
        begin = tokenizer("a").input_ids[:1]
        self._begin: list[int] = begin if begin == [tokenizer.bos_token_id] else []
        self._special = tuple(tokenizer.all_special_tokens)
        self._template = Template(tokenizer)

    @classmethod
    def of_texts(cls, tokenizer: "PreTrainedTokenizerBase", context: int) -> "Encoder":
        """For prompts and responses as they are: nothing is cut that fits into `context` (0: unlimited)."""
        limit = context or UNLIMITED
        return cls(
            tokenizer, "transcript", max_prompt_length=limit, max_response_length=limit, max_length=limit
        )

    def prompt(self, prompt: Dialogue) -> list[int]:
        """Token ids of a prompt, at least one and at most `max_prompt_length`.

        A prompt that is too long loses its oldest turns and then begins with a human turn; if the last human
        turn alone is too long, that turn loses its beginning.
        """
        limit = self.max_prompt_length
        if _size(prompt) <= CHARACTERS * limit:
            ids = self._whole_prompt(prompt)
            if len(ids) <= limit:
                return ids
        starts = [i for i, turn in enumerate(prompt) if turn.role == "human"]
        kept: list[int] = []
        for start in reversed(starts):
            tail = Dialogue(prompt[start:])
            ids = self._whole_prompt(tail) if _size(tail) <= CHARACTERS * limit else None
            if ids is None or len(ids) > limit:
                break
            kept = ids
        return kept or self._shortened(Dialogue(prompt[starts[-1] :] if starts else prompt))

    def response(self, text: str, ended: bool = True) -> list[int]:
        """Token ids of a response, at most `max_response_length`, closed by the end token if `ended` and not
        cut.
        """
        limit = self.max_response_length
        shown = text[: CHARACTERS * limit]
        ids = self._plain(shown.strip() if self.form == "chat" else shown)
        whole = len(shown) == len(text) and len(ids) + ended <= limit
        return ids + [self.eos_id] * ended if whole else ids[:limit]

    def text(self, text: str) -> list[int]:
        """Token ids of a prompt given as finished text, template and all; it is not shortened."""
        return self._begin + self._plain(text) or [self.eos_id]

    def sequence(self, prompt: Dialogue, response: str, ended: bool = True) -> tuple[list[int], list[int]]:
        """Prompt and response ids. Raises RejectedRow("longer_than_context") if together they exceed
        `max_length`.
        """
        prompt_ids, response_ids = self.prompt(prompt), self.response(response, ended)
        self._check_length(len(prompt_ids) + len(response_ids))
        return prompt_ids, response_ids

    def pair(self, preference: Preference) -> tuple[list[int], list[int], list[int]]:
        """Prompt, chosen and rejected ids. Raises RejectedRow as `sequence` does, and if truncation has made
        the responses equal.
        """
        prompt_ids = self.prompt(preference.prompt)
        chosen, rejected = self.response(preference.chosen), self.response(preference.rejected)
        if chosen == rejected:
            raise RejectedRow("response_too_long_became_equal")
        self._check_length(len(prompt_ids) + max(len(chosen), len(rejected)))
        return prompt_ids, chosen, rejected

    def usable(self, preferences: Iterable[Preference]) -> tuple[list[Preference], dict[str, int]]:
        """The preferences that `pair` can encode, and the number of others by reason."""
        rejected = Counter[str]()
        kept = [preference for preference, _ in self.encoded(preferences, rejected)]
        return kept, dict(sorted(rejected.items()))

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
        """A batch of (prompt, response) texts, (B, T); `ended` tells, for all or for each, whether EOS
        follows.
        """
        flags = [ended] * len(items) if isinstance(ended, bool) else ended
        rows = [self.sequence(*item, flag) for item, flag in zip(items, flags, strict=True)]
        return pad_sequences([row[0] for row in rows], [row[1] for row in rows], self.pad_id)

    def prompts(self, prompts: Sequence[Dialogue], seeds: Sequence[int]) -> Prompts:
        """A left-padded batch for the sampler, (B, P), with the seed of each prompt's sampling."""
        return pad_prompts([self.prompt(prompt) for prompt in prompts], seeds, self.pad_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response ids up to the first end token, which is left out; nothing is tidied up."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.text_of(ids)

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

    def _whole_prompt(self, prompt: Dialogue) -> list[int]:
        ids = self._chat(prompt) if self.form == "chat" else self._begin + self._plain(prompt.transcript())
        return ids or [self.eos_id]  # a model needs one token to start from

    def _shortened(self, prompt: Dialogue) -> list[int]:
        """A prompt whose first turn alone is too long, with that turn cut from the left."""
        limit = self.max_prompt_length
        if not prompt:
            return self._whole_prompt(prompt)[-limit:]
        first, rest = prompt[0], prompt[1:]
        text = self._plain(first.text[-CHARACTERS * limit :])[-limit:]
        while True:
            cut = Turn(first.role, self.text_of(text).lstrip("\ufffd"))  # the cut may have halved a character
            ids = self._whole_prompt(Dialogue([cut, *rest]))
            excess = len(ids) - limit
            if excess <= 0 or not text:
                return ids[-limit:]
            text = text[excess:]

    def _chat(self, prompt: Dialogue) -> list[int]:
        """The chat template around the messages; neighbours of one role are merged, as templates want them to
        take turns.

        Where a message spells a special token, template and messages are encoded apart, so that it stays
        plain text.
        """
        messages: list[dict[str, str]] = []
        for turn in prompt:
            role = "user" if turn.role == "human" else turn.role
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n\n" + turn.text.strip()
            else:
                messages.append({"role": role, "content": turn.text.strip()})
        messages = messages or [{"role": "user", "content": ""}]  # templates refuse to fill in nothing
        contents = [message["content"] for message in messages]
        if not any(token in content for token in self._special for content in contents):
            return self._encode(self._template.fill(messages), special=True)
        slots = [{"role": m["role"], "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        pieces = SLOT.split(self._template.fill(slots))  # template, number, template, number, ...
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += self._plain(contents[int(piece)]) if i % 2 else self._encode(piece, special=True)
        return ids

    def _plain(self, text: str) -> list[int]:
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of exactly this text: no padding, cutting or extra tokens, whatever tokenizer.json or others
        have set.
        """
        if not text.isascii():
            _check_unicode(text)
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


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"a text holds half of a surrogate pair at character {error.start + 1}"
        raise DataError(message, "remove it: it is not valid Unicode") from None


def first_usable(
    encoder: Encoder, rows: Iterable[Preference], limit: int | None
) -> tuple[list[Preference], dict[str, int]]:
    """The first `limit` rows that can be encoded, and the number of others met on the way, by reason.

    Raises DataError if there is none.
    """
    kept, _, rejected = first_encoded(encoder, rows, limit)
    return kept, rejected


def first_encoded(
    encoder: Encoder, rows: Iterable[Preference], limit: int | None
) -> tuple[list[Preference], list[PairIds], dict[str, int]]:
    """`first_usable`, with the token ids of the kept rows: for those who read them more than once."""
    rejected = Counter[str]()
    kept = list(itertools.islice(encoder.encoded(rows, rejected), limit))
    if not kept:
        raise DataError(
            f"none of the pairs can be used: {dict(rejected)}",
            "raise data.max_prompt_length or data.max_response_length, or check the data",
        )
    return [row for row, _ in kept], [ids for _, ids in kept], dict(rejected)


def distinct_prompts(
    encoder: Encoder, rows: Iterable[Preference]
) -> tuple[list[Preference], list[Sequence[int]]]:
    """The first row of each prompt and the prompt's ids, in the order of the rows.

    Prompts are the same if their ids are: two that differ only in turns for which there is no room count as
    one.
    """
    known: set[bytes] = set()
    firsts, prompts = list[Preference](), list[Sequence[int]]()
    for row in rows:
        ids = compact(encoder.prompt(row.prompt))
        if (content := ids.tobytes()) not in known:
            known.add(content)
            firsts.append(row)
            prompts.append(ids)
    return firsts, prompts
