"""Text to tokens: reading preferences, encoding and batching.

Names that need torch are imported when first used, so that data can be read and checked before torch is
loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from preftune.data.dataset import Dataset, load_dataset, prompt_hash, read_preferences, row_key
from preftune.data.dialogue import Dialogue, Preference, Turn
from preftune.data.hh import RejectedRow, parse_prompt, split_pair
from preftune.data.loader import order, rows_at

if TYPE_CHECKING:
    from preftune.data.batch import (
        Pairs,
        Prompts,
        Sequences,
        Unpaired,
        pad_pairs,
        pad_prompts,
        pad_sequences,
        pad_unpaired,
        unpaired,
    )
    from preftune.data.encode import Encoder
    from preftune.data.select import distinct_prompts, first_encoded

__all__ = [
    "Dataset",
    "Dialogue",
    "Encoder",
    "Pairs",
    "Preference",
    "Prompts",
    "RejectedRow",
    "Sequences",
    "Turn",
    "Unpaired",
    "distinct_prompts",
    "first_encoded",
    "load_dataset",
    "order",
    "pad_pairs",
    "pad_prompts",
    "pad_sequences",
    "pad_unpaired",
    "parse_prompt",
    "prompt_hash",
    "read_preferences",
    "row_key",
    "rows_at",
    "split_pair",
    "unpaired",
]

_LAZY = {
    "Encoder": "preftune.data.encode",
    "distinct_prompts": "preftune.data.select",
    "first_encoded": "preftune.data.select",
    "Pairs": "preftune.data.batch",
    "Prompts": "preftune.data.batch",
    "Sequences": "preftune.data.batch",
    "pad_pairs": "preftune.data.batch",
    "pad_prompts": "preftune.data.batch",
    "Unpaired": "preftune.data.batch",
    "pad_sequences": "preftune.data.batch",
    "pad_unpaired": "preftune.data.batch",
    "unpaired": "preftune.data.batch",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
