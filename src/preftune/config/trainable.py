"""Which weights of a model a stage trains: all of them, the blocks at the top, or an adapter."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from preftune.config.base import Count, Positive, Settings

ALL, LORA = "all", "lora"


def _is_trainable(text: str) -> str:
    if text not in (ALL, LORA) and top_blocks(text) is None:
        raise ValueError(f'{text!r} is none of "all", "lora" and "top:K", the upper K blocks (1 or more)')
    return text


def top_blocks(trainable: str) -> int | None:
    """The K of "top:K"; None for any other."""
    match = re.fullmatch(r"top:([1-9][0-9]{0,3})", trainable)
    return int(match[1]) if match else None


Trainable = Annotated[str, AfterValidator(_is_trainable)]


class LoraConfig(Settings):
    """Adapters of stages that train by "lora": on all linear layers below the head, without dropout."""

    rank: Count = Field(default=16, description="Rank r of the adapter matrices.")
    alpha: Positive = Field(default=32.0, description="α: A·B is scaled by α / r.")
