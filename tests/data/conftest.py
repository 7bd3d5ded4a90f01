"""What the data tests share: the real rows (where a machine has them) and two small tokenizers."""

from pathlib import Path
from typing import Any

import pytest
from data_helpers import CHAT, make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Like GPT-2's: no pad token, no beginning token added."""
    end = "<|endoftext|>"
    return make_tokenizer([end], eos_token=end, bos_token=end)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Like SmolLM2's: messages between control tokens, the second of which ends a response."""
    special = ["<|im_start|>", "<|im_end|>"]
    made = make_tokenizer(special, eos_token=special[1], bos_token=special[0], pad_token=special[1])
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="session")
def hh_directory(shared: Path) -> Path:
    return shared / "data/hh-rlhf"


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "data/gpt2-tokenizer")
