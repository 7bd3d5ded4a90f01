"""preftune: RLHF for small language models that a person can run, read and trust.

Public names load on first use, so that `import preftune` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from preftune.version import __version__

if TYPE_CHECKING:
    from preftune.api import (
        dpo_train,
        grpo_train,
        ppo_train,
        run,
        supervised_finetune,
        train_reward_model,
    )
    from preftune.runs.standalone import load_policy, load_reward_model
    from preftune.training.one_update import one_update

_HOMES = {
    "run": "preftune.api",
    "train_reward_model": "preftune.api",
    "supervised_finetune": "preftune.api",
    "ppo_train": "preftune.api",
    "grpo_train": "preftune.api",
    "dpo_train": "preftune.api",
    "load_policy": "preftune.runs.standalone",
    "load_reward_model": "preftune.runs.standalone",
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
