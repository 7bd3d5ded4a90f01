"""`preftune` alone and `preftune runs`: the runs that lie here, how far they are, and how to go on.

Plain reads of small files: it must be there at once. No library but for `preftune runs` of runs that were
measured, whose numbers are read as the report reads them. What cannot be read is said, never an error.
"""

import os
import platform
import shlex
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preftune.errors import InputMissing, PreftuneError
from preftune.records.outdated import AGAIN, Outdated, outdated
from preftune.records.verdict import BETTER, RULE, WORSE, outcome
from preftune.rundir import BASE, RunDir, policy_name, read_object
from preftune.runs.lock import is_held
from preftune.sums import check_own, read_sealed
from preftune.untrusted import printable
from preftune.version import __version__

if TYPE_CHECKING:
    from preftune.records.policy import Comparison

RUNS = Path("runs")
_SHOWN = 5  # runs on the first screen
_SETTINGS = 6  # that differ, of one run
_BEGIN = (
    ("preftune run quickstart", "all stages on a built-in data set, 2 minutes on two cores"),
    ("preftune run quickstart --dry-run", "what that would do, with every setting"),
    ("preftune --help", "all commands; docs/own-data.md: your own pairs"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run directory, its settings by dotted key, its state in words, the next command, and the numbers of
    one that was measured, if they were asked for.
    """

    run: RunDir
    settings: Mapping[str, Any]
    state: str
    next: str
    numbers: Sequence[str]


def runs_in(folder: Path, *, numbers: bool) -> list[RunSummary]:
    """The runs in a folder, the one that was written last first; `numbers`: with what was measured."""
    folders = [path for path in folder.glob("*") if RunDir(path).exists()]
    return [_summary(RunDir(path), numbers) for path in sorted(folders, key=_changed_at, reverse=True)]


def first_screen() -> str:
    """What it is, how to begin, this machine, and the last runs."""
    wide = max(len(command) for command, _ in _BEGIN)
    lines = [f"preftune {__version__}: RLHF for small language models, measured and written up", "", "begin:"]
    lines += [f"  {command:<{wide}}  {purpose}" for command, purpose in _BEGIN]
    lines += ["", f"this machine: {', '.join(_machine())}"]
    if runs := runs_in(RUNS, numbers=False):
        lines += ["", "last runs here (`preftune runs` lists all):"]
        for summary in runs[:_SHOWN]:
            lines.append(f"  {summary.run.path}: {summary.state}")
            lines += [f"      {summary.next}"] * bool(summary.next)
    return "\n".join(lines)


def runs(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Where run directories lie.")] = "runs",
) -> None:
    """List runs: state, headline numbers, the settings that differ, how to go on."""
    typer.echo(printable(show_runs(folder)))


def show_runs(folder: str | Path = RUNS) -> str:
    """Every run with state, headline numbers, the settings in which it differs from others, the next command.
    InputMissing if there is none.
    """
    runs = runs_in(Path(folder), numbers=True)
    if not runs:
        raise InputMissing(
            f"no run in {folder}", "`preftune run quickstart` makes one; or give another folder"
        )
    keys = {key for summary in runs for key in summary.settings if key != "name"}
    tables = [summary.settings for summary in runs if summary.settings]
    shared = {key: Counter(repr(settings.get(key)) for settings in tables) for key in sorted(keys)}
    differ = [key for key, values in shared.items() if len(values) > 1]
    lines = []
    for summary in runs:
        own_keys = [key for key in differ if key in summary.settings]
        own_keys.sort(
            key=lambda key, run=summary: shared[key][repr(run.settings[key])]
        )  # its own values first
        assignments = [f"{key}={summary.settings[key]}" for key in own_keys]
        more = f" and {len(assignments) - _SETTINGS} more" if len(assignments) > _SETTINGS else ""
        lines.append(f"{summary.run.path}: {summary.state}")
        lines += [f"    {number}" for number in summary.numbers]
        lines += [f"    differs: {', '.join(assignments[:_SETTINGS])}{more}"] if assignments else []
        lines += [f"    {summary.next}"] if summary.next else []
    claimed = any(
        word in number for summary in runs for number in summary.numbers for word in (BETTER, WORSE)
    )
    return "\n".join([*lines, RULE] if claimed else lines)


def _summary(run: RunDir, numbers: bool) -> RunSummary:
    try:
        settings = _settings(run)
        stages = settings["stage"]
        state, done = _state(run, [*([BASE] if _from_scratch(settings) else []), *stages])
        flat = dict(_flat(settings))
        gains = _headlines(run, stages) if numbers else []
        step = (
            f"read it: {run.report_page}"
            if done and run.report_page.is_file()
            else f"go on: {_resume_command(run)}"
        )
    except (PreftuneError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        why = str(error).partition("\n")[0].removeprefix(f"{run.path}/")[:120]
        return RunSummary(run=run, settings={}, state=f"cannot be read ({why})", next="", numbers=())
    return RunSummary(run=run, settings=flat, state=state, next=step, numbers=gains)


def _settings(run: RunDir) -> dict[str, Any]:
    """What config.toml holds. ValueError or PreftuneError if it is not there, not what was written, or no
    settings of a run.
    """
    if not run.config.is_file():
        raise ValueError("it has no config.toml")
    check_own(run, run.config, run.run)
    settings = tomllib.loads(run.config.read_text(encoding="utf-8"))
    stages = settings.get("stage", {})
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ValueError("what its config.toml calls stages are none")
    if not stages:
        raise ValueError("its config.toml names no stage")
    return settings


def _state(run: RunDir, stages: Sequence[str]) -> tuple[str, bool]:
    """In words, and whether all stages are finished."""
    records = {name: read_sealed(run.stage_json(name)).get("status") for name in stages}
    finished = [name for name, status in records.items() if status == "finished"]
    begun = [name for name, status in records.items() if status == "running"]
    in_use = is_held(run)
    phrases = [f"{len(finished)} of {len(stages)} stages finished"]
    phrases += [f"{'under way' if in_use else 'stopped'} in {' and '.join(begun)}"] if begun else []
    phrases += ["reported"] if len(finished) == len(stages) and run.report_page.is_file() else []
    return ", ".join(phrases) + (" (in use now)" if in_use else ""), len(finished) == len(stages)


def _headlines(run: RunDir, stages: Iterable[str]) -> list[str]:
    """A line for every policy that was measured; one alone where nothing measured stands any more."""
    if not run.comparisons.is_file():
        return []
    from preftune.records.base import read_records
    from preftune.records.policy import Comparison

    rows = read_records(run.comparisons, Comparison)
    gone = outdated(run) if rows else Outdated()
    why = f"what was measured is {gone.reason}; {AGAIN}"
    if gone.all:
        return [why]
    lines = {name: _headline(rows, policy_name(name)) for name in stages}
    return [
        f"{name}: {why if gone.policy(policy_name(name)) else gains}"
        for name, gains in lines.items()
        if gains
    ]


def _headline(rows: Sequence["Comparison"], policy: str) -> str:
    """The gains of a policy over the reference, which the first row names, by each judge, as far as they were
    measured, with verdicts; "" of none.
    """
    reference = rows[0].reference if rows else ""
    over = {policy_name("sft"): "SFT"}.get(reference, reference.removeprefix(policy_name("")))
    gains = []
    for row in (row for row in rows if (row.policy, row.reference) == (policy, reference)):
        value, low, high = row.difference.value, row.difference.low, row.difference.high
        if low is None or high is None:
            continue
        verdict = outcome(low, high, row.difference.n, row.p_holm)
        gain = f"{value:+.2f} [{low:+.2f}, {high:+.2f}], {verdict}"
        gains.append(f"{row.measure} {gain}" if gains else f"{row.measure} over {over} {gain}")
    return "; ".join(gains)


def _resume_command(run: RunDir) -> str:
    """The command that goes on with a run, with the settings of its last command: config.toml has them. Where
    its copies go, and which run it takes stages from, only its first command says; a stage that is made anew
    is taken from nowhere.
    """
    command = (read_object(run.run) if run.run.is_file() else {}).get("command")
    words_given = [str(word) for word in command] if isinstance(command, list) else []
    words = ["preftune", "run", str(run.config), "--out", str(run.path)]
    for option in ("--mirror", *(() if run.aside.is_dir() else ("--from",))):
        joined = [word.partition("=")[2] for word in words_given if word.startswith(f"{option}=")]
        values = [value for word, value in pairwise(words_given) if word == option] + joined
        words += [option, values[0]] if values else []
    return shlex.join(words)


def _from_scratch(settings: Mapping[str, Any]) -> bool:
    return isinstance(settings.get("model", {}).get("scratch"), dict)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _changed_at(folder: Path) -> float:
    files = [folder / "config.toml", *folder.glob("stages/*/stage.json"), folder / "report.html"]
    return max((file.stat().st_mtime for file in files if os.path.isfile(file)), default=0.0)


def _machine() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield f"{platform.machine()}, {cores} {'core' if cores == 1 else 'cores'}"
    with suppress(OSError, ValueError, KeyError):
        rows = (line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        kib = {name: int(amount.split()[0]) for name, amount in rows}
        yield f"{kib['MemTotal'] / 2**20:.0f} GiB of memory, {kib['MemAvailable'] / 2**20:.0f} free"
    cards = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    driver = cards or shutil.which("nvidia-smi")
    yield f"{cards or 'an'} NVIDIA GPU{'s' if cards > 1 else ''}" if driver else "no GPU seen"
    built = any((Path(__file__).parent.parent / "models" / "fast").glob("native-*.so"))
    yield "sampling kernel built" if built else "no sampling kernel (`make native` builds it)"
