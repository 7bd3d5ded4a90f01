"""The loop: a run that was killed and resumed is the uninterrupted one, bit for bit, for every algorithm."""

import contextlib
import json
import shutil
import time
from pathlib import Path

import pytest
from resuming import EVERY, STEPS, Killed, Wholes, plan_for, prepare, rows, run
from safetensors.torch import load_file

from preftune.algorithms import ALGORITHMS
from preftune.algorithms.base import Metrics
from preftune.errors import DataError
from preftune.models.aligned import ALIGNMENT
from preftune.models.fast.trunk import Trunk
from preftune.models.trunk import share_trunk
from preftune.rundir import read_jsonl
from preftune.training import checkpoint
from preftune.training.loop import train
from sweeps import ALL
from tiny import misplaced, online, pairs, roles, same_weights, sequences, state

pytestmark = pytest.mark.xdist_group("wholes")  # one worker trains them

IN_PART = ("reward", "dpo", "ppo", "grpo")  # a head, pairs, two roles, groups


@EVERY
def test_killed_and_resumed_equals_uninterrupted(algorithm: str, tmp_path: Path, wholes: Wholes) -> None:
    """Killed at step 1 (no checkpoint yet), then at 4 (resuming from 0), then finished from the checkpoint of
    step 2.
    """
    out, whole = wholes(algorithm)
    for step in (1, 4):
        with pytest.raises(Killed):
            run(algorithm, tmp_path / "pieces", kill_at=step)
    assert [p.name for p in (tmp_path / "pieces" / "checkpoints").iterdir()] == ["step-000002"]
    pieces = run(algorithm, tmp_path / "pieces")
    assert whole.keys() == pieces.keys()
    for name in whole:
        assert same_weights(pieces[name], whole[name])
    assert rows(tmp_path / "pieces") == rows(out)
    assert [row["step"] for row in rows(tmp_path / "pieces")] == list(range(1, STEPS + 1))


def test_what_comes_before_the_first_step_is_not_done_again(tmp_path: Path) -> None:
    """Killed at step 1, where there is no checkpoint, it is done again; at 4 it is in that of step 2."""
    begun = list[int]()
    for kill_at, times in ((1, 1), (4, 2), (None, 2)):
        made, learner, _ = prepare("reward")
        plan = plan_for("reward", tmp_path, begin=lambda: begun.append(1))

        def on_step(step: int, metrics: Metrics, kill_at: int | None = kill_at) -> None:
            if step == kill_at:
                raise Killed

        with contextlib.suppress(Killed):
            train(made, learner, pairs, plan, on_step)
        assert len(begun) == times


def test_training_changes_every_trained_role(wholes: Wholes) -> None:
    fresh = {name: state(role.model) for name, role in roles("ppo").items()}
    for name, after in wholes("ppo")[1].items():
        assert not same_weights(after, fresh[name])


def test_a_lost_optimizer_state_would_show(tmp_path: Path, wholes: Wholes) -> None:
    """The test above can fail: without the moments the resumed weights are others."""
    _, whole = wholes("sft")
    with pytest.raises(Killed):
        run("sft", tmp_path / "pieces", kill_at=3)
    made, learner, models = prepare("sft")
    assert checkpoint.restore(tmp_path / "pieces" / "checkpoints", learner) == 2
    learner.trained["policy"].optimizer.state.clear()
    for step in range(2, STEPS):
        learner.set_progress(step, STEPS)
        made.step(sequences(step, 8))
    assert not same_weights(state(models["policy"].model), whole["policy"])


def test_time_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Seconds of training: rising, also across a resume, and no more than have passed."""
    began = time.monotonic()
    with pytest.raises(Killed):
        run("sft", tmp_path, kill_at=4)
    run("sft", tmp_path)
    times = [row["time"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] <= time.monotonic() - began


def test_rows_after_the_checkpoint_are_replaced(tmp_path: Path) -> None:
    """A torn last line, too, is no row."""
    with pytest.raises(Killed):
        run("sft", tmp_path, kill_at=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run("sft", tmp_path)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_a_stage_without_a_checkpoint_starts_again(tmp_path: Path, wholes: Wholes) -> None:
    _, whole = wholes("sft")
    with pytest.raises(Killed):
        run("sft", tmp_path / "pieces", kill_at=4)
    shutil.rmtree(tmp_path / "pieces" / "checkpoints")
    assert same_weights(run("sft", tmp_path / "pieces")["policy"], whole["policy"])


@EVERY
def test_a_resumed_state_lies_in_memory_as_that_of_a_run_without_end(algorithm: str, wholes: Wholes) -> None:
    """Equal numbers at other addresses give other last bits. The file is read at 8 bytes past a multiple of
    64 somewhere, since its header is as long as the names in it.
    """
    out, _ = wholes(algorithm)
    _, learner, _ = prepare(algorithm)
    assert checkpoint.restore(out / "checkpoints", learner) == STEPS
    for trained in learner.trained.values():
        assert misplaced(trained.role.model) == []
        moments = [value for state in trained.optimizer.state.values() for value in state.values()]
        assert len(moments) == 3 * len(list(trained.role.model.parameters()))
        assert [value.data_ptr() % ALIGNMENT for value in moments] == [0] * len(moments)
        assert all(value.is_contiguous() for value in moments)


@pytest.mark.parametrize("algorithm", ALGORITHMS if ALL else ("sft", *IN_PART))
def test_a_stage_that_trains_the_upper_blocks_resumes_bit_for_bit(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints hold what is trained, and the hash of what is not; states come from the sampler."""
    taken, own = list[int](), Trunk.take
    monkeypatch.setattr(Trunk, "take", lambda *rows: (taken.append(1), own(*rows)))
    whole = run(algorithm, tmp_path / "whole", top=1)
    with pytest.raises(Killed):
        run(algorithm, tmp_path / "pieces", kill_at=4, top=1)
    kept = tmp_path / "pieces" / "checkpoints" / "step-000002"
    trunks = json.loads((kept / "state.json").read_text())["trunks"]
    assert trunks.keys() == whole.keys()
    for name in trunks:
        assert {key.split(".")[1:3] != ["h", "0"] for key in load_file(kept / f"{name}.safetensors")} == {
            True
        }
    pieces = run(algorithm, tmp_path / "pieces", top=1)
    for name in whole:
        assert same_weights(pieces[name], whole[name])
    assert rows(tmp_path / "pieces") == rows(tmp_path / "whole")
    assert bool(taken) == online(algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS if ALL else IN_PART)
def test_a_stage_that_trains_adapters_resumes_bit_for_bit(algorithm: str, tmp_path: Path) -> None:
    """Its checkpoints hold adapters and scalar heads, with their moments, and nothing else."""
    whole = run(algorithm, tmp_path / "whole", rank=2)
    with pytest.raises(Killed):
        run(algorithm, tmp_path / "pieces", kill_at=4, rank=2)
    kept = tmp_path / "pieces" / "checkpoints" / "step-000002"
    assert json.loads((kept / "state.json").read_text())["trunks"].keys() == whole.keys()
    for name in whole:
        held = load_file(kept / f"{name}.safetensors")
        assert held.keys() == {key for key in whole[name] if ".lora_" in key or key == "score.weight"}
        assert len(load_file(kept / f"{name}-optimizer.safetensors")) == 3 * len(held)
    pieces = run(algorithm, tmp_path / "pieces", rank=2)
    for name in whole:
        assert same_weights(pieces[name], whole[name])
    assert rows(tmp_path / "pieces") == rows(tmp_path / "whole")


def test_a_stage_on_4_bit_weights_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Quantised anew, they are the same; its checkpoints hold adapters and scalar heads, and nothing else."""
    pytest.importorskip("bitsandbytes", reason="pip install -c constraints.txt 'preftune[qlora]'")
    whole = run("ppo", tmp_path / "whole", rank=2, quantised=True)
    with pytest.raises(Killed):
        run("ppo", tmp_path / "pieces", kill_at=4, rank=2, quantised=True)
    for name in whole:
        held = load_file(tmp_path / "pieces" / "checkpoints" / "step-000002" / f"{name}.safetensors")
        assert held.keys() == {key for key in whole[name] if ".lora_" in key or key == "score.weight"}
    pieces = run("ppo", tmp_path / "pieces", rank=2, quantised=True)
    for name in whole:
        assert same_weights(pieces[name], whole[name])
    assert rows(tmp_path / "pieces") == rows(tmp_path / "whole")
    kept = tmp_path / "whole" / "checkpoints"
    plain, learner, _ = prepare("ppo", rank=2)
    assert plain
    with pytest.raises(DataError, match="what is frozen in them differs"):
        checkpoint.restore(kept, learner)


def test_a_checkpoint_of_another_trunk_is_refused(tmp_path: Path) -> None:
    run("sft", tmp_path, top=1)
    _, learner, models = prepare("sft")
    models["policy"].model.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1e-3
    share_trunk(models["policy"].model, 1)
    with pytest.raises(DataError, match="what is frozen in them differs"):
        checkpoint.restore(tmp_path / "checkpoints", learner)
