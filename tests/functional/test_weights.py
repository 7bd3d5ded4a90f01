"""The three reductions and the sum that applies them."""

import math

import pytest
import torch

from preftune.functional import constant_length, sequence_mean, token_mean, weighted_sum

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
TERMS = torch.arange(12, dtype=torch.float64).view(3, 4)


def test_by_hand() -> None:
    assert token_mean(MASK).tolist() == [[0, 0.25, 0.25, 0.25], [0, 0, 0.25, 0], [0, 0, 0, 0]]
    third = pytest.approx(1 / 6)
    assert sequence_mean(MASK).tolist() == [[0, third, third, third], [0, 0, 0.5, 0], [0, 0, 0, 0]]
    # the empty row counts for constant_length only
    assert constant_length(MASK.double(), 5).tolist()[1] == [0, 0, pytest.approx(1 / 15, rel=1e-12), 0]


def test_given_totals_replace_those_of_the_mask() -> None:
    assert token_mean(MASK, 8)[0].tolist() == [0, 0.125, 0.125, 0.125]
    assert token_mean(MASK, torch.tensor(8))[0].tolist() == [0, 0.125, 0.125, 0.125]
    assert sequence_mean(MASK, 4)[1].tolist() == [0, 0, 0.25, 0]
    assert constant_length(MASK, 5, 2)[1].tolist() == pytest.approx([0, 0, 0.1, 0])


@pytest.mark.parametrize("weights", [token_mean, sequence_mean])
def test_means_of_ones_are_one(weights) -> None:
    assert weighted_sum(torch.ones(3, 4), weights(MASK.double())).item() == pytest.approx(1.0, rel=1e-12)


def test_all_reductions_agree_on_full_rows() -> None:
    full, terms = torch.ones(3, 4, dtype=torch.float64), TERMS
    values = [
        weighted_sum(terms, w) for w in (token_mean(full), sequence_mean(full), constant_length(full, 4))
    ]
    assert [v.item() for v in values] == pytest.approx([5.5] * 3, rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "total"),
    [(token_mean, 4), (sequence_mean, 2), (lambda m, total: constant_length(m, 5, total), 3)],
)
def test_microbatches_with_the_global_total_sum_to_the_whole(weights, total: int) -> None:
    mask = MASK.double()
    whole = weighted_sum(TERMS, weights(mask, total))
    parts = sum(weighted_sum(TERMS[i : i + 1], weights(mask[i : i + 1], total)) for i in range(3))
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    naive = sum(weighted_sum(TERMS[i : i + 1], token_mean(mask[i : i + 1])) for i in range(2)) / 2
    assert naive.item() != pytest.approx(weighted_sum(TERMS, token_mean(mask)).item())


def test_an_empty_mask_weighs_nothing() -> None:
    for weights in (
        token_mean(MASK * 0),
        sequence_mean(MASK * 0),
        constant_length(MASK * 0, 5),
        token_mean(MASK * 0, 0),
    ):
        assert weights.abs().sum() == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_terms_without_weight_do_not_exist(poison: float) -> None:
    terms = torch.where(MASK.bool(), TERMS, poison).requires_grad_()
    weights = token_mean(MASK.double())
    loss = weighted_sum(terms, weights)
    assert loss.item() == pytest.approx((1 + 2 + 3 + 6) / 4, rel=1e-12)
    assert torch.equal(torch.autograd.grad(loss, terms)[0], weights)


def test_a_term_with_weight_does_exist() -> None:
    assert weighted_sum(torch.tensor([1.0, math.nan]), torch.tensor([0.5, 0.5])).isnan()


def test_negative_weights_count() -> None:
    assert weighted_sum(torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0])).item() == -1.0


def test_one_token_alone_has_weight_1() -> None:
    mask = torch.tensor([[0, 1]])
    for weights in (token_mean(mask), sequence_mean(mask), constant_length(mask, 1)):
        assert weights.tolist() == [[0.0, 1.0]]


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"terms \(2,\) and weights \(2, 3\) differ"):
        weighted_sum(torch.zeros(2), torch.zeros(2, 3))
