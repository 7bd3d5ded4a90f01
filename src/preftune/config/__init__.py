"""Settings: pydantic models, TOML recipes and `key=value` overrides. Imports no torch."""

from preftune.config.graph import EVALUATION, judge_of, judges_of, parents, stage_order, stages_until
from preftune.config.load import Origin, Resolved, build, config_hash, load_recipe, recipe_names
from preftune.config.options import Option, options, options_markdown, options_text
from preftune.config.run import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    ScratchConfig,
)
from preftune.config.show import show_graph, show_plan, show_values
from preftune.config.stages import (
    ALGORITHM_CONFIGS,
    DPOConfig,
    GRPOConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    StageConfig,
)
from preftune.config.toml import dump_toml

__all__ = [
    "ALGORITHM_CONFIGS",
    "EVALUATION",
    "CheckpointConfig",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Option",
    "Origin",
    "PPOConfig",
    "Resolved",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "ScratchConfig",
    "StageConfig",
    "build",
    "config_hash",
    "dump_toml",
    "judge_of",
    "judges_of",
    "load_recipe",
    "options",
    "options_markdown",
    "options_text",
    "parents",
    "recipe_names",
    "show_graph",
    "show_plan",
    "show_values",
    "stage_order",
    "stages_until",
]
