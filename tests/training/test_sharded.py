"""Two gloo processes with a part of every weight each (FSDP2) train what one does that has all of them."""

import gc
import os
import shutil
import traceback
import weakref
from functools import cache
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
from preftune.data import Dialogue, Preference
from preftune.errors import ConfigError
from preftune.models.roles import Policy, Reference, Role
from preftune.models.shards import local, readable, shard, unsharded
from preftune.models.trunk import share_trunk
from preftune.rollout.sample import sample
from preftune.runs.feed import Feed
from preftune.runs.head import fitted_head
from preftune.training.learner import Learner
from sweeps import ALL
from tiny import EOS, causal_lm, flat, online, pairs, prompts, state

KINDS = ("dpo", "reward", "kto", "ppo", "grpo", *(("sft", "rloo") if ALL else ()))
UNEVEN = KINDS if ALL else ("dpo", "kto", "ppo", "grpo")  # pairs, a mean over the batch, two roles, groups
# The bias of a key has no gradient: with its usual eps AdamW would make steps of what rounding leaves there.
ADAMW = OptimizerConfig(eps=1e-3)

STEPS = 3  # the third begins at a checkpoint, with moments that two have made
FEWER = 2  # where it is rows or adapters that differ: the second step has moments

HOW: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "eos_id": EOS}

Weights = dict[str, list[float]]
Heard = tuple[Path, dict[str, list[Any]]]


def trained(algorithm: str, out: Path, **more: Any) -> Weights:
    """The weights of each trained role, as numbers that may be sent. What is sampled is used once: the second
    minibatch meets a policy that is no longer the one that sampled it.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"steps": STEPS} | ({"epochs": 1} if online(algorithm) else {}) | more
    found = run(algorithm, out, adamw=ADAMW, say=lambda text: None, **settings)
    return {name: flat(weights).tolist() for name, weights in found.items()}


alone = cache(trained)  # by one process, once for all who ask


def killed(algorithm: str, out: Path, **more: Any) -> None:
    """Begun, and gone in step 3: there is a checkpoint of step 2."""
    with pytest.raises(Killed):
        trained(algorithm, out, kill_at=STEPS, **more)


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


def cut_in_two(folder: Path, told: Connection) -> None:
    """Upper blocks trained alone: straight on; killed and resumed; begun by one; with states on disk."""
    os.environ["PREFTUNE_CACHE"] = str(folder / "cache")
    cut: dict[str, Any] = {"shard": True, "top": 1}
    told.send(trained("sft", folder / "cut_two" / "sft", **cut))
    killed("sft", folder / "cut_pieces", **cut)
    copied_by_one(folder / "cut_pieces", folder / "cut_fewer")
    told.send(trained("sft", folder / "cut_pieces", **cut))
    told.send(trained("reward", folder / "cut_two" / "reward", **cut))
    told.send(trained("dpo", folder / "cut_two" / "dpo", kept=True, **cut))
    told.send(trained("ppo", folder / "cut_two" / "ppo", by_block=True, **cut))
    told.send(parts_of_a_cut())


def parts_of_a_cut() -> tuple[Any, ...]:
    """Names and share of what is trained; in how many places each weight of two roles and their copies lies,
    one for all parts.
    """
    models, learner = (Policy(causal_lm(1)), Reference(causal_lm(1))), Learner(shard=True)
    for role in models:
        share_trunk(role.model, 1)
    learner.train("policy", models[0], ADAMW, 1e-2)
    learner.freeze(models[1])
    learner.shard_frozen([models[1]])
    trained = {name: p for name, p in models[0].model.named_parameters() if p.requires_grad}
    places: dict[str, set[int]] = {}
    for role in models:
        named = [*role.model.named_parameters()]
        with unsharded(role):
            named += [(name, p) for name, p in role.model.named_parameters() if name not in trained]
        for name, p in named:
            places.setdefault(name, set()).add(0 if isinstance(p, DTensor) else p.data_ptr())
    mine, all_of_it = (sum(f(p) for p in trained.values()) for f in (lambda p: local(p).numel(), torch.numel))
    return sorted(trained), mine / all_of_it, {name: len(found) for name, found in places.items()}


def fitted(**how: Any) -> Weights:
    """A reward model's weights after its head was fitted to 7 pairs, a process having 0 to 2 at a time."""
    _, learner, models = prepare("reward", **how)
    feed = Feed(
        rows=[Preference(prompt=Dialogue(), chosen="", rejected="")] * 7,
        steps=3,
        batch_at=lambda step: pairs(step, 3),
        names_at=lambda step: [],
        held_out=lambda: None,
        rows_per_step=3,
    )
    fitted_head(models["reward_model"], feed, learner, lambda text: None)
    with unsharded(models["reward_model"]):
        return {"reward_model": flat(state(models["reward_model"].model)).tolist()}


def one_block_at_a_time() -> tuple[float, Any, int]:
    """Replies of a policy that is read so: the most blocks that were whole at once, the replies of all, and
    how often memory ran out in the middle of process 1's passes.
    """
    policy, learner = Policy(causal_lm(1)), Learner(process_timeout=PATIENCE, shard=True, by_block=True)
    size = sum(p.nbytes for p in policy.model.transformer.h[0].parameters())
    learner.freeze(policy)
    learner.shard_frozen([policy])
    live, warned = [0.0], list[str]()

    def look(module: Any, given: Any) -> None:
        weights = [p for block in policy.model.transformer.h for p in block.parameters()]
        live.append(sum(p.untyped_storage().nbytes() for p in weights) / size)
        if len(live) == 7 and learner.rank == 1:
            raise torch.OutOfMemoryError

    with readable(policy):
        for block in policy.model.transformer.h:
            block.mlp.register_forward_pre_hook(look)
        drawn = sample(policy, learner.place(prompts(3, 5)), **HOW, say=warned.append)
    replies = [ids[own].tolist() for ids, own in zip(drawn.ids, drawn.response, strict=True)]
    return max(live), learner.gather_items(replies), len(warned)


def copied_by_one(source: Path, target: Path) -> None:
    learner = Learner(process_timeout=PATIENCE)
    learner.wait()
    if learner.is_main:
        shutil.copytree(source, target)
    learner.wait()


def kept_after_a_stage() -> list[str]:
    """Roles whose models are still there once nobody uses them."""
    made, learner, models = prepare("ppo", top=1, shard=True, by_block=True)
    made.step(learner.place(prompts(3, 8)))
    modules = {name: weakref.ref(role.module) for name, role in models.items()}
    learner.accelerator.free_memory()
    del made, learner, models
    gc.collect()
    return [name for name, module in modules.items() if module() is not None]


def work(rank: int, port: int, folder: Path, told: Connection) -> None:
    """All that two processes have to show, in one start of them."""
    join(rank, port)
    try:
        for name in KINDS:
            told.send(trained(name, folder / "two" / name, shard=True))
        for name in UNEVEN:
            cut = name in ("dpo", "ppo")
            told.send(trained(name, folder / "uneven_two" / name, shard=cut, size=3, steps=FEWER))
        told.send(trained("sft", folder / "lora_two", shard=True, rank=2, steps=FEWER))
        cut_in_two(folder, told)
        by_block: dict[str, Any] = {"shard": True, "by_block": True}
        told.send(trained("ppo", folder / "by_block", **by_block))
        told.send(trained("grpo", folder / "lora_by_block", rank=2, steps=FEWER, **by_block))
        told.send(fitted(shard=True))
        told.send(fitted(shard=True, by_block=True))
        told.send(one_block_at_a_time())
        told.send(kept_after_a_stage())
        if ALL:
            told.send(trained("ppo", folder / "more", shard=True))
        killed("ppo", folder / "pieces", shard=True)
        copied_by_one(folder / "pieces", folder / "fewer")
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
    if ALL:
        killed("ppo", folder / "more")
    killed("reward", folder / "cut_two" / "reward", top=1)
    subjects = [*KINDS, *(f"uneven {name}" for name in UNEVEN), "lora"]
    subjects += ["cut sft", "cut pieces", "cut reward", "cut dpo", "cut ppo", "cut parts"]
    subjects += ["by block", "lora by block", "fitted", "fitted by block", "one block", "kept"]
    subjects += ["more"] if ALL else []
    subjects += ["pieces", "parts", "tied"]
    said: dict[str, list[Any]] = {}
    with two(work, folder) as ears:
        for subject in subjects:
            said[subject] = [ear.poll(PATIENCE) and ear.recv() for ear in ears]
            if any(isinstance(each, str) for each in said[subject]):
                pytest.fail(f"{subject}: {said[subject][0]}")
    return folder, said


def close(found: Weights, expected: Weights, within: float = 2e-6) -> None:
    for name in expected:
        assert torch.tensor(found[name]) == pytest.approx(torch.tensor(expected[name]), abs=within), name


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_with_parts_train_what_one_with_all_does(heard: Heard, name: str) -> None:
    """Rollouts, metrics of every step, and weights after three steps with moments."""
    folder, said = heard
    one = alone(name, folder / "one" / name)
    for found in said[name]:
        close(found, one)
    ours, theirs = rows(folder / "one" / name), rows(folder / "two" / name)
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(mine, rel=1e-4, abs=1e-5)


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize("name", UNEVEN)
def test_three_rows_are_shared_by_two_processes(heard: Heard, name: str) -> None:
    """One has two of them; of a minibatch with one row, the other has none."""
    folder, said = heard
    one = trained(name, folder / "uneven_one" / name, size=3, steps=FEWER)
    for found in said[f"uneven {name}"]:
        close(found, one)
    ours, theirs = rows(folder / "uneven_one" / name), rows(folder / "uneven_two" / name)
    assert len(ours) == len(theirs) == FEWER
    for mine, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(mine, rel=1e-4, abs=1e-5)


@pytest.mark.xdist_group("forked")
def test_adapters_are_sharded_with_what_is_below(heard: Heard) -> None:
    folder, said = heard
    one = trained("sft", folder / "lora_one", rank=2, steps=FEWER)
    for found in said["lora"]:
        close(found, one)


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_upper_blocks_that_are_trained_alone_are_sharded(heard: Heard, name: str) -> None:
    """The reward model was begun by one that has all; DPO keeps states on disk; PPO reads by block."""
    folder, said = heard
    one = trained(name, folder / "cut_one" / name, top=1)
    for found in said[f"cut {name}"]:
        close(found, one, 1e-6)
    assert rows(folder / "cut_two" / name) == [
        pytest.approx(row, rel=1e-5, abs=1e-6) for row in rows(folder / "cut_one" / name)
    ]
    assert any((folder / "cache").glob("states/*/states.bin"))
    if name == "sft":
        assert said["cut pieces"] == said["cut sft"]
        close(trained("sft", folder / "cut_fewer", top=1), one, 1e-6)


@pytest.mark.xdist_group("forked")
def test_what_is_trained_is_in_parts_and_what_is_shared_lies_there_once(heard: Heard) -> None:
    for names, share, places in heard[1]["cut parts"]:
        assert all(name.startswith(("transformer.h.1.", "transformer.ln_f.")) for name in names)
        assert len(names) == 14
        assert 0.45 < share < 0.55
        assert set(places.values()) == {1}
        assert len(places) == len(names) + 14


@pytest.mark.xdist_group("forked")
def test_what_is_read_a_block_at_a_time_gives_the_same_numbers(heard: Heard) -> None:
    """The same bits; adapters stay beside their weights then, which changes the last of them."""
    folder, said = heard
    assert said["by block"] == said["ppo"]
    assert rows(folder / "by_block") == rows(folder / "two" / "ppo")
    one = trained("grpo", folder / "lora_by_block_one", rank=2, steps=FEWER)
    for found in said["lora by block"]:
        close(found, one)


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize("how", ["fitted", "fitted by block"])
def test_a_head_is_fitted_to_the_pairs_of_all_processes(heard: Heard, how: str) -> None:
    """7 of them in steps of 3, the last of 1: a process has none of it. Only the head is another then."""
    one, before = fitted(), {"reward_model": flat(state(prepare("reward")[2]["reward_model"].model)).tolist()}
    for found in heard[1][how]:
        close(found, one, 1e-5)
    changed = torch.tensor(one["reward_model"]) != torch.tensor(before["reward_model"])
    assert int(changed.sum()) == 16


@pytest.mark.xdist_group("forked")
def test_one_block_is_whole_at_a_time_whatever_the_processes_do(heard: Heard) -> None:
    """Process 1 has more rows, and takes half of them at a time after a pass that it has to break off."""
    drawn = sample(Policy(causal_lm(1)), prompts(3, 5), **HOW)
    replies = [ids[own].tolist() for ids, own in zip(drawn.ids, drawn.response, strict=True)]
    for live, found, warnings in heard[1]["one block"]:
        assert 1 <= live < 1.1
        assert found == replies
        assert warnings in (0, 1)
    assert sum(warnings for _, _, warnings in heard[1]["one block"]) == 1


@pytest.mark.xdist_group("forked")
def test_a_killed_run_goes_on_bit_for_bit_or_with_other_processes(heard: Heard) -> None:
    """By two that wrote the parts: each bit, weights and moments. By one, by two after one (in sweeps; always
    above, for the reward model): to rounding.
    """
    folder, said = heard
    assert said["pieces"] == said["ppo"]
    digests = optimizer_digests(folder / "pieces", STEPS)
    assert digests == optimizer_digests(folder / "two" / "ppo", STEPS)
    names = ("critic", "critic-optimizer", "policy", "policy-optimizer")
    files = [f"{name}-0000{i}-of-00002.safetensors" for name in names for i in (1, 2)]
    assert sorted(digests) == files
    assert (folder / "fewer" / "checkpoints" / "step-000002" / files[0]).is_file()
    one = alone("ppo", folder / "one" / "ppo")
    close(trained("ppo", folder / "fewer"), one)
    for found in said.get("more", []):
        close(found, one)


@pytest.mark.xdist_group("forked")
def test_each_process_holds_its_part_only(heard: Heard) -> None:
    """Of weights and moments, also of what is only looked up; an uneven row more is the first one's."""
    for parts in heard[1]["parts"]:
        assert set(parts) == {"policy", "reference", "critic"}
        for mine, all_of_it in parts.values():
            assert 0.45 < mine / all_of_it < 0.55
    for name in ("policy", "reference", "critic"):
        assert sum(parts[name][0] for parts in heard[1]["parts"]) == heard[1]["parts"][0][name][1]


@pytest.mark.xdist_group("forked")
def test_a_finished_stages_models_in_parts_are_given_back(heard: Heard) -> None:
    assert heard[1]["kept"] == [[], []]


@pytest.mark.xdist_group("forked")
def test_a_model_that_cannot_be_cut_is_refused(heard: Heard) -> None:
    assert heard[1]["tied"] == [78, 78]


def test_half_precision_with_a_scaler_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="fp16") as error:
        load_recipe("tiny", ["parallel.shard=true", "precision=fp16"])
    assert error.value.code == 78


def test_one_process_alone_keeps_all() -> None:
    _, learner, models = prepare("sft", shard=True)
    assert not learner.shard
    assert not any(isinstance(p, DTensor) for p in models["policy"].module.parameters())
