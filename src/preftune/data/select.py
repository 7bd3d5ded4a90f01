"""Which rows a stage can use, once each, and what truncation has made of them."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from preftune.data.batch import PairIds, compact
from preftune.data.dialogue import Preference
from preftune.data.encode import Encoder
from preftune.data.hh import REASONS, RejectedRow
from preftune.errors import DataError


def first_encoded(
    encoder: Encoder, rows: Iterable[Preference], limit: int | None
) -> tuple[list[Preference], list[PairIds], dict[str, int]]:
    """The first `limit` rows that can be encoded, their token ids, and the number of others met on the way,
    by reason. Raises DataError if there is none.
    """
    rejected = Counter[str]()
    encoded = list(itertools.islice(encoder.encoded(rows, rejected), limit))
    if not encoded and not rejected:
        raise DataError(
            "there are no rows to choose from", "check the data, and the stage's part and sources"
        )
    if not encoded:
        verb = "lower" if set(rejected) == {"longer_than_context"} else "raise"
        reasons = "; ".join(f"{n} {reason}: {REASONS[reason]}" for reason, n in rejected.most_common())
        raise DataError(
            f"none of the pairs can be used: {reasons}",
            f"{verb} data.max_prompt_length or data.max_response_length, or check the data",
        )
    return [row for row, _ in encoded], [ids for _, ids in encoded], dict(rejected)


def remarks(encoder: Encoder, encoded: Sequence[PairIds], rejected: Mapping[str, int]) -> Iterator[str]:
    """What truncation has made of the rows, in sentences with the keys that change it."""
    if equal := rejected.get("response_too_long_became_equal"):
        yield (
            f"pairs left out: {equal:,}, whose replies are equal in the first "
            f"data.max_response_length = {encoder.max_response_length} tokens; raise it to keep them"
        )
    contents = ([compact(ids).tobytes() for ids in (p.prompt, p.chosen, p.rejected)] for p in encoded)
    if repeats := len(encoded) - len(set(map(tuple, contents))):
        yield (
            f"{repeats:,} of {len(encoded):,} rows ({repeats / len(encoded):.1%}) repeat an earlier one "
            f"after truncation and are kept (data.max_prompt_length = {encoder.max_prompt_length}, "
            f"data.max_response_length = {encoder.max_response_length})"
        )


def distinct_prompts(
    encoder: Encoder, rows: Iterable[Preference], limit: int | None = None
) -> tuple[list[Preference], list[Sequence[int]]]:
    """The first row of each prompt and the prompt's ids, in the order of the rows, at most `limit` of them.

    Prompts are the same if their ids are: two that differ only in turns for which there is no room count as
    one. Those that a chat template refuses are left out; its refusal is raised if it refuses all.
    """
    contents: set[bytes] = set()
    refusal: RejectedRow | None = None
    firsts, prompts = list[Preference](), list[Sequence[int]]()
    for row in rows:
        if len(firsts) == limit:
            break
        try:
            ids = compact(encoder.prompt(row.prompt))
        except RejectedRow as error:
            refusal = error
            continue
        if (content := ids.tobytes()) not in contents:
            contents.add(content)
            firsts.append(row)
            prompts.append(ids)
    if refusal is not None and not firsts:
        raise refusal
    return firsts, prompts
