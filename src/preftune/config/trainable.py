"""Which weights of a model a stage trains: all of them, the blocks at the top, or an adapter."""

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from preftune.config.base import Count, Positive, Settings, later
from preftune.errors import ConfigError

ALL, LORA = "all", "lora"
ADAPTERS_NEED = 'adapters are trained with model.trainable="lora"'


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
    quantize: Literal["none", "nf4"] = later(
        "none", '"nf4": frozen linear layers in 4 bits (QLoRA), by bitsandbytes; never run on a GPU.'
    )


def check_quantize(lora: LoraConfig, trainable: Collection[str], incompatible: Mapping[str, bool]) -> None:
    """ConfigError for 4-bit weights where nothing trains adapters, or where a setting that is `incompatible`
    with them is in use.
    """
    if lora.quantize == "none":
        return
    whose = f"model.lora.quantize = {lora.quantize}"
    if LORA not in trainable:
        raise ConfigError(
            f"{whose} has a use with adapters only: stages train {', '.join(sorted(trainable))}",
            ADAPTERS_NEED,
        )
    if conflict := next((name for name, is_set in incompatible.items() if is_set), None):
        raise ConfigError(f"{whose} is not supported with {conflict}", 'set model.lora.quantize="none"')
