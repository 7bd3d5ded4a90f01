"""Masks and masked statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.functional import last_response_index, masked_mean, masked_var, masked_whiten, response_mask

NAN = float("nan")


def test_response_mask_keeps_the_first_eos_and_ignores_those_before_start() -> None:
    ids = torch.tensor([[7, 0, 3, 0, 0], [0, 5, 5, 5, 5], [5, 5, 5, 5, 0]])
    expected = [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert response_mask(ids, 0, 2).long().tolist() == expected
    starts = torch.tensor([4, 0, 5])
    assert response_mask(ids, 0, starts).long().tolist() == [
        [0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert response_mask(ids, 0).dtype == torch.bool


def test_last_response_index() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    assert last_response_index(mask).tolist() == [2, -1, 3, 0]
    assert last_response_index(mask).dtype == torch.int64
    assert last_response_index(mask.bool()).tolist() == [2, -1, 3, 0]


def test_masked_mean_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 4.0, 0.0]
    assert masked_mean(x, mask, dim=0).tolist() == [2.5, 2.0, 0.0]
    assert masked_mean(x, mask, dim=-1).tolist() == [1.5, 4.0, 0.0]
    assert masked_mean(x, mask * 0).item() == 0.0


def test_masked_var_by_hand_and_where_it_is_undefined() -> None:
    x = torch.tensor([[1.0, 3.0, NAN, 8.0]])
    mask = torch.tensor([[1, 1, 0, 1]])
    assert masked_var(x, mask).item() == pytest.approx(13.0)
    assert masked_var(x, mask, unbiased=False).item() == pytest.approx(26 / 3)
    assert masked_var(x, torch.tensor([[0, 1, 0, 0]])).item() == 0.0
    assert masked_var(x, mask * 0).item() == 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_whitened_mean_and_variance(seed: int, shift: bool, unbiased: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x = 50 + 10 * torch.randn(4, 7, dtype=torch.float64, generator=g)
    mask = torch.rand(4, 7, generator=g) < 0.6
    mask[0, :3] = True
    white = masked_whiten(x, mask, shift, unbiased)
    mean = 0.0 if shift else masked_mean(x, mask).item()
    assert masked_mean(white, mask).item() == pytest.approx(mean, abs=1e-10)
    assert masked_var(white, mask, unbiased).item() == pytest.approx(1.0, abs=1e-8)
    assert (white[~mask] == 0).all()


def test_eps_stands_inside_the_root() -> None:
    x, mask = torch.tensor([[1.0, 3.0]], dtype=torch.float64), torch.ones(1, 2)
    white = masked_whiten(x, mask, eps=2.0)  # variance 2, so the divisor is sqrt(2 + 2)
    torch.testing.assert_close(white, torch.tensor([[-0.5, 0.5]], dtype=torch.float64))


def test_whitening_of_one_entry_or_equal_entries_is_zero() -> None:
    x = torch.full((2, 3), 5.0)
    one = torch.zeros(2, 3)
    one[0, 1] = 1
    assert masked_whiten(x, one).abs().sum() == 0
    assert masked_whiten(x, torch.ones(2, 3)).abs().sum() == 0


def test_half_precision_statistics_are_those_of_float32() -> None:
    x = torch.full((1, 4096), 30.0, dtype=torch.float16)  # the sum, 122880, overflows float16
    assert masked_mean(x, torch.ones(1, 4096)).item() == 30.0
