"""The graph of stages: who starts from whom, in which order they run, and what makes a graph invalid."""

from collections.abc import Mapping

from preftune.config.algorithms.base import StageSettings, from_outside, names_a_stage
from preftune.errors import ConfigError, UsageError, one_of

BASE = "base"  # the model before any stage
EVALUATION = "evaluation"  # what runs after all stages


def parents(stage: StageSettings) -> tuple[str, ...]:
    """Names of the stages whose models this one reads, without "base"."""
    return tuple(dict.fromkeys(name for name in stage.parents() if name != BASE))


def judge_of(stages: Mapping[str, StageSettings]) -> str | None:
    """The stage whose model scores every policy: the judge of the first stage that has one, which may be from
    elsewhere, else the first reward stage.
    """
    named = [stage.scored_by for stage in stages.values() if stage.makes == "model"]
    trained = [name for name, stage in stages.items() if stage.scores]
    return next((name for name in (*named, *trained) if name is not None), None)


def judges_of(stages: Mapping[str, StageSettings]) -> list[str]:
    """Reward stages, and policy stages by whose implicit reward another one learns."""
    named = {stage.scored_by for stage in stages.values()}
    return [name for name, stage in stages.items() if stage.scores or name in named]


def witnesses(stages: Mapping[str, StageSettings]) -> list[str]:
    """Reward stages that no stage learns from, and none lets judge its replies: they can check the others."""
    used = {judge_of(stages), *(stage.scored_by for stage in stages.values())}
    return [name for name, stage in stages.items() if stage.scores and name not in used]


def stage_order(stages: Mapping[str, StageSettings]) -> list[str]:
    """Stage names with parents before children, otherwise in the order of the recipe.

    Raises ConfigError where stages wait for each other.
    """
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise ConfigError(f"stages wait for each other: {circle}", "let one of them start from 'base'")
        if name not in order:
            for parent in parents(stages[name]):
                visit(parent, (*path, name))
            order.append(name)

    for name in stages:
        visit(name, ())
    return order


def stages_until(stages: Mapping[str, StageSettings], last: str) -> list[str]:
    """`last` and everything it needs, in running order. Raises UsageError for a name that is no stage."""
    if last not in stages:
        raise UsageError(f"there is no stage {last!r}", one_of(last, stages))
    needed: set[str] = set()
    waiting = [last]
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting.extend(parent for parent in parents(stages[name]) if parent not in needed)
    return [name for name in stage_order(stages) if name in needed]


def check_graph(stages: Mapping[str, StageSettings]) -> None:
    """Raise ConfigError unless every `init` and `reward_model` names a fitting stage and none is circular."""
    if not stages:
        raise ConfigError("a run needs at least one stage", "add a table such as [stage.sft]")
    for name, meaning in ((BASE, "the base model"), (EVALUATION, "the comparison of all policies")):
        if name in stages:
            raise ConfigError(f"stage.{name}: this name means {meaning}", "give the stage another name")
    policies = [name for name, stage in stages.items() if stage.trains_policy]
    judges = [n for n, s in stages.items() if s.scores or s.implicit_beta() is not None]
    makers = [n for n, s in stages.items() if s.makes == "data"]
    for name, stage in stages.items():
        for setting, policy in (("init", stage.init), ("reference", stage.reference_stage)):
            if policy not in (BASE, *policies):
                expected = "a stage that trains a policy"
                _refuse(stages, name, setting, policy, expected, [BASE, *policies])
        judge = stage.scored_by
        if judge is not None and judge not in judges and not from_outside(judge):
            expected = "a stage whose model scores, or ./DIRECTORY"
            _refuse(stages, name, stage.judge_key, judge, expected, judges)
        if stage.data is not None and names_a_stage(stage.data) and stage.data not in makers:
            expected = "a stage that collects, or a file, ./DIR, hub id or world"
            _refuse(stages, name, "data", stage.data, expected, makers)
    stage_order(stages)


def _refuse(
    stages: Mapping[str, StageSettings],
    name: str,
    setting: str,
    value: str,
    expected: str,
    choices: list[str],
) -> None:
    """Raise for a setting of stage `name`, with those of `choices` that do not wait for that stage."""
    later = {name}
    while more := {n for n, stage in stages.items() if later.intersection(parents(stage))} - later:
        later |= more
    possible = [choice for choice in choices if choice not in later]
    offer = f"choose one of: {', '.join(possible)}" if possible else "add one to the recipe"
    raise ConfigError(f'stage.{name}.{setting} = "{value}": expected {expected}', offer)
