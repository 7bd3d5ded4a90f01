"""What the measurement of a policy refuses."""

import math

import pytest
import torch

from preftune.errors import PreftuneError
from preftune.evaluation.policy import _finite
from tiny import EOS, Judge, sequences


@pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_no_number_stops_the_evaluation(score: float) -> None:
    """Training skips such a step; here there is nothing to skip, and a mean would be worthless."""
    batch = sequences(4)
    scores = torch.tensor([0.5, 1.0, score, 2.0])
    with pytest.raises(PreftuneError, match="NaN or infinite"):
        _finite(Judge(lambda rows: scores, EOS), batch)
    assert _finite(Judge(lambda rows: scores[:2], EOS), batch[slice(0, 2)]) == ([0.5, 1.0], None)
