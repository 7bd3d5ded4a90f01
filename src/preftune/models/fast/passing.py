"""The states at the cut that a sampler computes on its way, kept for the passes over what it has drawn.

A decoder brings every token but a row's last through all blocks, the frozen ones too: those states are the
trunk's, up to rounding. Whether they are is tried once for each trunk, on a few short rows: frozen weights
alone decide it, so that a stage which is killed and resumed finds the same. Half precision rounds the two
apart; there the sampler's states have to be about as near to float32's as those of a plain pass.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from preftune.models.fast.decode import decoder
from preftune.models.fast.support import near, rows_below, trial
from preftune.models.fast.switch import Switch
from preftune.models.fast.trunk import Branch, Row, branch_of

_drawn = Switch()
without_drawn_states = _drawn.turned_off  # the trunk computes the states of what was drawn once more
_BYTES = 4  # of a number
_NEARLY_AS_NEAR = 1.25  # times the error of a plain pass in half precision


class PassingDecoder:
    """A `Decoder` that remembers the states at the cut.

    states: those of each pass, (n, d) · state_index (G · k, P + limit): where among all of them each token of
    each row lies · ends (G · k,): tokens of each row so far · rows (n,): those that are still computed.
    """

    def __init__(
        self, model: PreTrainedModel, branch: Branch, ids: Tensor, lengths: Tensor, k: int, limit: int
    ) -> None:
        self.inner, self.branch, self.k = decoder(model, ids, lengths, k, limit), branch, k
        self.states: list[Tensor] = []
        self.state_index = ids.new_zeros(len(ids) * k, ids.shape[1] + limit)
        self.ends = lengths.repeat_interleave(k)
        self.rows = torch.arange(len(self.ends), device=ids.device)

    def start(self) -> Tensor:
        with self.branch.cut.watched(self._keep_states):
            states = self.inner.start()
        self.state_index[:, : self.inner.node.shape[1]] = self.inner.node.repeat_interleave(self.k, 0)
        return states

    def step(self, tokens: Tensor) -> Tensor:
        self._index_next()
        with self.branch.cut.watched(self._keep_states):
            return self.inner.step(tokens)

    def end(self, tokens: Tensor) -> None:
        """The rows' last tokens, which nothing follows: computed up to the cut only."""
        self._index_next()
        self._keep_states(self.branch.cut.below(lambda: self.inner.step(tokens)))

    def keep(self, rows: Tensor) -> None:
        self.inner.keep(rows)
        self.rows = self.rows[rows]

    def hand_over(self, ids: Tensor, attention: Tensor) -> None:
        """The trunk keeps all rows that were drawn."""
        self.branch.trunk.take(ids, attention, self.rows_drawn(attention))

    def rows_drawn(self, attention: Tensor) -> list[Row]:
        """The rows that were drawn, of the tokens under attention (G · k, T), in one tensor of states."""
        del self.inner  # nothing more will be drawn: its caches make room
        states, self.states = torch.cat(self.states), []
        lengths = attention.sum(1).tolist()
        return [Row(states, row[:n]) for row, n in zip(self.state_index, lengths, strict=True)]

    def _keep_states(self, states: Tensor) -> None:
        self.states.append(states.flatten(0, 1))

    def _index_next(self) -> None:
        """The next states at the cut are those of the next token of each row."""
        count = sum(map(len, self.states))
        new = torch.arange(count, count + len(self.rows), device=self.rows.device)
        self.state_index[self.rows, self.ends[self.rows]] = new
        self.ends[self.rows] += 1


def passing_decoder(
    model: PreTrainedModel,
    ids: Tensor,
    lengths: Tensor,
    k: int,
    limit: int,
    say: Callable[[str], None] | None,
) -> PassingDecoder | None:
    """A decoder whose states the model's trunk can keep. None if the trunk keeps nothing in memory, if the
    states would fill it, or if they differ from the trunk's own by more than rounding, which `say` is told
    once.
    """
    branch = branch_of(model)
    if branch is None or _drawn.off:
        return None
    if not branch.trunk.takes((ids.numel() + len(ids) * k * limit) * branch.cut.width * _BYTES):
        return None
    if branch.trunk.drawn is None:
        branch.trunk.drawn = _same_states(model, branch)
        if not branch.trunk.drawn and say is not None:
            say(
                "the sampler's states below the trained blocks differ by more than rounding from those of a "
                "plain pass: each rollout goes through the frozen blocks once more"
            )
    return PassingDecoder(model, branch, ids, lengths, k, limit) if branch.trunk.drawn else None


@torch.no_grad()
def _same_states(model: PreTrainedModel, branch: Branch) -> bool:
    """Whether both ways give the same to rounding: two rows for each prompt; every third ends early."""
    ids, lengths = trial(model)
    device = ids.device
    tokens = torch.stack([ids[:, :4], ids[:, :4].flip(1)], 1).flatten(0, 1)
    passing = PassingDecoder(model, branch, ids, lengths, 2, 4)
    passing.start()
    passing.step(tokens[:, 0])
    passing.step(tokens[:, 1])
    alive = (torch.arange(len(tokens), device=device) % 3 > 0).nonzero().squeeze(1)
    passing.keep(alive)
    passing.step(tokens[alive, 2])
    passing.end(tokens[alive, 3])
    column, starts = torch.arange(ids.shape[1] + 4, device=device), lengths.repeat_interleave(2).unsqueeze(1)
    table = torch.nn.functional.pad(ids.repeat_interleave(2, 0), (0, 4))
    table, attention = table.scatter(1, starts + column[:4], tokens), column < passing.ends.unsqueeze(1)
    sampled = _states(passing.rows_drawn(attention))
    plain = _states(rows_below(model, branch.cut, table, attention))
    if (same := near(sampled, plain)) or not torch.is_autocast_enabled(device.type):
        return same
    with torch.autocast(device.type, enabled=False):
        exact = _states(rows_below(model, branch.cut, table, attention))
    return _error(sampled, exact) <= _NEARLY_AS_NEAR * _error(plain, exact)


def _states(rows: Sequence[Row]) -> Tensor:
    """Of all tokens of all rows, one after another: (tokens, d)."""
    return torch.cat([row.states[row.state_index] for row in rows])


def _error(states: Tensor, exact: Tensor) -> float:
    """Relative to each token's state; their mean, which varies less than the largest."""
    return float(((states - exact).norm(dim=1) / exact.norm(dim=1)).mean())
