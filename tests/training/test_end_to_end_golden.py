"""One update of the real classes and learner against numbers from the real TRL 1.16 trainers.

The vectors lie in golden/end_to_end of PREFTUNE_SHARED; their README states how they were made and the
tolerances.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import preftune
from preftune.data import Pairs, pad_sequences
from preftune.models.roles import Policy, Reference, RewardModel
from preftune.rollout import Rollout

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / os.environ.get("PREFTUNE_SHARED", "../shared") / "golden" / "end_to_end"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden vectors are not at {GOLDEN}")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "e2e_golden.json").read_text())


def causal_lm(golden: dict[str, Any], name: str) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(GPT2Config(**golden["config"]))
    missing = model.load_state_dict(load_file(GOLDEN / f"{name}.safetensors"), strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert missing.unexpected_keys == []
    model.tie_weights()
    return model


def reward_model(golden: dict[str, Any]) -> GPT2ForSequenceClassification:
    model = GPT2ForSequenceClassification(GPT2Config(**golden["config"], num_labels=1))
    model.load_state_dict(load_file(GOLDEN / "reward_model.safetensors"))
    return model


def pairs(golden: dict[str, Any]) -> Pairs:
    rows, pad = golden["batch"], golden["pad_token_id"]
    prompts = [row["prompt_ids"] for row in rows]
    return Pairs(
        pad_sequences(prompts, [row["chosen_ids"] for row in rows], pad),
        pad_sequences(prompts, [row["rejected_ids"] for row in rows], pad),
    )


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def assert_same_parameters(model: torch.nn.Module, expected_file: Path) -> None:
    """To 1e-6, except the key third of c_attn.bias: its true gradient is 0, so Adam's step there is noise.

    The same holds for single elements elsewhere whose gradient is below 1e-7: a float64 update differs from
    TRL's float32 one by 1.3e-6 in one of them. At most 4 of 28,992 elements may be such, none by more than
    1e-5.
    """
    expected = load_file(expected_file)
    noisy = 0
    for name, parameter in model.named_parameters():
        if name not in expected:
            continue
        difference = (parameter.detach() - expected[name]).abs()
        if name.endswith("c_attn.bias"):
            difference[32:64] = 0
        assert difference.max().item() <= 1e-5, name
        noisy += int((difference > 1e-6).sum())
    assert noisy <= 4


@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_dpo(golden: dict[str, Any], kind: str, microbatch_size: int | None) -> None:
    policy = Policy(causal_lm(golden, "policy"))
    metrics = preftune.one_update(
        "dpo",
        {"policy": policy, "reference": Reference(causal_lm(golden, "ref"))},
        pairs(golden),
        optimizer=adamw,
        microbatch_size=microbatch_size,
        kind=kind,
        beta=golden["dpo"][kind]["beta"],
        length_average=kind == "ipo",
    )
    expected = golden["dpo"][kind]["logs"]
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    if kind != "ipo":  # TRL logs the rewards of the length-averaged form there
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert metrics[name] == pytest.approx(expected[name], abs=1e-5)
    if kind == "sigmoid":
        assert_same_parameters(policy.model, GOLDEN / "policy_after_dpo_step.safetensors")


def test_dpo_at_the_reference_is_ln_2(golden: dict[str, Any]) -> None:
    models = {"policy": Policy(causal_lm(golden, "ref")), "reference": Reference(causal_lm(golden, "ref"))}
    metrics = preftune.one_update("dpo", models, pairs(golden), optimizer=adamw)
    assert metrics["loss"] == pytest.approx(golden["dpo"]["policy_equals_ref_loss"], abs=1e-7)
    assert metrics["rewards/margins"] == 0.0
    assert metrics["rewards/accuracies"] == 0.0


@pytest.mark.parametrize(("entry", "center"), [("center_None", 0.0), ("center_0.01", 0.01)])
def test_reward_model(golden: dict[str, Any], entry: str, center: float) -> None:
    role = RewardModel(reward_model(golden))
    expected = golden["reward"]["scores_at_last_token_incl_eos"]
    batch = pairs(golden)
    assert role.raw_scores(batch.chosen).tolist() == pytest.approx(expected["chosen"], abs=1e-5)
    assert role.raw_scores(batch.rejected).tolist() == pytest.approx(expected["rejected"], abs=1e-5)
    metrics = preftune.one_update(
        "reward", {"reward_model": role}, batch, optimizer=adamw, microbatch_size=3, center_coef=center
    )
    logs = golden["reward"][entry]["logs"]
    assert metrics["loss"] == pytest.approx(logs["loss"], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(logs["grad_norm"], rel=1e-4)
    assert metrics["accuracy"] == logs["accuracy"]
    assert metrics["margin"] == pytest.approx(logs["margin"], abs=1e-5)
    after = golden["reward"][entry]["params_after_one_step"]["score.weight"]
    assert role.model.score.weight.double().norm().item() == pytest.approx(after["l2"], abs=1e-5)


def test_sft(golden: dict[str, Any]) -> None:
    policy = Policy(causal_lm(golden, "policy"))
    metrics = preftune.one_update(
        "sft", {"policy": policy}, pairs(golden).chosen, optimizer=adamw, microbatch_size=1
    )
    expected = golden["sft_completion_only"]["logs"]
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert metrics["entropy"] == pytest.approx(expected["entropy"], abs=1e-5)
    assert_same_parameters(policy.model, GOLDEN / "policy_after_sft_step.safetensors")


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("reduction", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_grpo(golden: dict[str, Any], reduction: str, kl_coef: float) -> None:
    inputs = golden["grpo"]["inputs"]
    sequences = pad_sequences(inputs["prompts"], inputs["completions"], golden["pad_token_id"])

    def aligned(rows: list[list[float]]) -> torch.Tensor:
        full = torch.zeros(sequences.ids.shape)
        for i, row in enumerate(rows):
            start = len(inputs["prompts"][i])
            full[i, start : start + len(inputs["completions"][i])] = torch.tensor(row)[
                : len(inputs["completions"][i])
            ]
        return full

    policy = Policy(causal_lm(golden, "policy"))
    rollout = Rollout(
        sequences=sequences,
        logprobs=aligned(inputs["old_logps"]),
        reference_logprobs=aligned(inputs["ref_logps"]),
        scores=torch.tensor(inputs["rewards"]),
        group=torch.arange(2).repeat_interleave(4),
    )
    expected = golden["grpo"]["losses"][f"{reduction}_beta{kl_coef}"]
    metrics = preftune.one_update(
        "grpo",
        {"policy": policy},
        rollout,
        optimizer=adamw,
        microbatch_size=3,
        reduction=reduction,
        kl_coef=kl_coef,
        clip_low=0.2,
        clip_high=0.28,
        max_new_tokens=expected["max_completion_length"],
    )
    assert metrics["loss"] == pytest.approx(expected["trl_loss"], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected["trl_grad_l2_norm"], rel=1e-4)
