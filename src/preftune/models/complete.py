"""A causal language model of which every weight is there, in float32, as transformers reads it."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from preftune.errors import DataError

_TRIES = 5  # what is taken out may leave another contradiction


def complete_lm(path: str | Path, **how: Any) -> PreTrainedModel:
    """What `from_pretrained` gives. DataError if a weight is missing: the library would draw it at random.

    Settings for `generate` that contradict themselves, which the library reads and then refuses to write, are
    left out; nothing here samples by them.
    """
    # Any: asked for the info too, it gives a pair, which its annotation does not know.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **how
    )
    model, info = loaded
    if missing := sorted(map(str, info["missing_keys"])):
        raise DataError(
            f"{path} is not a complete causal language model: it lacks {', '.join(missing[:4])}",
            hint="weights that are missing would be random; save the whole model with save_pretrained",
        )
    model.generation_config = _consistent(model.generation_config)
    return model


def _consistent(settings: GenerationConfig) -> GenerationConfig:
    """Settings for `generate` without those that contradict the others."""
    for _ in range(_TRIES):
        try:
            settings.validate(strict=True)
        except ValueError as error:
            wrong = re.findall(r"`(\w+)`:", str(error))
            stated = settings.to_diff_dict()
            settings = GenerationConfig(**{key: value for key, value in stated.items() if key not in wrong})
        else:
            return settings
    return GenerationConfig(bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id)
