"""How far two models are apart on given responses, from one forward pass of each."""

import torch

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
    in: between two models of 135M, 3.85 nats read 3.48 in bfloat16.
    """
    response = sequences.response
    targets, rows = sequences.ids[response], response.nonzero()[:, 0]
    models = [role.model for role in (policy, other)]
    k1, exact = (torch.zeros(len(sequences), device=rows.device) for _ in range(2))
    states = [predicting_states(model, sequences, response) for model in models]
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        ours, theirs = (logits_of(m, state[part]) for m, state in zip(models, states, strict=True))
        log_ratio = gather_logprobs(ours, targets[part], temperature) - gather_logprobs(
            theirs, targets[part], temperature
        )
        k1.index_add_(0, rows[part], log_ratio)
        exact.index_add_(0, rows[part], categorical_kl(ours, theirs, temperature))
    return k1.tolist(), exact.tolist()
