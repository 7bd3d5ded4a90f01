"""What on-policy algorithms share: they sample, and something scores what they sampled."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from preftune.config.algorithms.base import Batch, OptimizerConfig, StageSettings, from_outside, must_divide
from preftune.config.base import Count, Name, Positive, later, words_in
from preftune.config.rewards import Functions, RewardTerms, reward_terms


class OnlineConfig(StageSettings):
    """What on-policy algorithms share: how responses are sampled, and what scores them."""

    batch: ClassVar[Batch] = "prompts"
    uses: ClassVar[tuple[str, ...]] = ("pairs", "unpaired", "prompts")
    length: ClassVar[str] = "steps"
    kl_metric: ClassVar[str] = "kl_per_sequence"  # what kl_budget bounds
    score_metric: ClassVar[str] = "reward"
    headline: ClassVar[Mapping[str, str]] = {
        "reward": "score",
        "kl_per_sequence": "KL",
        "completions/mean_length": "length",
    }
    panel: ClassVar[Mapping[str, str]] = {"loss": "loss", **headline, "completions/clipped_ratio": "ended"}
    drawn_first: ClassVar[tuple[str, ...]] = (
        *("loss", "reward", "objective/rlhf_reward", "kl_per_sequence", "kl", "sampling/kl_k3"),
        *("completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std", "reward_std"),
        *("entropy", "grad_norm"),
    )

    algorithm: Any = Field(description="Algorithm of this stage.")
    init: Name = Field(default="sft", description='Initial policy and reference: a policy stage, or "base".')
    reward_model: Name | None = Field(
        default="rm",
        description="Reward stage that scores responses, a stage such as DPO for its implicit reward, or the "
        "directory or hub id of a reward model (with a slash); none: functions only.",
    )
    reward_functions: RewardTerms | None = later(
        None, 'Python functions added to the score: "module:function", or "0.5 * a:f + b:g".'
    )
    watched_functions: Functions | None = later(
        None,
        'Python functions that are measured at every step and enter no score: "module:function", '
        "or several with commas. What they give is logged, as of reward_functions, as rewards/FUNCTION/mean.",
    )
    on_reward_error: Literal["stop", "mask"] = later(
        "stop", "When a reward function fails: stop the run, or mask the response."
    )
    missing_eos_score: float | None = Field(
        default=-1.0,
        description="Score of a response that does not end; none keeps its own score, and is the "
        "default without a reward model (whose scores have mean 0 and standard deviation "
        "1).",
    )
    max_new_tokens: Count = Field(default=64, description="Maximum number of new tokens per response.")
    temperature: Positive = Field(
        default=1.0, description="Sampling temperature; log-probabilities use it too."
    )
    kl_budget: Positive | None = later(
        None,
        "End the stage when a step's KL to the reference exceeds this many nats per response, keeping the "
        "last checkpoint from before or, with checkpoint.best, the best one up to that; none sets no limit.",
    )

    steps: Count = Field(default=100, description="Training steps; each one samples, scores and updates.")
    batch_size: Count = Field(default=64, description="Responses per step.")
    minibatches: Count = Field(
        default=1, description="Optimizer updates per epoch over the sampled responses."
    )
    epochs: Count = Field(default=1, description="Epochs over the sampled responses.")
    microbatch_size: Count = Field(
        default=8, description="Responses per forward pass; bounds memory, not results."
    )
    learning_rate: Positive = Field(default=2e-6, description="Peak learning rate.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")

    if TYPE_CHECKING:
        kl_coef: float

    @model_validator(mode="before")
    @classmethod
    def _no_scale_no_replacement(cls, values: Any) -> Any:
        """Where functions alone score, -1 may be more than any of them gives: being cut off would pay."""
        if isinstance(values, dict) and "reward_model" in values and values["reward_model"] is None:
            return {"missing_eos_score": None, **values}
        return values

    @model_validator(mode="after")
    def _something_scores(self) -> Self:
        if self.reward_model is None and self.reward_functions is None:
            raise ValueError(
                "nothing scores the responses: name a reward_model, or reward_functions, or both"
            )
        return self

    @model_validator(mode="after")
    def _watches_what_it_does_not_learn(self) -> Self:
        terms = reward_terms(self.reward_functions) if self.reward_functions else {}
        if twice := terms.keys() & set(words_in(self.watched_functions)):
            raise ValueError(f"watched_functions: {min(twice)} is one of reward_functions, which are logged")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.items_per_row > 1:
            must_divide("batch_size", self.batch_size, "group_size", self.items_per_row)
        must_divide("batch_size", self.batch_size, "minibatches", self.minibatches)
        return self

    @property
    def scored_by(self) -> str | None:
        return self.reward_model

    def paths(self) -> tuple[str, ...]:
        return (*super().paths(), *(("reward_model",) if from_outside(self.reward_model or "") else ()))

    def functions(self) -> str | None:
        return self.reward_functions

    @property
    def all_functions(self) -> str | None:
        names = (*filter(None, [self.reward_functions]), *words_in(self.watched_functions))
        return " + ".join(names) or None

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens

    @property
    def updates_per_step(self) -> int:
        return self.epochs * self.minibatches

    def worth(self, metrics: Mapping[str, float]) -> float:
        """What a step measured, by which its policy is compared with those of other steps."""
        return metrics[self.score_metric] - self.kl_coef * metrics[self.kl_metric]

    @property
    def budget(self) -> tuple[str, float] | None:
        return None if self.kl_budget is None else (self.kl_metric, self.kl_budget)

    def steps_on(self, rows: float) -> int:
        return self.steps

    def rows_planned(self, rows: int) -> float:
        return self.steps * self.rows_per_step

    def tokens_per_row(self, prompt: float, chosen: float, rejected: float) -> float:
        return self.items_per_row * self.epochs * (prompt + min(chosen, self.max_new_tokens))

    def consuming(self, rows_wanted: float, rows: int) -> Self:
        return self.model_copy(update={"steps": max(round(rows_wanted / self.rows_per_step), 1)})

    def plan(self, rows: Sequence[int] | None = None) -> str:
        scored = " + ".join(judge for judge in (self.reward_model, self.reward_functions) if judge)
        return f"from {self.init}, scored by {scored}: {self.steps} steps of {self.batch_size} responses"
