"""What holds for every algorithm: an update sees the rows, not how they are split, ordered or padded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.algorithms import ALGORITHMS, GRPO, PPO
from preftune.data import Pairs, Sequences
from tiny import TRAINED, batch_for, gradients, relative, roles, runner, sequences, widened_batch

ROUNDING = 1e-6  # relative, over all parameters; float32 keeps 1.2e-7
EVERY = pytest.mark.parametrize("algorithm", ALGORITHMS)
# Groups change places, and members within their groups: GRPO's groups lie in succession.
ORDER = torch.tensor([6, 4, 7, 5, 1, 3, 0, 2])


@EVERY
@pytest.mark.parametrize("microbatch_size", [1, 3, 5])
def test_the_microbatch_size_changes_no_gradient(algorithm: str, microbatch_size: int) -> None:
    whole, metrics = gradients(algorithm, batch_for(algorithm))
    split, again = gradients(algorithm, batch_for(algorithm), microbatch_size=microbatch_size)
    for role in whole:
        assert relative(split[role], whole[role]) < ROUNDING
    assert again == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@EVERY
def test_the_order_of_rows_changes_no_gradient(algorithm: str) -> None:
    plain, metrics = gradients(algorithm, batch_for(algorithm))
    permuted, again = gradients(algorithm, batch_for(algorithm)[ORDER])
    for role in plain:
        assert relative(permuted[role], plain[role]) < ROUNDING
    assert again == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@EVERY
def test_padding_changes_no_gradient(algorithm: str) -> None:
    """Seven more columns, of another id, and NaN in a rollout off the response."""
    plain, metrics = gradients(algorithm, batch_for(algorithm))
    wide, again = gradients(algorithm, widened_batch(batch_for(algorithm), 7))
    for role in plain:
        assert relative(wide[role], plain[role]) < ROUNDING
    assert again == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@EVERY
def test_an_update_is_repeatable_bit_for_bit(algorithm: str) -> None:
    first, metrics = gradients(algorithm, batch_for(algorithm))
    second, again = gradients(algorithm, batch_for(algorithm))
    for role, gradient in first.items():
        assert all(torch.equal(gradient[name], second[role][name]) for name in gradient)
    assert again == metrics


@EVERY
def test_rows_matter(algorithm: str) -> None:
    """The other side of the tests above: another batch gives another gradient."""
    one, _ = gradients(algorithm, batch_for(algorithm, seed=5))
    other, _ = gradients(algorithm, batch_for(algorithm, seed=6))
    assert all(relative(one[role], other[role]) > 0.1 for role in one)


def predicting(algorithm: str, role: str, batch: Any) -> Tensor:
    """Columns whose final hidden state the loss may read, of the batch as one forward sees it."""
    if isinstance(batch, Pairs):
        sides = [predicting(algorithm, role, side) for side in (batch.chosen, batch.rejected)]
        width = max(side.shape[1] for side in sides)
        return torch.cat([torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in sides])
    rows: Sequences = batch if isinstance(batch, Sequences) else batch.sequences
    if algorithm == "reward":
        return torch.arange(rows.ids.shape[1]) == rows.attention.sum(1, keepdim=True) - 1
    return torch.nn.functional.pad(rows.response[:, 1:], (0, 1))


@pytest.mark.parametrize(("algorithm", "role"), TRAINED)
def test_prompt_and_padding_get_exactly_no_gradient(algorithm: str, role: str) -> None:
    """Neither the outputs at prompt and padding columns nor the inputs at padding columns."""
    models, batch, kept = roles(algorithm), batch_for(algorithm), []

    def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        output = output * 1.0  # a tensor of its own, so that its gradient is that of this place alone
        output.retain_grad()
        kept.append(output)
        return output

    model = models[role].model
    made, _ = runner(algorithm, models)
    handles = [
        model.base_model.wte.register_forward_hook(keep),
        model.base_model.ln_f.register_forward_hook(keep),
    ]
    _ = made.improve(batch) if isinstance(made, PPO | GRPO) else made.step(batch)
    for handle in handles:
        handle.remove()
    embedded, hidden = (tensor.grad.abs().sum(-1) for tensor in kept)
    read = predicting(algorithm, role, batch)
    assert hidden.shape == read.shape
    assert (hidden[~read] == 0).all()
    assert (hidden[read] > 0).float().mean() > 0.7  # clipping may silence some
    sides = (
        [batch.chosen, batch.rejected] if isinstance(batch, Pairs) else [getattr(batch, "sequences", batch)]
    )
    real = torch.cat(
        [torch.nn.functional.pad(s.attention, (0, read.shape[1] - s.ids.shape[1])) for s in sides]
    )
    assert (embedded[~real] == 0).all()


@EVERY
def test_nothing_but_the_trained_roles_changes(algorithm: str) -> None:
    models = roles(algorithm)
    made, recorders = runner(algorithm, models)
    _ = (
        made.improve(batch_for(algorithm))
        if isinstance(made, PPO | GRPO)
        else made.step(batch_for(algorithm))
    )
    assert set(recorders) == set(ALGORITHMS[algorithm].trains)
    for name, role in models.items():
        assert any(p.requires_grad for p in role.model.parameters()) == (name in recorders)


def test_rows_are_cut_to_their_own_width() -> None:
    """The premise of the split tests: microbatches are narrower than the batch."""
    batch = sequences(5, 8)
    assert {batch[i : i + 1].ids.shape[1] for i in range(8)} != {batch.ids.shape[1]}
