"""What `preftune runs` says of numbers whose models are no longer there: once a run, or by policy."""

from pathlib import Path

import pytest

import prose
from preftune.rundir import RunDir, write_jsonl, write_text
from preftune.runs.overview import show_runs
from preftune.sums import write_sealed

STAGES = ("sft", "rm", "ppo", "dpo")
GONE = "of models of {} that are no longer there; preftune evaluate RUN measures what is there"


@pytest.mark.parametrize(
    ("gone", "shared", "says"),
    [
        (("rm", "ppo"), ("sft", "rm"), ["what was measured is " + GONE.format("rm and ppo")]),
        (
            ("rm", "dpo"),
            (),
            ["ppo: score over SFT +0.50", "dpo: what was measured is " + GONE.format("rm and dpo")],
        ),
    ],
    ids=["all", "one policy, and a stage that has no numbers"],
)
def test_that_models_are_gone_is_said_where_there_were_numbers(
    tmp_path: Path, gone: tuple[str, ...], shared: tuple[str, ...], says: list[str]
) -> None:
    run = RunDir(tmp_path / "one")
    write_text(run.config, "".join(f'[stage.{name}]\nalgorithm = "x"\n' for name in STAGES))
    measured = {"reference": "policy_sft", "measure": "score", "mean": 0.5, "interval": [0, 1], "verdict": ""}
    write_jsonl(run.comparisons, [{"policy": f"policy_{name}"} | measured for name in ("ppo", "dpo")])
    record = {"made_from": dict.fromkeys(gone, "an old sum"), "shared": list(shared)}
    write_sealed(run.stage_json("evaluation"), record)
    lines = [line.strip() for line in show_runs(tmp_path).splitlines()][1:-1]
    assert [line.partition(" [")[0] for line in lines] == says


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"policy": "policy_ppo"', "evaluation/comparisons.jsonl:2: not valid JSON"),
        ('{"policy": 3}', "evaluation/comparisons.jsonl:2: policy: input should be a valid string"),
        (
            '{"policy": "policy_ppo", "reference": "base", "measure": "score", "mean": 1, "interval": 5}',
            "evaluation/comparisons.jsonl:2: difference: value error, an interval has two ends",
        ),
    ],
    ids=["torn", "a number for a name", "no interval"],
)
def test_damaged_numbers_are_refused_as_the_report_refuses_them_and_end_nothing(
    tmp_path: Path, row: str, why: str
) -> None:
    for name in ("one", "two"):
        run = RunDir(tmp_path / name)
        write_text(run.config, "".join(f'[stage.{name}]\nalgorithm = "x"\n' for name in STAGES))
        measured = {"reference": "policy_sft", "measure": "score", "mean": 0.5, "interval": [0, 1]}
        write_jsonl(run.comparisons, [{"policy": "policy_ppo"} | measured])
    damaged = RunDir(tmp_path / "one").comparisons
    write_text(damaged, damaged.read_text() + row + "\n")
    said = show_runs(tmp_path)
    assert f"{tmp_path}/one: cannot be read ({why}" in said
    assert f"{tmp_path}/two: 0 of 4 stages finished" in said
    assert "SFT +0.50 [+0.00, +1.00], no detectable difference" in said
    (line,) = (line for line in said.splitlines() if "ppo: score" in line)
    prose.compare("runs/list_of_runs: a policy in a list of runs", line)
