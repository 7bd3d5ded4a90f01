"""What holds for every algorithm: an update sees the rows, not how they are split, ordered or padded."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.algorithms import ALGORITHMS, on_policy
from preftune.algorithms.base import Loss, Metrics, averaged
from preftune.algorithms.on_policy import minibatches
from preftune.data import Pairs, Sequences
from preftune.models.fast.support import plain_layout
from preftune.models.roles import Reference
from preftune.seeding import derive_seed
from tiny import (
    GROUP,
    TRAINED,
    Judge,
    batch_for,
    causal_lm,
    gradients,
    grouped,
    online,
    prompts,
    relative,
    roles,
    runner,
    sequences,
    step,
    widened_batch,
)

ROUNDING = 1e-6  # relative, over all parameters; float32 keeps 1.2e-7
EVERY = pytest.mark.parametrize("algorithm", ALGORITHMS)
# Groups change places, and members within their groups: GRPO's groups lie in succession.
ORDER = torch.tensor([6, 4, 7, 5, 1, 3, 0, 2])


Whole = Callable[[str], tuple[Any, Metrics]]


@pytest.fixture(scope="module")
def unsplit() -> Whole:
    """Gradients and metrics of an algorithm's usual batch."""
    return cache(lambda algorithm: gradients(algorithm, batch_for(algorithm)))


@EVERY
@pytest.mark.parametrize("microbatch_size", [1, 3])
def test_the_microbatch_size_changes_no_gradient(
    algorithm: str, microbatch_size: int, unsplit: Whole
) -> None:
    whole, metrics = unsplit(algorithm)
    split, again = gradients(algorithm, batch_for(algorithm), microbatch_size=microbatch_size)
    for role in whole:
        assert relative(split[role], whole[role]) < ROUNDING
    assert again == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@EVERY
def test_the_order_of_rows_changes_no_gradient(algorithm: str, unsplit: Whole) -> None:
    plain, metrics = unsplit(algorithm)
    permuted, again = gradients(algorithm, batch_for(algorithm)[ORDER])
    for role in plain:
        assert relative(permuted[role], plain[role]) < ROUNDING
    assert again == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@EVERY
def test_padding_changes_no_gradient(algorithm: str, unsplit: Whole) -> None:
    """Seven more columns, of another id, and NaN in a rollout off the response."""
    plain, metrics = unsplit(algorithm)
    wide, again = gradients(algorithm, widened_batch(batch_for(algorithm), 7))
    for role in plain:
        assert relative(wide[role], plain[role]) < ROUNDING
    assert again == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@EVERY
def test_an_update_is_repeatable_bit_for_bit(algorithm: str, unsplit: Whole) -> None:
    first, metrics = unsplit(algorithm)
    second, again = gradients(algorithm, batch_for(algorithm))
    for role, gradient in first.items():
        assert all(torch.equal(gradient[name], second[role][name]) for name in gradient)
    assert again == metrics


@EVERY
def test_rows_matter(algorithm: str, unsplit: Whole) -> None:
    """The other side of the tests above: another batch gives another gradient."""
    one, _ = unsplit(algorithm)
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
def test_prompt_and_padding_get_exactly_no_gradient(
    algorithm: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the outputs at prompt and padding columns nor the inputs at padding columns."""
    models, batch, kept = roles(algorithm), batch_for(algorithm), []

    def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        output = output * 1.0  # a tensor of its own, so that its gradient is that of this place alone
        output.retain_grad()
        kept.append(output)
        return output

    model = models[role].model
    made, _ = runner(algorithm, models)
    if hasattr(made, "distance"):  # a look at the policy before the update, without gradient
        monkeypatch.setattr(made, "distance", lambda batch: torch.tensor(0.0))
    handles = [
        model.base_model.wte.register_forward_hook(keep),
        model.base_model.ln_f.register_forward_hook(keep),
    ]
    with plain_layout():  # a tree has no padding
        step(algorithm, made, batch)
    for handle in handles:
        handle.remove()
    embedded, hidden = (tensor.grad.abs().sum(-1) for tensor in kept)
    read = predicting(algorithm, role, batch)
    assert hidden.shape == read.shape
    assert (hidden[~read] == 0).all()
    assert (hidden[read] > 0).float().mean() > 0.6  # clipping may silence some
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
    step(algorithm, made, batch_for(algorithm))
    assert set(recorders) == set(ALGORITHMS[algorithm].trains)
    for name, role in models.items():
        assert any(p.requires_grad for p in role.model.parameters()) == (name in recorders)


def given_to_the_learner(
    algorithm: str, made: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Loss]]:
    """The weights and the loss of each update of a step, in order."""
    given: list[tuple[Tensor, Loss]] = []

    def update(role: str, part: Any, weights: Tensor, loss: Callable[[Any], Loss]) -> Metrics:
        out = loss(part)
        given.append((weights, out))
        return dict.fromkeys((*out.metrics, "loss", "grad_norm"), 0.0)

    monkeypatch.setattr(made.learner, "update", update)
    step(algorithm, made, batch)
    return given


REDUCTIONS = [("grpo", {"reduction": name}) for name in ("grpo", "dapo", "dr_grpo")]
EVERY_WEIGHT = pytest.mark.parametrize(
    ("algorithm", "config"), [(name, {}) for name in ALGORITHMS] + REDUCTIONS
)


@EVERY_WEIGHT
def test_new_tensors_are_where_the_batch_is(
    algorithm: str, config: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, terms and metrics, where the batch is elsewhere than tensors made without a device."""
    (made, _), batch = runner(algorithm, roles(algorithm), **config), batch_for(algorithm)
    with torch.device("meta"):
        given = given_to_the_learner(algorithm, made, batch, monkeypatch)
    assert len(given) == len(ALGORITHMS[algorithm].trains)
    for weights, out in given:
        tensors = (weights, out.terms, *out.metrics.values())
        assert {tensor.device.type for tensor in tensors} == {"cpu"}


@EVERY_WEIGHT
def test_weights_are_shares_of_what_all_processes_hold(
    algorithm: str, config: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with as many rows and tokens as this one: every weight is halved."""
    (made, _), batch = runner(algorithm, roles(algorithm), **config), batch_for(algorithm)
    alone = given_to_the_learner(algorithm, made, batch, monkeypatch)
    monkeypatch.setattr(made.learner, "total", lambda count: 2 * count)
    shared = given_to_the_learner(algorithm, made, batch, monkeypatch)
    for (half, _), (whole, _) in zip(shared, alone, strict=True):
        torch.testing.assert_close(2 * half, whole)
        assert whole.any()


ONLINE = pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if online(name)])


@ONLINE
def test_a_reference_with_the_policys_weights_is_at_distance_exactly_0(algorithm: str) -> None:
    """k1 of every token, in a whole step from prompts; PPO's rewards are then the scores alone."""
    models = roles(algorithm)
    models["reference"] = Reference(causal_lm(1))
    made, _ = runner(algorithm, models, 3, temperature=0.7, max_new_tokens=10)
    made.scorer = Judge(lambda batch: batch.response.sum(1).float())
    sampled = made.rollout(prompts(3))
    assert torch.equal(sampled.logprobs, sampled.reference_logprobs)
    assert sampled.logprobs.any()
    metrics = made.improve(sampled)
    kept = ("objective/kl", "objective/non_score_reward", "kl_per_sequence")
    assert {metrics[name] for name in kept if name in metrics} == {0.0}
    if algorithm == "ppo":
        assert metrics["objective/rlhf_reward"] == metrics["objective/scores"]


@ONLINE
def test_sampling_follows_the_settings(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_new_tokens": 7, "temperature": 0.6, "missing_eos_score": -3.0}
    models, seen = roles(algorithm), {}
    made, _ = runner(algorithm, models, 3, **settings)
    made.scorer = Judge(lambda batch: batch.ids.sum(1))
    whole = batch_for(algorithm)
    monkeypatch.setattr(
        on_policy, "collect", lambda batch, **given: seen.update(given, prompts=batch) or whole
    )
    given = {name: models.get(name) for name in ("policy", "reference", "critic")}
    given |= {"scorer": made.scorer, "prompts": prompts(3), "batch_size": 3, **settings}
    given |= {"say": made.learner.say_once}
    given |= {"responses_per_prompt": GROUP if grouped(algorithm) else 1}
    made.rollout(given["prompts"])
    assert seen == given


@ONLINE
def test_the_seeds_of_the_prompts_decide_the_order_of_minibatches(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this very rule: with another the same settings and seed would give other weights."""
    made, _ = runner(algorithm, roles(algorithm))
    seeds: list[int] = []
    monkeypatch.setattr(made, "rollout", lambda batch: None)
    monkeypatch.setattr(made, "improve", lambda rollout, seed: seeds.append(seed))
    made.step(prompts(3))
    assert seeds == [derive_seed("minibatches", *prompts(3).seeds)]


@ONLINE
def test_each_epoch_has_an_order_of_its_own_from_the_seed(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = runner(algorithm, roles(algorithm), epochs=2, minibatches=4)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(on_policy, "minibatches", lambda all, *given: seen.append(given) or [all])
    made.improve(batch_for(algorithm), seed=7)
    made.improve(batch_for(algorithm))
    assert seen == [(4, derive_seed(seed, epoch)) for seed in (7, 0) for epoch in (0, 1)]


def test_minibatches_depend_on_their_seed_alone() -> None:
    def order(seed: int) -> list[list[int]]:
        return [part.tolist() for part in minibatches(torch.arange(10), 3, seed)]

    first = order(1)
    torch.manual_seed(99)  # the global generator has no say
    assert order(1) == first != order(2)
    assert sorted(row for part in first for row in part) == list(range(10))
    assert sorted(len(part) for part in first) == [3, 3, 4]


def test_metrics_of_a_step_are_means_over_its_updates() -> None:
    assert averaged([{"loss": 1.0}, {"loss": 3.0}]) == {"loss": 2.0}


def test_rows_are_cut_to_their_own_width() -> None:
    """The premise of the split tests: microbatches are narrower than the batch."""
    batch = sequences(5, 8)
    assert {batch[i : i + 1].ids.shape[1] for i in range(8)} != {batch.ids.shape[1]}
