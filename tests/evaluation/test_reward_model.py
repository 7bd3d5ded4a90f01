"""The parts of an examination that read no labels, and the groups that accuracy is taken by."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from preftune.data import Dialogue, Preference, Sequences, Turn, pad_sequences
from preftune.evaluation.bands import expected_band
from preftune.evaluation.preference import PairLogprobs, preference
from preftune.evaluation.reward_model import by_length_difference, examine, score_by_length
from preftune.evaluation.sanity import KINDS, invariance, sanity_rows
from preftune.models.roles import RewardModel
from tiny import EOS, POSITIONS, classifier, rows


class Encoder:
    """Rows of ids for numbered pairs; the text of a made-up response is as many 1s as it has words."""

    eos_id, pad_id, max_length = EOS, EOS, POSITIONS

    def __init__(self) -> None:
        self.prompts, self.responses = rows(7, 20)

    def prompt(self, prompt: int) -> list[int]:
        return self.prompts[prompt]

    def response(self, text: Any, ended: bool = True) -> list[int]:
        return self.responses[text] if isinstance(text, int) else [1] * len(text.split()) + [EOS]

    def sequence(self, prompt: int, text: Any, ended: bool = True) -> tuple[list[int], list[int]]:
        return self.prompt(prompt), self.response(text)


def numbered(n: int) -> list[Any]:
    ended = (True, True)
    return [SimpleNamespace(prompt=i, chosen=i, rejected=i, row=i, ended=ended) for i in range(n)]


def test_a_sound_reward_model_does_not_see_padding() -> None:
    found = invariance(RewardModel(classifier(1)), Encoder(), numbered(16), torch.device("cpu"), 1.0)  # type: ignore[arg-type]
    assert found["ok"] is True
    assert found["n"] == 16
    assert 0 <= max(found["padding_max_difference"], found["batch_max_difference"]) < 1e-4


class Leaky(RewardModel):
    """Reads its score at the last column, as a reader of index -1 does."""

    __slots__ = ()

    def raw_scores(self, sequences: Sequences) -> torch.Tensor:
        return self.module(sequences.ids, sequences.attention, torch.ones_like(sequences.attention))[:, -1]


def test_a_score_that_is_read_on_padding_is_noticed() -> None:
    found = invariance(Leaky(classifier(1)), Encoder(), numbered(16), torch.device("cpu"), 1.0)  # type: ignore[arg-type]
    assert found["ok"] is False
    assert found["padding_max_difference"] > 0.01
    assert found["batch_max_difference"] > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_false_alarm_and_hides_no_real_one(dtype: torch.dtype) -> None:
    """A row's last digits depend on its company there: more than float32's tolerance allows."""
    sound, leaky = RewardModel(classifier(1)), Leaky(classifier(1))
    sound.dtype = leaky.dtype = dtype
    encoder: Any = Encoder()
    batch = pad_sequences(*rows(7, 16), EOS)
    sd = float(sound.raw_scores(batch).detach().std())
    found, wrong = (
        invariance(each, encoder, numbered(16), torch.device("cpu"), sd) for each in (sound, leaky)
    )
    assert found["ok"]
    assert found["tolerance"] > 1e-3 * sd
    assert not wrong["ok"]


def test_sanity_rows_score_what_they_say() -> None:
    pairs = [
        SimpleNamespace(prompt=i, chosen=f" w{i} x y z", rejected=" no", row=i, ended=(True, True))
        for i in range(12)
    ]  # all words are the token 1: shuffled and repeated ones are the same row as chosen
    device, model = torch.device("cpu"), RewardModel(classifier(1))
    found = {r["name"]: r for r in sanity_rows(model, Encoder(), pairs, 5, device, 0, 50)}  # type: ignore[arg-type]
    assert list(found) == ["chosen", "rejected", "shuffled_words", "empty", "repeated_token"]
    assert found["shuffled_words"]["mean"] == pytest.approx(found["chosen"]["mean"], abs=1e-6)
    assert found["shuffled_words"]["below_chosen"]["value"] == 0.5  # ties count half
    assert found["empty"]["mean"] != pytest.approx(found["chosen"]["mean"], abs=1e-3)
    assert all(row["n"] == 12 for row in found.values())
    assert found["chosen"]["below_chosen"] is None


def test_sanity_rows_end_as_the_replies_of_their_pair_do() -> None:
    """But for the empty one, which is an end token alone."""
    pairs: Any = [SimpleNamespace(prompt=0, chosen=" w x", rejected=" no", row=0, ended=(False, True))]
    encoder, ends = Encoder(), list[bool]()
    encoder.sequence = lambda prompt, text, ended=True: (ends.append(ended), ([1], [2]))[1]  # type: ignore[method-assign]
    sanity_rows(RewardModel(classifier(1)), encoder, pairs, 5, torch.device("cpu"), 0, 5)  # type: ignore[arg-type]
    assert dict(zip(KINDS, ends, strict=True)) == {
        "chosen": False, "rejected": True, "shuffled_words": False, "empty": True, "repeated_token": False,
    }  # fmt: skip


def test_copies_of_a_pair_narrow_no_interval() -> None:
    """A ranked prompt gives several pairs: here each one thrice."""
    rng = np.random.default_rng(0)
    pairs = [
        Preference(prompt=Dialogue([Turn("human", f" Q{i}?")]), chosen=" a", rejected=" b") for i in range(80)
    ]
    once = [
        {"pair": pair, "chosen": float(x), "rejected": 0.0, "chosen_length": 3 + i % 2, "rejected_length": 3}
        for i, (pair, x) in enumerate(zip(pairs, rng.normal(0.5, 1, 80), strict=True))
    ]
    first, second = (examine("rm", scored, 0) for scored in (once, once * 3))
    for name in ("accuracy_ties_half_interval", "mean_margin_interval", "brier_interval"):
        assert np.ptp(second[name]) == pytest.approx(np.ptp(first[name]), rel=0.15)
    for name in ("accuracy", "by_source", "by_turns"):
        shares = [
            each[name] if name == "accuracy" else next(iter(each[name].values())) for each in (first, second)
        ]
        assert np.ptp(shares[1]["interval"]) == pytest.approx(np.ptp(shares[0]["interval"]), rel=0.05)


def test_every_pair_is_in_one_bin_of_the_length_difference() -> None:
    lengths = np.array([-30, -20, -3, -2, -1, 0, 0, 1, 2, 5, 9, 40])
    margins = np.where(lengths < 0, 1.0, -1.0)
    bins = by_length_difference(lengths, margins, np.arange(len(lengths)))
    assert sum(b["n"] for b in bins) == len(lengths)
    assert [b["value"] for b in bins] == [1.0] * 3 + [0.0] * (len(bins) - 3)
    (equal,) = [b for b in bins if b["label"] == "0"]
    assert (equal["low"], equal["high"], equal["n"]) == (0, 1, 2)
    assert bins[0]["low"] is None
    assert bins[-1]["high"] is None
    for earlier, later in pairwise(bins):
        assert earlier["high"] <= later["low"]


@pytest.mark.parametrize(
    ("data", "sources", "parameters", "low", "high"),
    [
        ("Anthropic/hh-rlhf", {"helpful-base", "harmless-base"}, 774_000_000, 0.726, 0.737),
        ("Anthropic/hh-rlhf", {"helpful-base"}, 774_000_000, 0.726, 0.726),
        ("pairs", {"harmless-base"}, 435_000_000, 0.684, 0.752),
        ("Anthropic/hh-rlhf", {"helpful-base"}, 124_000_000, None, None),
        ("pairs", {"mine"}, 774_000_000, None, None),
    ],
)
def test_the_expected_band_is_published_or_none(
    data: str, sources: set[str], parameters: int, low: float | None, high: float | None
) -> None:
    band = expected_band(data, sources, parameters)
    assert (band["low"], band["high"]) == (low, high)
    if low is None:
        assert "none known at this size" in band["text"]
    else:
        assert band["source"]
    assert expected_band("world", {"fact"}, 1000, 0.86)["high"] == 0.86


def test_where_no_band_is_known_all_of_the_smallest_published_size_are_named() -> None:
    band = expected_band("Anthropic/hh-rlhf", {"harmless-base"}, 135_000_000)
    assert "(435 M): DeBERTa-v3-large 75.2 %, " in band["text"]
    assert "OpenAssistant DeBERTa-v3-large 68.4 % on harmless" in band["text"]
    assert all(source in band["source"] for source in ("sileod/deberta-v3-large", "table 7"))


def test_a_policy_prefers_what_it_made_more_likely() -> None:
    ours = PairLogprobs(np.array([[-2.0, -9.0], [-5.0, -4.0]]), np.array([[2.0, 3.0], [1.0, 4.0]]))
    reference = PairLogprobs(np.array([[-3.0, -3.0], [-9.0, -4.0]]), ours.lengths)
    found = preference(ours, reference, 50, 0)
    assert found["accuracy"]["value"] == 1.0  # +1 against -6, +4 against 0
    assert found["mean_margin"]["mean"] == pytest.approx(5.5)
    assert found["accuracy_logprob"]["value"] == 0.5
    assert found["accuracy_logprob_per_token"]["value"] == 0.5  # -1 > -3, -5 < -1
    assert preference(ours, None, 50, 0)["accuracy"] is None


def test_pairs_of_one_prompt_are_one_opinion_of_a_policy() -> None:
    """20 prompts, each with the same pair thrice: the intervals are those of 20 pairs."""
    rng = np.random.default_rng(0)
    own = PairLogprobs(rng.normal(size=(20, 2)), np.ones((20, 2)))
    base = PairLogprobs(rng.normal(size=(20, 2)), np.ones((20, 2)))
    thrice = PairLogprobs(np.repeat(own.sums, 3, 0), np.ones((60, 2)), np.repeat(np.arange(20), 3))
    once = preference(own, base, 200, 0)
    found = preference(thrice, PairLogprobs(np.repeat(base.sums, 3, 0), np.ones((60, 2))), 200, 0)
    for key in ("accuracy", "accuracy_logprob", "accuracy_logprob_per_token"):
        assert found[key]["interval"] == pytest.approx(once[key]["interval"], abs=0.01)
        assert found[key]["n"] == 60
    assert found["mean_margin"]["interval"] == pytest.approx(once["mean_margin"]["interval"])


def test_a_policy_of_no_known_logprob_prefers_nothing() -> None:
    nothing = PairLogprobs(np.full((2, 2), np.nan), np.ones((2, 2)))
    found = preference(nothing, nothing, 50, 0)
    assert [found[key]["interval"] for key in ("accuracy", "accuracy_logprob")] == [[0.0, 1.0]] * 2


def test_scores_by_length_are_the_means_of_each_eighth() -> None:
    rng = np.random.default_rng(4)
    sides = {f"{side}_length": rng.integers(1, 40, size=60) for side in ("chosen", "rejected")}
    scores = {side: sides[f"{side}_length"] + rng.normal(size=60) for side in ("chosen", "rejected")}
    scored = [{key: column[i] for key, column in (sides | scores).items()} for i in range(60)]
    found = score_by_length(scored, np.arange(60), 50, 0)
    assert [low["high"] for low in found[:-1]] == [high["low"] for high in found[1:]]
    for side in ("chosen", "rejected"):
        assert sum(part[side]["n"] for part in found if part[side]) == 60
        for part in found:
            here = [s[side] for s in scored if part["low"] <= s[f"{side}_length"] < part["high"]]
            if here:
                assert part[side]["mean"] == pytest.approx(sum(here) / len(here))
                assert part[side]["interval"][0] <= part[side]["mean"] <= part[side]["interval"][1]
            else:
                assert part[side] is None
    sizes = [sum(part[side]["n"] for side in ("chosen", "rejected") if part[side]) for part in found]
    assert 7 <= len(found) <= 8
    assert max(sizes) <= 2 * 120 / 8


def test_pairs_that_stand_twice_are_no_more_evidence_on_length() -> None:
    """Intervals of the length correlation and of scores by length: as wide for 120 rows as for the 60 prompts
    that they repeat.
    """
    rng = np.random.default_rng(5)
    columns = {f"{side}_length": rng.integers(1, 40, size=60) for side in ("chosen", "rejected")}
    columns |= {side: columns[f"{side}_length"] / 20 + rng.normal(size=60) for side in ("chosen", "rejected")}
    once = [
        {key: column[i] for key, column in columns.items()}
        | {"pair": Preference(prompt=Dialogue([Turn("human", f" Q{i}?")]), chosen=" a", rejected=" b")}
        for i in range(60)
    ]

    def widths(scored: list[dict[str, Any]]) -> tuple[float, float]:
        found = examine("rm", scored, 0, resamples=500)
        correlation = found["correlation_score_length_interval"]
        binned = [part["chosen"]["interval"] for part in found["score_by_length"] if part["chosen"]]
        return float(np.ptp(correlation)), float(np.mean([np.ptp(interval) for interval in binned]))

    assert widths(once * 2) == pytest.approx(widths(once), rel=0.15)


def test_responses_of_one_length_make_one_bin_and_an_absent_side_is_none() -> None:
    row = {"chosen_length": 3, "rejected_length": 3, "chosen": 1.0, "rejected": -1.0}
    (only,) = score_by_length([row, row], np.arange(2), 10, 0)
    assert (only["low"], only["high"], only["length"]) == (3, 4, 3.0)
    assert (only["chosen"]["mean"], only["rejected"]["mean"]) == (1.0, -1.0)
    short, long = score_by_length([row | {"rejected_length": 9}], np.arange(1), 10, 0)
    assert short["rejected"] is None
    assert long["chosen"] is None
