"""Reward modelling."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from preftune.config.algorithms.base import Batch, Healthy, ScoreHead, algorithm_field
from preftune.config.algorithms.offline import OfflineConfig
from preftune.config.base import Count, Name, NonNegative, Positive, Words, later, words_in


class RewardConfig(OfflineConfig):
    """A Bradley-Terry reward model on preference pairs."""

    label: ClassVar[str] = "reward model"
    implementation: ClassVar[str] = "preftune.algorithms.reward:Reward"
    batch: ClassVar[Batch] = "pairs"
    trains_policy: ClassVar[bool] = False
    stage_name: ClassVar[str] = "rm"
    headline: ClassVar[Mapping[str, str]] = {"loss": "loss", "accuracy": "accuracy"}
    panel: ClassVar[Mapping[str, str]] = {**headline, "margin": "margin"}
    drawn_first: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")
    healthy: ClassVar[Mapping[str, Healthy]] = {
        "loss": Healthy(words="0.55 to 0.65 on HH", low=0.55, high=0.65, on_hh=True),
        "accuracy": Healthy(words="0.60 to 0.75 on HH", low=0.60, high=0.75, on_hh=True),
        "margin": Healthy(words="positive", low=0.0),
    }
    combining: ClassVar[tuple[str, ...]] = ("members", "combine", "sd_coef", "experts")
    card: ClassVar[str] = "a reward model (Bradley-Terry): it scores a response to a prompt"
    card_limits: ClassVar[tuple[str, ...]] = (
        "- Its score means something for comparing two responses to one prompt, not across prompts.",
        "- The end token belongs to what is scored. TRL's trainers drop it before they score: "
        "`reward_funcs` sees the score of the text without it: the same as `score(..., ended=False)` below, "
        "and not what the accuracy above was measured with. Keep the end token where you can.",
    )

    algorithm: Literal["reward"] = algorithm_field("reward")
    init: Name = Field(
        default="sft", description='Initial weights of the backbone: a policy stage, or "base".'
    )
    learning_rate: Positive = Field(default=1e-5, description="Peak learning rate.")
    center_coef: NonNegative = Field(
        default=0.0, description="Coefficient of the penalty that centers a pair's scores at 0."
    )
    head_scale: NonNegative = later(
        1.0,
        "Standard deviation of the new scalar head, in units of 1/sqrt(width + 1); 0 starts "
        "every score at 0. Pretrained models with large last hidden states need less than "
        "1, since their initial scores differ by more than the pairs teach.",
    )
    pooling: Literal["last", "mean"] = later(
        "last",
        "What a response's score is: that of its last token, or the mean of those of all its tokens, which "
        "preftune alone reads.",
    )
    fit_head: bool = later(
        False,
        "Begin with the head that predicts the pairs best from the model's states as they are (logistic "
        "regression), and train all from there (Kumar et al., arXiv:2202.10054).",
    )
    members: Count = later(1, "Number of reward models in an ensemble, each with its own head and row order.")
    combine: Literal["mean", "min", "mean-sd"] = later(
        "mean",
        "Score of an ensemble: the mean or the minimum of its members' normalised scores, or the "
        "mean minus sd_coef times their sd (Coste et al., arXiv:2310.02743).",
    )
    sd_coef: NonNegative = later(0.5, 'Factor of the sd among members in combine = "mean-sd".')
    experts: Words | None = later(
        None,
        "Train one reward model per kind of source (words separated by commas, matched as in sources: "
        '"harmless, helpful"); a gate picks one by the prompt.',
    )

    @model_validator(mode="after")
    def _experts_are_the_members(self) -> Self:
        if self.experts is not None and (self.members > 1 or self.sources is not None):
            raise ValueError(
                "experts are the members, each with its own sources: leave out members and sources"
            )
        return self

    @model_validator(mode="after")
    def _one_has_nothing_to_combine(self) -> Self:
        if self.members == 1 and (self.combine != "mean" or self.sd_coef != 0.5):
            raise ValueError("combine and sd_coef are for members = 2 or more")
        return self

    def unused(self, key: str, group: str) -> str | None:
        if key == "sd_coef" and self.combine != "mean-sd":
            return f'it is a factor in {group}.combine="mean-sd"'
        if key == "head_scale" and self.fit_head:
            return f"{group}.fit_head sets the head"
        return super().unused(key, group)

    @property
    def head(self) -> ScoreHead:
        return ScoreHead(self.head_scale, self.fit_head, self.pooling)

    @property
    def models(self) -> int:
        return len(self.kinds) or self.members

    @property
    def kinds(self) -> tuple[str, ...]:
        return words_in(self.experts)

    def learns_from(self, source: str) -> bool:
        return any(kind in source for kind in self.kinds) if self.kinds else super().learns_from(source)

    def member(self, number: int) -> Self:
        alone = super().member(number)
        return alone.model_copy(update={"sources": self.kinds[number]}) if self.kinds else alone

    def plan(self, rows: Sequence[int] | None = None) -> str:
        times = f", {self.members} members ({self.combine})" if self.members > 1 else ""
        return super().plan(rows) + (f", experts: {self.experts}" if self.experts else times)
