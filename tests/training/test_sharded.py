"""Two gloo processes with a part of every weight each (FSDP2) train what one does that has all of them."""

import shutil
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import Killed, optimizer_digests, prepare, rows, run
from torch.distributed.tensor import DTensor

from gloo import join, two
from patience import PATIENCE
from preftune.config import OptimizerConfig, load_recipe
from preftune.errors import ConfigError
from preftune.models.roles import Policy, Role
from preftune.models.shards import shard
from preftune.training.learner import Learner
from sweeps import ALL
from tiny import causal_lm, flat, prompts

KINDS = ("sft", "dpo", "reward", "kto", "ppo", "grpo", "rloo")
UNEVEN = KINDS if ALL else ("dpo", "kto", "ppo", "grpo")  # pairs, a mean over the batch, two roles, groups
# The bias of a key has no gradient: with its usual eps AdamW would make steps of what rounding leaves there.
ADAMW = OptimizerConfig(eps=1e-3)

Weights = dict[str, list[float]]
Heard = tuple[Path, dict[str, list[Any]]]


def trained(algorithm: str, out: Path, **more: Any) -> Weights:
    """The weights of each trained role, as numbers that may be sent."""
    out.mkdir(parents=True, exist_ok=True)
    found = run(algorithm, out, adamw=ADAMW, say=lambda text: None, **more)
    return {name: flat(weights).tolist() for name, weights in found.items()}


def killed(algorithm: str, out: Path, **more: Any) -> None:
    """Begun, and gone in step 4: there is a checkpoint of step 2."""
    with pytest.raises(Killed):
        trained(algorithm, out, kill_at=4, **more)


def held(role: Role, optimizer: Any = None) -> tuple[int, int]:
    """Numbers that this process holds of a role and its moments, and how many there are."""
    tensors: list[torch.Tensor] = list(role.module.parameters())
    if optimizer is not None:
        tensors += [x for kept in optimizer.state.values() for x in kept.values() if x.dim()]
        assert len(tensors) > len(optimizer.state)
    parts = [x for x in tensors if isinstance(x, DTensor)]
    assert len(parts) == len(tensors)
    return sum(x.to_local().numel() for x in parts), sum(x.numel() for x in parts)


def parts_of_ppo() -> dict[str, tuple[int, int]]:
    """What a process has in its memory after one step of PPO with reference and critic."""
    made, learner, models = prepare("ppo", shard=True)
    made.step(learner.place(prompts(3, 8)))
    optimizers = {name: each.optimizer for name, each in learner.trained.items()}
    return {name: held(role, optimizers.get(name)) for name, role in models.items()}


def work(rank: int, port: int, folder: Path, told: Connection) -> None:
    """All that two processes have to show, in one start of them."""
    join(rank, port)
    try:
        for name in KINDS:
            told.send(trained(name, folder / "two" / name, shard=True))
        for name in UNEVEN:
            told.send(trained(name, folder / "uneven_two" / name, shard=name in ("dpo", "ppo"), size=3))
        told.send(trained("sft", folder / "lora_two", shard=True, rank=2))
        told.send(trained("ppo", folder / "more", shard=True))
        killed("ppo", folder / "pieces", shard=True)
        learner = Learner(process_timeout=PATIENCE)
        learner.wait()
        if learner.is_main:
            shutil.copytree(folder / "pieces", folder / "fewer")
        learner.wait()
        told.send(trained("ppo", folder / "pieces", shard=True))
        told.send(parts_of_ppo())
        tied = causal_lm(1)
        tied.transformer.h[1].mlp = tied.transformer.h[0].mlp
        with pytest.raises(ConfigError, match="one weight in several blocks") as error:
            shard(Policy(tied))
        told.send(error.value.code)
    except BaseException:
        told.send(traceback.format_exc())


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    """What both processes say, by subject."""
    folder = tmp_path_factory.mktemp("sharded")
    killed("ppo", folder / "more")
    subjects = [*KINDS, *(f"uneven {name}" for name in UNEVEN), "lora", "more", "pieces", "parts", "tied"]
    said: dict[str, list[Any]] = {}
    with two(work, folder) as ears:
        for subject in subjects:
            said[subject] = [ear.poll(PATIENCE) and ear.recv() for ear in ears]
            if any(isinstance(each, str) for each in said[subject]):
                pytest.fail(f"{subject}: {said[subject][0]}")
    return folder, said


def close(found: Weights, expected: Weights) -> None:
    for name in expected:
        assert torch.tensor(found[name]) == pytest.approx(torch.tensor(expected[name]), abs=2e-6), name


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_with_parts_train_what_one_with_all_does(heard: Heard, name: str) -> None:
    """Rollouts, metrics of every step, and weights after five steps with moments."""
    folder, said = heard
    one = trained(name, folder / "one" / name)
    for found in said[name]:
        close(found, one)
    ours, theirs = rows(folder / "one" / name), rows(folder / "two" / name)
    assert len(ours) == len(theirs) == 5
    for mine, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(mine, rel=1e-4, abs=1e-5)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("name", UNEVEN)
def test_three_rows_are_shared_by_two_processes(heard: Heard, name: str) -> None:
    """One has two of them; of a minibatch with one row, the other has none."""
    folder, said = heard
    one = trained(name, folder / "uneven_one" / name, size=3)
    for found in said[f"uneven {name}"]:
        close(found, one)
    ours, theirs = rows(folder / "uneven_one" / name), rows(folder / "uneven_two" / name)
    for mine, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(mine, rel=1e-4, abs=1e-5)


@pytest.mark.xdist_group("distributed")
def test_adapters_are_sharded_with_what_is_below(heard: Heard) -> None:
    folder, said = heard
    one = trained("sft", folder / "lora_one", rank=2)
    for found in said["lora"]:
        close(found, one)


@pytest.mark.xdist_group("distributed")
def test_a_killed_run_goes_on_bit_for_bit_or_with_other_processes(heard: Heard) -> None:
    """By two that wrote the parts: each bit, weights and moments. By one, by two after one: to rounding."""
    folder, said = heard
    assert said["pieces"] == said["ppo"]
    digests = optimizer_digests(folder / "pieces")
    assert digests == optimizer_digests(folder / "two" / "ppo")
    names = ("critic", "critic-optimizer", "policy", "policy-optimizer")
    files = [f"{name}-0000{i}-of-00002.safetensors" for name in names for i in (1, 2)]
    assert sorted(digests) == files
    assert (folder / "fewer" / "checkpoints" / "step-000002" / files[0]).is_file()
    one = trained("ppo", folder / "one" / "again")
    close(trained("ppo", folder / "fewer"), one)
    for found in said["more"]:
        close(found, one)


@pytest.mark.xdist_group("distributed")
def test_each_process_holds_its_part_only(heard: Heard) -> None:
    """Of weights and moments, also of what is only looked up; an uneven row more is the first one's."""
    for parts in heard[1]["parts"]:
        assert set(parts) == {"policy", "reference", "critic"}
        for mine, all_of_it in parts.values():
            assert 0.45 < mine / all_of_it < 0.55
    for name in ("policy", "reference", "critic"):
        assert sum(parts[name][0] for parts in heard[1]["parts"]) == heard[1]["parts"][0][name][1]


@pytest.mark.xdist_group("distributed")
def test_a_model_that_cannot_be_cut_is_refused(heard: Heard) -> None:
    assert heard[1]["tied"] == [78, 78]


@pytest.mark.parametrize("setting", ["precision=fp16", "stage.sft.trainable=top:1"])
def test_what_is_not_sharded_is_refused_by_name(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[2]) as error:
        load_recipe("tiny", ["parallel.shard=true", setting])
    assert error.value.code == 78


def test_one_process_alone_keeps_all() -> None:
    _, learner, models = prepare("sft", shard=True)
    assert not learner.shard
    assert not any(isinstance(p, DTensor) for p in models["policy"].module.parameters())
