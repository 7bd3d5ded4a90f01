"""Which judges training saw: one that a policy learnt from is no check on that policy."""

from collections.abc import Collection, Iterable, Mapping

from preftune.config.rewards import judges_in, reward_terms
from preftune.report.view import Row, RunView, setting
from preftune.rundir import policy_name

WORLD_GOLD = "preftune.world.gold:gold"  # the function behind the world's own score


def unseen_words(run: RunView) -> str:
    """That training never saw gold, where no policy was trained on it, and no pairs were labelled by it."""
    return "" if labelled_by(run.config, _golds(run)) or seen_gold(run) else " which training never saw,"


def _golds(run: RunView) -> list[str]:
    """The judges called gold, that of `gold` itself first; the world's own, too."""
    golds = [*judges_in(setting(run.config.get("evaluation", {}), "gold"))]
    return [WORLD_GOLD, *golds] if run.config.get("data", {}).get("name") == "world" else golds


def _is_one_of(gold: str, judges: Collection[str | None]) -> bool:
    """Whether gold, or a function in it, is among the judges."""
    return any(judge in judges for judge in (gold, *(reward_terms(gold) if ":" in gold else ())))


def seen_by(config: Row, golds: Iterable[str]) -> dict[str, list[str]]:
    """By stage, those of the judges that its policy was trained on."""
    judges = dict[str, list[str | None]]()
    for name, stage in config.get("stage", {}).items():
        functions = setting(stage, "reward_functions")
        judges[name] = [setting(stage, "reward_model"), *(reward_terms(functions) if functions else ())]
    return _golds_among(golds, judges)


def labelled_by(config: Row, golds: Iterable[str]) -> dict[str, list[str]]:
    """By stage that collects, those of the judges that labelled its pairs."""
    return _golds_among(golds, {name: [setting(s, "judge")] for name, s in config.get("stage", {}).items()})


def _golds_among(
    golds: Iterable[str], by_stage: Mapping[str, Collection[str | None]]
) -> dict[str, list[str]]:
    golds = list(golds)
    golds_by_stage = {
        name: [gold for gold in golds if _is_one_of(gold, judges)] for name, judges in by_stage.items()
    }
    return {name: judges for name, judges in golds_by_stage.items() if judges}


def seen_gold(run: RunView) -> dict[str, list[str]]:
    """By stage, the judges called gold that its policy was trained on, of policies that were evaluated."""
    by_stage = seen_by(run.config, _golds(run))
    return {name: golds for name, golds in by_stage.items() if run.policy(policy_name(name)) is not None}


def ceilings(run: RunView) -> set[str]:
    """The policies that were trained on what `gold` is: no contestants by it."""
    by_stage = seen_by(run.config, _golds(run)[:1])
    return {policy_name(name) for name in by_stage}


def taught_by_second(run: RunView) -> list[str]:
    """Stages that learnt from the second reward model, or had it judge their replies."""
    second, stages = run.second_stage, run.config.get("stage", {})
    by_stage = {name: (setting(s, "reward_model"), setting(s, "judge")) for name, s in stages.items()}
    return [] if second is None else [name for name, judges in by_stage.items() if second in judges]
