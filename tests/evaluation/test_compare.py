"""Verdicts of comparisons: what they need beside an interval."""

import pytest

from preftune.evaluation.compare import judged


@pytest.mark.parametrize(
    ("n", "interval", "p_value", "verdict"),
    [
        (10, [0.1, 0.5], 0.01, "better"),
        (10, [-0.5, -0.1], 0.01, "worse"),
        (9, [0.1, 0.5], 0.01, "no detectable difference"),  # as the report: too few prompts for a claim
        (100, [0.1, 0.5], 0.06, "no detectable difference"),
        (100, [-0.1, 0.5], 0.01, "no detectable difference"),
    ],
)
def test_a_verdict_needs_prompts_an_interval_and_a_p_value(
    n: int, interval: list[float], p_value: float, verdict: str
) -> None:
    (record,) = judged([{"n": n, "interval": interval, "p_value": p_value}], "score vs policy_sft")
    assert record["verdict"] == verdict
