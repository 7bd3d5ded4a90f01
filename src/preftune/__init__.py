"""preftune: RLHF for small language models that a person can run, read and trust.

Public names load on first use, so that `import preftune` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preftune.pipeline.api import (
        dpo_train,
        grpo_train,
        ppo_train,
        run,
        supervised_finetune,
        train_reward_model,
    )
    from preftune.pipeline.handles import load_policy, load_reward_model
    from preftune.training.one_update import one_update

__version__ = "0.1.0"  # the same as in pyproject.toml; a test compares them

_HOMES = {
    "run": "preftune.pipeline.api",
    "train_reward_model": "preftune.pipeline.api",
    "supervised_finetune": "preftune.pipeline.api",
    "ppo_train": "preftune.pipeline.api",
    "grpo_train": "preftune.pipeline.api",
    "dpo_train": "preftune.pipeline.api",
    "load_policy": "preftune.pipeline.handles",
    "load_reward_model": "preftune.pipeline.handles",
    "one_update": "preftune.training.one_update",
}

__all__ = [
    "__version__",
    "dpo_train",
    "grpo_train",
    "load_policy",
    "load_reward_model",
    "one_update",
    "ppo_train",
    "run",
    "supervised_finetune",
    "train_reward_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'preftune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
