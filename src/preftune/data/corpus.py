"""What a base model from scratch learns to read: documents in an order, and a tokenizer for them.

On real text a document is a whole transcript, chosen and rejected replies alike: a base model knows bad
replies too.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preftune.data.dialogue import Preference
from preftune.data.loader import rows_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
LONGEST_TOKEN = 1000  # characters, in a vocabulary that is learnt here
_LONG_RUN = re.compile(rf"(\S{{{LONGEST_TOKEN}}})\S+|(\s{{{LONGEST_TOKEN}}})\s+")
_BUCKET = 8  # batches whose documents are sorted by length together, against padding


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, and whether their order matters (a curriculum) or is shuffled again each epoch."""

    documents: Sequence[str]
    ordered: bool

    def batches(self, lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
        """Document numbers of every step. Neighbouring batches hold documents of like length."""
        n = len(self.documents)
        batches: list[list[int]] = []
        for first in range(0, steps, _BUCKET):
            span = range(first, min(first + _BUCKET, steps))
            rows = [row for step in span for row in self._rows(step, batch_size, n, seed)]
            rows.sort(key=lambda row: (lengths[row], row))
            bucket = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
            batches += [bucket[i] for i in rows_at(0, len(bucket), len(bucket), seed, f"base/{first}")]
        return batches

    def _rows(self, step: int, batch_size: int, n: int, seed: int) -> list[int]:
        if self.ordered:
            return [i % n for i in range(step * batch_size, (step + 1) * batch_size)]
        return rows_at(step, batch_size, n, seed, "base")


def transcripts(train: Sequence[Preference]) -> Corpus:
    """Every transcript of the training pairs, chosen and rejected."""
    return Corpus(list(_transcripts(train)), ordered=False)


def train_tokenizer(train: Sequence[Preference], vocab_size: int) -> "PreTrainedTokenizerBase":
    """A byte-level BPE of `vocab_size` entries learnt on the transcripts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # To learn from one word takes time that grows with the square of its length: minutes for a megabyte.
    texts = (_LONG_RUN.sub(r"\1\2", text) for text in _transcripts(train))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, clean_up_tokenization_spaces=False
    )


def _transcripts(train: Sequence[Preference]) -> Iterator[str]:
    for pair in train:
        prompt = pair.prompt.transcript() if pair.prompt else ""  # a text has no roles
        yield from (prompt + reply for reply in (pair.chosen, pair.rejected) if reply)
