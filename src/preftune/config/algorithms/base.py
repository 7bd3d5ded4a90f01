"""What a stage's settings share, and what the rest of the program asks of an algorithm.

The answers stand here, on the class of the settings, because plan, report and model cards need them without
torch; the mathematics is the class that `implementation` names. Nobody else knows which algorithms there are.

Batch sizes count items over all processes: `batch_size` is what one step consumes, `minibatches` cuts a step
into updates, `microbatch_size` bounds memory and changes no result beyond rounding.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field

from preftune.config.algorithms.healthy import Healthy
from preftune.config.algorithms.llm import LLMConfig
from preftune.config.algorithms.optimizer import OptimizerConfig
from preftune.config.base import Count, Name, Settings, later
from preftune.config.trainable import Trainable
from preftune.errors import ConfigError

Batch = Literal["sequences", "pairs", "unpaired", "prompts"]
Part = Literal["all", "first", "second"]
WORLD = "world"  # the built-in data


_STAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def names_a_stage(value: str | None) -> bool:
    """Whether the value names a stage. A slash marks a directory, an ending a file, a colon a function."""
    return value is not None and _STAGE.fullmatch(value) is not None and value != WORLD


class ScoreHead(NamedTuple):
    """The head of a reward model: the sd of a new one in units of 1/sqrt(width + 1), or `fitted` to the pairs
    before the first step; `pooling`: what a response's score is of its tokens' ones.
    """

    scale: float = 1.0
    fitted: bool = False
    pooling: Literal["last", "mean"] = "last"


class StageSettings(Settings):
    """Settings of one stage. A subclass is the settings of one algorithm and describes it to the others.

    Class variables, all told by a subclass where the default is not true of it:

    label · what reports call its policy
    implementation · "module:class" of the `Algorithm`, loaded when a stage is trained
    batch · what a step consumes: "sequences" and "pairs" of the training rows, "unpaired" responses with a
    label, or "prompts" to sample for
    uses · kinds of data rows that such batches can be made of: "pairs", "unpaired", "prompts", "text"
    makes · a "model", or "data" that other stages learn from
    trains_policy · False for a model that scores
    imitates · its policy, the first of them, is what others are compared with; its held-out loss is recorded
    stage_name · its name in shipped recipes, if that is not the algorithm's
    headline · metrics worth watching live, with short names
    panel · those that the panel shows, where these are not "loss" and the headline
    score_metric · the metric that is the mean score of what it sampled; the panel gives it a standard error
    healthy · ranges that the page in docs/algorithms/ gives
    drawn_first · metrics whose curves come first, in this order, before the headline and all others by name;
    those that it does not log are passed over
    not_drawn · metrics that mean nothing as a curve
    length · the setting that says how long it trains, and nothing else
    judge_key · the setting that names what scores
    combining · settings of how its models are combined, which none of them depends on
    card, card_limits · what the model card says: "This is ...", and limits besides those of every model
    """

    label: ClassVar[str]
    implementation: ClassVar[str]
    batch: ClassVar[Batch]
    uses: ClassVar[tuple[str, ...]] = ("pairs",)
    card: ClassVar[str]
    makes: ClassVar[Literal["model", "data"]] = "model"
    trains_policy: ClassVar[bool] = True
    imitates: ClassVar[bool] = False
    stage_name: ClassVar[str] = ""
    headline: ClassVar[Mapping[str, str]] = {"loss": "loss"}
    panel: ClassVar[Mapping[str, str]] = {}
    score_metric: ClassVar[str] = ""
    healthy: ClassVar[Mapping[str, Healthy]] = {}
    drawn_first: ClassVar[tuple[str, ...]] = ("loss",)
    not_drawn: ClassVar[frozenset[str]] = frozenset()
    card_limits: ClassVar[tuple[str, ...]] = ()
    combining: ClassVar[tuple[str, ...]] = ()
    length: ClassVar[str] = ""
    judge_key: ClassVar[str] = "reward_model"

    data: Name | None = later(
        None,
        "Data of this stage, instead of the run's: a stage that collects, a file, a directory "
        '(with a slash: ./DIR), a hub id, or "world". Prompts held out by the run are left out.',
    )
    trainable: Trainable | None = later(None, "Weights that this stage trains, if not model.trainable.")

    rounds: Count = later(
        1,
        "Number of times to run the chain from the stage that collects its data to this "
        "one; each round starts from the previous round's policy (docs/collect.md).",
    )

    if TYPE_CHECKING:  # every stage has these fields, in its own words and with its own defaults
        algorithm: Any  # a Literal: the name
        init: str
        epochs: int
        batch_size: int
        microbatch_size: int
        learning_rate: float
        optimizer: OptimizerConfig

    @classmethod
    def name(cls) -> str:
        """The name of the algorithm: the one value that `algorithm` may have."""
        return str(cls.model_fields["algorithm"].default)

    @classmethod
    def watched_numbers(cls) -> Mapping[str, str]:
        """Metrics that the panel of a run shows, with short names, in their order."""
        return cls.panel or {"loss": "loss", **cls.headline}

    @property
    def online(self) -> bool:
        """Whether it samples what it learns from."""
        return self.batch == "prompts"

    @property
    def scores(self) -> bool:
        """Whether its model scores responses by itself."""
        return self.makes == "model" and not self.trains_policy

    @property
    def tunes(self) -> bool:
        """Whether its policy is a contestant: neither a judge nor what contestants are compared with."""
        return self.trains_policy and not self.imitates

    @property
    def models(self) -> int:
        """How many models it trains, one after the other; more than one are an ensemble."""
        return 1

    @property
    def head(self) -> ScoreHead:
        """Of a stage that trains a reward model."""
        return ScoreHead()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of an ensemble of experts: what the sources of each one's rows have in their names."""
        return ()

    def member_names(self, name: str) -> list[str]:
        """What its models are called as stages of their own, where it is called `name`."""
        return [f"{name}/member-{i}" for i in range(self.models)]

    def member(self, number: int) -> Self:
        """The settings of one model of an ensemble, which is a stage of its own."""
        return self.model_copy(update={key: type(self).model_fields[key].default for key in self.combining})

    def learners(self) -> list[Self]:
        """The settings of its models by what they learn from: one for each of its experts, and one for all
        members of an ensemble, which learn from the same rows.
        """
        members = [self.member(number) for number in range(self.models)]
        return [member for number, member in enumerate(members) if member not in members[:number]]

    @property
    def most_rows(self) -> int | None:
        """How many rows it learns from at most; None for one that has no such limit."""
        return None

    def shares(self, rows: int) -> list[int]:
        """About how many of `rows` rows that are not known yet each of its learners gets: experts share them,
        and a half of the prompts has half of them.
        """
        learners = self.learners()
        parts = len(learners) * (1 if self.training_part() == "all" else 2)
        return [rows // parts] * len(learners)

    # --- the graph

    @property
    def scored_by(self) -> str | None:
        """The stage whose model scores what it samples, or a reward model from elsewhere (`from_outside`)."""
        return None

    def parents(self) -> tuple[str, ...]:
        """The stages, or "base", whose models or data it reads."""
        data = self.data if names_a_stage(self.data) else None
        judge = None if from_outside(self.scored_by or "") else self.scored_by
        named = (self.init, self.reference_stage, judge, data)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def reference_stage(self) -> str:
        """The stage, or "base", whose policy it is held against."""
        return self.init

    @property
    def judge_directory(self) -> str | None:
        """The directory of a reward model from elsewhere that scores what it samples."""
        return None

    def implicit_beta(self) -> float | None:
        """β, where β log π / π_ref of its policy, with `init` as the reference, scores responses too."""
        return None

    @property
    def implicit_average(self) -> bool:
        """Whether that reward is divided by the response's length."""
        return False

    def functions(self) -> str | None:
        """The reward functions that score: a setting like `reward_functions`."""
        return None

    @property
    def all_functions(self) -> str | None:
        """All functions that it calls, those that score and those that only watch: like `functions`."""
        return self.functions()

    @property
    def asks(self) -> LLMConfig | None:
        """Settings of a language model that is asked to judge, if that is the judge."""
        return None

    def paths(self) -> tuple[str, ...]:
        """The settings that hold paths."""
        return () if self.data is None or names_a_stage(self.data) or self.data == WORLD else ("data",)

    def located(self, full: Callable[[str | None], str | None]) -> Self:
        """The same stage with its paths in full."""
        return self.model_copy(update={key: full(getattr(self, key)) for key in self.paths()})

    # --- how much it does

    @property
    def items_per_row(self) -> int:
        """How many of the items that `batch_size` counts come of one data row, or prompt."""
        return 1

    @property
    def rows_per_step(self) -> int:
        """Data rows, or prompts, that a step consumes."""
        return self.batch_size // self.items_per_row

    @property
    def new_tokens(self) -> int:
        """The longest response that it samples; 0 where it samples none."""
        return 0

    def steps_on(self, rows: float) -> int:
        """Steps of the stage, if there are `rows` training rows for it (of half a row, a pair's reply)."""
        raise NotImplementedError

    @property
    def updates_per_step(self) -> int:
        """Updates of each trained role in a step."""
        return 1

    @property
    def budget(self) -> tuple[str, float] | None:
        """A metric, and how much of it ends the stage early."""
        return None

    def rate_of(self, role: str) -> float:
        """Peak learning rate of a trained role."""
        return self.learning_rate

    def as_most_steps(self) -> Self:
        """As it is in most of its steps, which is what a plan measures: its first ones may do less."""
        return self

    def training_part(self) -> Part:
        """The half of the training prompts that it learns from: "first", "second", or "all"."""
        return "all"

    def learns_from(self, source: str) -> bool:
        """Whether it learns from the rows of a source."""
        return True

    def on_part(self, part: Part) -> Self:
        """The same stage on another half of the prompts. ConfigError for one that always takes all."""
        raise ConfigError(f"an algorithm such as {self.algorithm} cannot learn from half of the prompts")

    def tokens_per_row(self, prompt: float, chosen: float, rejected: float) -> float:
        """Tokens through the policy's training forward for each row in each step, at such mean lengths."""
        raise NotImplementedError

    def rows_made(self, prompts: int) -> int:
        """Data rows that it makes of so many prompts (0: unknown), if it makes data and leaves none out."""
        return 0

    def rows_planned(self, rows: int) -> float:
        """Rows, or prompts, that the stage consumes of `rows` (0: as many as it asks for); repeats count."""
        raise NotImplementedError

    def consuming(self, rows_wanted: float, rows: int) -> Self:
        """The same stage made longer or shorter, so that it consumes about `rows_wanted` of `rows` rows."""
        raise NotImplementedError

    # --- in words

    def variant(self) -> str:
        """What tells two stages of one algorithm apart, after their names: ", β 0.1"."""
        return ""

    def plan(self, rows: Sequence[int] | None = None) -> str:
        """One line: where it starts, how much it does; in steps if it is known how many training rows each of
        its `learners` can learn from.
        """
        raise NotImplementedError


def from_outside(judge: str) -> bool:
    """Whether a judge is a directory or hub id; the names of stages have no slash."""
    return "/" in judge or judge.startswith((".", "~"))


def must_divide(total_name: str, total: int, divisor_name: str, divisor: int) -> None:
    """ValueError unless `divisor` goes into `total`."""
    if total % divisor:
        raise ValueError(f"{total_name} = {total} is not a multiple of {divisor_name} = {divisor}")


def algorithm_field(name: str) -> Any:
    """The field `algorithm` of an algorithm's settings."""
    return Field(default=name, description="Algorithm of this stage.")
