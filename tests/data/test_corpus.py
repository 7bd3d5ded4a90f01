"""The tokenizer that a base model from scratch gets: texts of any kind, in time."""

import random
import time

import pytest

from preftune.data import Preference
from preftune.data.corpus import train_tokenizer
from preftune.data.dialogue import Dialogue, Turn

LONG = 300_000


def pair(text: str, row: int) -> Preference:
    prompt = Dialogue([Turn("human", f"Question {row} please")])
    return Preference(prompt=prompt, chosen=f" {text}", rejected=" No", row=row)


def vocabulary(*texts: str) -> set[str]:
    made = train_tokenizer([pair(text, i) for i, text in enumerate(texts)], 400)
    return set(made.get_vocab())


def letters(n: int) -> str:
    return "".join(random.Random(0).choices("abcdefghij", k=n))


@pytest.mark.parametrize(
    "text",
    ["a" * LONG, letters(LONG), "\n" * LONG, "lorem ipsum " * (LONG // 12)],
    ids=["one letter", "one word", "white space", "words"],
)
def test_a_tokenizer_is_learnt_from_a_long_text_in_time(text: str) -> None:
    """A single word of a megabyte took the library ten minutes, this would one: the square of its length."""
    began = time.process_time()
    found = train_tokenizer([pair(text, 0), pair("yes", 1)], 400)
    assert time.process_time() - began < 5
    ids = found(text[:20_000])["input_ids"]
    assert found.decode(ids) == text[:20_000]


def test_words_of_ordinary_length_are_learnt_whole() -> None:
    """What is left out is the rest of a run of more than a thousand characters, and nothing else."""
    word = letters(1000)
    assert vocabulary(word, " yes") == vocabulary(word + "zzzz" * 100, " yes")
    assert vocabulary(word[:-4] + "zzzz", " yes") != vocabulary(word, " yes")
