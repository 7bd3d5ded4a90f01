"""What the measurement of a policy refuses."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preftune.config import EvaluationConfig
from preftune.data import Dialogue, Preference, Turn
from preftune.errors import PreftuneError
from preftune.evaluation.policy import Conditions, _finite
from preftune.evaluation.stats import bootstrap_mean
from preftune.evaluation.summary import _possible
from tiny import EOS, Judge, sequences


@pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_no_number_stops_the_evaluation(score: float) -> None:
    """Training skips such a step; here there is nothing to skip, and a mean would be worthless."""
    batch = sequences(4)
    scores = torch.tensor([0.5, 1.0, score, 2.0])
    with pytest.raises(PreftuneError, match="NaN or infinite"):
        _finite(Judge(lambda rows: scores, EOS), batch)
    assert _finite(Judge(lambda rows: scores[:2], EOS), batch[slice(0, 2)]) == ([0.5, 1.0], None)


def test_an_interval_of_lengths_ends_where_lengths_do() -> None:
    """Of ten replies of which eight were cut off at 48 tokens, the interval of the mean reaches beyond."""
    low, high = bootstrap_mean([48.0] * 8 + [3.0, 20.0], resamples=400)
    assert high > 48 > low
    assert _possible({"interval": [low, high]}, 48)["interval"] == [max(low, 0), 48]
    assert _possible({"interval": [-3.0, 5.0]})["interval"] == [0, 5.0]
    assert _possible({"interval": [-math.inf, math.inf]}, 48)["interval"] == [-math.inf, math.inf]


def test_a_chosen_reply_that_was_cut_is_not_measured_as_one_that_ends() -> None:
    def sequence(prompt: Dialogue, text: str, ended: bool = True) -> tuple[list[int], list[int]]:
        return [1, 2], [3, EOS] if ended else [3]

    encoder: Any = SimpleNamespace(
        sequence=sequence,
        ends=(EOS,),
        pad_id=EOS,
        decode=lambda ids: "Yes",
        readable_prompt=lambda prompt: "Hi",
    )
    rows = [
        Preference(prompt=Dialogue([Turn("human", " Hi")]), chosen=" Yes", rejected=" No", columns=columns)
        for columns in ({}, {"ended_chosen": False})
    ]
    conditions = Conditions(
        prompts=rows,
        encoder=encoder,
        scorer=None,
        reference=encoder,
        settings=EvaluationConfig(),
        seed=0,
        device=torch.device("cpu"),
    )
    assert [row["ended"] for row in conditions.human([row.chosen for row in rows])] == [True, False]
