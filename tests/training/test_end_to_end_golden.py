"""One update of the real classes and learner against numbers from the real TRL 1.16 trainers.

What is compared, and how near it must be, stands in `preftune.selftest.updates`, which runs the same on any
machine.
"""

import pytest
import torch

from preftune.selftest.updates import UPDATES, compare_update


def agree(what: str, at_least: int = 2, microbatch_size: int | None = None) -> None:
    """The update gives TRL's numbers, and as many of them as it should."""
    given = {"microbatch_size": microbatch_size} if microbatch_size else {}
    found = compare_update(what, torch.device("cpu"), **given)
    assert not found.failures, "\n".join(found.failures)
    assert found.values >= at_least


@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_dpo(kind: str, microbatch_size: int | None) -> None:
    agree(f"DPO, {kind}", {"sigmoid": 30_566, "ipo": 2, "hinge": 6}[kind], microbatch_size)


def test_dpo_at_the_reference_is_ln_2() -> None:
    agree("DPO at the reference", 3)


@pytest.mark.parametrize("entry", ["reward model", "reward model, centred"])
def test_reward_model(entry: str) -> None:
    agree(entry, 13)


def test_sft() -> None:
    agree("SFT, completion only", 30_563)


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("reduction", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_grpo(reduction: str, kl_coef: float) -> None:
    agree(f"GRPO, {reduction}, KL {kl_coef:g}")


def test_no_update_is_left_out() -> None:
    assert len(UPDATES) == 3 + 3 + 1 + 8
