"""Rewards, GAE and group advantages against their definitions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.functional import (
    gae,
    group_advantages,
    leave_one_out_advantages,
    masked_mean,
    missing_eos_scores,
    shaped_rewards,
)
from preftune.functional.advantages import centred_groups


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def runs(starts: list[int], lengths: list[int], width: int) -> Tensor:
    """A mask with one run of columns a row."""
    columns = torch.arange(width)
    start, length = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
    return (columns >= start) & (columns < start + length)


# ---- scores and rewards


def test_missing_eos_rules() -> None:
    scores, ended = torch.tensor([1.0, 2.0, math.nan]), torch.tensor([1, 0, 0])
    assert missing_eos_scores(scores, ended, replace=-1.0).tolist() == [1.0, -1.0, -1.0]
    assert missing_eos_scores(scores[:2], ended[:2].bool(), penalty=0.5).tolist() == [1.0, 1.5]
    assert missing_eos_scores(scores[:2], ended[:2]).tolist() == [1.0, 2.0]
    assert missing_eos_scores(scores, ended, replace=0.0, penalty=9.0).tolist() == [1.0, 0.0, 0.0]


def test_shaped_rewards_by_hand() -> None:
    lp = torch.tensor([[-9.0, -1.0, -2.0, math.nan], [-1.0, -1.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.0, -2.0, -1.5, math.inf], [-1.0, -1.0, -2.0, -3.0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    out = shaped_rewards(torch.tensor([5.0, -2.0]), lp, ref, mask, 0.1)
    expected = torch.tensor([[0.0, -0.1, 5.05, 0.0], [0.0, 0.0, -0.1, -2.2]])
    torch.testing.assert_close(out, expected)


def test_rewards_sum_to_the_score_less_the_penalty() -> None:
    mask = runs([0, 2, 3, 1], [7, 3, 1, 4], 7)
    lp, ref, scores = rand(4, 7).requires_grad_(), rand(4, 7, seed=1), rand(4, seed=2).requires_grad_()
    out = shaped_rewards(scores, lp, ref, mask, 0.3)
    kl = torch.where(mask, lp - ref, 0.0).sum(1)
    torch.testing.assert_close(out.sum(1), (scores - 0.3 * kl).detach(), rtol=0, atol=1e-12)
    assert not out.requires_grad
    same = shaped_rewards(scores, lp, lp, mask, 0.3)  # at the reference only the score is left
    assert (same != 0).sum().item() == 4


def test_empty_row_is_named() -> None:
    mask = runs([0, 0, 1], [1, 0, 0], 3)
    with pytest.raises(ValueError, match=r"rows \[1, 2\] have no response"):
        shaped_rewards(torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, 3), mask, 0.1)
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2, 3, 4, 5, 6, 7\] have no response"):
        shaped_rewards(torch.zeros(10), torch.zeros(10, 3), torch.zeros(10, 3), torch.zeros(10, 3), 0.1)


def test_a_response_may_be_column_0_alone() -> None:
    rewards = shaped_rewards(
        torch.tensor([5.0, 6.0]), torch.zeros(2, 2), torch.zeros(2, 2), runs([0, 1], [1, 1], 2), 0.1
    )
    assert rewards.tolist() == [[5.0, 0.0], [0.0, 6.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages(torch.zeros(4), 1), "group_size is 1; a group needs 2 responses"),
        (lambda: group_advantages(torch.zeros(5), 2), "5 scores are not a multiple of group_size 2"),
        (
            lambda: group_advantages(torch.zeros(4), 2, "row"),
            "unknown scale 'row'; one of group, batch, none",
        ),
    ],
)
def test_what_is_wrong_with_a_group_is_said(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- GAE


def gae_by_definition(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k} over the row's response, term by term."""
    out = torch.zeros_like(r)
    for row in range(len(r)):
        columns = mask[row].nonzero().flatten().tolist()
        rewards, values = r[row, columns].tolist(), [*v[row, columns].tolist(), 0.0]
        deltas = [reward + gamma * values[k + 1] - values[k] for k, reward in enumerate(rewards)]
        for k, column in enumerate(columns):
            out[row, column] = sum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(deltas)))
    return out


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7)), min_size=1, max_size=4),
    st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000),
)  # fmt: skip
def test_gae_is_its_definition(rows: list[tuple[int, int]], gamma: float, lam: float, seed: int) -> None:
    mask = runs([s for s, _ in rows], [n for _, n in rows], 7)
    r, v = rand(len(rows), 7, seed=seed), rand(len(rows), 7, seed=seed + 1)
    advantages, returns = gae(r, v, mask, gamma, lam)
    torch.testing.assert_close(advantages, gae_by_definition(r, v, mask, gamma, lam), rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, torch.where(mask, advantages + v, 0.0), rtol=0, atol=1e-12)


MASK = runs([0, 2, 3], [6, 3, 1], 6)


def test_lam_one_gamma_one_returns_are_rewards_to_go() -> None:
    r = torch.where(MASK, rand(3, 6), 0.0)
    to_go = torch.where(MASK, r.flip(1).cumsum(1).flip(1), 0.0)
    for seed in (1, 2):  # whatever the critic says
        _, returns = gae(r, rand(3, 6, seed=seed), MASK, 1.0, 1.0)
        torch.testing.assert_close(returns, to_go, rtol=0, atol=1e-12)


def test_lam_zero_is_the_one_step_error() -> None:
    r, v = rand(3, 6), rand(3, 6, seed=1)
    advantages, _ = gae(r, v, MASK, 0.9, 0.0)
    held = torch.where(MASK, v, 0.0)
    following = torch.cat([held[:, 1:], torch.zeros(3, 1)], 1)
    expected = torch.where(MASK, r + 0.9 * following - v, 0.0)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)


def test_without_critic_and_penalty_every_token_gets_the_score() -> None:
    scores, zeros = rand(3), torch.zeros(3, 6, dtype=torch.float64)
    rewards = shaped_rewards(scores, rand(3, 6, seed=1), rand(3, 6, seed=2), MASK, 0.0)
    advantages, _ = gae(rewards, zeros, MASK, 1.0, 1.0)
    torch.testing.assert_close(advantages, torch.where(MASK, scores[:, None], 0.0), rtol=0, atol=1e-12)


def test_gae_of_padded_shifted_and_permuted_rows() -> None:
    r, v = rand(3, 6), rand(3, 6, seed=1)
    advantages, returns = gae(r, v, MASK, 0.9, 0.8)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(gae(r[order], v[order], MASK[order], 0.9, 0.8)[0], advantages[order])

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (2, 3))

    wide, wide_returns = gae(padded(r), padded(v), padded(MASK), 0.9, 0.8)
    assert torch.equal(wide, padded(advantages))
    assert torch.equal(wide_returns, padded(returns))


class Launches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_columns_of_the_prompt_cost_gae_nothing() -> None:
    counts = []
    for before, after in ((0, 0), (50, 0), (3, 70)):
        wide = [torch.nn.functional.pad(x, (before, after)) for x in (rand(3, 6), rand(3, 6, seed=1), MASK)]
        with Launches() as launches:
            gae(*wide, 0.9, 0.8)
        counts.append(launches.count)
    assert max(counts) <= counts[0] + 1  # a slice of all columns is none


def test_gae_without_any_response_is_zero() -> None:
    advantages, returns = gae(rand(3, 6), rand(3, 6), torch.zeros_like(MASK), 0.9, 0.8)
    assert (advantages == 0).all()
    assert (returns == 0).all()


# ---- groups


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_equal_scores_give_exact_zero_and_groups_sum_to_zero(scale: str, k: int) -> None:
    scores = rand(4 * k).float()
    scores[k : 2 * k] = 0.1  # the mean of three 0.1 is not 0.1
    out = group_advantages(scores, k, scale, eps=1e-12).view(4, k)
    assert (out[1] == 0).all()
    assert (out[[0, 2, 3]] != 0).all()
    torch.testing.assert_close(out.sum(1), torch.zeros(4), rtol=0, atol=1e-5)
    loo = leave_one_out_advantages(scores, k).view(4, k)
    assert (loo[1] == 0).all()
    torch.testing.assert_close(loo.sum(1), torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("off", [-7.0, 7.0])
def test_equal_scores_beside_one_that_does_not_count_give_exact_zero(off: float) -> None:
    """The mean of seven 0.7 is not 0.7, and the score off `valid` must not make the group an unequal one."""
    scores, valid = torch.full((8,), 0.7), torch.ones(8, dtype=torch.bool)
    scores[1], valid[1] = off, False
    assert masked_mean(scores, valid) != scores[0]  # the test can fail
    assert (centred_groups(scores, 8, valid) == 0).all()
    assert (group_advantages(scores, 8, valid=valid) == 0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_all_scores_equal(scale: str) -> None:
    assert (group_advantages(torch.full((6,), 0.1), 3, scale) == 0).all()


@pytest.mark.parametrize("k", [2, 3, 8])
def test_group_advantages_by_definition(k: int) -> None:
    scores, eps = rand(3 * k), 1e-4
    groups = scores.view(3, k)
    centred = groups - groups.mean(1, keepdim=True)
    sd = torch.sqrt(centred.square().sum(1, keepdim=True) / (k - 1))
    torch.testing.assert_close(group_advantages(scores, k).view(3, k), centred / (sd + eps))
    torch.testing.assert_close(group_advantages(scores, k, "none").view(3, k), centred)
    sd_all = torch.sqrt((scores - scores.mean()).square().sum() / (3 * k - 1))
    torch.testing.assert_close(group_advantages(scores, k, "batch").view(3, k), centred / (sd_all + eps))
    others = (groups.sum(1, keepdim=True) - groups) / (k - 1)
    torch.testing.assert_close(leave_one_out_advantages(scores, k).view(3, k), groups - others)


def test_group_std_after_scaling_and_affine_invariance() -> None:
    scores = rand(12)
    out = group_advantages(scores, 4, eps=0.0)
    torch.testing.assert_close(out.view(3, 4).std(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(group_advantages(3 * scores + 7, 4, eps=0.0), out)
    shifted = group_advantages(scores + 7, 4, "none")
    torch.testing.assert_close(shifted, group_advantages(scores, 4, "none"))


def test_groups_of_two() -> None:
    scores, eps = torch.tensor([3.0, 1.0], dtype=torch.float64), 1e-4
    sd = math.sqrt(2)
    expected = sd / (sd + eps) / math.sqrt(2)
    assert group_advantages(scores, 2, eps=eps).tolist() == pytest.approx([expected, -expected], rel=1e-12)
    assert leave_one_out_advantages(scores, 2).tolist() == [2.0, -2.0]


def test_groups_are_successive_rows() -> None:
    scores = torch.tensor([1.0, 3.0, 10.0, 10.0])
    assert group_advantages(scores, 2, "none").tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert group_advantages(scores[[0, 2, 1, 3]], 2, "none").tolist() == [-4.5, 4.5, -3.5, 3.5]


def test_gae_of_a_single_column() -> None:
    advantages, returns = gae(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[1]]), 0.9, 0.8)
    assert (advantages.item(), returns.item()) == (2.0, 3.0)


def test_equally_infinite_scores_are_no_equal_scores() -> None:
    """Advantages of 0 would hide a reward model that gives no number."""
    advantages = group_advantages(torch.tensor([math.inf, math.inf, 1.0, 1.0]), 2)
    assert advantages[:2].isnan().all()
    assert advantages[2:].tolist() == [0.0, 0.0]
