"""Two processes train what one does: the same batches, first gradients and losses to rounding."""

import json
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import gloo
import preftune
from gloo import join
from made_once import small_world
from patience import PATIENCE
from preftune import cli

OVERRIDES = ["model.scratch.steps=4", "stage.sft.rows=64", "stage.rm.rows=64", "stage.ppo.minibatches=4"]
OVERRIDES += ["stage.ppo.epochs=1", "stage.ppo.steps=1"]


def metrics(run: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


def command(out: Path, *words: str) -> list[str]:
    return ["train", "tiny", *words, *OVERRIDES, "--out", str(out)]


def one_of_two(rank: int, port: int, fault: str, words: list[str], told: Connection) -> None:
    """One of two processes of a command, as torchrun would start it but without the imports: by torchrun it
    is started in tests/faults/test_two_processes.py.
    """
    join(rank, port)
    os.environ["PREFTUNE_FAULT"] = fault
    with small_world():
        told.send(cli.main(words))


@pytest.mark.xdist_group("forked")
@pytest.mark.usefixtures("small_data")
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    preftune.ppo_train("tiny", *OVERRIDES, out=str(tmp_path / "one"))
    with gloo.two(one_of_two, "", command(tmp_path / "two", "ppo")) as ears:
        assert [ending(ear) for ear in ears] == [0, 0]
    for stage in ("base", "sft", "rm", "ppo"):
        one, two = metrics(tmp_path / "one", stage), metrics(tmp_path / "two", stage)
        assert [row["step"] for row in one] == [row["step"] for row in two]
        assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4), stage
    assert metrics(tmp_path / "two", "rm")[-1]["loss"] == pytest.approx(
        metrics(tmp_path / "one", "rm")[-1]["loss"], abs=1e-4
    )
    one, two = (metrics(tmp_path / name, "ppo")[0] for name in ("one", "two"))
    times = {"time", "step_seconds", "sampling_seconds"}
    for name in one.keys() - times:  # several minibatches, lowest, highest, sd, sums
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), name
    in_parts(tmp_path / "one", tmp_path / "two")


def ending(ear: Connection) -> int | None:
    """The exit code of a command; None for one that was killed before it could say so."""
    assert ear.poll(PATIENCE)
    try:
        return ear.recv()
    except EOFError:
        return None


def in_parts(one: Path, two: Path) -> None:
    """GRPO by two that keep every model in parts, killed in its third step; one goes on, and leaves a plain
    model.
    """
    words = ("parallel.shard=true", "checkpoint.every=1")
    with gloo.two(one_of_two, "step@step=3:kill", command(two, "grpo", *words)) as ears:
        ends = [ending(ear) for ear in ears]
    assert None in ends
    assert 0 not in ends
    assert {file.name for file in (two / "stages/grpo/checkpoints/step-000002").iterdir()} == {
        *(f"policy{kind}-0000{i}-of-00002.safetensors" for kind in ("", "-optimizer") for i in (1, 2)),
        *("state.json", "manifest.json"),
    }
    for run in (two, one):
        preftune.grpo_train("tiny", *OVERRIDES, *words, out=str(run))
    for mine, other in zip(metrics(one, "grpo"), metrics(two, "grpo"), strict=True):
        for name in ("reward", "tokens/sampled", "kl_per_sequence", "loss"):
            assert other[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-4), name
    saved = AutoModelForCausalLM.from_pretrained(two / "models/policy_grpo")
    assert not any(isinstance(parameter, DTensor) for parameter in saved.parameters())
