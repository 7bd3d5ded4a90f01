"""Every golden entry: values and gradients at 1e-12 in float64, at the file's tolerances in float32.

What is compared with what stands in `preftune.selftest`, which ships the vectors and runs the same.
"""

import pytest
import torch

from golden import DTYPES, agree, dtypes, names, vectors
from preftune.selftest.maths import COMPARISONS

# What we do not have: the four entries place the score one column later than we do.
ASSEMBLY_ONLY = {
    "postprocessed_responses", "value_mask", "token_rewards", "gae_raw", "returns", "advantages_whitened",
}  # fmt: skip


@pytest.fixture(params=DTYPES, ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_no_entry_is_left_out() -> None:
    """Each entry has one comparison, and that looks at everything the entry expects."""
    for name in vectors():
        assert sum(name.startswith(prefix) for prefix in COMPARISONS) == 1, name
        for one in dtypes(name):
            compared = agree(name, one)
            left_out = set(compared.raw["expected"]) - compared.used
            assert left_out == (ASSEMBLY_ONLY if name.startswith("ppo_reward_assembly") else set()), name
    assert len(vectors()) == 31


def test_selective_logprobs(dtype: torch.dtype) -> None:
    agree("selective_logprobs", dtype)


def test_reward_bradley_terry(dtype: torch.dtype) -> None:
    agree("reward_bradley_terry", dtype)


@pytest.mark.parametrize("name", names("dpo_family"))
def test_dpo_family(name: str, dtype: torch.dtype) -> None:
    agree(name, dtype)


def test_kl_estimators(dtype: torch.dtype) -> None:
    agree("kl_estimators", dtype)


@pytest.mark.parametrize("name", names("gae_"))
def test_gae(name: str, dtype: torch.dtype) -> None:
    agree(name, dtype)


def test_masked_whiten(dtype: torch.dtype) -> None:
    agree("masked_whiten", dtype)


@pytest.mark.parametrize("name", names("ppo_losses"))
def test_ppo_losses(name: str, dtype: torch.dtype) -> None:
    agree(name, dtype)


@pytest.mark.parametrize("name", names("ppo_reward_assembly"))
def test_ppo_reward_assembly(name: str, dtype: torch.dtype) -> None:
    agree(name, dtype)


def test_ppo_reward_at_last_token(dtype: torch.dtype) -> None:
    agree("ppo_reward_at_last_token", dtype)


def test_response_mask() -> None:
    agree("response_mask_pad_equals_eos")


def test_adaptive_kl_controller() -> None:
    agree("adaptive_kl_controller")


def test_group_advantages(dtype: torch.dtype) -> None:
    agree("group_advantages", dtype)


@pytest.mark.parametrize("name", names("grpo_loss"))
def test_grpo_loss(name: str, dtype: torch.dtype) -> None:
    agree(name, dtype)


def test_rloo_sequence_loss(dtype: torch.dtype) -> None:
    agree("rloo_sequence_loss", dtype)


def test_simpo(dtype: torch.dtype) -> None:
    agree("simpo_beta2.0_gamma1.0", dtype)


def test_orpo(dtype: torch.dtype) -> None:
    agree("orpo", dtype)


@pytest.mark.parametrize("name", names("kto_"))
def test_kto(name: str, dtype: torch.dtype) -> None:
    agree(name, dtype)
