"""peft's own models with TRL's formulas on padded rows: what adapters are compared with."""

from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel

from preftune.algorithms import ALGORITHMS
from preftune.config import OptimizerConfig
from preftune.data import Sequences
from preftune.models.roles import Role
from preftune.training.learner import Learner
from tiny import pairs, sequences, step

RANK, ALPHA = 2, 8
RATE = 1e-2
ADAM = OptimizerConfig(eps=1e-3, max_grad_norm=1e9)  # eps: where a gradient is 0, its rounding has no sign


def peft_model(model: PreTrainedModel, ours: PreTrainedModel) -> Any:
    """peft's own model, as its users (and TRL with a peft_config) make one, with our first A."""
    kind = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type=kind
    )
    theirs = peft.get_peft_model(model.eval(), config).eval()
    first = {name: p for name, p in ours.named_parameters() if ".lora_" in name}
    own = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if ".lora_" in n}
    assert own.keys() == first.keys()
    for name, p in own.items():
        p.data.copy_(first[name])
    return theirs


def logps(model: Any, batch: Sequences) -> Tensor:
    """Sum over the response of log π, from the logits of a padded forward: (B,)."""
    logits = model(batch.ids, attention_mask=batch.attention.long()).logits[:, :-1]
    each = -cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
    return (each * batch.response[:, 1:]).sum(1)


def last_scores(model: Any, batch: Sequences) -> Tensor:
    """Scores at the last real token, read from all positions."""
    inner = model.base_model.model
    states = inner.base_model(batch.ids, attention_mask=batch.attention.long()).last_hidden_state
    return inner.score(states).squeeze(-1)[torch.arange(len(batch)), batch.attention.sum(1) - 1]


def loss_of(algorithm: str, model: Any, batch: Any) -> Tensor:
    """TRL's formulas, the adapter switched off for the reference."""
    if algorithm == "sft":
        return -logps(model, batch).sum() / batch.response.sum()
    if algorithm == "reward":
        return -logsigmoid(last_scores(model, batch.chosen) - last_scores(model, batch.rejected)).mean()
    with torch.no_grad(), model.disable_adapter():
        reference = logps(model, batch.chosen) - logps(model, batch.rejected)
    return -logsigmoid(0.1 * (logps(model, batch.chosen) - logps(model, batch.rejected) - reference)).mean()


def trained(theirs: Any) -> dict[str, nn.Parameter]:
    """What peft's model trains, by our names."""
    return {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }


def update_three_times(algorithm: str, roles: Mapping[str, Role], learner: Learner, theirs: Any) -> None:
    """Our role, and peft's model by torch's AdamW: losses and gradient norms of every update are equal."""
    kind = ALGORITHMS[algorithm]
    learner.train(kind.trains[0], roles[kind.trains[0]], ADAM, RATE)
    algo = kind(kind.Config(algorithm=algorithm, microbatch_size=3), roles, learner)
    parameters: list[Any] = list(trained(theirs).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=ADAM.eps, weight_decay=ADAM.weight_decay)
    for i in range(3):
        batch = (sequences if algorithm == "sft" else pairs)(5 + i)
        learner.begin_step()
        metrics = step(algorithm, algo, batch)
        optimizer.zero_grad()
        loss = loss_of(algorithm, theirs, batch)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        optimizer.step()
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=2e-5, abs=2e-6)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4, abs=1e-7)
