"""States that the sampler brings to the cut: the trunk's own to rounding, and taken only where they are."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_trunk import ADAM, LAYERS, RATE, roles_of
from torch import Tensor

from families import PLAIN, TREES, made
from preftune.algorithms import ALGORITHMS
from preftune.data import Sequences
from preftune.models.fast import support
from preftune.models.fast.cut import Cut
from preftune.models.fast.decode import GridDecoder
from preftune.models.fast.passing import passing_decoder, without_drawn_states
from preftune.models.fast.trunk import Branch, branch_of
from preftune.models.roles import Policy, casting
from preftune.models.trunk import forget_states, keep_on_disk, keep_states, share_trunk
from preftune.rollout import sample as module
from preftune.rollout.sample import sample
from preftune.training.learner import Learner
from tiny import EOS, Judge, grouped, prompts, state

IDS, LENGTHS = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2])


def cut(family: str) -> tuple[Policy, Branch]:
    policy = Policy(made(LAYERS[family]()))
    share_trunk(policy.model, 1)
    branch = branch_of(policy.model)
    assert branch is not None
    return policy, branch


def drawn(policy: Policy, **more: Any) -> Sequences:
    how: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "responses_per_prompt": 3}
    return sample(policy, prompts(3, 5), eos_id=(EOS, 3, 7), **how, **more)


def never(*rows: Tensor) -> Any:
    raise AssertionError("a row is not there")


@pytest.mark.parametrize("ask_every", [1, 4])
@pytest.mark.parametrize("family", [*TREES, *PLAIN])
@torch.no_grad()
def test_the_states_of_all_tokens_are_those_of_the_trunk(
    family: str, ask_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged prompts with three replies each, some of which end early; their last tokens included."""
    monkeypatch.setitem(module._ASK_EVERY, "cpu", ask_every)
    policy, branch = cut(family)
    batch = drawn(policy, keeps_states=True)
    lengths = batch.response.sum(1)
    assert lengths.min() < 5 < lengths.max() == 9  # some end early
    taken = branch.trunk.rows(batch.ids, batch.attention, never)
    plain = support.rows_below(policy.model, branch.cut, batch.ids, batch.attention)
    for row, own in zip(taken, plain, strict=True):
        drawn_states, plain_states = (x.states[x.state_index] for x in (row, own))
        torch.testing.assert_close(drawn_states, plain_states, atol=5e-6, rtol=1e-5)
    assert {row.states.data_ptr() for row in taken} == {taken[0].states.data_ptr()}  # in memory once
    assert drawn(policy).ids.equal(batch.ids)


@pytest.mark.parametrize("wrong", [0.0, 0.1])
@pytest.mark.parametrize("family", [*TREES, *PLAIN])
@torch.no_grad()
def test_in_half_precision_they_are_as_near_to_float32_as_the_trunks_own(
    family: str, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken then, and refused where attention is wrong by a tenth."""
    own, said = GridDecoder.attend, list[str]()
    monkeypatch.setattr(GridDecoder, "attend", lambda grid, *args: own(grid, *args) * (1 + wrong))
    policy, branch = cut(family)
    policy.dtype = torch.bfloat16
    batch = drawn(policy, keeps_states=True, say=said.append)
    if wrong and family in TREES:  # others draw with their own cache
        assert ["differ by more than rounding" in line for line in said] == [True]
        return
    assert not said
    below = [batch.ids, batch.attention]
    with casting(policy):
        taken = branch.trunk.rows(*below, never)
        plain = support.rows_below(policy.model, branch.cut, *below)
    exact = support.rows_below(policy.model, branch.cut, *below)
    errors = list[float]()
    for rows in (taken, plain):
        states = (torch.cat([row.states[row.state_index] for row in each]) for each in (rows, exact))
        errors.append(float(torch.sub(*states).norm()))
    assert 0 < errors[0] < 1.25 * errors[1]


def rule(batch: Sequences) -> Tensor:
    return ((batch.ids == 7) & batch.response).sum(1).float() - batch.response.sum(1) / 5


def two_steps(
    family: str, algorithm: str, said: Callable[[str], None] = print
) -> tuple[list[dict[str, float]], dict[str, dict[str, Tensor]]]:
    """Sampled, scored, looked up, and learnt from in two epochs of two minibatches."""
    kind, roles, learner = (
        ALGORITHMS[algorithm],
        roles_of(LAYERS[family], algorithm),
        Learner(microbatch_size=3, say=said),
    )
    for name, role in roles.items():
        share_trunk(role.model, 1)
        learner.train(name, role, ADAM, RATE) if name in kind.trains else learner.freeze(role)
    settings: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 8, "minibatches": 2, "microbatch_size": 3}
    settings |= {"epochs": 2} | ({"group_size": 2} if grouped(algorithm) else {})
    made_of: Any = kind(kind.Config(**settings), roles, learner, Judge(rule, EOS))  # type: ignore[call-arg]
    seen = []
    for i in range(2):
        learner.begin_step()
        seen.append(made_of.step(prompts(i, 4 if grouped(algorithm) else 8)))
    return seen, {name: state(roles[name].model) for name in kind.trains}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_updates_are_those_of_the_trunks_own_pass(
    family: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted(monkeypatch)
    metrics, weights = two_steps(family, algorithm)
    assert {*passes} == {6, 12}  # the trials of the cut and of what is drawn, and no row of a rollout
    with without_drawn_states():
        plain_metrics, plain = two_steps(family, algorithm)
    assert {*passes} > {6, 12}
    same(metrics, plain_metrics, 3e-5)
    for role, each in plain.items():
        for name, weight in each.items():
            assert (weights[role][name] - weight).abs().max() <= 1e-6 * max(weight.abs().max(), 1), name


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass through the lower blocks alone."""
    passes, own = list[int](), support.rows_below

    def counting(model: Any, cut: Cut, ids: Tensor, attention: Tensor, alone: bool = False) -> Any:
        passes.append(len(ids))
        return own(model, cut, ids, attention, alone)

    for file in ("support", "passing"):
        monkeypatch.setattr(f"preftune.models.fast.{file}.rows_below", counting)
    return passes


def same(found: list[dict[str, float]], wanted: list[dict[str, float]], tolerance: float) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=2e-6)


def test_wrong_states_are_not_taken_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder whose attention is wrong by 1e-4 draws as ever; what is learnt from comes of the trunk."""
    own = GridDecoder.attend

    def wrong(grid: GridDecoder, *args: Any) -> Tensor:
        return own(grid, *args) * (1 + 1e-4)

    monkeypatch.setattr(GridDecoder, "attend", wrong)
    said: list[str] = []
    metrics, weights = two_steps("gpt2", "ppo", said.append)
    assert [line for line in said if "differ by more than rounding" in line] == said[:1] == said
    with without_drawn_states():
        plain_metrics, plain = two_steps("gpt2", "ppo")
    same(metrics, plain_metrics, 0)
    assert all(weights[role][name].equal(w) for role, each in plain.items() for name, w in each.items())


def test_states_are_taken_only_where_they_stay_in_memory(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    policy, _ = cut("gpt2")

    def taken(limit: int = 4) -> bool:
        return passing_decoder(policy.model, IDS, LENGTHS, 2, limit, print) is not None

    assert taken()
    with without_drawn_states():
        assert not taken()
    with monkeypatch.context() as small:
        small.setattr("preftune.models.fast.trunk._ROOM", (6 + 4 * 4) * 16 * 4)
        assert taken(4)
        assert not taken(5)
    keep_states(policy.model, False)
    assert not taken()
    keep_states(policy.model, True)
    keep_on_disk(policy.model, 1, 1 << 20, "float32", print)
    assert not taken()
    assert passing_decoder(made(TREES["gpt2"]()), IDS, LENGTHS, 2, 4, print) is None


@torch.no_grad()
def test_rows_that_memory_ran_out_on_are_taken_half_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, branch = cut("gpt2")
    own, failures = GridDecoder.step, iter([True])

    def step(grid: GridDecoder, tokens: Tensor) -> Tensor:
        if len(tokens) == 15 and next(failures, False):
            raise torch.OutOfMemoryError
        return own(grid, tokens)

    monkeypatch.setattr(GridDecoder, "step", step)
    said: list[str] = []
    batch = drawn(policy, keeps_states=True, say=said.append)
    assert len(said) == 1
    assert len(branch.trunk.rows(batch.ids, batch.attention, never)) == 15
    forget_states()
    with contextlib.suppress(AssertionError):
        branch.trunk.rows(batch.ids, batch.attention, never)
        pytest.fail("nothing was forgotten")
