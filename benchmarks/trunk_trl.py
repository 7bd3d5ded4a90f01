"""`trainable = "top:K"` and "lora" against TRL with the same blocks frozen, or with peft, in alternation.

Usage: trunk_trl.py [SIZE ...] [--stages ...] [--pairs N] --shared DIRECTORY, with TRL's environments of
`make bench`. Models, rows and steps are those of trunk.py, whose rows of results lie in the same file with
"against": "trl". TRL takes one step for both states of ours, first and kept; losses agree in
every step. Rows are written after each pair.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trunk

sys.path.insert(0, str(trunk.ROOT / "benchmarks" / "speed"))
import bench
from bench import Worker as Theirs

STAGES = {  # states of ours: measured beside one side of TRL's
    f"{stage}-{how}" if how else stage: (
        stage,
        how,
        [b for a, b, c in trunk.TRL_STAGES if (a, c) == (stage, how)],
    )
    for stage, _, how in trunk.TRL_STAGES
}


def prepare(folder: Path, size: str, stage: str, how: str, data: list[Any], shared: Path) -> Path:
    """A directory of work for theirs.py: the same networks, rows and steps, in the same order."""
    from transformers import AutoTokenizer

    directory = folder / f"{size}-{stage}-{how or 'top'}"
    side = trunk.Side(size, stage, "first", "full", data)
    trunk.network(size, scalar=False).save_pretrained(directory / "lm")
    side.scalar().save_pretrained(directory / "rm")
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "gpt2-tokenizer")
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # pads as our side does
    for part in ("lm", "rm"):
        tokenizer.save_pretrained(directory / part)
    n = trunk.PROMPTS if stage == "ppo" else trunk.PAIRS_A_STEP
    work = {
        "size": size,
        "batch": n,
        "rows": [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in data],
        "steps": [list(range(i, i + n)) for i in range(0, len(data), n)],
        **({"lora": {"r": trunk.RANK, "lora_alpha": trunk.ALPHA}} if how == "lora" else {}),
        **({} if how else {"top": trunk.SIZES[size]["top"]}),
    }
    (directory / "work.json").write_text(json.dumps(work))
    return directory


Rounds = list[list[dict[str, Any]]]


def compare(
    size: str, name: str, pairs: int, data: list[Any], folder: Path, shared: Path
) -> Iterator[list[dict[str, Any]]]:
    """TRL and ours in turns; after each round the rows so far, one for each kind of states."""
    stage, how, kinds = STAGES[name]
    directory = prepare(folder, size, stage, how, data, shared)
    theirs = Theirs(*bench.theirs(stage), directory, stage)
    ours = [trunk.Worker(size, stage, states, how or "trunk", str(folder / "rows.json")) for states in kinds]
    rounds: Rounds = []
    for i in range(1 + pairs):
        found = theirs.step()
        rounds.append([{**found, "seconds": found["cpu_seconds"]}, *(worker.step(i) for worker in ours)])
        for k in range(1, len(rounds[0])):
            bench.check(stage, [[r[k], r[0]] for r in rounds])
        if i:
            yield [row_of(size, stage, how, kinds[k - 1], k, data, rounds) for k in range(1, len(rounds[0]))]
    for worker in (theirs, *ours):
        worker.stop()


def row_of(
    size: str, stage: str, how: str, states: str, k: int, data: list[Any], rounds: Rounds
) -> dict[str, Any]:
    """The row of our worker `k`."""
    sides = (
        (("lora", "first"), ("lora", states)) if how == "lora" else (("frozen", "first"), ("trunk", states))
    )
    work = [[trunk.flops(size, stage, s, data, i, who) for who, s in sides] for i in range(len(rounds))]
    row = {
        "stage": stage,
        "states": states,
        "against": "trl",
        **({"trainable": how} if how else {}),
    }
    row |= trunk.figures([(r[0], r[k]) for r in rounds], work, ("trl", "trunk"))
    if "loss" in rounds[0][0]:
        row["largest_loss_difference"] = max(abs(r[0]["loss"] - r[k]["loss"]) for r in rounds)
    return row


def missing(size: str, name: str, pairs: int) -> bool:
    """Whether a row has fewer pairs on record."""
    stage, how, kinds = STAGES[name]
    return any(trunk.pairs_of(size, stage, states, "trl", how) < pairs for states in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", help=f"of {', '.join(trunk.SIZES)}")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/hh-rlhf")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"PREFTUNE_CACHE": name, "OMP_NUM_THREADS": "1"}
        folder, data = Path(name), trunk.rows(wanted.shared, 2 * trunk.PROMPTS)
        (folder / "rows.json").write_text(json.dumps(data))
        for stage in wanted.stages:
            for size in wanted.sizes or trunk.SIZES:
                if missing(size, stage, wanted.pairs):
                    for rows in compare(size, stage, wanted.pairs, data, folder, wanted.shared):
                        for row in rows:
                            trunk.write(size, row)
                            trunk.say(size, row)


if __name__ == "__main__":
    main()
