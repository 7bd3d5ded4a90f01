"""peft's own models with TRL's formulas on padded rows: what adapters are compared with."""

from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel

from preftune.data import Sequences

RANK, ALPHA = 2, 8


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
