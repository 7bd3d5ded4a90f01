"""What is wrong with a file of rows before anything is trained on it: `preftune inspect --data PATH`.

Texts are compared without regard to case and white space. Counts are of all rows; phrases and openings, which
take long, of the first rows, those of train before others. Nothing is guessed: each finding comes with its
count and examples.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from preftune.data import Dataset, Preference
from preftune.data.dataset import KINDS, SPLIT_NAMES
from preftune.evaluation.baselines import tokens
from preftune.evaluation.stats import mcnemar_exact, wilson
from preftune.records.verdict import MIN_PROMPTS

EXAMPLES = 3
READ = 20_000  # rows whose phrases are counted
WORDS = 300  # of a reply that are read for phrases
LONGEST = 4  # words of a phrase
FEW = 10  # pairs in which a phrase must tell the replies apart to be looked at
PHRASES = 10
OPENING = 4  # words
COMMON = 0.05  # share of the replies
LEAK = 5  # words of a reply that must not stand in two splits: a shorter one says nothing
ALPHA = 0.01  # chance that a file without any preferred phrase shows one

Home = tuple[str, Preference]  # split and row
Phrase = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: how many of how many, a sentence, and examples."""

    kind: str
    count: int
    of: int
    text: str
    examples: tuple[str, ...] = ()
    numbers: dict[str, Any] | None = None


def examine(dataset: Dataset) -> list[Finding]:
    """Every look, also those that found nothing (count 0)."""
    homes = [(split, row) for split in SPLIT_NAMES for row in getattr(dataset, split)]
    homes += [("train", row) for row in dataset.undesirable]
    findings = [_duplicates(homes), *_overlaps(homes)]
    if dataset.kind == "prompts":
        return findings
    if dataset.kind == "pairs":
        findings += [_contradictions(homes), _length(homes), *_preferred(homes)]
    return [*findings, _repeated_replies(homes), *_openings(homes)]


def lines(dataset: Dataset, findings: Sequence[Finding]) -> Iterator[tuple[str, Sequence[str]]]:
    """For the terminal."""
    prompts = dataset.report["distinct_prompts"]
    counts = [f"{len(getattr(dataset, name)):,} {name} ({prompts[name]:,} prompts)" for name in SPLIT_NAMES]
    yield f"{', '.join(counts)}: {KINDS[dataset.kind]}", ()
    if dataset.undesirable:
        yield (
            f"{len(dataset.undesirable):,} more of train are undesirable replies, which are looked at, too",
            (),
        )
    if prompts["test"] < MIN_PROMPTS:
        yield (
            f"fewer than {MIN_PROMPTS} prompts to compare policies on: no claim is made; raise data.held_out",
            (),
        )
    if cut := dataset.report.get("cut_from_train"):
        yield f"{' and '.join(cut)} cut from train, by prompt", ()
    yield from ((note, ()) for note in dataset.report.get("notes", []))
    yield "", ()
    yield from ((finding.text, finding.examples) for finding in findings)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _prompt(row: Preference) -> str:
    return _plain(row.prompt.transcript())


def _replies(row: Preference) -> list[str]:
    return [text for text in (row.chosen, row.rejected) if text]


def _home_name(home: Home) -> str:
    split, row = home
    return f"{split} {f'{row.source}:' if row.source else ''}{row.row}"


def _quoted(text: str) -> str:
    line = " ".join(text.split())
    return f"{line[:100]} …" if len(line) > 100 else line


def _duplicates(homes: Sequence[Home]) -> Finding:
    groups = defaultdict[tuple[str, ...], list[Home]](list)
    for home in homes:
        row = home[1]
        groups[_prompt(row), _plain(row.chosen), _plain(row.rejected)].append(home)
    repeated = [group for group in groups.values() if len(group) > 1]
    count = sum(len(group) - 1 for group in repeated)
    examples = [
        f"{', '.join(map(_home_name, group[:4]))}: {_quoted(group[0][1].chosen or _prompt(group[0][1]))}"
        for group in repeated[:EXAMPLES]
    ]
    return Finding(
        kind="duplicates",
        count=count,
        of=len(homes),
        text=f"duplicates: {count:,} of {len(homes):,} rows repeat another one",
        examples=tuple(examples),
    )


def _contradictions(homes: Sequence[Home]) -> Finding:
    """Pairs that stand there in both orders: half of such labels are wrong, whatever the truth is."""
    by_pair = defaultdict[tuple[str, str, str], list[Home]](list)
    contradictory = list[tuple[Home, Home]]()
    for home in homes:
        row = home[1]
        prompt, better, worse = _prompt(row), _plain(row.chosen), _plain(row.rejected)
        if reversed_homes := by_pair.get((prompt, worse, better)):
            contradictory.append((reversed_homes[0], home))
        by_pair[prompt, better, worse].append(home)
    return Finding(
        kind="contradictions",
        count=len(contradictory),
        of=len(homes),
        text=f"contradictions: {len(contradictory):,} pairs also stand there the other way round",
        examples=tuple(
            f"{_home_name(a)} and {_home_name(b)}: {_quoted(b[1].chosen)}"
            for a, b in contradictory[:EXAMPLES]
        ),
    )


def _overlaps(homes: Sequence[Home]) -> Iterator[Finding]:
    """Between each two splits: prompts in both, and replies of some length in both. Texts have no prompt."""
    prompts, replies = (defaultdict[str, dict[str, Home]](dict) for _ in range(2))
    for home in homes:
        if home[1].prompt:
            prompts[home[0]].setdefault(_prompt(home[1]), home)
        for text in _replies(home[1]):
            if len(text.split()) >= LEAK:
                replies[home[0]].setdefault(_plain(text), home)
    for noun, table in (("prompts", prompts), ("replies", replies)):
        for a, b in combinations(SPLIT_NAMES, 2):
            shared = [text for text in table[b] if text in table[a]]
            if not table[a] or not table[b]:
                continue
            longer = f" of {LEAK} words or more" if noun == "replies" else ""
            examples = [
                f"{_home_name(table[a][t])} and {_home_name(table[b][t])}: {_quoted(t)}" for t in shared
            ]
            yield Finding(
                kind=f"overlap of {noun}",
                count=len(shared),
                of=len(table[b]),
                text=f"overlap: {len(shared):,} of {len(table[b]):,} {noun}{longer} in {b} are in {a}, too",
                examples=tuple(examples[:EXAMPLES]),
                numbers={"splits": [a, b]},
            )


def _repeated_replies(homes: Sequence[Home]) -> Finding:
    """The same words in answer to different prompts."""
    uses = defaultdict[str, set[str]](set)
    for _, row in homes:
        for text in _replies(row):
            uses[_plain(text)].add(_prompt(row))
    several = sorted(((len(p), text) for text, p in uses.items() if len(p) > 1), key=lambda x: (-x[0], x[1]))
    return Finding(
        kind="repeated replies",
        count=len(several),
        of=len(uses),
        text=f"repeated replies: {len(several):,} of {len(uses):,} replies answer more than one prompt",
        examples=tuple(f"{n} prompts: {_quoted(text)}" for n, text in several[:EXAMPLES]),
    )


def _length(homes: Sequence[Home]) -> Finding:
    sizes = [(len(row.chosen.split()), len(row.rejected.split())) for _, row in homes]
    differ = [(a, b) for a, b in sizes if a != b]
    longer = sum(a > b for a, b in differ)
    share = longer / len(differ) if differ else 0.5
    low, high = wilson(longer, len(differ))
    means = [sum(size[side] for size in sizes) / max(len(sizes), 1) for side in (0, 1)]
    biased = not low <= 0.5 <= high
    best = max(share, 1 - share)
    verdict = (
        f'; "the {"longer" if share > 0.5 else "shorter"} one" is right in {best:.0%} without reading'
        if biased
        else ": no bias is seen"
    )
    text = (
        f"length: the chosen reply is the longer one in {share:.1%} [{100 * low:.1f}, {100 * high:.1f}] of "
        f"{len(differ):,} pairs ({means[0]:.1f} and {means[1]:.1f} words on average){verdict}"
    )
    numbers = {"share": share, "interval": [low, high], "words": means}
    return Finding(kind="length bias", count=longer, of=len(differ), text=text, numbers=numbers)


def _phrases(text: str, n: int, parts: set[Phrase]) -> set[Phrase]:
    """The phrases of `n` words of a reply, of those whose shorter parts are among these."""
    words = tokens(text[: WORDS * 20])[:WORDS]
    phrases = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return {p for p in phrases if p[1:] in parts and p[:-1] in parts} if n > 1 else phrases


def _telling(homes: Sequence[Home]) -> tuple[dict[Phrase, int], dict[Phrase, int]]:
    """In how many pairs the chosen, and in how many the rejected reply alone has a phrase; of phrases for
    which that is FEW pairs or more. A phrase can stand in FEW replies only if its parts do: counted by
    length, the rare ones, which are most, take no memory.
    """
    by_side, parts = (dict[Phrase, int](), dict[Phrase, int]()), set[Phrase]()
    for n in range(1, LONGEST + 1):
        only, replies = (Counter[Phrase](), Counter[Phrase]()), Counter[Phrase]()
        for _, row in homes[:READ]:
            better, worse = _phrases(row.chosen, n, parts), _phrases(row.rejected, n, parts)
            only[0].update(better - worse)
            only[1].update(worse - better)
            replies.update(better)
            replies.update(worse)
        parts = {phrase for phrase, count in replies.items() if count >= FEW}
        common = [phrase for phrase in parts if only[0][phrase] + only[1][phrase] >= FEW]
        for side, counts in zip(by_side, only, strict=True):
            side.update((phrase, counts[phrase]) for phrase in common)
    return by_side


def _preferred(homes: Sequence[Home]) -> Iterator[Finding]:
    """Phrases that tell chosen from rejected: in how many pairs one reply alone has them (McNemar, exact;
    Bonferroni over all phrases that were looked at). A longer phrase that says no more than a part of it,
    and a part that says no more than the whole, are left out.
    """
    only = _telling(homes)
    common = list(only[0])

    def strength(phrase: Phrase) -> float:
        """McNemar's chi-square."""
        a, b = only[0][phrase], only[1][phrase]
        return (a - b) ** 2 / (a + b)

    for side, name, opposite in ((0, "chosen", "rejected"), (1, "rejected", "chosen")):
        ahead = [phrase for phrase in common if only[side][phrase] > only[1 - side][phrase]]
        ahead.sort(key=lambda phrase: (-strength(phrase), -len(phrase), phrase))
        best = list[Phrase]()
        for phrase in ahead[: 10 * PHRASES]:
            if len(best) == PHRASES or mcnemar_exact(only[0][phrase], only[1][phrase]) * len(common) > ALPHA:
                break
            if not any(_within(phrase, earlier) or _within(earlier, phrase) for earlier in best):
                best.append(phrase)
        yield Finding(
            kind=f"phrases of {name} replies",
            count=len(best),
            of=len(common),
            text=f"phrases: {len(best) or 'none'} of {len(common):,} (1 to {LONGEST} words) "
            f"{'occur' if best else 'occurs'} more in the {name} reply",
            examples=tuple(
                f"{' '.join(p)}: in {only[side][p]:,} pairs in the {name} reply alone, in "
                f"{only[1 - side][p]:,} in the {opposite}"
                for p in best
            ),
        )


def _within(inner: Phrase, outer: Phrase) -> bool:
    return any(outer[i : i + len(inner)] == inner for i in range(len(outer) - len(inner) + 1))


def _openings(homes: Sequence[Home]) -> Iterator[Finding]:
    """First words that many replies share."""
    starts: Iterable[list[str]] = (
        tokens(t[:200])[:OPENING] for _, row in homes[:READ] for t in _replies(row)
    )
    counts = Counter(tuple(words) for words in starts if len(words) == OPENING)
    total = counts.total()
    common = [(n, words) for words, n in counts.most_common(EXAMPLES) if n >= COMMON * total and n > 1]
    yield Finding(
        kind="openings",
        count=len(common),
        of=total,
        text=f"openings: {len(common) or 'none'} of {OPENING} words {'begin' if common else 'begins'} "
        f"{COMMON:.0%} of the replies or more",
        examples=tuple(f"{' '.join(words)}: {n / total:.1%} of {total:,} replies" for n, words in common),
    )
