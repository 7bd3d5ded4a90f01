"""The registry of algorithms: one line for each, and `register` for those from elsewhere."""

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from preftune.config.algorithms.base import StageSettings
from preftune.config.algorithms.collect import CollectConfig
from preftune.config.algorithms.dpo import DPOConfig
from preftune.config.algorithms.grpo import GRPOConfig
from preftune.config.algorithms.kto import KTOConfig
from preftune.config.algorithms.ppo import PPOConfig
from preftune.config.algorithms.reward import RewardConfig
from preftune.config.algorithms.rloo import RLOOConfig
from preftune.config.algorithms.sft import SFTConfig

# In the order in which the documentation lists them.
ALGORITHM_CONFIGS: dict[str, type[StageSettings]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "dpo": DPOConfig,
    "rloo": RLOOConfig,
    "kto": KTOConfig,
}
# Stages that train nothing: what they make is data.
_DATA: dict[str, type[StageSettings]] = {"collect": CollectConfig}
_TOLD = ("label", "implementation", "batch", "card")
_FIELDS = ("algorithm", "init", "epochs", "batch_size", "microbatch_size", "learning_rate", "optimizer")


def register(config: type[StageSettings]) -> type[StageSettings]:
    """Add an algorithm by the class of its settings; from here on recipes may name it. Fits a decorator.

    TypeError, naming what is missing, for a class that does not say what the others will ask;
    ValueError for a name that is taken.
    """
    missing = [name for name in _TOLD if not hasattr(config, name)]
    missing += [name for name in _FIELDS if name not in config.model_fields]
    if missing:
        raise TypeError(f"{config.__name__} lacks {', '.join(missing)}: see StageSettings")
    if config.name() in _DATA or ALGORITHM_CONFIGS.setdefault(config.name(), config) is not config:
        raise ValueError(f"there is an algorithm {config.name()!r} already")
    return config


def stage_kinds() -> dict[str, type[StageSettings]]:
    """What `algorithm` may name: the registered algorithms, and the stages that make data."""
    return {**ALGORITHM_CONFIGS, **_DATA}


def config_of(algorithm: str) -> type[StageSettings] | None:
    """The settings of an algorithm by its name; None where nobody has registered it."""
    return stage_kinds().get(algorithm)


def _settings(value: Any) -> Any:
    """Keys and values as the settings of the algorithm that they name."""
    if not isinstance(value, dict):
        return value
    kind = config_of(str(value.get("algorithm")))
    if kind is None:
        raise ValueError(f"algorithm must be one of {', '.join(stage_kinds())}")
    return kind.model_validate(value)


# A union that grows with the registry: each stage is checked, and written, by its own class.
StageConfig = Annotated[SerializeAsAny[StageSettings], BeforeValidator(_settings)]
