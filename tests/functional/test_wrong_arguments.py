"""Arguments that fit no formula are refused, where broadcasting would give a number all the same."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preftune import functional as pf

ROWS, COLUMN = torch.arange(4.0), torch.arange(4.0)[:, None]  # (B,) and (B, 1) make (B, B)
TOKENS, IDS, LOGITS = torch.ones(4, 4), torch.ones(3, 5, dtype=torch.long), torch.randn(3, 5, 7)
ONE = torch.ones(1, 4)
SUMS = (
    "shapes differ: policy_chosen (4,), policy_rejected (4,), reference_chosen (4,), reference_rejected (4,)"
)

Case = tuple[str, Callable[[], object]]
SHAPES: dict[str, Case] = {
    "fewer ids than columns": (
        "logits (3, 5, 7) and ids (3, 4) differ in rows or columns",
        lambda: pf.token_logprobs(LOGITS, IDS[:, :4]),
    ),
    "fewer ids than rows": (
        "logits (3, 5, 7) and ids (2, 5) differ in rows or columns",
        lambda: pf.token_logprobs(LOGITS, IDS[:2]),
    ),
    "ids that are no integers": (
        "ids are torch.float32; token ids are integers",
        lambda: pf.token_logprobs(LOGITS, IDS + 0.5),
    ),
    "logits of one row": ("logits (5, 7) are not (B, T, V)", lambda: pf.entropy(LOGITS[0])),
    "one reference for all": (
        "shapes differ: logits (3, 5, 7), reference_logits (1, 5, 7)",
        lambda: pf.full_kl(LOGITS, LOGITS[:1]),
    ),
    "starts of other rows": (
        "2 starts for 1 rows",
        lambda: pf.response_mask(IDS[:1], 0, torch.tensor([1, 2])),
    ),
    **{
        f"mask of a column, {function.__name__}": (
            "a mask (4, 1) does not fit (4,)",
            lambda function=function: function(ROWS, COLUMN),
        )
        for function in (pf.masked_mean, pf.masked_var, pf.masked_whiten)
    },
    "kl_estimate": (
        "shapes differ: logprobs (4, 4), reference_logprobs (4,)",
        lambda: pf.kl_estimate(TOKENS, ROWS, "k1"),
    ),
    "bradley_terry_loss": (
        "shapes differ: chosen (4, 1), rejected (4,)",
        lambda: pf.bradley_terry_loss(COLUMN, ROWS),
    ),
    "margin": (
        "shapes differ: chosen (4,), rejected (4,), margin (4, 1)",
        lambda: pf.bradley_terry_loss(ROWS, ROWS, COLUMN),
    ),
    **{
        f"preference_loss, {name}": (
            "shapes differ: " + ", ".join(f"{other} (4,{' 1' if other == name else ''})" for other in names),
            lambda name=name, names=names: pf.preference_loss(
                **{other: COLUMN if other == name else ROWS for other in names}, beta=0.1
            ),
        )
        for names in (("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"),)
        for name in names
    },
    "chosen_lengths": (
        f"{SUMS}, chosen_lengths (4, 1), rejected_lengths (4,)",
        lambda: pf.preference_loss(
            ROWS, ROWS, ROWS, ROWS, beta=0.1, chosen_lengths=COLUMN, rejected_lengths=ROWS
        ),
    ),
    "rejected_lengths": (
        f"{SUMS}, chosen_lengths (4,), rejected_lengths (4, 1)",
        lambda: pf.preference_loss(
            ROWS, ROWS, ROWS, ROWS, beta=0.1, chosen_lengths=ROWS, rejected_lengths=COLUMN
        ),
    ),
    "simpo_loss": (
        "shapes differ: chosen_mean (4,), rejected_mean (4, 1)",
        lambda: pf.simpo_loss(ROWS, COLUMN, beta=2.0, gamma=0.5),
    ),
    "orpo_odds_term": (
        "shapes differ: chosen_mean (4,), rejected_mean (4, 1)",
        lambda: pf.orpo_odds_term(-ROWS, -COLUMN),
    ),
    "kto_kl": ("shapes differ: policy (4,), reference (4, 1)", lambda: pf.kto_kl(ROWS, COLUMN)),
    "kto_loss": (
        "shapes differ: policy (4,), reference (4,), desirable (4, 1)",
        lambda: pf.kto_loss(ROWS, ROWS, COLUMN, 0.1, beta=0.1),
    ),
    "kl of each row": (
        "shapes differ: policy (4,), reference (4,), desirable (4,), kl (4, 1)",
        lambda: pf.kto_loss(ROWS, ROWS, ROWS > 1, COLUMN, beta=0.1),
    ),
    "missing_eos_scores": (
        "shapes differ: scores (4, 1), ended (4,)",
        lambda: pf.missing_eos_scores(COLUMN, ROWS > 1, replace=-1.0),
    ),
    "scores in a column": (
        "scores (4, 1) are not one a row of (4, 4)",
        lambda: pf.shaped_rewards(COLUMN, TOKENS, TOKENS, TOKENS, 0.1),
    ),
    "scores of other rows": (
        "scores (4,) are not one a row of (1, 4)",
        lambda: pf.shaped_rewards(ROWS, ONE, ONE, ONE, 0.1),
    ),
    "reference of rows": (
        "shapes differ: logprobs (4, 4), reference_logprobs (4,), response (4, 4)",
        lambda: pf.shaped_rewards(ROWS, TOKENS, ROWS, TOKENS, 0.1),
    ),
    "values of rows": (
        "shapes differ: rewards (4, 4), values (4,), response (4, 4)",
        lambda: pf.gae(TOKENS, ROWS, TOKENS, 1.0, 0.95),
    ),
    "one mask for all": (
        "shapes differ: rewards (4, 4), values (4, 4), response (1, 4)",
        lambda: pf.gae(TOKENS, TOKENS, ONE, 1.0, 0.95),
    ),
    "scores of tokens": ("scores (4, 4) are not one a response", lambda: pf.group_advantages(TOKENS, 2)),
    "scores of tokens, leave one out": (
        "scores (4, 4) are not one a response",
        lambda: pf.leave_one_out_advantages(TOKENS, 2),
    ),
    "old log-probs of rows": (
        "shapes differ: logprobs (4, 4), old_logprobs (4,)",
        lambda: pf.ppo_policy_loss(TOKENS, ROWS, ROWS),
    ),
    "mask of rows": (
        "shapes differ: logprobs (4, 4), old_logprobs (4, 4), mask (4,)",
        lambda: pf.ppo_policy_loss(TOKENS, TOKENS, ROWS, mask=ROWS > 1),
    ),
    "advantages of one row's tokens": (
        "advantages (4,) are neither one a row nor one a token of logprobs (1, 4)",
        lambda: pf.ppo_policy_loss(ONE, ONE, ROWS),
    ),
    "log-probs without columns": (
        "advantages (4,) are neither one a row nor one a token of logprobs (4,)",
        lambda: pf.ppo_policy_loss(ROWS, ROWS, ROWS),
    ),
    "returns of rows": (
        "shapes differ: values (4, 4), old_values (4, 4), returns (4,)",
        lambda: pf.ppo_value_loss(TOKENS, TOKENS, ROWS),
    ),
    "value mask of rows": (
        "shapes differ: values (4, 4), old_values (4, 4), returns (4, 4), mask (4,)",
        lambda: pf.ppo_value_loss(TOKENS, TOKENS, TOKENS, mask=ROWS > 1),
    ),
}


def preference(**given: float | str) -> Tensor:
    return pf.preference_loss(ROWS, ROWS, ROWS, ROWS, **{"beta": 0.1, **given})


NUMBERS: dict[str, Case] = {
    **{
        f"temperature {t}, {name}": (f"temperature is {t}; it must be above 0", lambda f=f, t=t: f(t))
        for t in (0.0, -1.0, math.nan)
        for name, f in {
            "token_logprobs": lambda t: pf.token_logprobs(LOGITS, IDS, t),
            "entropy": lambda t: pf.entropy(LOGITS, t),
            "full_kl": lambda t: pf.full_kl(LOGITS, LOGITS, t),
        }.items()
    },
    "beta": ("beta is -0.1; it must be above 0", lambda: preference(beta=-0.1)),
    "beta 0, by which ipo divides": (
        "beta is 0.0; it must be above 0",
        lambda: preference(beta=0.0, kind="ipo"),
    ),
    "simpo's beta": (
        "beta is -2.0; it must be above 0",
        lambda: pf.simpo_loss(ROWS, ROWS, beta=-2.0, gamma=0.5),
    ),
    "kto's beta": (
        "beta is -0.1; it must be above 0",
        lambda: pf.kto_loss(ROWS, ROWS, ROWS > 1, 0.1, beta=-0.1),
    ),
    "label_smoothing": (
        "label_smoothing is -0.1; it must lie in [0, 1]",
        lambda: preference(label_smoothing=-0.1),
    ),
    "label_smoothing above 1": (
        "label_smoothing is 1.1; it must lie in [0, 1]",
        lambda: preference(label_smoothing=1.1, kind="robust"),
    ),
    "gamma": ("gamma is 1.01; it must lie in [0, 1]", lambda: pf.gae(TOKENS, TOKENS, TOKENS, 1.01, 1.0)),
    "lam": ("lam is -0.5; it must lie in [0, 1]", lambda: pf.gae(TOKENS, TOKENS, TOKENS, 1.0, -0.5)),
    "clip_low": (
        "clip_low is -0.2; it must lie in [0, inf]",
        lambda: pf.ppo_policy_loss(TOKENS, TOKENS, ROWS, -0.2),
    ),
    "clip_high": (
        "clip_high is -0.2; it must lie in [0, inf]",
        lambda: pf.ppo_policy_loss(TOKENS, TOKENS, ROWS, 0.2, -0.2),
    ),
    "delta": (
        "delta is -1.0; it must lie in [0, inf]",
        lambda: pf.ppo_policy_loss(TOKENS, TOKENS, ROWS, delta=-1.0),
    ),
    "value clip": (
        "clip is -0.2; it must lie in [0, inf]",
        lambda: pf.ppo_value_loss(TOKENS, TOKENS, TOKENS, -0.2),
    ),
    "eps": ("eps is -1.0; it must lie in [0, inf]", lambda: pf.group_advantages(ROWS, 2, eps=-1.0)),
    "tokens in all": ("total is -3; it must lie in [0, inf]", lambda: pf.token_mean(TOKENS, -3)),
    "rows in all": ("total is -3; it must lie in [0, inf]", lambda: pf.sequence_mean(TOKENS, -3)),
    "max_length": ("max_length is 0; it must lie in [1, inf]", lambda: pf.constant_length(TOKENS, 0)),
    "target": ("target is 0.0; it must be above 0", lambda: pf.AdaptiveKL(0.1, 0.0, 100.0)),
    "horizon": ("horizon is -1.0; it must be above 0", lambda: pf.AdaptiveKL(0.1, 6.0, -1.0)),
    "a KL of NaN": (
        "kl is nan; it must lie in [-inf, inf]",
        lambda: pf.AdaptiveKL(0.1, 6.0, 100.0).observe(math.nan, 1),
    ),
    "a horizon of few steps": (  # 0.1 (1 - 0.2 64 / 10) is -0.028: the penalty would be a bonus
        "horizon is 10; for 64 sequences a step it must be above 12.8",
        lambda: pf.AdaptiveKL(0.1, 6.0, 10).observe(0.0, 64),
    ),
}


@pytest.mark.parametrize("name", [*SHAPES, *NUMBERS])
def test_what_fits_no_formula_is_refused(name: str) -> None:
    message, call = {**SHAPES, **NUMBERS}[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_what_can_only_mean_one_thing_is_taken() -> None:
    """Numbers and scalars for all rows, a mask for all rows or columns, one advantage a row in a column."""
    x = torch.randn(4, 6, dtype=torch.float64)
    columns, rows = torch.arange(6) < 3, (torch.arange(4) < 2)[:, None]
    torch.testing.assert_close(pf.masked_mean(x, columns), x[:, :3].mean())
    torch.testing.assert_close(pf.masked_var(x, rows), x[:2].var())
    kept = pf.masked_whiten(x, rows)
    torch.testing.assert_close(kept[:2], (x[:2] - x[:2].mean()) / x[:2].std())
    assert (kept[2:] == 0).all()
    assert torch.equal(
        pf.bradley_terry_loss(ROWS, ROWS, torch.tensor(0.5)), pf.bradley_terry_loss(ROWS, ROWS, 0.5)
    )
    assert torch.equal(
        preference(beta=1), pf.preference_loss(ROWS, ROWS, torch.tensor(0.0), torch.tensor(0.0), beta=1)
    )
    spread = pf.ppo_policy_loss(TOKENS, TOKENS, COLUMN)
    assert torch.equal(spread, pf.ppo_policy_loss(TOKENS, TOKENS, ROWS))
    assert torch.equal(spread, pf.ppo_policy_loss(TOKENS, TOKENS, ROWS, math.inf, 0.0, delta=math.inf))
    assert pf.gae(ONE, ONE, ONE, 0.0, 0.0)[1].tolist() == [[1.0] * 4]
    assert pf.response_mask(IDS, 0, torch.tensor([4])).sum() == 3
    assert pf.AdaptiveKL(0.1, 6.0, 100.0).observe(math.inf, 1) == pytest.approx(0.1 * 1.002)
