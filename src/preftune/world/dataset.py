"""The built-in world: prompts, replies, noisy preferences and pretraining documents, all from a seed.

Half the speakers are careful (right and courteous), half careless. Which of two replies is preferred is drawn
from Bradley-Terry over the gold score (gold.py), so the best accuracy a reward model can reach is known. One
blind spot is intended: replies with more than three courtesies occur in documents for pretraining, never in
pairs (replies.py).
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, get_args

from preftune.data.dataset import SPLIT_NAMES, Dataset, make_dataset
from preftune.data.dialogue import Dialogue, Preference
from preftune.errors import DataError
from preftune.world import grammar, replies
from preftune.world.gold import COURTESIES, WEIGHTS, best_reachable
from preftune.world.grammar import ANIMALS, TUNING_FORMS, VALUES, VERBS, Question, facts_about
from preftune.world.replies import draft_reply, draw_pair, probe_pair

VERSION = 1
Split = Literal["train", "validation", "test"]
Kind = Literal["training", "combinations", "wording"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PASSAGES = (0.75, 0.25)  # share of the documents: in the first quarter, after it
STACKED = 0.1  # of the dialogues among the documents
VERDICT = 0.3  # of the dialogues among the documents


def _question(rng: Random, *, forms: range, combination: bool = False) -> Question:
    """Draw a prompt; the asked fact is a held-out combination iff `combination`, the other fact never is."""
    animal, asked = rng.choice(ANIMALS), rng.randrange(2)
    facts = [
        rng.choice(facts_about(animal, verb, held_out=combination and place == asked))
        for place, verb in enumerate(rng.sample(list(VERBS), 2))
    ]
    return Question((facts[0], facts[1]), asked, rng.choice(forms))


def _split(question: Question) -> Split:
    """By hash of the prompt, hence the same for every seed: no prompt is in two splits."""
    bucket = int.from_bytes(hashlib.sha256(question.text().encode()).digest()[:4], "big") % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def draw_question(rng: Random, kind: Kind, split: Split) -> Question:
    """A prompt of one kind and split. Unseen combinations are in no split: all of them are held out."""
    forms = range(TUNING_FORMS, len(grammar.FORMS)) if kind == "wording" else range(TUNING_FORMS)
    while True:
        question = _question(rng, forms=forms, combination=kind == "combinations")
        if kind == "combinations" or _split(question) == split:
            return question


def _passage(rng: Random) -> str:
    """Two facts about one animal, told several times: the cheapest lesson in copying a value by its verb."""
    question = draw_question(rng, "training", "train")
    sentences = [question.facts[rng.randrange(2)].sentence() for _ in range(rng.randint(3, 6))]
    return "".join(f" {sentence}" for sentence in (question.premise(), *sentences))


def _conversation(rng: Random) -> str:
    """A prompt and a reply, good or bad; some pile up courtesies, some end in the human's verdict."""
    kind: Kind = "wording" if rng.randrange(len(grammar.FORMS)) >= TUNING_FORMS else "training"
    question = draw_question(rng, kind, "train")
    draft = draft_reply(rng, question)
    if rng.random() < STACKED:
        stacked = rng.choices(grammar.COURTEOUS_CLOSERS, k=rng.randint(1, 3))
        draft = replace(draft, after=(*draft.after, *stacked))
    text = question.dialogue().transcript() + draft.text()
    if rng.random() < VERDICT:
        right = question.right.sentence() in draft.fact
        text += f"\n\nHuman: {grammar.VERDICTS[0 if right else 1]}"
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One draw of the world: preferences in three splits; more prompts, pairs and documents on request."""

    seed: int
    train: tuple[Preference, ...]
    validation: tuple[Preference, ...]
    test: tuple[Preference, ...]
    report: dict[str, object]

    def documents(self, n: int) -> list[str]:
        """`n` texts to pretrain a base model on, in the order they must be read: passages first.

        A conversation is a prompt's transcript and one reply, good and bad alike. An EOS belongs after each.
        """
        rng = Random(f"{self.seed}/documents")
        return [(_passage if rng.random() < PASSAGES[i >= n / 4] else _conversation)(rng) for i in range(n)]

    def prompts(self, kind: Kind, n: int, seed: int = 0) -> list[Dialogue]:
        """`n` different prompts that no training pair and no document holds.

        "training": the forms of the pairs · "combinations": the asked animal and value never occurred
        together · "wording": a question form that only pretraining showed. DataError where fewer exist.
        """
        rng = Random(f"{self.seed}/prompts/{kind}/{seed}")
        dialogues: dict[str, Dialogue] = {}
        misses = 0
        while len(dialogues) < n and misses < 200:
            question = draw_question(rng, kind, "test")
            misses = misses + 1 if question.text() in dialogues else 0
            dialogues[question.text()] = question.dialogue()
        if len(dialogues) < n:
            raise DataError(f"the world has fewer than {n} prompts of kind {kind!r}", "ask for fewer prompts")
        return list(dialogues.values())

    def pairs(self, kind: Kind, n: int, seed: int = 0) -> list[Preference]:
        """`n` fresh labelled pairs on held-out prompts of one kind (prompts may recur)."""
        rng = Random(f"{self.seed}/pairs/{kind}/{seed}")
        return [draw_pair(rng, draw_question(rng, kind, "test"), row) for row in range(n)]

    def probes(self, name: str, kind: Kind, n: int, seed: int = 0) -> list[Preference]:
        """`n` pairs that differ in one component of gold (`replies.PROBES`); chosen is the better one.

        A reward model that does not see the component prefers chosen half of the time. "relevance" is the
        right fact against the prompt's other fact, so truth differs too.
        """
        rng = Random(f"{self.seed}/probes/{name}/{kind}/{seed}")
        pairs = []
        for row in range(n):
            question = draw_question(rng, kind, "test")
            better, worse = (draft.text() for draft in probe_pair(rng, question, name))
            prompt = question.dialogue()
            pairs.append(Preference(prompt=prompt, chosen=better, rejected=worse, source=name, row=row))
        return pairs


def world_hash() -> str:
    """sha256 over every word, share and weight that the world's texts and scores are made from."""
    ingredients = [
        *(VERSION, grammar.vocabulary(), VALUES, VERBS, grammar.FORMS, grammar.FIXED, grammar.VERDICTS),
        *(WEIGHTS, COURTESIES),
        *(replies.SPEAKERS, replies.NOT_RIGHT, replies.WRONG, replies.PAIR_SOURCES, replies.FACT_PAIRS_OTHER),
        *(replies.STYLE, replies.COVER, replies.COVERS),
        *(PASSAGES, STACKED, VERDICT),
    ]
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()


def _summary(pairs: tuple[Preference, ...]) -> dict[str, object]:
    sources = Counter(pair.source for pair in pairs)
    return {
        "pairs": len(pairs),
        "sources": dict(sorted(sources.items())),
        "best_reachable": best_reachable(pairs),
    }


def make_world(seed: int, pairs: int = 6000, validation: int = 1000, test: int = 1000) -> World:
    """Draw the world of `seed`, with so many labelled pairs a split (at least 1 each)."""
    if min(pairs, validation, test) < 1:
        raise DataError("every split of the world needs at least one pair", "set data.pairs to 1 or more")
    sizes: dict[Split, int] = {"train": pairs, "validation": validation, "test": test}
    splits: dict[Split, tuple[Preference, ...]] = {}
    for split, n in sizes.items():
        rng = Random(f"{seed}/{split}")
        splits[split] = tuple(draw_pair(rng, draw_question(rng, "training", split), row) for row in range(n))
    tokenizer = grammar.world_tokenizer()
    report: dict[str, object] = {
        "name": "world",
        "version": VERSION,
        "seed": seed,
        "world_sha256": world_hash(),
        "tokenizer_sha256": grammar.tokenizer_hash(tokenizer),
        "vocabulary": len(tokenizer),
        "splits": {split: _summary(rows) for split, rows in splits.items()},
    }
    return World(seed=seed, report=report, **splits)


def world_probes(seed: int, n: int = 200) -> dict[str, list[Preference]]:
    """`n` noiseless pairs for each part of gold, the better reply chosen; see `World.probes`."""
    world = make_world(seed, 1, 1, 1)
    return {name: world.probes(name, "training", n) for name in replies.PROBES}


def world_dataset(seed: int, pairs: int) -> Dataset:
    """The world's pairs as a run's data set."""
    world = make_world(seed, pairs)
    splits = {name: list(getattr(world, name)) for name in SPLIT_NAMES}
    return make_dataset(splits, {"name": "world", "seed": seed, "world": world.report})
