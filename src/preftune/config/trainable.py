"""Which weights of a model a stage trains: all of them, or the blocks at the top."""

import re
from typing import Annotated

from pydantic import AfterValidator

ALL = "all"


def _is_trainable(text: str) -> str:
    if text == "lora":
        raise ValueError('"lora" is not there yet: use "all", or "top:K" for the upper K blocks')
    if text != ALL and top_blocks(text) is None:
        raise ValueError(f'{text!r} is neither "all" nor "top:K", the upper K blocks (1 or more)')
    return text


def top_blocks(trainable: str) -> int | None:
    """The K of "top:K"; None where all weights are trained."""
    found = re.fullmatch(r"top:([1-9][0-9]{0,3})", trainable)
    return int(found[1]) if found else None


Trainable = Annotated[str, AfterValidator(_is_trainable)]
