"""Adapters: the numbers of peft and torch's AdamW, one copy of what is frozen, plain directories."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from families import PLAIN, TREES, made
from peft_oracle import ADAM, ALPHA, RANK, RATE, last_scores, peft_model, trained, update_three_times
from preftune.algorithms import ALGORITHMS
from preftune.errors import DataError
from preftune.models.adapter import (
    adapt,
    adapter_of,
    fold,
    hold_once,
    linear_layers,
    merge_saved,
    merged,
    save_adapter,
)
from preftune.models.layers import token_embedding
from preftune.models.roles import Critic, Policy, Reference, RewardModel, Role
from preftune.rollout.sample import sample
from preftune.training.learner import Learner
from tiny import EOS, batch_for, prompts, sequences, state, step

LAYERS = {**TREES, **PLAIN}


def scalar(family: str) -> PreTrainedModel:
    model = made(LAYERS[family](), AutoModelForSequenceClassification)
    model.config.pad_token_id = 0
    return model


FORMULAS = [(family, "dpo") for family in LAYERS] + [
    (family, algorithm) for family in ("gpt2", "llama") for algorithm in ("sft", "reward")
]


@pytest.mark.parametrize(("family", "algorithm"), FORMULAS)
def test_three_updates_are_those_of_peft_and_adamw(family: str, algorithm: str) -> None:
    kind, learner = ALGORITHMS[algorithm], Learner(microbatch_size=3)
    roles: dict[str, Role] = {}
    if algorithm == "reward":
        roles["reward_model"], plain = RewardModel(scalar(family)), scalar(family)
    else:
        roles["policy"], plain = Policy(made(LAYERS[family]())), made(LAYERS[family]())
    if "reference" in kind.needs:
        roles["reference"] = Reference(made(LAYERS[family]()))
        learner.freeze(roles["reference"])
    role = roles[kind.trains[0]]
    adapt(role.model, RANK, ALPHA, seed=3)
    hold_once([each.model for each in roles.values()])
    theirs = peft_model(plain, role.model)
    update_three_times(algorithm, roles, learner, theirs)
    ours = {n: p for n, p in role.model.named_parameters() if p.requires_grad}
    expected = trained(theirs)
    assert ours.keys() == expected.keys()
    assert max(float((p - expected[n]).abs().max()) for n, p in ours.items()) <= 2e-6
    assert all(p.any() for n, p in ours.items() if "lora_B" in n)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_rollouts_updates_are_those_of_two_whole_models(algorithm: str) -> None:
    """Policy and reference, critic and reward model on one copy, against models of their own with AdamW."""
    kind, found = ALGORITHMS[algorithm], []
    for ours in (True, False):
        learner = Learner(microbatch_size=3)
        make: dict[str, Callable[[], Role]] = {
            "policy": lambda: Policy(made(TREES["gpt2"]())),
            "reference": lambda: Reference(made(TREES["gpt2"]())),
            "critic": lambda: Critic(scalar("gpt2"), 0.3, 2.0),
        }
        roles = {name: make[name]() for name in kind.needs if name in make}
        for name in kind.trains:
            adapt(roles[name].model, RANK, ALPHA, seed=3)
        if ours:
            hold_once([role.model for role in roles.values()])
        for name, role in roles.items():
            if name not in kind.trains:
                learner.freeze(role)
            elif ours:
                learner.train(name, role, ADAM, RATE)
            else:
                own = [p for n, p in role.model.named_parameters() if "lora_" in n or n == "score.weight"]
                optimizer = torch.optim.AdamW(own, lr=RATE, eps=ADAM.eps, weight_decay=ADAM.weight_decay)
                learner.adopt(name, role, optimizer, ADAM)
        settings: dict[str, Any] = {"epochs": 3, "minibatches": 1, "microbatch_size": 3}
        settings |= {"group_size": 4} if algorithm == "grpo" else {}
        algo = kind(kind.Config(algorithm=algorithm, **settings), roles, learner)
        learner.begin_step()
        metrics = step(algorithm, algo, batch_for(algorithm))
        found.append((metrics, {name: state(roles[name].model) for name in kind.trains}))
    (ours_metrics, ours_weights), (metrics, weights) = found
    assert ours_metrics == pytest.approx(metrics, rel=2e-5, abs=2e-6)
    for name, each in weights.items():
        fresh = state(made(TREES["gpt2"]()) if name == "policy" else scalar("gpt2"))
        for key, weight in each.items():
            assert (ours_weights[name][key] - weight).abs().max() <= 1e-6, key
            plain = key.replace(".base_layer", "")
            if plain in fresh and plain != "score.weight":
                assert torch.equal(weight, fresh[plain]), key
        assert any("lora_B" in key and weight.any() for key, weight in each.items())


def test_the_weights_below_are_in_memory_once() -> None:
    policy, reference, judge = Policy(made(TREES["llama"]())), made(TREES["llama"]()), scalar("llama")
    Reference(reference)
    adapt(policy.model, RANK, ALPHA, seed=3)
    hold_once([policy.model, reference, judge])
    places = {name: p.data_ptr() for name, p in reference.named_parameters()}
    for name, p in policy.model.named_parameters():
        plain = name.replace(".base_layer", "")
        assert (places.get(plain) == p.data_ptr()) == ("lora_" not in name), name
    learner = Learner()
    learner.train("policy", policy, ADAM, RATE)
    held = {p for group in learner.trained["policy"].optimizer.param_groups for p in group["params"]}
    assert held == {p for n, p in policy.model.named_parameters() if "lora_" in n}
    count = sum(sum(layer.weight.shape) for layer in linear_layers(reference).values())
    assert sum(p.numel() for p in held) == RANK * count


def shaken(family: str, seed: int = 4) -> PreTrainedModel:
    """With an adapter that changes the numbers."""
    model = Policy(made(LAYERS[family]())).model
    adapt(model, RANK, ALPHA, seed=3)
    random = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=random))
    return model


@pytest.mark.parametrize("family", LAYERS)
def test_sampling_goes_by_the_merged_weights_and_leaves_the_others_as_they_were(family: str) -> None:
    model = shaken(family)
    before, ids = state(model), sequences(2).ids
    with torch.no_grad():
        apart = model(ids).logits
        with merged(model):
            together = model(ids).logits
    assert torch.allclose(together, apart, atol=1e-4 * float(apart.abs().max()))
    assert not torch.allclose(apart, made(LAYERS[family]()).eval()(ids).logits, atol=1e-2)
    wanted: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "eos_id": EOS}
    replies = sample(Policy(model), prompts(1), **wanted)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    fold(model)
    assert torch.equal(sample(Policy(model), prompts(1), **wanted).ids, replies.ids)


@pytest.mark.parametrize("family", LAYERS)
def test_what_is_saved_is_what_peft_reads_and_what_is_read_here(family: str, tmp_path: Path) -> None:
    model, base = shaken(family), made(LAYERS[family]()).eval()
    folded = fold(model)
    assert folded is not None
    save_adapter(folded, tmp_path / "adapter", "some/base")
    model.save_pretrained(tmp_path / "whole")
    assert adapter_of(model) is None
    assert state(model).keys() == state(base).keys()
    ids = sequences(2).ids
    theirs = peft.PeftModel.from_pretrained(made(LAYERS[family]()), tmp_path / "adapter").eval()
    assert torch.allclose(theirs(ids).logits, model(ids).logits, atol=1e-4)
    unloaded: Any = theirs.merge_and_unload()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    merge_saved(base, tmp_path / "adapter", config)
    loaded = type(base).from_pretrained(tmp_path / "whole")
    for name, weight in state(base).items():
        assert torch.equal(weight, state(loaded)[name])
        assert torch.allclose(weight, state(unloaded)[name], atol=1e-6)


def test_a_reward_models_adapter_has_its_head(tmp_path: Path) -> None:
    model, batch = scalar("gpt2"), sequences(3)
    adapt(RewardModel(model).model, RANK, ALPHA, seed=3)
    model.get_parameter("score.weight").data.mul_(2)
    folded = fold(model)
    assert folded is not None
    save_adapter(folded, tmp_path / "adapter", "some/base")
    theirs = peft.PeftModel.from_pretrained(scalar("gpt2"), tmp_path / "adapter").eval()
    assert torch.allclose(last_scores(theirs, batch), RewardModel(model).raw_scores(batch), atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(DataError, match="modules_to_save"):
        merge_saved(made(TREES["gpt2"]()), tmp_path / "adapter", config)


STRANGE = [
    *({"peft_type": "IA3"}, {"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"x": 4}}, {"r": 0}),
    *({"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}, {"lora_alpha": "8"}, {"r": 3}),
]


@pytest.mark.parametrize("change", STRANGE, ids=str)
def test_an_adapter_of_another_kind_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folded = fold(shaken("gpt2"))
    assert folded is not None
    save_adapter(folded, tmp_path / "adapter", "some/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(DataError, match="adapter_"):
        merge_saved(made(TREES["gpt2"]()), tmp_path / "adapter", config | change)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folded = fold(shaken("gpt2"))
    assert folded is not None
    save_adapter(folded, tmp_path / "adapter", "some/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(DataError, match="does not fit the base model"):
        merge_saved(made(TREES["llama"]()), tmp_path / "adapter", config)


def test_an_adapter_of_a_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    """peft's model adds it to the head alone; merged, the embedding would move along."""
    base = made(TREES["gpt2"]())
    lora = peft.LoraConfig(r=RANK, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(DataError, match="adapts lm_head, which is the embedding, too"):
        merge_saved(made(TREES["gpt2"]()), tmp_path / "adapter", config)


def test_the_embedding_and_the_head_are_not_adapted() -> None:
    model = made(TREES["opt"]())
    names = linear_layers(model)
    assert names
    assert token_embedding(model) not in names.values()
    assert not [name for name in names if "lm_head" in name]
