"""Replies of a policy, judged: preference data that another stage learns from. Trains nothing."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from preftune.config.algorithms.base import Batch, StageSettings, algorithm_field, names_a_stage
from preftune.config.algorithms.llm import LLM, LLMConfig
from preftune.config.base import Count, Name, NonNegative, Positive, later
from preftune.config.rewards import reward_terms


class CollectConfig(StageSettings):
    """Sampled replies to training prompts, their scores, and the preferences that these make."""

    label: ClassVar[str] = "collected replies"
    makes: ClassVar[Literal["model", "data"]] = "data"
    trains_policy: ClassVar[bool] = False
    batch: ClassVar[Batch] = "prompts"
    uses: ClassVar[tuple[str, ...]] = ("pairs", "unpaired", "prompts")
    implementation: ClassVar[str] = ""
    judge_key: ClassVar[str] = "judge"
    panel: ClassVar[Mapping[str, str]] = {"score": "score", "completions/mean_length": "length"}
    score_metric: ClassVar[str] = "score"

    algorithm: Literal["collect"] = algorithm_field("collect")
    init: Name = Field(default="sft", description='The policy that responds: a policy stage, or "base".')
    judge: Name = Field(
        description='What scores the responses: "module:function" or a weighted sum of such, a reward stage, '
        "the directory or hub id of a reward model (with a slash: ./DIR), or a language model that is asked "
        'which of two is better: "llm:MODEL".'
    )
    rows: Count | None = Field(default=None, description="Number of prompts; none uses all.")
    replies: Annotated[int, Field(ge=2)] = Field(default=4, description="Responses to each prompt.")
    max_new_tokens: Count | None = Field(
        default=None,
        description="Maximum number of new tokens per response; none takes evaluation.max_new_tokens.",
    )
    temperature: Positive = Field(default=1.0, description="Sampling temperature.")
    missing_eos_score: float | None = later(
        None, "Score of a response that does not end; none keeps its own score. PPO and GRPO give it -1."
    )
    truncated: Literal["keep", "drop"] = later(
        "keep",
        "Responses that do not end: judged like others, or in no pair. A pair in which only one ends also "
        "teaches whether to end.",
    )
    pairing: Literal["best_worst", "all", "random"] = Field(
        default="best_worst",
        description="Pairs of a prompt's responses: the best and the worst, all of them, or a random one.",
    )
    ties: Literal["drop", "random"] = Field(
        default="drop", description="Pairs with equal scores: left out, or labelled by a coin."
    )
    tie_margin: NonNegative = Field(
        default=0.0, description="Scores that differ by at most this much are equal."
    )
    label_temperature: Positive | None = Field(
        default=None,
        description="Draw labels with noise: the first is chosen with probability sigmoid(difference of "
        "scores / this) (Bradley-Terry); none takes the higher score.",
    )
    batch_size: Count = Field(
        default=16,
        description="Prompts at a time; bounds memory, and is what a stop loses. Another number is another "
        "stage: the same responses up to rounding.",
    )
    microbatch_size: Count = Field(
        default=8, description="Responses per forward pass of the judge; bounds memory, not results."
    )
    llm: LLMConfig = later(LLMConfig(), "Where and how a language model is asked.")

    @model_validator(mode="after")
    def _judge_is_one(self) -> Self:
        if self.functions() is not None:
            reward_terms(self.judge)
        if self.asks is not None and (self.asks.url is None or self.judge == LLM):
            raise ValueError(f"{self.judge} is asked at llm.url, such as http://127.0.0.1:8000/v1")
        if self.asks is None and self.llm != LLMConfig():
            raise ValueError(f'llm is set and judge = {self.judge}: it is used with judge = "llm:MODEL"')
        if self.asks is not None and self.missing_eos_score is not None:
            raise ValueError(f"missing_eos_score is set, and {self.judge} compares: it gives no scores")
        return self

    @property
    def online(self) -> bool:
        return False  # it samples, and learns nothing

    @property
    def scored_by(self) -> str | None:
        return self.judge if names_a_stage(self.judge) else None

    @property
    def asks(self) -> LLMConfig | None:
        return self.llm if self.judge.startswith(LLM) else None

    def functions(self) -> str | None:
        return self.judge if ":" in self.judge and self.asks is None else None

    @property
    def judge_directory(self) -> str | None:
        """The directory of a reward model from elsewhere, if that is the judge."""
        return None if self.functions() or self.scored_by or self.asks else self.judge

    def paths(self) -> tuple[str, ...]:
        return (*super().paths(), *(["judge"] if self.judge_directory else []))

    def located(self, full: Callable[[str | None], str | None]) -> Self:
        llm = self.llm.model_copy(update={"template": full(self.llm.template)})
        return super().located(full).model_copy(update={"llm": llm})

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens or 0  # checked with the evaluation otherwise

    def steps_on(self, rows: float) -> int:
        return math.ceil(rows / self.batch_size)

    def rows_made(self, prompts: int) -> int:
        pairs_per_prompt = math.comb(self.replies, 2) if self.pairing == "all" else 1
        return min(prompts or self.rows or 0, self.rows or prompts) * pairs_per_prompt

    def plan(self, rows: Sequence[int] | None = None) -> str:
        rows_read = self.rows if rows is None else min(sum(rows), self.rows or sum(rows))
        prompts = "all" if rows_read is None else f"{'up to ' if rows is not None else ''}{rows_read:,}"
        comparisons = self.replies * (self.replies - 1)  # any two, in both orders
        times = f", at most {comparisons * (rows_read or 1):,} questions{' a prompt' * (rows_read is None)}"
        judged = f"judged by {self.judge}{'' if self.asks is None else times}"
        return f"from {self.init}: {self.replies} replies to {prompts} prompts, {judged}"
