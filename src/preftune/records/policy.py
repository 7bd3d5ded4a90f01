"""evaluation/<policy>.json, best_of_n.json, comparisons.jsonl, pairs.json. KL: to the reference, in nats."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from preftune.records.base import Estimate, Estimates, Measured, Number, Numbers, Record, Several, at
from preftune.untrusted import clean

REWARD_MODEL, BEST_OF, PAIRS = "reward_model", "best_of_n", "pairs"  # files that hold no policy
MAX_LABEL = 60
SHARES = ("empty_share", "role_leakage", "repetition_4", "distinct_1", "distinct_2")
_WITH_INTERVAL = {"empty": "empty_share", "role_leakage_rate": "role_leakage", "repetition": "repetition_4"}


class Prompt(Record):
    """What a policy scored on one prompt; the prompt is named by 16 digits of its hash."""

    row: int | None = None
    prompt: str = ""
    score: Number | None = None
    gold: Number | None = None
    held_out: Number | None = None
    kl: Number | None = None
    k1: Number | None = None
    reverse_kl: Number | None = None
    length: Number | None = None
    ended: bool | None = None
    chosen_score: Number | None = None


class LengthControlled(Record):
    """What is left of a policy's gain over the reference at equal length."""

    win_rate: Measured = None
    gain: Measured = None
    matched: Measured = at("gain_length_matched")  # on prompts where both responses are about equally long
    surviving: Measured = at("share_surviving")  # share of the gain that is left
    method: str = ""
    source: str = ""


class PromptGroup(Record):
    """A policy's gains over the reference on prompts of one kind: difference, interval, paired by prompt."""

    n: int
    score: Measured = None
    p_holm: Number | None = at("score", "p_holm")  # corrected over all kinds
    gold: Measured = None
    held_out: Measured = None


class PolicyRecord(Record):
    """One policy's measurements on the held-out prompts."""

    policy: str
    label: str = ""
    n_prompts: int | None = None
    n_samples: int | None = None
    score: Measured = at("score", old="reward")
    score_sd: Number | None = at("score", "sd", old="reward")
    score_difference: Measured = at("score_difference_to_sft", old="reward_difference_to_sft")
    score_difference_to_chosen: Measured = at("score_difference_to_chosen", old="reward_difference_to_chosen")
    win_rate: Measured = at("win_rate_vs_sft")
    win_rate_chosen: Measured = at("win_rate_vs_chosen")
    kl_sequence: Measured = at("kl", "exact_per_sequence")
    kl_token: Measured = at("kl", "exact_per_token")
    k1_sequence: Measured = at("kl", "k1_per_sequence")
    k1_token: Measured = at("kl", "k1_per_token")
    reverse_kl: Measured = at("kl", "reverse_per_sequence")  # KL(reference || policy), on its samples
    kl_formula: Number | None = at("kl", "formula")
    length: Measured = None
    length_median: Number | None = at("length", "median")
    eos_rate: Measured = None
    shares: Numbers = Field(default_factory=dict)  # empty, distinct_1, ..., role_leakage
    intervals: Estimates = Field(default_factory=dict)  # the same names, where one is known
    gold: Measured = None
    golds: Estimates = Field(default_factory=dict)  # of named judges; `gold` is the world's, or the first's
    disagreement: Measured = None  # of an ensemble that is the judge: sd of a score among its members
    held_out: Measured = at("held_out_score", old="held_out_reward")  # by a model that trained no policy
    held_out_by: str | None = at("held_out_score", "stage", old="held_out_reward")  # that model's stage
    held_out_difference: Measured = at("held_out_difference_to_sft")
    length_controlled: LengthControlled | None = None
    by_prompt: Mapping[str, Mapping[str, PromptGroup]] = Field(default_factory=dict)  # by source, by turns
    prompts: Several[Prompt] = ()
    preference: Mapping[str, Any] | None = None  # of `evaluate --pairs`

    @model_validator(mode="before")
    @classmethod
    def _gather_shares(cls, row: Any) -> Any:
        """Shares lie side by side in the file; labels are text from outside."""
        if not isinstance(row, Mapping):
            return row
        row = dict(row)
        for key in ("score", "reward", "kl", "length"):  # the fields inside are looked up by path
            if row.get(key) is not None and not isinstance(row[key], Mapping | Estimate):
                raise ValueError(f"{key} is no object")
        row.setdefault("shares", {key: row[key] for key in SHARES if row.get(key) is not None})
        intervals = {new: row[old] for old, new in _WITH_INTERVAL.items() if row.get(old) is not None}
        row.setdefault("intervals", intervals)
        if isinstance(row.get("policy"), str) and isinstance(row.get("label") or "", str):
            row["label"] = clean(row.get("label") or row["policy"], MAX_LABEL)
        return row

    @property
    def scores(self) -> tuple[float, ...]:
        """One for each prompt, where it is a number."""
        return tuple(p.score for p in self.prompts if p.score is not None and math.isfinite(p.score))

    @property
    def kl(self) -> Estimate | None:
        """KL per response in nats: exact over the vocabulary, or the bound of the formula for best-of-n."""
        if self.kl_sequence is not None:
            return self.kl_sequence
        return None if self.kl_formula is None else Estimate(value=self.kl_formula)

    @property
    def best_of(self) -> bool:
        """True for best-of-n of the sft policy: a selection rule, not a trained model."""
        return self.policy.startswith("best_of_")


class PairsPolicy(PolicyRecord):
    """A policy of `evaluate --pairs`: how often it prefers the chosen response, by its own log-probabilities
    (against the reference's, per token), and how its samples do on their prompts.
    """

    prefers: Measured = at("preference", "accuracy")
    prefers_per_token: Measured = at("preference", "accuracy_logprob_per_token")


class BestOf(Record):
    """One point of the best-of-n curve: KL by formula (an upper bound), in nats, and what it gained."""

    n: int
    kl: Number = Field(validation_alias="kl_formula")
    score: Measured = at("score", old="reward")
    gold: Measured = None
    held_out: Measured = None


class BestOfCurve(Record):
    """best_of_n.json."""

    curve: Several[BestOf] = ()

    @property
    def points(self) -> tuple[BestOf, ...]:
        return tuple(sorted(self.curve, key=lambda point: point.n))


class Comparison(Record):
    """A policy against a reference in "score", "gold" or "held_out", paired by prompt.

    `p_holm` is the p-value after Holm's correction, `n_needed` the prompts to show the difference seen.
    """

    policy: str
    reference: str
    measure: str
    difference: Estimate
    p_holm: Number | None = None
    n_needed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _difference(cls, row: Any) -> Any:
        if not isinstance(row, Mapping) or "difference" in row:
            return row
        keys = ("mean", "value", "interval", "n")
        return {**row, "difference": {key: row[key] for key in keys if key in row}}


class PairsFile(Record):
    """pairs.json: which file `evaluate --pairs` read, and how many of its pairs."""

    file: str = "?"
    sha256: str | None = None
    n: int | None = None
    seen_in_training: int | None = None  # left out for that


def policy_files(directory: Path) -> list[Path]:
    """The files of policies among those of an evaluation."""
    other_files = (REWARD_MODEL, BEST_OF, PAIRS)
    return sorted(path for path in directory.glob("*.json") if not path.stem.startswith(other_files))
