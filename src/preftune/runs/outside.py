"""How a model that may come from elsewhere reads text."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from preftune.data import Encoder
from preftune.data.encode import UNLIMITED
from preftune.models.load import context_length, declared_ends, load_tokenizer
from preftune.models.locate import Source, surroundings
from preftune.rundir import read_object
from preftune.runs.stages import SIDE_FILE


def encoder_of(source: Source, side: Mapping[str, Any], judge: bool = False) -> Encoder:
    """Prompts and responses as they are, up to the model's context, in the form that `side`, its
    preftune.json, states, else in its own chat template, if it has one. A `judge` from elsewhere reads whole
    turns, as it was trained to.
    """
    context, tokenizer = context_length(source) or UNLIMITED, load_tokenizer(source)
    return Encoder(
        tokenizer,
        side.get("form") or ("chat" if tokenizer.chat_template else "transcript"),
        max_prompt_length=context,
        max_response_length=context,
        max_length=context,
        ends=declared_ends(source),
        template_arguments=side.get("template_arguments", {}),
        whole_turns=judge and is_foreign(side),
    )


def is_foreign(side: Mapping[str, Any]) -> bool:
    """Whether a model was trained elsewhere: a preftune.json that a person wrote states only mean and sd."""
    return "stage" not in side


def reading_of(source: Source) -> dict[str, Any]:
    """What a judge's scores depend on besides its files: the ids that it reads after an end token. {} if
    there are none, so that keys from before these ids were read stay valid where they are right.
    """
    path = Path(source.path) / SIDE_FILE
    side = read_object(path) if path.is_file() else {}
    chat = is_foreign(side) and side.get("form", "chat") == "chat" and source.exists()
    after = _after_end(source, surroundings(source)) if chat else ()
    return {"after_end": list(after)} if after else {}


@lru_cache(maxsize=8)
def _after_end(source: Source, contents: str) -> tuple[int, ...]:
    """Computed once, as long as the files stay the same."""
    return tuple(encoder_of(source, {}, judge=True).after_end)
