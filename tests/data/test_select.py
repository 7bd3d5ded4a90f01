"""Which rows can be encoded, and what is said of the others and of repeats."""

import pytest
from data_helpers import make_tokenizer

import prose
from preftune.data import Dialogue, Encoder, Preference, Turn
from preftune.data.select import first_encoded, remarks
from preftune.errors import DataError


def encoder(prompt: int, response: int, form: str = "transcript") -> Encoder:
    end = "<|endoftext|>"
    return Encoder(make_tokenizer([end], eos_token=end), form, prompt, response)  # type: ignore[arg-type]


def pair(question: str, good: str, bad: str) -> Preference:
    return Preference(prompt=Dialogue([Turn("human", question)]), chosen=good, rejected=bad)


def test_equal_and_repeated_pairs_are_counted_with_the_keys_to_raise() -> None:
    rows = [
        pair(" the end of a question", " yes", " no"),
        pair(" another start, the end of a question", " yes", " no"),  # the same last tokens
        pair(" Hi", " a very long reply that ends so", " a very long reply that ends otherwise"),
        pair(" Hi", " up", " down"),
    ]
    kept, encoded, rejected = first_encoded(short := encoder(20, 6), rows, None)
    assert rejected == {"response_too_long_became_equal": 1}
    assert kept == [rows[0], rows[1], rows[3]]
    equal, repeated = remarks(short, encoded, rejected)
    assert equal.startswith("pairs left out: 1, ")
    assert "data.max_response_length = 6 tokens; raise" in equal
    assert repeated.startswith("1 of 3 rows (33.3%) ")
    prose.compare("data/select: pairs that became equal or repeat another one", equal, repeated)
    assert "data.max_prompt_length = 20" in repeated
    whole = encoder(100, 100)
    assert list(remarks(whole, *first_encoded(whole, rows, None)[1:])) == []


def test_nothing_usable_says_what_to_raise() -> None:
    said = r"1 response_too_long_became_equal: .*raise data.max_response_length"
    with pytest.raises(DataError, match=said):
        first_encoded(encoder(30, 1), [pair(" Hi", " up", " under")], None)
    with pytest.raises(DataError, match="no rows to choose from"):
        first_encoded(encoder(30, 1), [], None)


def test_the_plain_form_adds_no_roles() -> None:
    plain = encoder(50, 50, "plain")
    prompt = Dialogue([Turn("human", " Once upon"), Turn("assistant", " a time")])
    assert plain.tokenizer.decode(plain.prompt(prompt)) == "Once upon\n\na time"
    assert plain.tokenizer.decode(plain.response(" there was", ended=False)) == " there was"
    assert plain.prompt(Dialogue()) == [plain.eos_id]
