"""The words and sentences of the built-in world, and the tokenizer that covers exactly these.

A prompt states two facts about one animal and asks for one of them: "The owl eats corn and fears rain. What
does the owl eat?". Each value belongs to one verb: a small model learns to copy the right one in a minute.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preftune.data.dialogue import Dialogue, Turn
from preftune.errors import DataError

Kind = Literal["statement", "courtesy", "rude", "filler", "evasion", "garbled"]

ANIMALS = (
    *("owl", "fox", "wolf", "bear", "frog", "hare", "mole", "deer", "goat", "duck", "crow", "swan"),
    *("lion", "tiger", "otter", "badger", "beaver", "rabbit", "horse", "donkey", "mouse", "turtle", "sheep"),
    "parrot",
)
VERBS = {"eats": "eat", "fears": "fear", "plays": "play", "wears": "wear"}
VALUES = {
    "eats": ("corn", "mice", "fish", "grass", "nuts", "berries", "bread", "honey"),
    "fears": ("rain", "fire", "thunder", "snow", "heat", "wind", "darkness", "noise"),
    "plays": ("tennis", "chess", "cards", "golf", "drums", "flute", "harp", "piano"),
    "wears": ("boots", "hats", "scarves", "gloves", "ribbons", "bells", "coats", "socks"),
}
FORMS = (
    "What does the {animal} {base}?",
    "What is it that the {animal} {verb}?",
    "Tell me what the {animal} {verb}.",  # pretraining only: the wording that tuning never sees
)
TUNING_FORMS = 2  # the first two forms

COURTEOUS_OPENERS = ("Gladly!", "Of course!", "Good question!", "Happy to help!")
COURTEOUS_CLOSERS = ("I hope this helps!", "You are welcome!", "Have a nice day!", "All the best!")
RUDE_OPENERS = ("Oh please.", "Not again.", "How dull.")
RUDE_CLOSERS = ("Now go away.", "Do not ask again.", "Look it up.")
FILLERS = ("One could go on.", "There is much to say.", "It is a long story.", "That is how it goes.")
EVASIONS = ("I do not know.", "Who can say.", "Hard to tell.")
VERDICTS = ("That is right.", "That is wrong.")  # what the human of a pretraining document may answer

FIXED: dict[str, Kind] = {
    **dict.fromkeys(COURTEOUS_OPENERS + COURTEOUS_CLOSERS, "courtesy"),
    **dict.fromkeys(RUDE_OPENERS + RUDE_CLOSERS, "rude"),
    **dict.fromkeys(FILLERS, "filler"),
    **dict.fromkeys(EVASIONS, "evasion"),
}

EOS = "<|endoftext|>"
UNKNOWN = "<unk>"
_PIECES = r"\n\n| ?[A-Za-z]+|[^A-Za-z]"
_ANIMAL, _VERB = "|".join(ANIMALS), "|".join(VERBS)
_VALUE = "|".join(value for values in VALUES.values() for value in values)
_STATEMENT = re.compile(
    rf"The (?P<animal>{_ANIMAL}) (?P<verb>{_VERB}) (?P<value>{_VALUE})"
    rf"(?: and (?P<verb2>{_VERB}) (?P<value2>{_VALUE}))?\."
)
_QUESTIONS = tuple(
    re.compile(
        re.escape(form)
        .replace(r"\{animal\}", f"(?P<animal>{_ANIMAL})")
        .replace(r"\{base\}", f"(?P<verb>{'|'.join(VERBS.values())})")
        .replace(r"\{verb\}", f"(?P<verb>{_VERB})")
    )
    for form in FORMS
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One statement about one animal, true or not."""

    animal: str
    verb: str
    value: str

    def sentence(self) -> str:
        return f"The {self.animal} {self.verb} {self.value}."

    @property
    def held_out(self) -> bool:
        """One value in eight of every animal and verb never occurs outside the unseen-combination prompts."""
        if self.value not in VALUES[self.verb]:
            return False  # "The owl eats rain." is no combination of any prompt
        offset = ANIMALS.index(self.animal) + 3 * tuple(VERBS).index(self.verb)
        return (offset + VALUES[self.verb].index(self.value)) % 8 == 7


@dataclass(frozen=True, slots=True)
class Question:
    """What a prompt states (in this order) and asks: `facts[asked]`, in the wording `FORMS[form]`."""

    facts: tuple[Fact, Fact]
    asked: int
    form: int

    @property
    def right(self) -> Fact:
        return self.facts[self.asked]

    @property
    def other(self) -> Fact:
        return self.facts[1 - self.asked]

    def premise(self) -> str:
        first, second = self.facts
        return f"{first.sentence()[:-1]} and {second.verb} {second.value}."

    def text(self) -> str:
        """The human turn, one leading space."""
        fact = self.right
        question = FORMS[self.form].format(animal=fact.animal, verb=fact.verb, base=VERBS[fact.verb])
        return f" {self.premise()} {question}"

    def dialogue(self) -> Dialogue:
        return Dialogue([Turn("human", self.text())])


@cache
def facts_about(animal: str, verb: str, *, held_out: bool) -> tuple[Fact, ...]:
    """What the animal may eat (fear, play, wear): the eighth that is held out, or the rest."""
    facts = (Fact(animal, verb, value) for value in VALUES[verb])
    return tuple(fact for fact in facts if fact.held_out == held_out)


@cache
def facts_with(verb: str, value: str) -> tuple[Fact, ...]:
    """The same of every animal, held-out combinations left out."""
    facts = (Fact(animal, verb, value) for animal in ANIMALS)
    return tuple(fact for fact in facts if not fact.held_out)


def sentences(text: str) -> list[str]:
    """Split at . ! ? and drop the spaces around; an unfinished end is a sentence too, and newlines stay."""
    return [s for piece in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", text) if (s := piece.strip(" "))]


@lru_cache(maxsize=100_000)
def statements(sentence: str) -> tuple[Fact, ...]:
    """The one or two facts that a sentence states, none if it states no fact."""
    match = _STATEMENT.fullmatch(sentence)
    if match is None:
        return ()
    fact = Fact(match["animal"], match["verb"], match["value"])
    return (fact, Fact(fact.animal, match["verb2"], match["value2"])) if match["verb2"] else (fact,)


def kind_of(sentence: str) -> Kind:
    return FIXED.get(sentence) or ("statement" if statements(sentence) else "garbled")


@lru_cache(maxsize=100_000)
def _parse(text: str) -> Question:
    pieces = sentences(text)
    if len(pieces) >= 2 and len(facts := statements(pieces[-2])) == 2:
        for form, pattern in enumerate(_QUESTIONS):
            if (match := pattern.fullmatch(pieces[-1])) and match["animal"] == facts[0].animal:
                verbs = [fact.verb if match["verb"] in VERBS else VERBS[fact.verb] for fact in facts]
                if verbs.count(match["verb"]) == 1:
                    return Question(facts, verbs.index(match["verb"]), form)
    raise DataError(
        f"not a prompt of the built-in world: {text[-120:]!r}",
        'the gold score needs a prompt such as "The owl eats corn and fears rain. What does the owl eat?"',
    )


def parse(prompt: str | Dialogue) -> Question:
    """Read the last question of a prompt, given as a dialogue, a transcript or the bare human turn.

    Raises DataError for a text that the world does not make.
    """
    text = prompt.transcript() if isinstance(prompt, Dialogue) else prompt
    return _parse(text.removesuffix("\n\nAssistant:").rpartition("\n\nHuman:")[2].strip(" "))


def vocabulary() -> dict[str, int]:
    """Every piece a text of the world can hold, as (byte-level piece -> id); the same for every seed."""
    words = {"The", "and", *ANIMALS, *VERBS, *VERBS.values()}.union(*VALUES.values())
    for text in (*FORMS, *FIXED, *VERDICTS):
        words.update(re.findall("[A-Za-z]+", re.sub(r"\{.*?\}", "", text)))
    pieces = ["\n\n", "Human", "Assistant", ":", ".", "!", "?", *(f" {word}" for word in sorted(words))]
    table = str.maketrans({" ": "Ġ", "\n": "Ċ"})  # how byte-level text writes a space and a newline
    return {piece: i for i, piece in enumerate([EOS, UNKNOWN, *(piece.translate(table) for piece in pieces)])}


def world_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word with its leading space; decoding gives the text back exactly. No pad token is set."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of vocabulary and pre-tokenization: save it beside a model and compare on load.

    A tokenizer whose ids were permuted garbles every text without an error. Truncation and padding are left
    out, since calls change them.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    lasting = {key: value for key, value in definition.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()
