"""Settings: pydantic models, TOML recipes and `key=value` overrides. Imports no torch."""

from preftune.config.algorithms import (
    ALGORITHM_CONFIGS,
    DPOConfig,
    GRPOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    StageConfig,
    config_of,
    register,
)
from preftune.config.algorithms.base import (
    Healthy,
    OptimizerConfig,
    StageSettings,
    algorithm_field,
    from_outside,
)
from preftune.config.algorithms.offline import OfflineConfig
from preftune.config.algorithms.online import OnlineConfig
from preftune.config.graph import EVALUATION, judge_of, judges_of, parents, stage_order, stages_until
from preftune.config.load import Resolved, build, config_hash, load_recipe, recipe_names
from preftune.config.options import options, options_markdown, options_text
from preftune.config.run import CheckpointConfig, DataConfig, EvaluationConfig, RunConfig, TextForm
from preftune.config.show import show_plan
from preftune.config.toml import dump_toml

__all__ = [
    "ALGORITHM_CONFIGS",
    "EVALUATION",
    "CheckpointConfig",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "Healthy",
    "OfflineConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "PPOConfig",
    "Resolved",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "StageConfig",
    "StageSettings",
    "TextForm",
    "algorithm_field",
    "build",
    "config_hash",
    "config_of",
    "dump_toml",
    "from_outside",
    "judge_of",
    "judges_of",
    "load_recipe",
    "options",
    "options_markdown",
    "options_text",
    "parents",
    "recipe_names",
    "register",
    "show_plan",
    "stage_order",
    "stages_until",
]
