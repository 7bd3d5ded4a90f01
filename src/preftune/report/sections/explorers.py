"""Samples side by side and the reward model's mistakes, as cards; no more of them than a page can bear."""

import html
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from preftune.records.reward_model import Mistake
from preftune.records.run import SampleRow
from preftune.report.blocks import Card, Explorer, Passage
from preftune.report.shades import level, scale_of
from preftune.report.text import MAX_QUOTE, clean, cut_note, number
from preftune.report.view import RunView

# Bytes of each kind of card in the page: together with the figures it stays under 3 MB.
SAMPLE_BYTES = 1_200_000
MISTAKE_BYTES = 900_000
CARD_BYTES, PASSAGE_BYTES, SHADE_BYTES = 400, 90, 20  # markup around the text
SHADED = 200  # mistakes whose tokens set the scale of the shades
QUOTED = 5
MAX_TOKENS = 256  # scores of tokens that the evaluation records for one response
Tokens = Sequence[tuple[str, float | None]]


def samples(run: RunView) -> tuple[Explorer, int]:
    """A card for each prompt with every policy's response, in order; and the number of all prompts."""
    policies = tuple(run.samples)
    answers: dict[str, dict[str, SampleRow]] = {}
    for policy, rows in run.samples.items():
        for row in rows:
            answers.setdefault(row.prompt, {}).setdefault(policy, row)
    every = (
        _sample(run, index, prompt, answered, policies)
        for index, (prompt, answered) in enumerate(answers.items(), start=1)
    )
    cards = tuple(_fitting(every, SAMPLE_BYTES))
    explorer = Explorer(
        key="samples", noun="prompts", quantity="score", cards=cards, quoted=QUOTED,
        measures=tuple(run.label(policy) for policy in policies),
    )  # fmt: skip
    return explorer, len(answers)


def example(run: RunView) -> Card | None:
    """The first prompt of the evaluation that most policies' kept responses answer; not picked by content."""
    cards = samples(run)[0].cards
    return max(cards, key=lambda card: len(card.passages), default=None)


def _sample(
    run: RunView, index: int, prompt: str, rows: dict[str, SampleRow], policies: Sequence[str]
) -> Card:
    scores = tuple(_finite(rows[policy].score) if policy in rows else None for policy in policies)
    replies = [
        Passage(label=run.label(policy), note=_note(row), text=row.response) for policy, row in rows.items()
    ]
    pairs = zip(policies, scores, strict=True)
    listed = ", ".join(f"{run.label(policy)} {number(score)}" for policy, score in pairs if score is not None)
    question = Passage(label="Prompt", note="", text=prompt)
    return Card(
        title=f"Prompt {index}", lead=_lead(prompt), note=listed, passages=(question, *replies), values=scores
    )


def mistakes(run: RunView) -> Explorer:
    """A card for each mistake, the surest first, with its tags and what each token did to the score."""
    counts = Counter(tag for row in run.mistakes for tag in set(_tags(row)))
    names = tuple(sorted(counts, key=lambda tag: (tag.startswith(SOURCE), -counts[tag], tag)))
    tag_index = {tag: index for index, tag in enumerate(names)}
    ordered = sorted(run.mistakes, key=_margin)
    scale = _scale(ordered[:SHADED])
    cards = tuple(_fitting((_mistake(row, tag_index, scale) for row in ordered), MISTAKE_BYTES))
    cards_with_tag = Counter(index for card in cards for index in card.tags)
    return Explorer(
        key="mistakes", noun="mistakes", quantity="confidence", cards=cards, quoted=QUOTED,
        measures=("confidence",), tags=tuple((tag, cards_with_tag[index]) for index, tag in enumerate(names)),
    )  # fmt: skip


SOURCE = "source: "
REJECTED = "Rejected (scored at least as high)"


def _tags(row: Mistake) -> list[str]:
    tags = [clean(tag, 40) for tag in row.tags]
    return [*tags, f"{SOURCE}{clean(row.source, 60)}"] if row.source else tags


def _mistake(row: Mistake, tag_index: dict[str, int], scale: float) -> Card:
    margin, confidence = _margin(row), _confidence(row)
    tags = ", ".join(clean(tag, 40) for tag in row.tags)
    sides = (
        (row.chosen, row.reward_chosen, row.length_chosen, row.tokens_chosen, "Chosen (labelled better)"),
        (row.rejected, row.reward_rejected, row.length_rejected, row.tokens_rejected, REJECTED),
    )
    sure = f"margin {number(margin, sign=True)}, confidence {number(confidence)}"
    passages = [Passage(label="Prompt", note="", text=row.prompt)]
    for text, raw, length, tokens, label in sides:
        notes = [f"score {number(score)}"] if (score := _finite(raw)) is not None else []
        if length is not None:
            notes.append(f"{length} tokens")
        shades = tuple(_shades(tokens, scale, len(text))) if tokens else ()
        passages.append(Passage(label=label, note=", ".join(notes), text=text, shades=shades))
    return Card(
        title=f"Validation row {clean(row.idx, 20)}",
        lead=_lead(row.prompt),
        note=f"{sure}, {tags}" if tags else sure,
        passages=tuple(passages),
        tags=tuple(tag_index[tag] for tag in dict.fromkeys(_tags(row))),
        values=(confidence,),
    )


def _margin(row: Mistake) -> float:
    value = _finite(row.margin)
    return 0.0 if value is None else value


def _confidence(row: Mistake) -> float:
    """sigmoid(|margin|), as recorded or as the margin gives it."""
    recorded = _finite(row.confidence)
    return 1 / (1 + math.exp(-min(abs(_margin(row)), 500.0))) if recorded is None else recorded


def _moves(tokens: Tokens) -> list[tuple[str, float]]:
    """Tokens with the change of the score that each brought; the first has nothing to be compared with."""
    moves, before = [], None
    for text, score in tokens:
        after = _finite(score)
        moves.append((text, 0.0 if before is None or after is None else after - before))
        before = after
    return moves


def _scale(rows: Iterable[Mistake]) -> float:
    """What the darkest shade stands for."""
    return scale_of(
        move
        for row in rows
        for tokens in (row.tokens_chosen, row.tokens_rejected)
        for _, move in _moves(tokens)
    )


def _shades(tokens: Tokens, scale: float, length: int) -> Iterator[tuple[str, int]]:
    """Tokens by what each did to the score, with a note of what is not shown of a text of `length`."""
    yield from shaded(_moves(tokens), scale)
    read = min(sum(len(text) for text, _ in tokens), MAX_QUOTE)
    unread = read < MAX_QUOTE and len(tokens) < MAX_TOKENS  # it ends where the reward model stopped reading
    if length > read + 1:  # decoding may drop a blank at the start
        yield (f" … ({length - read} more characters, not read)" if unread else cut_note(length - read)), 0


def shaded(moves: Iterable[tuple[str, float]], scale: float) -> Iterator[tuple[str, int]]:
    """Neighbours of one level together, cut at MAX_QUOTE characters like any text."""
    pieces: list[tuple[str, int]] = []
    room = MAX_QUOTE
    for text, move in moves:
        quoted, room = text[:room], room - min(len(text), room)
        if pieces and pieces[-1][1] == level(move, scale):
            pieces[-1] = (pieces[-1][0] + quoted, pieces[-1][1])
        elif quoted:
            pieces.append((quoted, level(move, scale)))
    yield from ((clean(text, None), shade) for text, shade in pieces)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _lead(prompt: str) -> str:
    """The first words of the last question."""
    last = prompt.strip().removesuffix("Assistant:").rpartition("Human:")[2]
    return clean(" ".join(last.split()), None)[:90] or "(no question)"


def _note(row: SampleRow) -> str:
    """Score, KL, length, end and gold of one sample."""
    measures = (("score", row.score), ("gold", row.gold), ("second model", row.held_out), ("KL", row.kl))
    notes = [f"{words} {number(value)}" for words, value in measures if value is not None]
    if row.length is not None:
        notes.append(f"{row.length} token{'' if row.length == 1 else 's'}")
    if row.ended is False:
        notes.append("cut at the limit")
    if not row.response.strip():
        notes.append("empty")
    return ", ".join(notes)


def _fitting(cards: Iterable[Card], budget: int) -> Iterator[Card]:
    """Cards from the front as long as their markup stays within `budget` bytes."""
    for card in cards:
        budget -= _size(card)
        if budget < 0:
            return
        yield card


def _size(card: Card) -> int:
    texts = [card.title, card.lead, card.note]
    texts += [clean(passage.text) for passage in card.passages if not passage.shades]
    pieces = [piece for passage in card.passages for piece, _ in passage.shades]
    markup = CARD_BYTES + PASSAGE_BYTES * len(card.passages) + SHADE_BYTES * len(pieces)
    return markup + len(html.escape("".join(texts + pieces)).encode())
