"""The head with which a reward stage begins where `fit_head` asks for it: fitted to its training pairs."""

from collections.abc import Callable

import torch

from preftune.data.batch import Pairs, concatenate
from preftune.models.fitted import fit_head
from preftune.models.roles import RewardModel
from preftune.models.scalar import score_head
from preftune.models.shards import local, readable, rows_of
from preftune.models.trunk import forget_states
from preftune.runs.feed import Feed
from preftune.training.learner import Learner

PAIRS = 16_384  # at most: 75 MB of states of 576 float64 numbers


def fitted_head(model: RewardModel, feed: Feed, learner: Learner, say: Callable[[str], None]) -> None:
    """Give the model the head that predicts the pairs of the first epoch best from its states as they are, in
    one pass over them. Every process computes the states of its share.
    """
    pairs, size = min(len(feed.rows), PAIRS), feed.rows_per_step
    say(f"fitting the head to the states of {pairs:,} pairs")
    differences, prompts = list[torch.Tensor](), list[bytes]()
    with readable(model):
        for start in range(0, pairs, size):
            batch: Pairs = feed.batch_at(start // size)[: pairs - start]
            differences += learner.gather_items([_differences(model, batch, learner)])
            prompts += [_prompt(batch, i) for i in range(len(batch))]
            forget_states()
    fitted = fit_head(torch.cat(differences).double().numpy(), prompts)
    weight = learner.gather_items([fitted.weight])[0]  # the main process's
    head = score_head(model.model).weight
    with torch.no_grad():
        local(head).copy_(torch.from_numpy(weight).float().unsqueeze(0)[rows_of(head)])
    say(f"fitted: loss {fitted.loss:.3f} and accuracy {fitted.accuracy:.3f} in cross-validation")


def _differences(model: RewardModel, batch: Pairs, learner: Learner) -> torch.Tensor:
    """State of the chosen response minus that of the rejected one, of each pair of this process's share:
    (n, d). All processes make as many passes, which may gather weights.
    """
    share, found = learner.place(batch), list[torch.Tensor]()
    most = -(-len(batch) // learner.world)
    size = learner.microbatch_size or most
    for start in range(0, most, size):
        part = share[start : start + size]
        chosen, rejected = model.response_states(concatenate(part.chosen, part.rejected)).chunk(2)
        found.append((chosen - rejected).cpu())
    return torch.cat(found)


def _prompt(batch: Pairs, i: int) -> bytes:
    side = batch.chosen
    return side.ids[i][side.attention[i].bool() & ~side.response[i]].cpu().numpy().tobytes()
