"""Adapters against TRL's trainers with peft: loss, gradients and parameters of the first step, as
`tests/slow/lora_golden.py` made them (`make lora-golden`).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from preftune.models.adapter import adapt
from preftune.models.roles import Policy, Reference, RewardModel, Role
from preftune.models.trunk import trained_parameters
from preftune.selftest.updates import adamw, causal_lm, pairs, reward_model
from preftune.training.one_update import one_update

FILE = Path(__file__).with_name("lora_golden.safetensors")
CPU = torch.device("cpu")


def golden(what: str) -> dict[str, Tensor]:
    """Tensors under "ALGORITHM/WHAT/", by the names that parameters have here."""
    tensors = load_file(FILE)
    found = {key.removeprefix(f"{what}/"): x for key, x in tensors.items() if key.startswith(what)}
    return {
        key.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): x
        for key, x in found.items()
    }


def facts() -> dict[str, str]:
    with safe_open(FILE, "pt") as file:
        return file.metadata()


def roles(algorithm: str) -> dict[str, Role]:
    """The trained role first, with an adapter on it that starts as TRL's did."""
    trained: Role = (
        RewardModel(reward_model(CPU)) if algorithm == "reward" else Policy(causal_lm("policy", CPU))
    )
    adapt(trained.model, int(facts()["rank"]), float(facts()["alpha"]), seed=0)
    begin = golden(f"{algorithm}/begin")
    named = dict(trained.model.named_parameters())
    assert {id(named[name]) for name in begin} == {id(p) for p in trained_parameters(trained.model)}
    for name, value in begin.items():
        named[name].data.copy_(value)
    if algorithm == "dpo":
        return {"policy": trained, "reference": Reference(causal_lm("policy", CPU))}
    return {"reward_model" if algorithm == "reward" else "policy": trained}


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "reward"])
def test_the_first_step_is_that_of_trl_with_peft(algorithm: str) -> None:
    made, gradients = roles(algorithm), dict[str, Tensor]()
    model = next(iter(made.values())).model
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(named.values())

    def keep(*_: Any) -> None:
        gradients.update({name: p.grad.clone() for name, p in named.items() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    batch: Any = pairs(CPU).chosen if algorithm == "sft" else pairs(CPU)
    more: dict[str, Any] = {"beta": float(facts()["beta"])} if algorithm == "dpo" else {}
    metrics = one_update(algorithm, made, batch, optimizer=optimizer, **more)
    logs = json.loads(facts()["logs"])[algorithm]
    assert metrics["loss"] == pytest.approx(logs["loss"], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(logs["grad_norm"], rel=1e-4)
    for name, wanted in golden(f"{algorithm}/grad").items():
        torch.testing.assert_close(gradients[name], wanted, atol=1e-6, rtol=1e-4)
    for name, wanted in golden(f"{algorithm}/after").items():
        torch.testing.assert_close(named[name].detach(), wanted, atol=1e-6, rtol=0)
    begin = golden(f"{algorithm}/begin")
    assert all(not named[name].equal(begin[name]) for name in begin)
