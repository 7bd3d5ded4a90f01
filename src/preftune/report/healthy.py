"""Healthy ranges of training metrics, as docs/algorithms/*.md give them. Rules of thumb, not limits.

They stand with the settings of each algorithm; `tests/report/test_healthy.py` holds them against those pages,
word for word.
"""

from preftune.config import Healthy, config_of
from preftune.report.view import RunView


def healthy(run: RunView, algorithm: str, metric: str) -> Healthy | None:
    """The range of a metric that applies to this run, if the pages give one."""
    kind = config_of(algorithm)
    healthy_range = kind.healthy.get(metric) if kind else None
    if kind is None or healthy_range is None or (healthy_range.on_hh and not _is_hh(run)):
        return None
    stages = run.config.get("stage", {}).values()
    of_algorithm = [stage for stage in stages if stage.get("algorithm") == algorithm]
    for key, value in healthy_range.only.items():
        if any(stage.get(key, kind.model_fields[key].default) != value for stage in of_algorithm):
            return None
    return healthy_range


def _is_hh(run: RunView) -> bool:
    return "hh-rlhf" in str(run.config.get("data", {}).get("name", "")).lower()
