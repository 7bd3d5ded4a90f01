"""Healthy ranges of training metrics, as docs/algorithms/*.md give them. Rules of thumb, not limits.

They stand with the settings of each algorithm; `tests/report/test_healthy.py` holds them against those pages,
word for word.
"""

from preftune.config import Healthy, config_of
from preftune.report.view import RunView


def healthy(run: RunView, algorithm: str, metric: str) -> Healthy | None:
    """The range of a metric that applies to this run, if the pages give one."""
    kind = config_of(algorithm)
    found = kind.healthy.get(metric) if kind else None
    if kind is None or found is None or (found.on_hh and not _is_hh(run)):
        return None
    stages = run.config.get("stage", {}).values()
    own = [stage for stage in stages if stage.get("algorithm") == algorithm]
    for key, wanted in found.only.items():
        if any(stage.get(key, kind.model_fields[key].default) != wanted for stage in own):
            return None
    return found


def _is_hh(run: RunView) -> bool:
    return "hh-rlhf" in str(run.config.get("data", {}).get("name", "")).lower()
