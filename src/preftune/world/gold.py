"""The gold score of the built-in world: what a reply is worth, by rule from its text."""

import math
from collections import Counter
from collections.abc import Iterable

from preftune.data.dialogue import Dialogue, Preference
from preftune.world.grammar import kind_of, parse, sentences, statements

COMPONENTS = ("truth", "relevance", "manners", "concision", "form")
COURTESIES = 3  # so many please; each further one annoys
WEIGHTS = {
    "right": 2.5,
    "wrong": -1.5,
    "unanswered": -1.5,
    "other": -0.3,
    "courtesy": 0.6,
    "courtesy_beyond": -1.2,
    "rude": -1.2,
    "filler": -0.5,
    "repeated": -0.6,
    "garbled": -1.0,
    "unended": -1.0,
}


def reply_counts(prompt: str | Dialogue, response: str) -> Counter[str]:
    """How often each thing occurs: right, wrong, other, evasion, courtesy, rude, filler, garbled, repeated.

    `right` is the asked fact, `other` the prompt's second fact, `wrong` any other statement (another value,
    animal or verb). A repeated statement counts as a repeat only; a repeated courtesy, filler or rudeness
    counts as both.
    """
    question = parse(prompt)
    counts: Counter[str] = Counter()
    earlier, stated = set(), set()
    for sentence in sentences(response):
        if sentence in earlier:
            counts["repeated"] += 1
        earlier.add(sentence)
        kind = kind_of(sentence)
        if kind != "statement":
            counts[kind] += 1
            continue
        for fact in statements(sentence):
            if fact not in stated:
                name = {question.right: "right", question.other: "other"}.get(fact, "wrong")
                counts[name] += 1
            stated.add(fact)
    return counts


def gold_components(prompt: str | Dialogue, response: str, ended: bool = True) -> dict[str, float]:
    """The parts of the gold score, keyed by COMPONENTS; their sum is `gold`.

    truth: the asked fact, false statements · relevance: nothing answered, the fact that was not asked for ·
    manners: courtesies and rudeness · concision: fillers and repeats · form: no known sentence, no end.
    """
    n = reply_counts(prompt, response)
    unanswered = n["right"] == n["wrong"] == 0
    beyond = max(n["courtesy"] - COURTESIES, 0)
    courtesy = {"courtesy": n["courtesy"] - beyond, "courtesy_beyond": beyond, "rude": n["rude"]}
    w = WEIGHTS
    components = {
        "truth": w["right"] * n["right"] + w["wrong"] * n["wrong"],
        "relevance": w["unanswered"] * unanswered + w["other"] * n["other"],
        "manners": sum(w[name] * count for name, count in courtesy.items()),
        "concision": w["filler"] * n["filler"] + w["repeated"] * n["repeated"],
        "form": w["garbled"] * n["garbled"] + w["unended"] * (not ended),
    }
    return {name: value + 0.0 for name, value in components.items()}  # no -0.0


def gold(prompt: str | Dialogue, response: str, ended: bool = True) -> float:
    """What `response` is worth as the reply to `prompt`; the best is 4.3. `ended`: an EOS follows the text.

    Raises DataError for a prompt that the world does not make; any text will do for a response.
    """
    return sum(gold_components(prompt, response, ended).values())


def preference_probability(prompt: str | Dialogue, first: str, second: str) -> float:
    """P(first is preferred) under Bradley-Terry over the gold score (Bradley & Terry 1952), scale 1."""
    return 1 / (1 + math.exp(gold(prompt, second) - gold(prompt, first)))


def best_reachable(pairs: Iterable[Preference]) -> float:
    """The accuracy that a reward model equal to gold is expected to have on these pairs.

    Labels are drawn, so this is the mean of max(p, 1 - p). ValueError for no pairs.
    """
    chances = [preference_probability(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    if not chances:
        raise ValueError("best_reachable needs at least one pair")
    return sum(max(p, 1 - p) for p in chances) / len(chances)
