"""How far two models are apart on given responses, from one forward pass of each."""

from collections.abc import Iterator

import torch
from torch import Tensor

from preftune.data import Sequences
from preftune.functional.kl import categorical_kl
from preftune.functional.logprobs import gather_logprobs
from preftune.models.roles import Policy, Reference, logits_of, predicting_states

_CHUNK = 256  # rows of (., V) logits alive at once


@torch.no_grad()
def divergences(
    policy: Policy | Reference, other: Policy | Reference, sequences: Sequences, temperature: float
) -> tuple[list[float], list[float]]:
    """Sums over each response of k1 = log π(y_t) - log π_other(y_t), and of the exact KL(π || π_other) over
    the vocabulary at each of its tokens, in nats: two lists of B.

    On responses drawn from π both have the sequence KL as their mean; the exact form varies less and is never
    negative (Rao-Blackwellised; Amini et al., arXiv:2504.10637). In float32, whatever the models are trained
    in: between two models of 135M, 3.85 nats read 3.48 in bfloat16. Of one model with itself all are 0.
    """
    rows = sequences.response.nonzero()[:, 0]
    k1, exact = (torch.zeros(len(sequences), device=rows.device) for _ in range(2))
    if policy is other:
        return k1.tolist(), exact.tolist()
    for chunk, log_ratio, kl in _by_token(policy, other, sequences, temperature):
        k1.index_add_(0, rows[chunk], log_ratio)
        exact.index_add_(0, rows[chunk], kl)
    return k1.tolist(), exact.tolist()


@torch.no_grad()
def token_divergences(
    policy: Policy | Reference, other: Policy | Reference, sequences: Sequences, temperature: float
) -> tuple[Tensor, Tensor]:
    """The terms of both sums, each at its token: two (B, T), 0 off the responses."""
    chunks = list(_by_token(policy, other, sequences, temperature))
    response = sequences.response

    def placed(pieces: list[Tensor]) -> Tensor:
        values = torch.cat(pieces)
        return torch.zeros(response.shape).to(values).masked_scatter(response, values)

    return placed([ratio for _, ratio, _ in chunks]), placed([kl for _, _, kl in chunks])


def _by_token(
    policy: Policy | Reference, other: Policy | Reference, sequences: Sequences, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """log π(y_t) - log π_other(y_t) and KL(π || π_other) of response tokens, some at a time: (n,) each."""
    response = sequences.response
    targets = sequences.ids[response]
    models = [role.model for role in (policy, other)]
    states = [predicting_states(model, sequences, response) for model in models]
    for start in range(0, len(targets), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        ours, theirs = (logits_of(m, state[chunk]) for m, state in zip(models, states, strict=True))
        log_ratio = gather_logprobs(ours, targets[chunk], temperature) - gather_logprobs(
            theirs, targets[chunk], temperature
        )
        yield chunk, log_ratio, categorical_kl(ours, theirs, temperature)
