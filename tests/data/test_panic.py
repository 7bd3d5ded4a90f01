"""A tokenizer whose rule backtracks without end panics in its library: a data error here, not a traceback."""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preftune.cli import main
from preftune.data import Encoder
from preftune.errors import DataError
from preftune.isolated import from_panic, is_panic


def backtracking() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a|a)*$"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")  # noqa: S106


def test_a_panic_of_the_tokenizer_is_a_data_error() -> None:
    encoder = Encoder(backtracking(), "transcript", 8, 8)
    assert encoder.response("aaa")
    with pytest.raises(DataError, match="the tokenizer gave up"):
        encoder.text("a" * 40 + "!" + "a" * 40 + "b")


def test_a_panic_anywhere_ends_a_command_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    assert is_panic(panic("x"))
    assert not is_panic(ValueError("x"))
    assert from_panic(panic("one\ntwo")).message == "the tokenizer gave up: one"

    def panics(*_: object, **__: object) -> None:
        raise panic("Onig: Regex search error")

    monkeypatch.setattr("preftune.api.evaluate", panics)
    assert main(["evaluate", "x"]) == 65
    assert "Onig: Regex search error" in capsys.readouterr().err
