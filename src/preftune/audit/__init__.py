"""`preftune audit DIR`: what is wrong with a model before it is used for RL, no matter who trained it.

Loads, probes and reports; trains nothing. A check that cannot even run is a fault of the model, not an error.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.audit.checks import FAULT, OK, WARNING, Check
from preftune.audit.files import check_files, open_directory
from preftune.audit.policy import check_policy
from preftune.audit.reward import check_reward_model
from preftune.errors import InputMissing, PreftuneError
from preftune.models.locate import GATE, locate
from preftune.models.roles import models_of
from preftune.runs.save import check_sums, load_reward_model

if TYPE_CHECKING:
    from preftune.runs.console import Console

UNKNOWN = "unknown"  # kind of model
_MARKS = {"ok": "ok", "note": "note", WARNING: "WARNING", FAULT: "FAULT"}


def audit_directory(path: Path) -> dict[str, Any]:
    """The verdict ("usable", "usable with care", "not usable") and the checks behind it. InputMissing where
    there is no directory.
    """
    if not path.is_dir():
        raise InputMissing(
            f"there is no model directory at {path}", hint="give a directory with a config.json"
        )
    weights = [file for file in path.glob("*.safetensors") if file.name != GATE]
    members = [] if weights else sorted(path.glob("member-*"))
    kinds, checks = set[str](), _combined(path) if members else list[Check]()
    for member in members or [path]:  # an ensemble is as good as each of its members
        kind, results = _checks_of(member)
        kinds.add(kind)
        checks += [replace(c, name=f"{member.name}: {c.name}") for c in results] if members else results
    kind = kinds.pop() if len(kinds) == 1 else UNKNOWN
    faults, warnings = (sum(check.status == status for check in checks) for status in (FAULT, WARNING))
    return {
        "directory": str(path),
        "kind": kind,
        "verdict": "not usable" if faults else "usable with care" if warnings else "usable",
        "faults": faults,
        "warnings": warnings,
        "checks": [asdict(_without_consequence(check)) for check in checks],
    }


def _without_consequence(check: Check) -> Check:
    """Nothing follows from what is as it should be."""
    return replace(check, consequence="", remedy="") if check.status == OK else check


def _checks_of(path: Path) -> tuple[str, list[Check]]:
    """The kind of one model, and all checks of it."""
    try:
        directory = open_directory(path)
    except PreftuneError as error:
        return UNKNOWN, [_broken("loads", error)]
    probe = check_reward_model if directory.kind == "reward model" else check_policy
    return directory.kind, [*check_files(directory), *probe(directory)]


def _combined(path: Path) -> list[Check]:
    """Whether the members of an ensemble can be loaded as one."""
    try:
        check_sums(path)
        model = load_reward_model(locate(str(path)))
    except PreftuneError as error:
        return [_broken("loads as an ensemble", error)]
    members = f"{len(models_of(model))} members"
    return [Check(name="loads as an ensemble", status=OK, found=members)]


def _broken(name: str, error: PreftuneError) -> Check:
    return Check(
        name=name,
        status=FAULT,
        found=error.message,
        consequence="nothing else can be checked",
        remedy=error.hint,
    )


def show_audit(console: "Console", result: Mapping[str, Any]) -> None:
    """A line a check, with what it means and what to do where something is amiss; then the verdict."""
    for check in result["checks"]:
        console.line(f"{_MARKS[check['status']]:<8}{check['name']}: {check['found']}")
        if check["consequence"]:
            console.line(f"{'':<8}  {check['consequence']}")
        if check["remedy"]:
            console.line(f"{'':<8}  what to do: {check['remedy']}")
    kind = "no model" if result["kind"] == UNKNOWN else f"a {result['kind']}"
    console.line(f"{result['directory']}, {kind}: {result['verdict']}")
