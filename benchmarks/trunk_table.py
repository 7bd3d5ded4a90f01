"""The tables of docs/trainable.md from benchmarks/results/trunk.json: trunk_table.py writes the page."""

import json
from typing import Any

import trunk

RESULTS = trunk.RESULTS
PAGE = trunk.ROOT / "docs" / "trainable.md"
BEGIN, END = "<!-- made by benchmarks/trunk_table.py -->", "<!-- end -->"
OF_ARITHMETIC = 0.95  # of the ratio of multiply-adds: the target of updates on fixed rows
TARGETS = {("full", "ppo"): 2.0, ("full", "grpo"): 1.4, ("full", "evaluate"): 1.5}
TARGETS |= {("trl", "dpo"): 4.5, ("trl", "ppo"): 3.5}
ORDER = ("sft", "reward", "dpo", "ppo", "grpo", "evaluate")
HEAD = [
    *("size", "stage", "states", "trained", "pairs", "ratio", "multiply-adds", "target"),
    *("seconds", "of sgemm", "peak MB"),
]


def target(row: dict[str, Any]) -> float | None:
    """The least ratio that was asked for."""
    if row["against"] == "full" and (row["against"], row["stage"]) not in TARGETS:
        return OF_ARITHMETIC * row["arithmetic_ratio"]
    return TARGETS.get((row["against"], row["stage"]))


def cells(size: dict[str, Any], row: dict[str, Any]) -> list[str]:
    least, slow = target(row), row["against"]
    met = "" if least is None else f"{least:.2f} {'met' if row['ratio_median'] >= least else 'missed'}"
    return [
        size["size"],
        row["stage"],
        row["states"],
        row.get("trainable", f"top:{size['top']}"),
        str(row["pairs"]),
        f"{row['ratio_median']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})",
        f"{row['arithmetic_ratio']:.2f}",
        met,
        f"{row[f'seconds_{slow}']:.1f} / {row['seconds_trunk']:.1f}",
        f"{row['share_of_sgemm_trunk']:.0%}",
        f"{row[f'peak_mb_{slow}']:,.0f} / {row['peak_mb_trunk']:,.0f}",
    ]


def table() -> str:
    """Both tables as they stand in the page, against full training and against TRL, and what they lack."""
    sizes = json.loads(RESULTS.read_text(encoding="utf-8"))["sizes"]
    rows = [(size, row) for size in sizes for row in size["stages"]]
    rows.sort(
        key=lambda x: (ORDER.index(x[1]["stage"]), x[1].get("trainable", ""), x[1]["states"], x[0]["size"])
    )
    wanted = {"full": [(*each, "") for each in trunk.STAGES], "trl": trunk.TRL_STAGES}
    lines: list[str] = []
    for against, name in (("full", "full training"), ("trl", "TRL")):
        found = [cells(*each) for each in rows if each[1]["against"] == against]
        head = [f"{name} / preftune" if word == "ratio" else word for word in HEAD]
        lines += [*(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *found)), ""]
        there = {(size["size"], *trunk.key(row)) for size, row in rows}
        lacking = [
            " ".join(word for word in (size, stage, states, how) if word)
            for stage, states, how in wanted[against]
            for size in trunk.SIZES
            if (size, stage, states, against, how) not in there
        ]
        lines += [f"Not measured so far: {', '.join(lacking)}.", ""] if lacking else []
    return "\n".join(lines)


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN + "\n")
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
