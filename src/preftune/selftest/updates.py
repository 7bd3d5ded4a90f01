"""One update of the real algorithm classes on the real learner, against the real TRL trainers.

A GPT-2 of 30,624 weights, one batch, AdamW at 1e-3; `data/README.md` states how the numbers were made.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from preftune.data import Pairs, Sequences, pad_sequences
from preftune.models.roles import Policy, Reference, RewardModel
from preftune.rollout import Rollout
from preftune.selftest.record import Comparison
from preftune.selftest.vectors import DATA
from preftune.training.one_update import one_update

Compare = Callable[[Comparison, torch.device], None]

LOSS = 1e-5  # absolute
GRAD_NORM = 1e-4  # relative
PARAMETER = 1e-6  # absolute, after one step
NOISY = 1e-5  # for at most 4 of 30,560 parameters: see same_parameters
ON_A_GPU = 5  # all of these times that, where sums are taken in another order than TRL's on a CPU


@cache
def golden() -> dict[str, Any]:
    return json.loads((DATA / "end_to_end.json").read_text(encoding="utf-8"))


@cache
def _weights() -> dict[str, Tensor]:
    return safetensors.torch.load((DATA / "weights.safetensors").read_bytes())


def weights(name: str) -> dict[str, Tensor]:
    """Tensors of "policy", "reference", "after_dpo", "after_sft", or the "reward_model"'s own."""
    return {key.removeprefix(f"{name}/"): x for key, x in _weights().items() if key.startswith(f"{name}/")}


def causal_lm(name: str, device: torch.device) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(GPT2Config(**golden()["config"]))
    loaded = model.load_state_dict(weights(name), strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.to(device)  # type: ignore[arg-type]


def reward_model(device: torch.device) -> GPT2ForSequenceClassification:
    """The policy's body with a head of its own."""
    model = GPT2ForSequenceClassification(GPT2Config(**{**golden()["config"], "num_labels": 1}))
    model.load_state_dict(weights("policy") | weights("reward_model"))
    return model.to(device)  # type: ignore[arg-type]


def pairs(device: torch.device) -> Pairs:
    rows, pad = golden()["batch"], golden()["pad_token_id"]
    prompts = [row["prompt_ids"] for row in rows]

    def side(name: str) -> Sequences:
        return pad_sequences(prompts, [row[f"{name}_ids"] for row in rows], pad).to(device)

    return Pairs(side("chosen"), side("rejected"))


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def slack(device: torch.device) -> int:
    return 1 if device.type == "cpu" else ON_A_GPU


def near(row: Comparison, device: torch.device, name: str, actual: Any, expected: Any) -> None:
    """To 1e-5 absolute, gradient norms to 1e-4 relative."""
    exact = torch.as_tensor(actual, dtype=torch.float64, device="cpu")
    if name == "grad_norm":
        row.near(name, exact, expected, rtol=GRAD_NORM * slack(device), atol=1e-300)
    else:
        row.near(name, exact, expected, atol=LOSS * slack(device))


def same_parameters(row: Comparison, model: torch.nn.Module, after: str, device: torch.device) -> None:
    """To 1e-6, except the key third of c_attn.bias: its true gradient is 0, so Adam's step there is noise.

    The same holds for single elements elsewhere whose gradient is below 1e-7: a float64 update differs from
    TRL's float32 one by 1.3e-6 in one of them. At most 4 of 30,560 elements may be such, none by more than
    1e-5.
    """
    expected = weights(after)
    noisy = 0
    for name, parameter in model.named_parameters():
        if name not in expected:
            continue
        actual, target = parameter.detach().cpu(), expected[name]
        if name.endswith("c_attn.bias"):
            width = len(target) // 3
            keep = torch.arange(len(target)) // width != 1
            actual, target = actual[keep], target[keep]
        off = (actual - target).abs() > PARAMETER * slack(device)
        noisy += int(off.sum())
        row.near(f"{name} after the step", actual[~off], target[~off], atol=PARAMETER * slack(device))
        if off.any():
            row.near(f"{name} after the step", actual[off], target[off], atol=NOISY * slack(device))
    if noisy > 4 * slack(device):
        row.failures.append(f"{noisy} parameters differ by more than {PARAMETER * slack(device):g}")


def dpo(kind: str, row: Comparison, device: torch.device, microbatch_size: int | None = None) -> None:
    policy = Policy(causal_lm("policy", device))
    metrics = one_update(
        "dpo",
        {"policy": policy, "reference": Reference(causal_lm("reference", device))},
        pairs(device),
        optimizer=adamw,
        microbatch_size=microbatch_size,
        kind=kind,
        beta=golden()["dpo"][kind]["beta"],
        length_average=kind == "ipo",
    )
    logs = golden()["dpo"][kind]["logs"]
    names = ["loss", "grad_norm"]
    if kind != "ipo":  # TRL logs the rewards of the length-averaged form there
        names += ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    for name in names:
        near(row, device, name, metrics[name], logs[name])
    if kind == "sigmoid":
        same_parameters(row, policy.model, "after_dpo", device)


def dpo_at_the_reference(row: Comparison, device: torch.device) -> None:
    """ln 2 where policy and reference are equal; exact up to float32."""
    models = {
        "policy": Policy(causal_lm("reference", device)),
        "reference": Reference(causal_lm("reference", device)),
    }
    metrics = one_update("dpo", models, pairs(device), optimizer=adamw)
    loss = torch.tensor(metrics["loss"], dtype=torch.float64)
    row.near("loss", loss, golden()["dpo"]["policy_equals_ref_loss"], atol=1e-7)
    row.same("rewards/margins", metrics["rewards/margins"], 0.0)
    row.same("rewards/accuracies", metrics["rewards/accuracies"], 0.0)


def reward(center: float, row: Comparison, device: torch.device) -> None:
    role, batch = RewardModel(reward_model(device)), pairs(device)
    scores = golden()["reward"]["scores_at_last_token_incl_eos"]
    near(row, device, "scores of chosen", role.raw_scores(batch.chosen).detach().cpu(), scores["chosen"])
    rejected = role.raw_scores(batch.rejected).detach().cpu()
    near(row, device, "scores of rejected", rejected, scores["rejected"])
    metrics = one_update(
        "reward", {"reward_model": role}, batch, optimizer=adamw, microbatch_size=3, center_coef=center
    )
    expected = golden()["reward"][f"center_{center or None}"]
    for name in ("loss", "grad_norm", "margin"):
        near(row, device, name, metrics[name], expected["logs"][name])
    row.same("accuracy", metrics["accuracy"], expected["logs"]["accuracy"])
    after = expected["params_after_one_step"]["score.weight"]
    norm = role.model.score.weight.detach().cpu().double().norm()  # type: ignore[union-attr]
    near(row, device, "norm of score.weight after the step", norm, after["l2"])


def sft(row: Comparison, device: torch.device) -> None:
    policy = Policy(causal_lm("policy", device))
    metrics = one_update("sft", {"policy": policy}, pairs(device).chosen, optimizer=adamw, microbatch_size=1)
    for name in ("loss", "grad_norm", "entropy"):
        near(row, device, name, metrics[name], golden()["sft_completion_only"]["logs"][name])
    same_parameters(row, policy.model, "after_sft", device)


def rollout(device: torch.device) -> Rollout:
    """Two prompts, four completions each, with the log-probabilities that the vectors give."""
    inputs = golden()["grpo"]["inputs"]
    sequences = pad_sequences(inputs["prompts"], inputs["completions"], golden()["pad_token_id"])

    def aligned(rows: list[list[float]]) -> Tensor:
        full = torch.zeros(sequences.ids.shape)
        for i, row in enumerate(rows):
            start, length = len(inputs["prompts"][i]), len(inputs["completions"][i])
            full[i, start : start + length] = torch.tensor(row)[:length]
        return full.to(device)

    return Rollout(
        sequences=sequences.to(device),
        logprobs=aligned(inputs["old_logps"]),
        reference_logprobs=aligned(inputs["ref_logps"]),
        scores=torch.tensor(inputs["rewards"]).to(device),
        group=torch.arange(2).repeat_interleave(4).to(device),
    )


def grpo(reduction: str, kl_coef: float, row: Comparison, device: torch.device) -> None:
    expected = golden()["grpo"]["losses"][f"{reduction}_beta{kl_coef}"]
    metrics = one_update(
        "grpo",
        {"policy": Policy(causal_lm("policy", device))},
        rollout(device),
        optimizer=adamw,
        microbatch_size=3,
        reduction=reduction,
        kl_coef=kl_coef,
        clip_low=0.2,
        clip_high=0.28,
        max_new_tokens=expected["max_completion_length"],
    )
    near(row, device, "loss", metrics["loss"], expected["trl_loss"])
    near(row, device, "grad_norm", metrics["grad_norm"], expected["trl_grad_l2_norm"])


# What, TRL's trainer, how.
UPDATES: dict[str, tuple[str, Compare]] = {
    "SFT, completion only": ("SFTTrainer", sft),
    "reward model": ("RewardTrainer", partial(reward, 0.0)),
    "reward model, centred": ("RewardTrainer", partial(reward, 0.01)),
    **{f"DPO, {kind}": ("DPOTrainer", partial(dpo, kind)) for kind in ("sigmoid", "ipo", "hinge")},
    "DPO at the reference": ("DPOTrainer", dpo_at_the_reference),
    **{
        f"GRPO, {reduction}, KL {kl_coef:g}": ("GRPOTrainer", partial(grpo, reduction, kl_coef))
        for reduction in ("grpo", "bnpo", "dr_grpo", "dapo")
        for kl_coef in (0.0, 0.04)
    },
}


def compare_update(name: str, device: torch.device, **settings: Any) -> Comparison:
    """One row of the table: an update by its name in `UPDATES`."""
    trainer, compare = UPDATES[name]
    version = golden()["versions"]["trl"]
    row = Comparison(what=f"update: {name}", reference=f"TRL {version} {trainer}", dtype="float32")
    return row.under(lambda: compare(row, device, **settings))
