"""What holds for every function alike: exported names, dtypes, mask forms, and silence off the mask."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preftune import functional as pf

B, T, V = 4, 6, 5
MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]]).bool()
IDS = torch.tensor([[1, 2, 3, 4, 0, 1]]).expand(B, T)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Functions of a mask and of per-token inputs, all (B, T).
MASKED: dict[str, tuple[int, Callable[..., Tensor | tuple[Tensor, ...]]]] = {
    "masked_mean": (1, lambda m, x: pf.masked_mean(x, m)),
    "masked_mean_rows": (1, lambda m, x: pf.masked_mean(x, m, dim=1)),
    "masked_var": (1, lambda m, x: pf.masked_var(x, m)),
    "masked_whiten": (1, lambda m, x: pf.masked_whiten(x, m)),
    "masked_whiten_kept": (1, lambda m, x: pf.masked_whiten(x, m, shift_mean=False)),
    "gae": (2, lambda m, r, v: pf.gae(r, v, m, 0.9, 0.8)),
    "ppo_policy_loss": (3, lambda m, *x: pf.ppo_policy_loss(*x, mask=m)),
    "ppo_policy_loss_delta": (3, lambda m, *x: pf.ppo_policy_loss(*x, delta=1.5, mask=m)),
    "ppo_policy_loss_sequence": (3, lambda m, *x: pf.ppo_policy_loss(*x, level="sequence", mask=m)),
    "ppo_policy_loss_sequence_sum": (3, lambda m, *x: pf.ppo_policy_loss(*x, level="sequence_sum", mask=m)),
    "ppo_value_loss": (3, lambda m, *x: pf.ppo_value_loss(*x, mask=m)),
    "ppo_value_loss_unclipped": (3, lambda m, *x: pf.ppo_value_loss(*x, clip=None, mask=m)),
    "token_mean": (1, lambda m, x: pf.weighted_sum(x, pf.token_mean(m))),
    "sequence_mean": (1, lambda m, x: pf.weighted_sum(x, pf.sequence_mean(m))),
    "constant_length": (1, lambda m, x: pf.weighted_sum(x, pf.constant_length(m, 7))),
    "shaped_rewards": (2, lambda m, lp, ref: pf.shaped_rewards(torch.arange(B), lp, ref, m, 0.3)),
}
DETACHED = {"shaped_rewards"}


def call(name: str, mask: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = MASKED[name][1](mask, *inputs)
    return out if isinstance(out, tuple) else (out,)


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [rand(B, T, seed=i).to(dtype) for i in range(MASKED[name][0])]


def test_exported_names_exist_and_are_sorted() -> None:
    assert sorted(pf.__all__) == pf.__all__
    assert len(set(pf.__all__)) == 27
    assert all(callable(getattr(pf, name)) for name in pf.__all__)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", MASKED)
def test_off_mask_inputs_do_not_exist(name: str, poison: float) -> None:
    def run(fill: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        inputs = [torch.where(MASK, x, fill).requires_grad_() for x in inputs_of(name)]
        outputs = call(name, MASK, inputs)
        if name in DETACHED:
            assert not any(out.requires_grad for out in outputs)
            return outputs, ()
        loss = sum((out * rand(*out.shape, seed=9)).sum() for out in outputs)
        return outputs, torch.autograd.grad(loss, inputs, allow_unused=True)

    (clean, clean_grads), (outputs, grads) = run(0.0), run(poison)
    for out, expected in zip(outputs, clean, strict=True):
        assert torch.equal(out, expected)
        assert out.isfinite().all()
        if out.shape == MASK.shape:
            assert (out[~MASK] == 0).all()
            assert (out[MASK] != 0).any()
    for grad, expected in zip(grads, clean_grads, strict=True):
        if grad is None:  # an input that this variant does not use, such as old values without clipping
            assert expected is None
            continue
        assert torch.equal(grad, expected)
        assert (grad[~MASK] == 0).all()
        assert (grad[MASK] != 0).any()


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("form", [torch.int64, torch.uint8, torch.float32, torch.float16])
def test_masks_are_bool_or_zero_one(name: str, form: torch.dtype) -> None:
    inputs = inputs_of(name)
    for out, expected in zip(call(name, MASK.to(form), inputs), call(name, MASK, inputs), strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("name", MASKED)
def test_dtype_of_masked_functions(name: str) -> None:
    for given in (torch.float16, torch.bfloat16, torch.float32):
        assert all(out.dtype == torch.float32 for out in call(name, MASK, inputs_of(name, given)))
    mixed = inputs_of(name, torch.float16)
    mixed[-1] = mixed[-1].double()
    assert all(out.dtype == torch.float64 for out in call(name, MASK, mixed))
    half = inputs_of(name, torch.float16)
    assert all(out.dtype == torch.float64 for out in call(name, MASK.double(), half))


# The rest: name -> (shapes of the floating inputs, function of them).
OTHERS: dict[str, tuple[list[tuple[int, ...]], Callable[..., Tensor]]] = {
    "token_logprobs": ([(B, T, V)], lambda x: pf.token_logprobs(x, IDS, 0.7)),
    "entropy": ([(B, T, V)], lambda x: pf.entropy(x, 0.7)),
    "full_kl": ([(B, T, V)] * 2, lambda x, y: pf.full_kl(x, y, 0.7)),
    **{k: ([(B, T)] * 2, lambda x, y, k=k: pf.kl_estimate(x, y, k)) for k in ("k1", "k2", "k3")},
    "bradley_terry_loss": ([(B,)] * 3, lambda c, r, m: pf.bradley_terry_loss(c, r, m, 0.01)),
    "preference_loss": ([(B,)] * 4, lambda *x: pf.preference_loss(*x, beta=0.1)),
    "simpo_loss": ([(B,)] * 2, lambda c, r: pf.simpo_loss(c, r, beta=2.0, gamma=0.5)),
    "orpo_odds_term": ([(B,)] * 2, lambda c, r: pf.orpo_odds_term(-c.abs(), -r.abs())),
    "kto_kl": ([(B,)] * 2, pf.kto_kl),
    "kto_loss": ([(B,)] * 2, lambda p, r: pf.kto_loss(p, r, MASK[:, 1], 0.3, beta=0.1)),
    "missing_eos_scores": ([(B,)], lambda s: pf.missing_eos_scores(s, MASK[:, 1], penalty=1.0)),
    "group_advantages": ([(B,)], lambda s: pf.group_advantages(s, 2)),
    "leave_one_out_advantages": ([(B,)], lambda s: pf.leave_one_out_advantages(s, 2)),
    "weighted_sum": ([(B, T)] * 2, pf.weighted_sum),
}


@pytest.mark.parametrize("name", OTHERS)
def test_dtype_of_the_others(name: str) -> None:
    shapes, function = OTHERS[name]
    wide = [rand(*shape, seed=i) for i, shape in enumerate(shapes)]
    exact = function(*wide)
    assert exact.dtype == torch.float64
    for given in (torch.float16, torch.bfloat16, torch.float32):
        out = function(*(x.to(given) for x in wide))
        assert out.dtype == torch.float32
        # computed in float32 throughout: equal to the float64 result on the rounded inputs
        rounded = function(*(x.to(given).double() for x in wide))
        torch.testing.assert_close(out.double(), rounded, rtol=1e-5, atol=1e-5)
    mixed = [x.half() for x in wide[:-1]] + wide[-1:]
    assert function(*mixed).dtype == torch.float64


def test_weights_of_a_bool_mask_are_float32() -> None:
    for weights in (pf.token_mean(MASK), pf.sequence_mean(MASK.long()), pf.constant_length(MASK, 9)):
        assert weights.dtype == torch.float32
    assert pf.token_mean(MASK, torch.tensor(17)).dtype == torch.float32


def test_lengths_and_labels_may_be_integers() -> None:
    sums = [rand(B, seed=i).float() for i in range(4)]
    lengths = torch.tensor([1, 2, 3, 4])
    by_hand = [x / lengths for x in sums]
    given = pf.preference_loss(*sums, beta=0.1, chosen_lengths=lengths, rejected_lengths=lengths)
    torch.testing.assert_close(given, pf.preference_loss(*by_hand, beta=0.1))
    labels = torch.tensor([1, 0, 1, 0])
    as_int = pf.kto_loss(sums[0], sums[1], labels, 0.1, beta=0.1)
    assert torch.equal(as_int, pf.kto_loss(sums[0], sums[1], labels.bool(), 0.1, beta=0.1))


S = torch.zeros(4)
EMPTY_ROW = MASK & (torch.arange(4) < 3)[:, None]
SMOOTHED = "label_smoothing is for sigmoid and robust, not for"
ONE_LENGTH = "give chosen_lengths and rejected_lengths, or neither"
NO_MULTIPLE, ONE_MEMBER = "4 scores are not a multiple of group_size 3", "group_size is 1; a group needs 2"
KINDS = "sigmoid, robust, hinge, ipo, .*, bco_pair"
# What is wrong, as a pattern for the whole message: it names the argument and what it may be.
BAD: dict[str, tuple[str, Callable[[], object]]] = {
    "kl kind": ("unknown KL estimator 'k4'; one of k1, k2, k3", lambda: pf.kl_estimate(S, S, "k4")),
    "preference kind": (
        f"unknown preference loss 'dpo'; one of {KINDS}",
        lambda: pf.preference_loss(S, S, S, S, beta=0.1, kind="dpo"),
    ),
    **{
        f"smoothing {kind}": (
            f"{SMOOTHED} '{kind}'",
            lambda kind=kind: pf.preference_loss(S, S, S, S, beta=0.1, kind=kind, label_smoothing=0.1),
        )
        for kind in (
            "hinge", "ipo", "reference_free", "nca_pair", "apo_zero", "apo_down", "sppo_hard", "bco_pair",
        )
    },
    "robust at one half": (
        "robust divides by .* label_smoothing: 0.5 is undefined",
        lambda: pf.preference_loss(S, S, S, S, beta=0.1, kind="robust", label_smoothing=0.5),
    ),
    "chosen lengths only": (
        ONE_LENGTH, lambda: pf.preference_loss(S, S, S, S, beta=0.1, chosen_lengths=S + 1)
    ),
    "rejected lengths only": (
        ONE_LENGTH, lambda: pf.preference_loss(S, S, S, S, beta=0.1, rejected_lengths=S + 1)
    ),
    "level": (
        "unknown level 'word'; one of token, sequence, sequence_sum",
        lambda: pf.ppo_policy_loss(MASK, MASK, S, level="word", mask=MASK),
    ),
    "sequence level without mask": (
        "level 'sequence' needs the mask: .* response",
        lambda: pf.ppo_policy_loss(MASK, MASK, S, level="sequence"),
    ),
    "sum level without mask": (
        "level 'sequence_sum' needs the mask: .* response",
        lambda: pf.ppo_policy_loss(MASK, MASK, S, level="sequence_sum"),
    ),
    "scale": (
        "unknown scale 'std'; one of group, batch, none", lambda: pf.group_advantages(S, 2, "std")
    ),
    "group not a multiple": (NO_MULTIPLE, lambda: pf.group_advantages(S, 3)),
    "group of one": (f"{ONE_MEMBER} .*", lambda: pf.group_advantages(S, 1)),
    "leave one out not a multiple": (NO_MULTIPLE, lambda: pf.leave_one_out_advantages(S, 3)),
    "leave one out of one": (f"{ONE_MEMBER} .*", lambda: pf.leave_one_out_advantages(S, 1)),
    "row without response": (
        r"rows \[3\] have no response token, .* score",
        lambda: pf.shaped_rewards(S, MASK, MASK, EMPTY_ROW, 0.1),
    ),
    "weights of another shape": (r"terms \(4,\) and weights .* shape", lambda: pf.weighted_sum(S, MASK)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_value_errors(name: str) -> None:
    message, call = BAD[name]
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()
