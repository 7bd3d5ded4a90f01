"""The table of docs/reliability.md, from the results beside this script: nothing in it is typed."""

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"
Found = dict[str, Any]  # what a script wrote
Rows = list[tuple[str, str]]  # what was done, what came of it
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


def table() -> str:
    """Markdown rows: what was done, what came of it, which script measured it."""
    measured = {
        "kills": _kills,
        "signals": _signals,
        "corruption": _corruption,
        "full_disk": _disk,
        "locks": _locks,
        "two_processes": _two_processes,
        "world_size": _world_size,
        "overhead": _overhead,
        "environment": _environment,
        "kills_few": _kills,
    }
    lines = ["| what was done | what came of it | script | commit |", "|---|---|---|---|"]
    if not (RESULTS / "kills_few.json").is_file():  # only SMALL=1 makes it
        measured.pop("kills_few")
    for name, rows in measured.items():
        found = _read(name)
        place = f"`{found['command'].rpartition('/')[2]}` | {found['commit']} |"
        lines += [f"| {what} | {result} | {place}" for what, result in rows(found)]
    return "\n".join(lines)


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def lower_bound(right: int, n: int) -> float:
    """The lower end of the exact 95 % interval of a share when all n of n came right (Clopper-Pearson)."""
    return 0.025 ** (1 / n) if right == n else math.nan


def _of(right: int, n: int) -> str:
    bound = lower_bound(right, n)
    return f"{right} of {n}" + ("" if math.isnan(bound) else f" (95 % interval from {bound:.1%})")


def _kills(found: Found) -> Rows:
    stages = ", ".join(f"{n} {name}" for name, n in found["by_stage"].items())
    kinds = ", ".join(
        f"{n} {'at random moments' if k == 'moment' else k}" for k, n in found["by_kind"].items()
    )
    many = found["many_in_one"]
    same = "identical" if not many["differs"] and many["code"] == 0 else "different"
    right = _of(found["identical"], found["kills"])
    return [
        (
            f"{found['kills']} SIGKILLs, one a run ({stages}; {kinds})",
            f"weights, optimizer, saved model, metrics and rows bit-identical: {right}",
        ),
        (f"{many['kills']} SIGKILLs in one PPO stage of {many['steps']} steps", same),
        (
            f"work lost in these runs (a checkpoint every {found['interval']} steps)",
            f"at most {found['most_steps_lost']} steps, {found['lost_beyond_interval']} beyond the interval",
        ),
        (
            "data rows and prompts in the ledgers of these runs",
            f"{found['rows_skipped_or_doubled']} skipped or doubled",
        ),
    ]


def _signals(found: Found) -> Rows:
    n = found["signals"]
    return [
        (
            f"{n} SIGTERMs at random moments of a stage",
            f"exit 143: {_of(found['exit_143'], n)}; then identical: {_of(found['identical'], n)}; "
            f"{found['steps_lost']} finished steps lost",
        ),
        (
            "from SIGTERM to the end of the process",
            f"median {found['median_seconds']:.2f} s, 95th percentile {found['p95_seconds']:.2f} s, "
            f"longest {found['most_seconds']:.2f} s",
        ),
    ]


def _corruption(found: Found) -> Rows:
    kinds = ", ".join(f"{counts['damaged']} {kind}" for kind, counts in found["by_kind"].items())
    right = _of(found["detected_and_older_used"], found["damaged"])
    what = f"{found['damaged']} damaged checkpoints ({kinds})"
    return [(what, f"detected, set aside, older one used: {right}")]


def _disk(found: Found) -> Rows:
    small, stays, returns = (
        found[key] for key in ("too_small_at_the_start", "full_until_the_end", "full_for_two_steps")
    )
    same = "identical" if not stays["differs"] and stays["code_of_the_repetition"] == 0 else "different"
    back, rows = "identical" if not returns["differs"] else "different", len(returns["rows"])
    return [
        (
            f"too little space before training ({found['file_system']})",
            f"exit {small['code']}, {'something' if small['trained'] else 'nothing'} trained",
        ),
        (
            "the disk fills up in step 3 and stays full",
            f"exit {stays['code']}, checkpoint of step {stays['older_checkpoint']} intact; afterwards {same}",
        ),
        (
            "the disk is full for two steps",
            f"exit {returns['code']}, {returns['warnings']} warnings, {rows} of 5 metrics rows, {back}",
        ),
    ]


def _locks(found: Found) -> Rows:
    free = "free after a SIGKILL of the first" if found["free_after_kill"] else "not freed"
    harm = "first unharmed" if found["first_unharmed"] else "first harmed"
    return [
        (
            f"{found['second_commands']} second commands on a run directory",
            f"exit 73: {_of(found['exit_73'], found['second_commands'])}; {harm}; {free}",
        ),
        (
            "such a command as a person types it",
            f"gone after {found['median_seconds']:.1f} s on the busy machine (median; "
            f"{found['processor_seconds']:.2f} s of processor time)",
        ),
        (
            f"{found['races']} pairs started at the same moment",
            f"{found['races_with_two_writers']} with two writers",
        ),
    ]


def _two_processes(found: Found) -> Rows:
    rows = []
    for name, case in found.items():
        if name.startswith("sig"):
            same = "identical" if not case["differs"] and case["code_of_the_repetition"] == 0 else "different"
            agreed = ", both stopped after the same step" if case["stopped_by_agreement"] else ""
            named = f", the silent one named after {found['patience']} s" if case["silent_one_named"] else ""
            result = f"both gone after {case['seconds']:.1f} s{agreed}{named}; resumed by two: {same}"
            number, _, which = name.partition("_")
            one = "the main one" if which else "one"
            rows.append((f"{number.upper()} to {one} of two processes (once)", result))
    return rows


def _world_size(found: Found) -> Rows:
    error, stage = found["error_in_one"], found["stage"].upper()
    shown = "the real one" if "this row is poisoned" in error["errors"][0] else "another one"
    code = f"exit {error['code_of_the_process']}, which torchrun shows"
    result = f"the first error shown is {shown}; {code}; both gone after {error['seconds']:.1f} s"
    rows = [("an error in one of two processes (once)", result)]
    for key, what in (("to_one", "begun by two processes, resumed by one"), ("to_two", "by one, by two")):
        case = found[key]
        same = "same rows" if case["same_rows"] and case["code"] == 0 else "different"
        result = (
            f"{same}; first gradient {case['first_gradient']:.2g} of itself apart, last loss "
            f"{case['last_loss']:.2g}, weights up to {case['weights']:.2g}"
        )
        rows.append((f"{stage} {what} (once)", result))
    return rows


def _overhead(found: Found) -> Rows:
    rows = []
    for key, name in (
        ("sft", "SFT of `quickstart`"),
        ("ppo", "PPO of `quickstart`"),
        ("gpt2_sft", "SFT, GPT-2's size"),
    ):
        cost = found[key]
        copy = f", {cost['copy'] * 1000:.1f} ms a step for the copy in memory" if cost["copy"] else ""
        seconds = f"{cost['save']:.3f} s a save{copy}, {cost['step']:.2f} s a step"
        rows.append(
            (
                f"checkpoints every {found['interval']} steps: {name}",
                f"{cost['share']:.2%} of the time ({seconds})",
            )
        )
    return rows


def _environment(found: Found) -> Rows:
    rows = []
    for name, differs in found["differs"].items():
        by = f"{', '.join(differs)} differ, weights by up to {found['largest'][name]:.1e}"
        rows.append((f"{found['stage'].upper()}: {name}", by if differs else "identical"))
    return rows


if __name__ == "__main__":
    main()
