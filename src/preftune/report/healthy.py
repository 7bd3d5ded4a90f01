"""Healthy ranges of training metrics, as docs/algorithms/*.md give them. Rules of thumb, not limits.

`tests/report/test_healthy.py` holds this table against those pages, word for word.
"""

from dataclasses import dataclass

from preftune.report.view import RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Healthy:
    """A range and the words of the page that it comes from. An end of None is open.

    alone: words in the place of the page's, where those need their sentence.
    """

    words: str
    alone: str | None = None
    low: float | None = None
    high: float | None = None
    on_hh: bool = False  # said of HH-RLHF only; means nothing on other data

    @property
    def meaning(self) -> str:
        return self.words if self.alone is None else self.alone


_STAY_NEAR = Healthy(words="about 30", alone="at most about 30", high=30.0)
_RATIO = Healthy(words="0.99 to 1.01", low=0.99, high=1.01)
_CLIPPED = Healthy(words="0 to 0.2", low=0.0, high=0.2)
HEALTHY: dict[str, dict[str, Healthy]] = {
    "reward": {
        "loss": Healthy(words="0.55 to 0.65 on HH", low=0.55, high=0.65, on_hh=True),
        "accuracy": Healthy(words="0.60 to 0.75 on HH", low=0.60, high=0.75, on_hh=True),
        "margin": Healthy(words="positive", low=0.0),
    },
    "ppo": {
        "first/val/ratio": Healthy(words="1 to 1e-5", low=1 - 1e-5, high=1 + 1e-5),
        "objective/kl": _STAY_NEAR,
        "policy/approxkl_avg": Healthy(words="0.001 to 0.02", low=0.001, high=0.02),
        "policy/clipfrac_avg": _CLIPPED,
        "val/ratio": _RATIO,
        "val/explained_variance": Healthy(words="0.3 to 0.9", low=0.3, high=0.9),
        "val/clipfrac_avg": Healthy(words="0 to 0.3", low=0.0, high=0.3),
    },
    "grpo": {
        "frac_reward_zero_std": Healthy(words="below 0.2", high=0.2),
        "kl": Healthy(words="0 to 0.1", low=0.0, high=0.1),
        "kl_per_sequence": _STAY_NEAR,
        "ratio": _RATIO,
        "clip_ratio/region_mean": _CLIPPED,
    },
    "dpo": {
        "loss": Healthy(words="0.5 to 0.69", low=0.5, high=0.6932),
        "rewards/accuracies": Healthy(words="0.55 to 0.75", low=0.55, high=0.75),
    },
}


def healthy(run: RunView, algorithm: str, metric: str) -> Healthy | None:
    """The range of a metric that applies to this run, if the pages give one."""
    found = HEALTHY.get(algorithm, {}).get(metric)
    if found is None or (found.on_hh and not _is_hh(run)):
        return None
    stages = run.config.get("stage") or {}
    kinds = {
        str(stage.get("kind", "sigmoid")) for stage in stages.values() if stage.get("algorithm") == "dpo"
    }
    sigmoid_only = algorithm == "dpo" and metric == "loss"
    return None if sigmoid_only and kinds - {"sigmoid"} else found


def _is_hh(run: RunView) -> bool:
    return "hh-rlhf" in str((run.config.get("data") or {}).get("name", "")).lower()
