"""A text as a task: its first words are the prompt, what follows is the reply (`data.prompt_words`).

The set-up of controlled sentiment: a model goes on with the beginning of a film review (Ziegler et al. 2019,
arXiv:1909.08593, section 3.1; Rafailov et al. 2023, arXiv:2305.18290, section 6).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from preftune.data.dialogue import Dialogue, Preference, Turn
from preftune.data.hh import one_space
from preftune.data.rows import Tally


def cut_texts(tallies: Sequence[Tally], words: int) -> None:
    """Cut every text after `words` words, in place: rows of text become replies to a prompt.

    Words end at white space. A text without more words than these is left out and counted.
    """
    begin = re.compile(rf"\s*((?:\S+\s+){{{words - 1}}}\S+)\s+(?=\S)")
    for tally in tallies:
        rows = [(_cut_row(row, begin), split) for row, split in zip(tally.rows, tally.splits, strict=True)]
        tally.rows = [row for row, _ in rows if row is not None]
        tally.splits = [split for row, split in rows if row is not None]
        tally.rejected["shorter_than_prompt_words"] += len(rows) - len(tally.rows)
        tally.rejected += Counter()  # drops reasons that occurred 0 times
        tally.kinds["unpaired"] += tally.kinds.pop("text", 0)


def _cut_row(row: Preference, begin: re.Pattern[str]) -> Preference | None:
    match = begin.match(row.chosen)
    if match is None:
        return None
    reply = one_space(row.chosen[match.end() :])
    return replace(row, prompt=Dialogue([Turn("human", match[1])]), chosen=reply)
