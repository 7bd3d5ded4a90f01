"""`data.prompt_words`: the first words of a text are a prompt, what follows is the reply."""

from pathlib import Path
from typing import Any

import pytest

from preftune.config import DataConfig
from preftune.data import Dataset, Encoder, load_dataset
from preftune.data.dataset import read_training
from preftune.errors import ConfigError
from preftune.rundir import write_jsonl
from preftune.runs.sources import held_out_prompts

TEXTS = ["  I saw  this\nfilm twice, and wept.", "Dull.", "So so dull", "One two three  four"]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    write_jsonl(path, rows)
    return str(path)


def read(tmp_path: Path, words: int = 3, rows: list[dict[str, str]] | None = None) -> Dataset:
    for name in ("validation", "test"):
        write(tmp_path / f"{name}.jsonl", [{"text": "a b c d"}])
    write(tmp_path / "train.jsonl", rows or [{"text": text} for text in TEXTS])
    return load_dataset(DataConfig(name=str(tmp_path), form="plain", prompt_words=words))


def test_a_text_is_cut_after_its_words_and_short_ones_are_counted(tmp_path: Path) -> None:
    data = read(tmp_path)
    assert [(row.prompt[0].text, row.chosen) for row in data.train] == [
        ("I saw  this", " film twice, and wept."),
        ("One two three", " four"),
    ]
    assert data.kind == "unpaired"
    assert data.report["rejected"] == {"shorter_than_prompt_words": 2}
    assert data.report["splits"] == {"train": 2, "validation": 1, "test": 1}


def test_prompt_and_reply_are_the_tokens_of_the_text(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    text = "I saw this film twice, and wept at the end of it."
    row = read(tmp_path, 4, [{"text": text}]).train[0]
    prompt, reply = Encoder(gpt2_tokenizer, "plain", 64, 64).sequence(row.prompt, row.chosen)
    assert prompt + reply == [*gpt2_tokenizer(text)["input_ids"], gpt2_tokenizer.eos_token_id]
    assert gpt2_tokenizer.decode(prompt) == "I saw this film"


def test_it_needs_the_plain_form_and_rows_of_text(tmp_path: Path) -> None:
    name = write(tmp_path / "train.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ConfigError, match=r"cuts texts, and the rows of .* are preference pairs"):
        load_dataset(DataConfig(name=name, form="plain", prompt_words=2))
    with pytest.raises(ValueError, match='prompt_words has a use with form = "plain" only'):
        DataConfig(name=name, prompt_words=2)


def test_a_held_out_prompt_is_one_in_whatever_form_it_is_read(tmp_path: Path) -> None:
    """The beginning of a text has no leading space, the same prompt of a pair has one."""
    texts = write(tmp_path / "texts.jsonl", [{"text": f"This film {i} is good."} for i in range(60)])
    config = DataConfig(name=texts, form="plain", prompt_words=3, held_out=0.2)
    dataset = load_dataset(config)
    held_out = {row.prompt[0].text for row in (*dataset.validation, *dataset.test)}
    pairs = [{"prompt": f"This film {i}", "chosen": "a", "rejected": "b"} for i in range(60)]
    own = write(tmp_path / "pairs.jsonl", pairs)
    made = read_training(DataConfig(name=own), held_out_prompts(dataset))
    left = {row.prompt[0].text.strip() for row in made.train}
    assert held_out
    assert left == {pair["prompt"] for pair in pairs} - held_out
