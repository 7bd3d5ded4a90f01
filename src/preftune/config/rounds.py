"""`stage.NAME.rounds = N`: the chain of stages from the one that collects to this one, N times.

Of each stage there is a copy for each round (`pairs-2`, `dpo-2`), which reads those of its own round. What
collects, and the stage itself, start from the policy of the round before.
"""

from collections.abc import Mapping
from typing import Any

from preftune.config.algorithms import config_of

_LINKS = ("init", "reference", "data", "judge", "reward_model")  # settings that name other stages

Stages = Mapping[str, Any]  # raw settings by name


def unrolled(stages: Stages) -> dict[str, Any]:
    """All stages with their copies for later rounds; a copy that the settings have already stays as it is."""
    with_copies = dict(stages)
    for last, settings in stages.items():
        rounds = settings.get("rounds") if isinstance(settings, dict) else None
        if type(rounds) is not int or rounds < 2:
            continue
        chain = [name for name in stages if name == last or name in _above(stages, last)]
        chain = [name for name in chain if name == last or _collects(stages, name)]
        if chain == [last]:
            raise ValueError(
                f"stage.{last}.rounds = {rounds}: nothing it learns from is collected, so that every round "
                "would be the same; let stage.NAME.data name a stage that collects"
            )
        for number in range(2, rounds + 1):
            for name in chain:
                copied = _of_round(stages, name, chain, last, number)
                with_copies.setdefault(round_name(name, number), copied)
    return with_copies


def _of_round(stages: Stages, name: str, chain: list[str], last: str, number: int) -> dict[str, Any]:
    """The settings of a stage's copy."""
    settings = {key: value for key, value in stages[name].items() if key != "rounds"}
    for key, linked in _links(stages, name).items():
        if linked in chain:
            settings[key] = round_name(linked, number)
    if name == last or _makes_data(stages, name):
        settings["init"] = round_name(last, number - 1)
    return settings


def round_name(name: str, number: int) -> str:
    """What the copy of a stage for a round, from 1 on, is called."""
    return name if number == 1 else f"{name}-{number}"


def _links(stages: Stages, name: str) -> dict[str, str]:
    """The other stages that a stage names, by the setting, its defaults included."""
    settings, kind = stages[name], config_of(str(stages[name].get("algorithm")))
    fields = kind.model_fields if kind else {}
    named = {key: settings.get(key, fields[key].default if key in fields else None) for key in _LINKS}
    return {key: value for key, value in named.items() if isinstance(value, str) and value in stages}


def _above(stages: Stages, name: str, visited: frozenset[str] = frozenset()) -> set[str]:
    """All stages that one depends on."""
    direct = set(_links(stages, name).values()) - visited - {name}
    return direct.union(*(_above(stages, linked, visited | direct | {name}) for linked in direct))


def _makes_data(stages: Stages, name: str) -> bool:
    kind = config_of(str(stages[name].get("algorithm")))
    return kind is not None and kind.makes == "data"


def _collects(stages: Stages, name: str) -> bool:
    return any(_makes_data(stages, ancestor) for ancestor in {name, *_above(stages, name)})
