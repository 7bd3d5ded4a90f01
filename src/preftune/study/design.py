"""What every seed of a study runs: the recipe's stages at equal tokens, and the stages that a study adds.

Added are, on the built-in world, an online stage on the gold score itself (the ceiling: what the same
algorithm reaches with a perfect reward); elsewhere a second reward model on the other half of the prompts,
which takes the part of gold; and one stage for every value of a sweep.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.config import (
    RunConfig,
    StageConfig,
    build,
    config_hash,
    dump_toml,
    from_outside,
    judge_of,
    judges_of,
    load_recipe,
)
from preftune.config.graph import witnesses
from preftune.config.rewards import judges_in
from preftune.config.rounds import round_name
from preftune.data import Dataset
from preftune.errors import ConfigError, DataError, UsageError
from preftune.rundir import write_text
from preftune.runs.lengths import Lengths
from preftune.runs.sources import learners_rows
from preftune.study.tokens import planned_tokens, with_tokens
from preftune.sums import read_sealed, write_sealed
from preftune.world.gold import gold

CEILING = "ceiling"
GOLD_MODEL = "gold_rm"
SECOND_MODEL = "second reward model"
GOLD_FUNCTION = "preftune.world.gold:gold"
FRESH_PAIRS = 2000  # that test a reward model, on each prompt set
REPLIES = 4  # of each policy to a prompt
VERSION = 1  # of what a study measures
_GOLD_ROWS = 256  # chosen replies from which gold's sd is taken, as many as normalise a reward model


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """A study but for its seeds. `sweeps`: stages by value as given, by swept setting."""

    config: RunConfig
    recipe: str
    overrides: tuple[str, ...]
    recipe_stages: tuple[str, ...]
    tokens: int | None
    sweeps: Mapping[str, Mapping[str, str]]
    fresh_pairs: int
    replies: int

    @property
    def is_world(self) -> bool:
        return self.config.is_world

    @property
    def gold(self) -> str:
        named = judges_in(self.config.evaluation.gold)
        return "the world's gold score" if self.is_world else named[0] if named else SECOND_MODEL

    @property
    def gold_apart(self) -> bool | None:
        """True if a second reward model learns from the half of the prompts that the judge does not; None:
        the settings do not say.
        """
        stages = self.config.stage
        half = stages[str(judge_of(stages))].training_part()
        second_halves = (stages[name].training_part() for name in witnesses(stages))
        return any({half, second_half} == {"first", "second"} for second_half in second_halves) or None

    def for_seed(self, seed: int) -> RunConfig:
        return self.config.model_copy(update={"seed": seed})

    def key(self, seed: int) -> str:
        """What a finished seed is known by."""
        return f"{VERSION}/{self.fresh_pairs}/{self.replies}/{config_hash(self.for_seed(seed))}"


@dataclass(frozen=True, slots=True)
class Request:
    """What the command asks for, before anything is looked up."""

    recipe: str
    overrides: tuple[str, ...] = ()
    tokens: int | None = None  # None: as the first online stage; 0: the recipe as it is
    sweep: str | None = None  # KEY=A,B; several with semicolons
    fresh_pairs: int = FRESH_PAIRS
    replies: int = REPLIES


def make_design(request: Request, config: RunConfig, dataset: Dataset, lengths: Lengths) -> Design:
    """The stages of every seed. `config` is the recipe's, with its paths in full. UsageError or ConfigError
    for a recipe that cannot be studied.
    """
    stages = dict(config.stage)
    if not any(stage.imitates for stage in stages.values()):
        raise ConfigError("a study compares policies with SFT, and this recipe has no sft stage")
    judge = judge_of(stages)
    if judge is None or from_outside(judge):
        raise ConfigError(
            "a study needs its own reward model, for the score and for best-of-n, and this recipe "
            f"has {'none' if judge is None else judge}",
            hint='add a stage with algorithm = "reward", and name it as reward_model',
        )
    recipe_stages = tuple(stages)
    budget = _budget(request.tokens, stages, lengths)
    if budget is not None:
        stages = _with_budget(stages, budget, lengths, dataset)
    if config.is_world:
        stages |= _ceiling(stages, dataset)
    elif not config.evaluation.gold:
        stages |= _second_judge(stages)
    sweeps: dict[str, dict[str, str]] = {}
    for text in request.sweep.split(";") if request.sweep is not None else ():
        key = text.partition("=")[0].strip()
        if key in sweeps:
            raise UsageError(f"{key} is swept twice", hint=f"write all its values once: {key}=A,B,C")
        stages, sweeps[key] = _with_sweep(request, text.strip(), stages)
    values = {**config.model_dump(), "stage": {n: s.model_dump() for n, s in stages.items()}}
    return Design(
        config=build(RunConfig, values),
        recipe=request.recipe,
        overrides=request.overrides,
        recipe_stages=recipe_stages,
        tokens=budget,
        sweeps=sweeps,
        fresh_pairs=request.fresh_pairs,
        replies=request.replies,
    )


def _budget(tokens: int | None, stages: Mapping[str, StageConfig], lengths: Lengths) -> int | None:
    """Tokens through the policy's training forward, equal for all algorithms; None leaves all as it is."""
    if tokens is not None:
        return tokens or None
    online = [stage for stage in stages.values() if stage.online]
    return round(planned_tokens(online[0], lengths) * online[0].rounds) if online else None


def _with_budget(
    stages: Mapping[str, StageConfig], budget: int, lengths: Lengths, dataset: Dataset
) -> dict[str, StageConfig]:
    """All contestants at equal tokens: the rounds of a stage share them, so that its last policy has seen as
    many as the others. What scores the others is no contestant.
    """
    shares = {
        round_name(name, number + 1): stage.rounds
        for name, stage in stages.items()
        if stage.rounds > 1
        for number in range(stage.rounds)
    }

    def with_budget(name: str, stage: StageConfig) -> StageConfig:
        rows, items = _rows_and_items(name, stages, dataset)
        return with_tokens(stage, max(round(budget / shares.get(name, 1) * items), 1), lengths, rows)

    judges = judges_of(stages)
    return {n: s if n in judges or s.makes == "data" else with_budget(n, s) for n, s in stages.items()}


def _rows_and_items(name: str, stages: Mapping[str, StageConfig], dataset: Dataset) -> tuple[int, int]:
    """How many rows a stage learns from, and how many of them it takes for the replies of a pair."""
    stage = stages[name]
    source = dataset.of(stage.data)
    if source is None:
        return sum(stage.shares(stages[str(stage.data)].rows_made(len(dataset.train)))), 1
    rows = sum(map(len, learners_rows(source.rows_for(stage.batch), stage, name)))
    return rows, stage.items_per_row if source.kind == stage.batch == "unpaired" else 1


def _ceiling(stages: Mapping[str, StageConfig], dataset: Dataset) -> dict[str, StageConfig]:
    """The first online stage again, scored by gold in units of its sd over chosen replies, as a reward model
    is normalised. Gold knows a missing end by itself.
    """
    first = next((stage for stage in stages.values() if stage.online), None)
    if first is None or CEILING in stages:
        return {}
    scores = [gold(row.prompt, row.chosen) for row in dataset.train[:_GOLD_ROWS]]
    mean = sum(scores) / len(scores)
    sd = (sum((s - mean) ** 2 for s in scores) / max(len(scores) - 1, 1)) ** 0.5
    changed = {
        "reward_model": None,
        "reward_functions": f"{1 / (sd or 1):.2g} * {GOLD_FUNCTION}",
        "missing_eos_score": None,
    }
    return {CEILING: first.model_copy(update=changed)}


def _second_judge(stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
    """Reward models on one half of the prompts each, where the recipe has a single one on all of them."""
    judges = {name: stage for name, stage in stages.items() if stage.scores}
    if not judges:
        raise ConfigError(
            "on real text a second reward model stands in for gold, and this recipe trains none",
            hint='add a stage with algorithm = "reward"',
        )
    if witnesses(stages):
        return {}
    if judge_of(stages) not in judges or len(judges) > 1:
        raise _without_gold(judges)
    (name, judge), *_ = judges.items()
    return {
        name: judge.on_part("first"),
        GOLD_MODEL: judge.on_part("second"),
    }


def check_gold(design: Design) -> None:
    """ConfigError for a design on disk that `make_design` would not make now: nothing stands for gold."""
    stages = design.config.stage
    if not (design.is_world or design.config.evaluation.gold or witnesses(stages)):
        raise _without_gold(name for name, stage in stages.items() if stage.scores)


def _without_gold(judges: Iterable[str]) -> ConfigError:
    return ConfigError(
        "on real text a second reward model stands in for gold, and by each of this recipe's some stage "
        f"learns ({', '.join(judges)})",
        hint='add a stage with algorithm = "reward" that none names',
    )


def _with_sweep(
    request: Request, sweep: str, stages: Mapping[str, StageConfig]
) -> tuple[dict[str, StageConfig], dict[str, str]]:
    """One stage more for each value; a value that the stage has already needs none."""
    key, _, text = sweep.partition("=")
    match = re.fullmatch(r"stage\.([A-Za-z0-9_-]+)\.(\w+)", key)
    values = list(dict.fromkeys(value.strip() for value in text.split(",") if value.strip()))
    if match is None or match[1] not in stages or not values:
        raise UsageError(
            f"cannot sweep {sweep!r}", hint="write it like --sweep stage.ppo.kl_coef=0.02,0.05,0.2"
        )
    name, field = match.groups()
    config = stages[name]
    if not config.tunes:
        raise UsageError(f"stage {name} is no preference tuning, so a sweep of it has no KL to draw")
    extended, stage_of = dict(stages), dict[str, str]()
    for value in values:
        words = [*request.overrides, f"{key}={value}"]
        variant = load_recipe(request.recipe, words, spared=request.overrides).config.stage[name]
        setting = getattr(variant, field)
        stage = f"{name}-{field}-{re.sub('[^A-Za-z0-9]', '_', value)}"
        stage_of[value] = name if getattr(config, field) == setting else stage
        if stage_of[value] != name:
            if stage in extended:
                hint = "write one of them in another way"
                raise UsageError(f"cannot sweep {key}: {value} and another value are both {stage}", hint)
            extended[stage] = config.model_copy(update={field: setting})
    return extended, stage_of


def save_design(design: Design, out: Path) -> None:
    """Write study.toml and design.json."""
    write_text(out / "study.toml", dump_toml(design.config))
    write_sealed(out / "design.json", _record(design))


def load_design(out: Path) -> Design:
    """The design that `save_design` wrote."""
    file = out / "design.json"
    record = read_sealed(file)
    config = load_recipe(str(out / "study.toml")).config
    try:
        return Design(
            config=config,
            recipe=record["recipe"],
            overrides=tuple(record["overrides"]),
            recipe_stages=tuple(record["own"]),
            tokens=record["tokens"],
            sweeps={key: dict(values) for key, values in _sweeps(record).items()},
            fresh_pairs=int(record["fresh_pairs"]),
            replies=int(record["replies"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        hint = "remove it and request.json and run the same command: both are made again"
        raise DataError(f"{file} is not as preftune writes it ({error!r})", hint) from error


def _record(design: Design) -> dict[str, Any]:
    return {
        "recipe": design.recipe,
        "overrides": list(design.overrides),
        "own": list(design.recipe_stages),
        "tokens": design.tokens,
        "sweeps": {key: dict(values) for key, values in design.sweeps.items()},
        "fresh_pairs": design.fresh_pairs,
        "replies": design.replies,
        "version": VERSION,
    }


def _sweeps(record: Mapping[str, Any]) -> Mapping[str, Mapping[str, str]]:
    """Of a design before there could be several, too."""
    key = record.get("sweep_key")
    return record["sweeps"] if "sweeps" in record else {key: record["sweep"]} if key else {}


def swept(design: Design) -> Sequence[str]:
    """Stages that exist for sweeps alone."""
    stages = dict.fromkeys(name for values in design.sweeps.values() for name in values.values())
    return [name for name in stages if name not in design.recipe_stages]
