"""One file an algorithm. To add one: write it, give it a config, add it here."""

from preftune.algorithms.base import Algorithm
from preftune.algorithms.dpo import DPO
from preftune.algorithms.grpo import GRPO
from preftune.algorithms.ppo import PPO
from preftune.algorithms.reward import Reward
from preftune.algorithms.sft import SFT

ALGORITHMS: dict[str, type[Algorithm]] = {"sft": SFT, "reward": Reward, "ppo": PPO, "grpo": GRPO, "dpo": DPO}

__all__ = ["ALGORITHMS", "DPO", "GRPO", "PPO", "SFT", "Algorithm", "Reward"]
