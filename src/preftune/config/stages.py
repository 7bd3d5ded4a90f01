"""Settings of the five algorithms. One model an algorithm; `algorithm` tells them apart in a run.

Batch sizes count items over all processes: `batch_size` is what one step consumes, `minibatches` cuts a step
into updates, `microbatch_size` bounds memory and changes no result beyond rounding.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from preftune.config.base import Count, Name, NonNegative, Positive, Settings, Share
from preftune.config.rewards import RewardTerms

PreferenceKind = Literal[
    "sigmoid", "robust", "hinge", "ipo", "reference_free", "nca_pair", "apo_zero", "apo_down", "sppo_hard",
    "bco_pair",
]  # fmt: skip


class OptimizerConfig(Settings):
    """AdamW and the course of its learning rate over a stage."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of the gradient's mean."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="Decay of the squared gradient."
    )
    eps: Positive = Field(default=1e-8, description="Added to the denominator of the update.")
    weight_decay: NonNegative = Field(default=0.0, description="Decoupled weight decay.")
    warmup: Share = Field(default=0.05, description="Share of the steps in which the rate rises from zero.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Course of the learning rate after the warm-up."
    )
    final: Share = Field(default=0.0, description="Share of the learning rate that is left at the end.")
    max_grad_norm: Positive = Field(
        default=1.0, description="Gradients longer than this are shortened to it."
    )


class SFTConfig(Settings):
    """Supervised fine-tuning on chosen responses."""

    algorithm: Literal["sft"] = Field(default="sft", description="Which algorithm this stage runs.")
    init: Name = Field(default="base", description='Where the weights come from: a stage, or "base".')
    rows: Count | None = Field(default=None, description="Training rows to use; none takes all.")
    epochs: Count = Field(default=1, description="Passes over the rows.")
    batch_size: Count = Field(default=32, description="Responses per update.")
    microbatch_size: Count = Field(default=8, description="Responses in memory at a time.")
    learning_rate: Positive = Field(default=2e-5, description="Highest learning rate.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")


class RewardConfig(Settings):
    """A Bradley-Terry reward model on preference pairs."""

    algorithm: Literal["reward"] = Field(default="reward", description="Which algorithm this stage runs.")
    init: Name = Field(default="sft", description='Where the backbone comes from: a policy stage, or "base".')
    rows: Count | None = Field(default=None, description="Training pairs to use; none takes all.")
    part: Literal["all", "first", "second"] = Field(
        default="all",
        exclude_if=lambda part: part == "all",  # recipes and stages from before this setting stay valid
        description="Half of the training prompts to learn from: a judge on one half and a second reward "
        "model on the other share no pair.",
    )
    epochs: Count = Field(default=1, description="Passes over the pairs.")
    batch_size: Count = Field(default=32, description="Pairs per update.")
    microbatch_size: Count = Field(default=8, description="Pairs in memory at a time.")
    learning_rate: Positive = Field(default=1e-5, description="Highest learning rate.")
    center_coef: NonNegative = Field(
        default=0.0, description="Weight of the term that pulls a pair's scores to mean 0."
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")


class DPOConfig(Settings):
    """Direct preference optimisation against the policy it starts from."""

    algorithm: Literal["dpo"] = Field(default="dpo", description="Which algorithm this stage runs.")
    init: Name = Field(default="sft", description='Start and reference: a policy stage, or "base".')
    rows: Count | None = Field(default=None, description="Training pairs to use; none takes all.")
    epochs: Count = Field(default=1, description="Passes over the pairs.")
    batch_size: Count = Field(default=32, description="Pairs per update.")
    microbatch_size: Count = Field(default=8, description="Pairs in memory at a time.")
    learning_rate: Positive = Field(default=2e-6, description="Highest learning rate.")
    beta: Positive = Field(default=0.1, description="How strongly the policy is held to the reference.")
    kind: PreferenceKind = Field(default="sigmoid", description="Form of the preference loss.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0, description="Assumed share of flipped labels; for kinds sigmoid and robust."
    )
    length_average: bool = Field(
        default=False, description="Divide log-probabilities by response length first."
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")

    @model_validator(mode="after")
    def _smoothing_has_a_kind(self) -> Self:
        if self.label_smoothing and self.kind not in ("sigmoid", "robust"):
            raise ValueError(
                f"label_smoothing = {self.label_smoothing} has no meaning for kind {self.kind!r}: "
                "set it to 0, or use kind sigmoid or robust"
            )
        return self


class OnlineConfig(Settings):
    """What PPO and GRPO share: how responses are sampled, and what scores them."""

    algorithm: Literal["ppo", "grpo"] = Field(description="Which algorithm this stage runs.")
    init: Name = Field(
        default="sft", description='Start and reference of the policy: a policy stage, or "base".'
    )
    reward_model: Name | None = Field(
        default="rm",
        description="Reward stage that scores responses, or a DPO stage for its implicit reward; "
        "none: functions only.",
    )
    reward_functions: RewardTerms | None = Field(
        default=None,
        exclude_if=lambda terms: terms is None,  # keys of stages from before this setting stay valid
        description='Python functions added to the score: "module:function", or "0.5 * a:f + b:g".',
    )
    on_reward_error: Literal["stop", "mask"] = Field(
        default="stop",
        exclude_if=lambda rule: rule == "stop",
        description="What a failing reward function does: stop the run, or leave its response out.",
    )
    missing_eos_score: float | None = Field(
        default=-1.0,
        description="Score of a response without end; none keeps it, and is the default without a reward "
        "model, whose scores alone have mean 0 and deviation 1.",
    )
    max_new_tokens: Count = Field(default=64, description="Longest response that is sampled.")
    temperature: Positive = Field(
        default=1.0, description="Sampling temperature; log-probabilities use it too."
    )

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


class PPOConfig(OnlineConfig):
    """Proximal policy optimisation with a learned critic and a per-token KL penalty in the reward."""

    # Settings are frozen, so that a narrower type is safe; pyright does not see it.
    algorithm: Literal["ppo"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="ppo", description="Which algorithm this stage runs."
    )
    steps: Count = Field(default=100, description="Rounds of sampling and updating.")
    batch_size: Count = Field(default=64, description="Responses sampled per step.")
    minibatches: Count = Field(default=2, description="Updates per pass over a step's responses.")
    epochs: Count = Field(default=4, description="Passes over a step's responses.")
    microbatch_size: Count = Field(default=8, description="Responses in memory at a time.")
    learning_rate: Positive = Field(default=5e-6, description="Highest learning rate of the policy.")
    critic_learning_rate: Positive = Field(default=1e-5, description="Highest learning rate of the critic.")
    kl_coef: NonNegative = Field(default=0.05, description="Weight of the KL to the reference in the reward.")
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.2, description="How far a ratio may leave 1.")
    value_clip: Positive | None = Field(
        default=0.2, description="How far a value may move per step; none: any."
    )
    gamma: Share = Field(default=1.0, description="Discount of later rewards.")
    lam: Share = Field(default=0.95, description="Weight of long returns in the advantage (GAE's lambda).")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(eps=1e-5), description="AdamW, for policy and critic."
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_own_eps(cls, values: Any) -> Any:
        """A table that sets one optimizer key must not bring back the general eps of 1e-8."""
        if isinstance(values, dict) and isinstance(values.get("optimizer"), dict):
            return {**values, "optimizer": {"eps": 1e-5, **values["optimizer"]}}
        return values

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        _must_divide("batch_size", self.batch_size, "minibatches", self.minibatches)
        return self


class GRPOConfig(OnlineConfig):
    """Group-relative policy optimisation: no critic, several responses to each prompt."""

    algorithm: Literal["grpo"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="grpo", description="Which algorithm this stage runs."
    )
    steps: Count = Field(default=100, description="Rounds of sampling and updating.")
    batch_size: Count = Field(default=64, description="Responses per step: prompts times group_size.")
    group_size: Annotated[int, Field(ge=2)] = Field(default=8, description="Responses to one prompt.")
    minibatches: Count = Field(default=1, description="Updates per pass over a step's responses.")
    epochs: Count = Field(default=1, description="Passes over a step's responses.")
    microbatch_size: Count = Field(default=8, description="Responses in memory at a time.")
    learning_rate: Positive = Field(default=2e-6, description="Highest learning rate.")
    kl_coef: NonNegative = Field(default=0.04, description="Weight of the KL to the reference in the loss.")
    kl: Literal["k2", "k3", "k3_ratio"] = Field(
        default="k3", description="KL estimator; k3_ratio weights k3 by the policy ratio."
    )
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="How far a ratio may fall below 1."
    )
    clip_high: Positive = Field(default=0.2, description="How far a ratio may rise above 1.")
    reduction: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = Field(
        default="dapo",
        description="How token losses are averaged: over all tokens, per response, or by a fixed length.",
    )
    scale: Literal["group", "batch", "none"] = Field(
        default="group", description="Standard deviation that advantages are divided by."
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        _must_divide("batch_size", self.batch_size, "group_size", self.group_size)
        _must_divide("batch_size", self.batch_size, "minibatches", self.minibatches)
        return self


def _must_divide(whole_name: str, whole: int, part_name: str, part: int) -> None:
    if whole % part:
        raise ValueError(f"{whole_name} = {whole} is not a multiple of {part_name} = {part}")


StageConfig = Annotated[
    SFTConfig | RewardConfig | DPOConfig | PPOConfig | GRPOConfig, Field(discriminator="algorithm")
]

# The order in which the documentation lists them.
ALGORITHM_CONFIGS: dict[str, type[Settings]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "dpo": DPOConfig,
}
