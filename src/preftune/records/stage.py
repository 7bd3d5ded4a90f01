"""What a stage writes: stage.json, how far it is and what it cost, and the rows of metrics.jsonl."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from preftune.records.base import Estimates, Measured, Number, Record, Several, at
from preftune.sums import write_sealed


def _as_float(value: Any) -> Any:
    return math.inf if type(value) is int and abs(value) > sys.float_info.max else value


Logged = Annotated[Number, BeforeValidator(_as_float)]  # JSON's integers have no end


class NotTheLast(Record):
    """Why a model is that after step `kept`: at `step` the KL was `value`, beyond the budget; or that
    checkpoint was the best of those up to `step`, with this worth.
    """

    step: int
    value: Number
    kept: int
    why: Literal["kl_budget", "best"] = "kl_budget"

    def words(self, stage: str) -> str:
        if self.why == "best":
            return (
                f"{stage}: the best checkpoint up to step {self.step} is that after step {self.kept}, "
                f"which is its model (checkpoint.best, {self.value:.4g})"
            )
        return (
            f"{stage} stopped at step {self.step}: its KL of {self.value:.3g} nats a response is beyond "
            f"kl_budget; its model is that after step {self.kept}"
        )


class AskedRecord(Record):
    """What a language model that judged has said."""

    questions: int = 0
    no_verdict: int = 0
    refused: int = 0
    ties: int = 0
    both_orders: Measured = None  # share of comparisons with the same outcome in both orders
    first_wins: Measured = None  # share of decided answers for the reply that stands first
    tokens_in: int = 0
    tokens_out: int = 0
    cost: Number | None = None
    answered_by: Several[str] = ()


class CollectedRecord(Record):
    """Of a stage that collects: who judged what, how often, and how well the labels agree."""

    judge: str = ""
    prompts: int = 0
    replies: int = 0
    pairs: int = 0
    left_out_pairs: int = 0
    score_mean: Number | None = None
    label_temperature: Number | None = None
    labels_agree: Number | None = None
    best_reachable: Number | None = None
    longer_wins: Measured = None  # share of pairs of unequal length
    beats: Estimates = Field(default_factory=dict)  # win rate over what another stage collected
    llm: AskedRecord | None = None


class JudgedRecord(Record):
    """What scored the policies of an evaluation: the judge, a stage or one from elsewhere, and its key; of
    reward functions, and of gold's judges, hashes of what they consist of.
    """

    judge: str | None = None
    key: str | None = None
    functions: Mapping[str, str] = Field(default_factory=dict)
    golds: Mapping[str, Any] = Field(default_factory=dict)


class StageRecord(Record):
    remedy: ClassVar[str] = "remove its directory and run the same command: the stage is trained again"

    stage: str = ""
    algorithm: str = ""
    status: str = ""
    key: str = ""  # SHA-256 of all that its result depends on
    inputs: Mapping[str, Any] = Field(default_factory=dict)  # what the key is made of
    made_from: Mapping[str, str | None] = Field(default_factory=dict)  # parent -> sum of its model
    shared: Several[str] = ()  # of the evaluation: the stages whose models all its numbers hang on
    judged_by: JudgedRecord | None = None  # of the evaluation
    state_sha256: Mapping[str, str] = Field(default_factory=dict)  # files of the last checkpoint
    seconds: Number | None = None
    peak_memory_mb: Number | None = None
    steps: int | None = None
    world_size: int | None = None  # processes that finished it
    parents: Several[str] = ()
    kl_budget: NotTheLast | None = None
    best: NotTheLast | None = None

    collected: CollectedRecord | None = None  # of one that makes data
    taken_from: str = ""  # the run that trained it, of a stage that was taken over
    left_out: Mapping[str, int] = at("rejected", default={})  # rows that could not be encoded, by reason

    @classmethod
    def write(cls, path: Path, row: Mapping[str, Any]) -> None:
        """Write what can be read back, with its own sum. ValidationError for anything else."""
        cls.model_validate(row)
        write_sealed(path, row)


class LiveRecord(Record):
    """live.json, for those who look on: the steps of the stage, tokens that one of them learns from (None:
    its metrics say), and one reply to a prompt, before the first step and as of a step since then.
    """

    remedy: ClassVar[str] = StageRecord.remedy

    steps: int = Field(ge=0, le=1 << 53)
    tokens: Number | None = None
    start: str = ""  # the stage, or "base", that the policy began as
    prompt: str = ""
    before: str = ""
    now: str = ""
    step: int = 0


class MetricsRow(Record):
    """What one step logged: numbers by name, those that are not finite included."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Logged]  # pyright: ignore[reportIncompatibleVariableOverride] - pydantic's way
    remedy: ClassVar[str] = StageRecord.remedy

    step: int = Field(ge=0, le=1 << 53)

    @property
    def numbers(self) -> Mapping[str, float]:
        """All but the step."""
        return self.__pydantic_extra__
