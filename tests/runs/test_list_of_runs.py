"""What `preftune runs` says: states, numbers and differences; numbers whose models are no longer there."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import prose
from preftune.cli import main
from preftune.records.verdict import BETTER, RULE
from preftune.rundir import RunDir, read_json, read_jsonl, write_json, write_jsonl, write_text
from preftune.runs import overview
from preftune.runs.overview import show_runs
from preftune.sums import note, write_sealed

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


def test_runs_are_listed_with_state_numbers_and_what_differs(
    tiny_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 0), ("b", 7)):
        shutil.copytree(tiny_run.path, tmp_path / name)
        file = tmp_path / name / "config.toml"
        file.write_text(file.read_text().replace("seed = 0\n", f"seed = {seed}\n"))
        note(RunDir(tmp_path / name), [file])
    (tmp_path / "d").mkdir()
    settings = (tmp_path / "a" / "config.toml").read_text().replace("prompts = 16\n", "prompts = 17\n")
    (tmp_path / "d" / "config.toml").write_text(settings)
    record = {**read_json(RunDir(tmp_path / "b").stage_json("ppo")), "status": "running"}
    write_sealed(RunDir(tmp_path / "b").stage_json("ppo"), record)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.toml").write_text("stage = [")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.toml").touch()
    assert main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/a: 6 of 6 stages finished, reported" in said
    (stopped,) = (line for line in said.splitlines() if f"{tmp_path}/b: " in line)
    assert "5 of 6 stages finished" in stopped
    assert "stopped in ppo" in stopped
    assert f"{tmp_path}/c: cannot be read" in said
    assert f"{tmp_path}/e: cannot be read (its config.toml " in said
    assert f"--out {tmp_path}/e" not in said
    settings = re.findall(r"differs: (\S+),", said)
    assert sorted(settings) == ["evaluation.prompts=16", "evaluation.prompts=17", "seed=7"]  # its own first
    gain = read_json(tiny_run.evaluation("policy_dpo"))["score_difference_to_sft"]
    found = re.findall(r"dpo: score over SFT (\S+) \[.*?\], (.*?); gold (\S+) \[.*?\], (.*?)\n", said)
    rows = read_jsonl(tiny_run.comparisons)
    verdicts = [
        row["verdict"] for row in rows if (row["policy"], row["reference"]) == ("policy_dpo", "policy_sft")
    ]
    assert [row[0] for row in found] == 2 * [f"{gain['mean']:+.2f}"]
    assert [row[1::2] for row in found] == 2 * [tuple(verdicts)]  # an interval alone is no verdict
    assert RULE not in said  # nothing is called better or worse
    table = RunDir(tmp_path / "a").comparisons
    write_jsonl(table, [{**row, "interval": [0.1, 9.0], "p_holm": 0.01} for row in rows])
    assert main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert any(f"[+0.10, +9.00], {BETTER}" in line for line in said)  # by the one rule, whatever is written
    assert said[-1] == RULE
    assert main(["runs", str(tmp_path / "none")]) == 66
    monkeypatch.setattr("preftune.runs.overview.RUNS", tmp_path)
    assert main([]) == 0
    assert all(line.strip() for line in capsys.readouterr().out.partition("last runs")[2].splitlines())


def test_a_run_goes_on_with_the_settings_of_its_last_command(tmp_path: Path) -> None:
    """Its first one, which run.json has, may be another: --redo, an extended stage, `train` then `run`."""
    run = RunDir(tmp_path)
    goes_on = f"preftune run {run.config} --out {run.path}"
    for words, more in (
        (["preftune", "train", "tiny", "sft", "--restart", "--redo", "dpo", "seed=1", "--out", "x"], ""),
        (["preftune", "run", "tiny", "--mirror", "m", "--from=r"], " --mirror m --from r"),
        (["ipykernel_launcher.py", "-f", "kernel.json"], ""),
    ):
        write_json(run.run, {"command": words})
        assert overview._resume_command(run) == goes_on + more
    write_json(run.run, {"command": ["preftune", "run", "tiny", "--mirror=m", "--from", "r"]})
    run.aside.mkdir()  # a stage is made anew: the old one must not be taken from there
    assert overview._resume_command(run) == f"{goes_on} --mirror m"


def test_gains_are_over_the_runs_own_reference(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    row = {"policy": "policy_dpo", "measure": "score", "mean": 0.5, "interval": [0.1, 0.9], "verdict": BETTER}
    rows = [row | {"reference": each} for each in ("policy_warm", "best_of_4")]
    write_jsonl(run.comparisons, rows)
    assert overview._headlines(run, ["dpo"]) == [f"dpo: score over warm +0.50 [+0.10, +0.90], {BETTER}"]


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "settings cut short": (
        "config.toml",
        lambda f: os.truncate(f, 40),
        "config.toml is not what",
    ),
    "settings gone": ("config.toml", Path.unlink, "it has no config.toml"),
    "a stage that is no table": (
        "config.toml",
        lambda f: (f.write_text("stage.ppo = 3\n"), note(RunDir(f.parent), [f])),
        "what its config.toml calls stages are none",
    ),
    "the command": ("run.json", lambda f: f.write_text("[]"), "run.json is not what was written"),
    "a stage's record empty": ("stages/ppo/stage.json", lambda f: os.truncate(f, 0), "stage.json"),
    "a stage's record no object": ("stages/ppo/stage.json", lambda f: f.write_text("[]"), "expected a JSON"),
    "a stage's record changed": (
        "stages/ppo/stage.json",
        lambda f: f.write_text(f.read_text().replace('"finished"', '"running"')),
        "does not match its own SHA-256",
    ),
    "the table": ("evaluation/comparisons.jsonl", lambda f: f.write_text("{\n{}\n"), "comparisons.jsonl"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_called_one_and_not_offered(
    name: str, tiny_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, damage, words = DAMAGES[name]
    shutil.copytree(tiny_run.path, tmp_path / "a", ignore=shutil.ignore_patterns("models", "figures"))
    damage(tmp_path / "a" / file)
    assert main(["runs", str(tmp_path)]) == 0
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{tmp_path}/a: cannot be read (")
    assert words in said
