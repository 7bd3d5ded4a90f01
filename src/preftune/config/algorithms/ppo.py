"""Proximal policy optimisation."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from preftune.config.algorithms.base import Healthy, OptimizerConfig, algorithm_field
from preftune.config.algorithms.online import OnlineConfig
from preftune.config.base import Count, NonNegative, Positive, Share, later


class PPOConfig(OnlineConfig):
    """Proximal policy optimisation with a learned critic and a per-token KL penalty in the reward."""

    label: ClassVar[str] = "PPO"
    implementation: ClassVar[str] = "preftune.algorithms.ppo:PPO"
    kl_metric: ClassVar[str] = "objective/kl"
    score_metric: ClassVar[str] = "objective/scores"
    headline: ClassVar[Mapping[str, str]] = {
        "objective/scores": "score",
        "objective/kl": "KL",
        "completions/mean_length": "length",
    }
    panel: ClassVar[Mapping[str, str]] = {
        "loss/policy_avg": "loss",
        **headline,
        "completions/clipped_ratio": "ended",
    }
    drawn_first: ClassVar[tuple[str, ...]] = (
        *("objective/scores", "objective/rlhf_reward", "objective/kl", "sampling/kl_k3"),
        *("completions/mean_length", "completions/clipped_ratio", "policy/approxkl_avg"),
        *("policy/clipfrac_avg", "val/explained_variance", "policy/entropy_avg", "loss/value_avg"),
        "grad_norm",
    )
    healthy: ClassVar[Mapping[str, Healthy]] = {
        "first/val/ratio": Healthy(words="1 to 1e-5", low=1 - 1e-5, high=1 + 1e-5),
        "objective/kl": Healthy(words="about 30", alone="at most about 30", high=30.0),
        "policy/approxkl_avg": Healthy(words="0.001 to 0.02", low=0.001, high=0.02),
        "policy/clipfrac_avg": Healthy(words="0 to 0.2", low=0.0, high=0.2),
        "val/ratio": Healthy(words="0.99 to 1.01", low=0.99, high=1.01),
        "val/explained_variance": Healthy(words="0.3 to 0.9", low=0.3, high=0.9),
        "val/clipfrac_avg": Healthy(words="0 to 0.3", low=0.0, high=0.3),
    }
    card: ClassVar[str] = "a policy trained with PPO against a reward model"

    algorithm: Literal["ppo"] = algorithm_field("ppo")
    minibatches: Count = Field(
        default=2, description="Optimizer updates per epoch over the sampled responses."
    )
    epochs: Count = Field(default=4, description="Epochs over the sampled responses.")
    learning_rate: Positive = Field(default=5e-6, description="Peak learning rate of the policy.")
    critic_learning_rate: Positive = Field(default=1e-5, description="Peak learning rate of the critic.")
    kl_coef: NonNegative = Field(default=0.05, description="KL penalty coefficient, in the reward.")
    kl_target: Positive | None = later(
        None,
        "Target KL to the reference, in nats per response, to which kl_coef adapts; none keeps "
        "kl_coef constant.",
    )
    kl_horizon: Count = later(
        10_000, "Responses over which kl_target may change kl_coef by a factor of at most about e^0.2."
    )
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="PPO clip range of the probability ratio."
    )
    value_clip: Positive | None = Field(
        default=0.2, description="Clip range of the value function; none does not clip."
    )
    critic_warmup: Annotated[int, Field(ge=0)] = later(
        0,
        "Steps at the start that train only the critic; the policy's learning-rate schedule runs on "
        "meanwhile.",
    )
    gamma: Share = Field(default=1.0, description="Discount factor.")
    lam: Share = Field(default=0.95, description="GAE lambda.")
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
    def _policy_is_trained(self) -> Self:
        if self.critic_warmup >= self.steps:
            raise ValueError(
                f"critic_warmup = {self.critic_warmup} leaves the policy none of {self.steps} steps"
            )
        return self

    @model_validator(mode="after")
    def _something_to_steer(self) -> Self:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(f"kl_target = {self.kl_target:g} cannot steer kl_coef = 0: it is multiplied")
        if self.kl_target is not None and self.batch_size >= 5 * self.kl_horizon:
            raise ValueError(
                f"kl_horizon = {self.kl_horizon} counts responses, and a step has {self.batch_size}: kl_coef "
                f"could fall below 0; set it above {self.batch_size / 5:g}, and well above batch_size"
            )
        return self

    def unused(self, key: str, group: str) -> str | None:
        if key == "kl_horizon" and self.kl_target is None:
            return f"it is the pace at which {group}.kl_target steers kl_coef: set that, too"
        return super().unused(key, group)

    def as_most_steps(self) -> Self:
        return self.model_copy(update={"critic_warmup": 0})

    def rate_of(self, role: str) -> float:
        return self.critic_learning_rate if role == "critic" else self.learning_rate
