"""Settings that have no use beside others. Whoever types one is told; what a recipe states is left alone: a
run's config.toml states every setting, and a shipped recipe those of its own data.
"""

from collections.abc import Iterable
from typing import Any

from preftune.config.algorithms.base import WORLD, names_a_stage
from preftune.config.base import Settings
from preftune.config.run import RunConfig
from preftune.config.trainable import ADAPTERS_NEED, LORA
from preftune.errors import ConfigError


def refuse_unused(config: RunConfig, typed: Iterable[str]) -> None:
    """ConfigError for the first of the `typed` keys, with values other than their defaults, that nothing
    reads in this run.
    """
    for key in typed:
        if (needs := _needs(config, key)) is not None:
            raise ConfigError(f"{key} has no use in this run", needs)


def _needs(config: RunConfig, key: str) -> str | None:
    """What the setting needs to be read, if that is missing."""
    section, _, name = key.partition(".")
    if section == "data":
        return _data_needs(config, name)
    if section == "sampler":
        return "sampler.url names the server that samples" if config.sampler.url is None else None
    if key.startswith("model.lora."):
        trains = {*map(config.trainable_of, config.stage)}
        return None if LORA in trains else ADAPTERS_NEED
    return _group_needs(config, key)


def _data_needs(config: RunConfig, name: str) -> str | None:
    sources = {config.data.name, *(stage.data for stage in config.stage.values())}
    files = {source for source in sources if source not in (None, WORLD) and not names_a_stage(source)}
    if name == "pairs" and WORLD not in sources:
        return (
            "it is the size of the built-in world (data.name=world); the rows of a stage are stage.NAME.rows"
        )
    if name == "held_out" and config.data.name == WORLD:
        return "the built-in world makes its validation and test rows itself"
    if name in ("config", "prompt_words") and not files:
        return "the built-in world has neither configurations nor texts to cut: it is for files and hub ids"
    return None


def _group_needs(config: RunConfig, key: str) -> str | None:
    """Of a group of settings, such as a stage or its optimizer, which says itself what in it needs what."""
    group, _, last = key.rpartition(".")
    settings: Any = config
    for name in group.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
    return settings.unused(last, group) if isinstance(settings, Settings) else None
