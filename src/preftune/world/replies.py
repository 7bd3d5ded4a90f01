"""Replies of the built-in world: drafts by careful and careless speakers, and pairs of them.

One blind spot is intended: no reply in a pair holds more than three courtesies. Every other kind of reply a
policy may come upon, readable or not, occurs in pairs: a kind that no pair holds is a blind spot.
"""

from dataclasses import dataclass, replace
from random import Random

from preftune.data.dialogue import Preference
from preftune.world import grammar
from preftune.world.gold import COMPONENTS, COURTESIES, preference_probability
from preftune.world.grammar import Fact, Question, facts_about, facts_with, kind_of

PROBES = (*COMPONENTS, "stacked courtesies")  # the last is the intended blind spot

# Shares. Two-item entries are (careful, careless) speakers.
SPEAKERS = {
    "right": (0.90, 0.25),
    "courteous_opener": (0.50, 0.15),
    "rude_opener": (0.05, 0.30),
    "filler_before": (0.10, 0.25),
    "filler_after": (0.10, 0.30),
    "courteous_closer": (0.50, 0.20),
    "second_closer": (0.25, 0.25),
    "rude_closer": (0.04, 0.25),
    "other_added": (0.10, 0.10),
}
NOT_RIGHT = {"wrong": 0.55, "other": 0.25, "evasion": 0.12, "none": 0.08}
WRONG = {"value": 0.60, "animal": 0.25, "swap": 0.15}
PAIR_SOURCES = {"fact": 0.4, "style": 0.25, "free": 0.35}
FACT_PAIRS_OTHER = 1 / 3  # of the bad halves of fact-only pairs answer the wrong verb
STYLE = {"courtesy": 0.36, "rude": 0.12, "filler": 0.12, "repeat": 0.20, "garbled": 0.20}
COVER = 0.2  # of the replies in free pairs
COVERS = {"none": 0.3, "repeat": 0.25, "second value": 0.2, "echo": 0.1, "garbled": 0.15}


@dataclass(frozen=True, slots=True)
class Draft:
    """A reply as whole sentences, so that two drafts can differ in one part alone."""

    before: tuple[str, ...]
    fact: tuple[str, ...]
    after: tuple[str, ...]

    def sentences(self) -> tuple[str, ...]:
        return self.before + self.fact + self.after

    def text(self) -> str:
        return "".join(f" {sentence}" for sentence in self.sentences())

    def courtesies(self) -> int:
        return sum(kind_of(sentence) == "courtesy" for sentence in self.sentences())


def _pick(rng: Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _wrong(rng: Random, question: Question) -> str:
    """A false statement about the asked verb; never a held-out combination, which training must not show."""
    right, how = question.right, _pick(rng, WRONG)
    if how == "swap":
        return Fact(right.animal, right.verb, question.other.value).sentence()
    if how == "value":
        others = facts_about(right.animal, right.verb, held_out=False)
    else:
        others = facts_with(right.verb, right.value)
    return rng.choice([fact for fact in others if fact != right]).sentence()


def _fact(rng: Random, question: Question, right: bool) -> tuple[str, ...]:
    if right:
        return (question.right.sentence(),)
    how = _pick(rng, NOT_RIGHT)
    if how == "wrong":
        return (_wrong(rng, question),)
    if how == "evasion":
        return (rng.choice(grammar.EVASIONS),)
    return (question.other.sentence(),) if how == "other" else ()


def draft_reply(rng: Random, question: Question) -> Draft:
    """One reply by a careful or a careless speaker."""
    careless = rng.randrange(2)

    def happens(name: str) -> bool:
        return rng.random() < SPEAKERS[name][careless]

    before: list[str] = []
    if happens("courteous_opener"):
        before.append(rng.choice(grammar.COURTEOUS_OPENERS))
    elif happens("rude_opener"):
        before.append(rng.choice(grammar.RUDE_OPENERS))
    fillers = rng.sample(grammar.FILLERS, 2)
    if happens("filler_before"):
        before.append(fillers[0])
    fact = _fact(rng, question, happens("right"))
    if fact == (question.right.sentence(),) and happens("other_added"):
        fact += (question.other.sentence(),)
    after = [fillers[1]] if happens("filler_after") else []
    if happens("courteous_closer"):
        after += rng.sample(grammar.COURTEOUS_CLOSERS, 1 + happens("second_closer"))
    elif happens("rude_closer"):
        after.append(rng.choice(grammar.RUDE_CLOSERS))
    if not [*before, *fact, *after]:
        fact = (rng.choice(grammar.EVASIONS),)
    return Draft(tuple(before), fact, tuple(after))


def _garbled(rng: Random, question: Question) -> str:
    """A statement without its value, or two sentences run together: how policies that drift write."""
    if rng.random() < 0.25:
        return f"The {question.right.animal} {rng.choice(question.facts).verb}."
    polite = grammar.COURTEOUS_OPENERS + grammar.COURTEOUS_CLOSERS
    first, second = (s.split() for s in rng.sample(polite + grammar.FILLERS, 2))
    words = [*first[: len(first) // 2 + 1], *second[len(second) // 2 :]]
    return " ".join(words).replace("!", "").replace(".", "") + "!"


def _cover(rng: Random, question: Question) -> Draft:
    """Replies that speakers do not make but a policy may: a kind that no pair holds is a blind spot."""
    draft, how = draft_reply(rng, question), _pick(rng, COVERS)
    right = question.right.sentence()
    if how == "none":
        return replace(draft, fact=()) if draft.before + draft.after else draft
    if how == "second value":
        return replace(draft, fact=tuple(rng.sample((right, _wrong(rng, question)), 2)))
    if how == "echo":
        return replace(draft, fact=(question.premise(),))
    if how == "garbled":
        return replace(draft, after=(*draft.after, _garbled(rng, question)))
    again = rng.choice(draft.sentences())
    if kind_of(again) == "courtesy" and draft.courtesies() == COURTESIES:
        again = rng.choice(draft.fact or grammar.FILLERS)
    return replace(draft, after=(*draft.after, *[again] * rng.choice((1, 1, 2))))


def _fact_pair(rng: Random, question: Question) -> tuple[Draft, Draft]:
    draft = draft_reply(rng, question)
    bad = question.other.sentence() if rng.random() < FACT_PAIRS_OTHER else _wrong(rng, question)
    return replace(draft, fact=(question.right.sentence(),)), replace(draft, fact=(bad,))


def _style_pair(rng: Random, question: Question) -> tuple[Draft, Draft]:
    """A draft, and the same with one sentence more."""
    draft, how = draft_reply(rng, question), _pick(rng, STYLE)
    if how == "repeat":
        return draft, replace(draft, after=(*draft.after, rng.choice(draft.sentences())))
    if how == "garbled":
        return draft, replace(draft, after=(*draft.after, _garbled(rng, question)))
    openers, closers = {
        "courtesy": (grammar.COURTEOUS_OPENERS, grammar.COURTEOUS_CLOSERS),
        "rude": (grammar.RUDE_OPENERS, grammar.RUDE_CLOSERS),
        "filler": (grammar.FILLERS, grammar.FILLERS),
    }[how]
    if rng.random() < 0.5:
        added = rng.choice([s for s in openers if s not in draft.sentences()])
        return draft, replace(draft, before=(added, *draft.before))
    added = rng.choice([s for s in closers if s not in draft.sentences()])
    return draft, replace(draft, after=(*draft.after, added))


def _free_pair(rng: Random, question: Question) -> tuple[Draft, Draft]:
    first, second = ((_cover if rng.random() < COVER else draft_reply)(rng, question) for _ in range(2))
    return first, second


def draw_pair(rng: Random, question: Question, row: int = -1) -> Preference:
    """Two different replies and a label drawn from their gold scores; `source` names what they differ in."""
    source = _pick(rng, PAIR_SOURCES)
    make = {"fact": _fact_pair, "style": _style_pair, "free": _free_pair}[source]
    while True:
        drafts = make(rng, question)
        texts = [draft.text() for draft in drafts]
        if texts[0] != texts[1] and max(draft.courtesies() for draft in drafts) <= COURTESIES:
            break
    prompt = question.dialogue()
    if rng.random() >= preference_probability(prompt, *texts):
        texts.reverse()
    return Preference(prompt=prompt, chosen=texts[0], rejected=texts[1], source=source, row=row)


def probe_pair(rng: Random, question: Question, name: str) -> tuple[Draft, Draft]:
    """A better and a worse reply, both with the right fact unless the probe is about facts."""
    draft = replace(draft_reply(rng, question), fact=(question.right.sentence(),))
    coin = rng.random() < 0.5
    if name == "truth":
        return draft, replace(draft, fact=(_wrong(rng, question),))
    if name == "relevance":
        return draft, replace(draft, fact=(question.other.sentence(),))
    if name == "concision":
        filler = rng.choice([s for s in grammar.FILLERS if s not in draft.sentences()])
        return draft, replace(draft, after=(draft.fact[0] if coin else filler, *draft.after))
    if name == "form":
        return draft, replace(draft, after=(*draft.after, _garbled(rng, question)))
    closers = rng.sample(grammar.COURTEOUS_CLOSERS, 4)
    plain = replace(draft, before=(), after=())
    if name == "manners":
        rude = replace(plain, after=(rng.choice(grammar.RUDE_CLOSERS),))
        return (plain, rude) if coin else (replace(plain, after=(closers[0],)), plain)
    polite = replace(plain, before=(rng.choice(grammar.COURTEOUS_OPENERS),), after=tuple(closers[:2]))
    return polite, replace(polite, after=tuple(closers))
