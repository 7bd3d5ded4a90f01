"""Memory that runs out: half the rows at a time, the same update, the same responses."""

import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import prose
from gloo import forkserver
from preftune import faults
from preftune.algorithms import SFT
from preftune.algorithms.base import Loss
from preftune.config import OptimizerConfig, SFTConfig
from preftune.data import Sequences
from preftune.functional import token_mean
from preftune.models.fast.native import without_kernel
from preftune.models.roles import Policy, Reference
from preftune.rollout import sample as sample_module
from preftune.rollout.sample import sample
from preftune.training.learner import Learner
from preftune.training.state import capture
from tiny import EOS, NO_CLIPPING, Recorder, causal_lm, flat, gradients, prompts, sequences, state

PER_MICROBATCH, PER_UPDATE = 2, 2  # times that the CPU waits for a GPU
# Kernels that are started, of a model of two blocks.
PER_TOKEN = {torch.float32: 122, torch.bfloat16: 134}
A_MICROBATCH, AN_UPDATE = 300, 52


class Device:
    """An accelerator in which `rows` rows fit."""

    def __init__(self, rows: int, policy: Policy) -> None:
        self.rows, self.policy, self.tried = rows, policy, list[int]()

    def loss(self, part: Sequences) -> Loss:
        self.tried.append(len(part))
        terms = -self.policy.logprobs(part)
        if len(part) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return Loss(terms, {"token": terms.detach()})


def update(rows: int, microbatch_size: int | None) -> tuple[Recorder, Device, list[str], dict[str, float]]:
    """One update of 13 rows on a device that holds `rows`."""
    said: list[str] = []
    policy, batch = Policy(causal_lm(1)), sequences(5, 13)
    learner, recorder = Learner(microbatch_size=microbatch_size, say=said.append), Recorder(policy.model)
    learner.adopt("policy", policy, recorder, NO_CLIPPING)
    device = Device(rows, policy)
    metrics = learner.update("policy", batch, token_mean(batch.response), device.loss)
    return recorder, device, said, metrics


@pytest.mark.parametrize(
    ("rows", "microbatch_size", "tried", "halvings"),
    [(3, None, [13, 6, 3, 3, 3, 3, 1], 2), (7, 8, [8, 4, 4, 4, 1], 1), (1, 2, [2] + [1] * 13, 1)],
)
def test_microbatches_are_halved_until_they_fit(
    rows: int, microbatch_size: int | None, tried: list[int], halvings: int
) -> None:
    recorder, device, said, metrics = update(rows, microbatch_size)
    assert device.tried == tried
    assert len(said) == halvings
    assert "out of memory with" in said[0]
    whole, _, silent, expected = update(99, None)
    assert not silent
    (found,), (wanted,) = recorder.steps, whole.steps
    assert (flat(found) - flat(wanted)).norm() / flat(wanted).norm() < 1e-6
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_memory_that_runs_out_in_a_later_microbatch_leaves_nothing_behind() -> None:
    """Gradients of the microbatches before it are dropped, not counted twice."""
    batch = sequences(5, 8)
    wanted, expected = gradients("sft", batch)
    faults.arm("loss@hit=2:oom")
    try:
        found, metrics = gradients("sft", batch, microbatch_size=4)
    finally:
        faults.arm("")
    difference = flat(found["policy"]) - flat(wanted["policy"])
    assert difference.norm() / flat(wanted["policy"]).norm() < 1e-6
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_later_updates_keep_the_smaller_size() -> None:
    said: list[str] = []
    learner, policy = Learner(microbatch_size=4, say=said.append), Policy(causal_lm(1))
    learner.train("policy", policy, OptimizerConfig(), 1e-3)
    algorithm = SFT(SFTConfig(), {"policy": policy}, learner)
    faults.arm("loss@hit=1:oom")
    try:
        for seed in (5, 6):
            algorithm.step(sequences(seed, 8))
    finally:
        faults.arm("")
    assert learner.microbatch_size == 2
    (line,) = said
    assert "with 4 rows at a time" in line
    assert line.endswith("going on with 2")
    prose.compare("training/memory: an update that does not fit", line)


def test_a_single_row_that_does_not_fit_is_an_error_and_changes_nothing() -> None:
    policy, batch = Policy(causal_lm(1)), sequences(5, 4)
    learner = Learner(microbatch_size=2, say=lambda text: None)
    learner.train("policy", policy, OptimizerConfig(), 1e-3)
    before = state(policy.model)
    with pytest.raises(torch.OutOfMemoryError):
        learner.update("policy", batch, token_mean(batch.response), Device(0, policy).loss)
    assert all(torch.equal(before[name], p) for name, p in state(policy.model).items())


def test_responses_are_sampled_in_halves_until_they_fit() -> None:
    """Memory runs out in the third token of five prompts, and in the second of the first two of them."""
    policy, questions = Policy(causal_lm(1)), prompts(5, 5)

    said: list[str] = []

    def draw() -> Sequences:
        return sample(
            policy,
            questions,
            max_new_tokens=8,
            temperature=1.0,
            eos_id=EOS,
            responses_per_prompt=2,
            say=said.append,
        )

    whole = draw()
    faults.arm("rollout.token@hit=3:oom;rollout.token@hit=4:oom")
    try:
        halves = draw()
    finally:
        faults.arm("")
    assert [[int(n) for n in re.findall(r"\d+", line)] for line in said] == [[5, 2], [2, 1]]
    prose.compare("training/memory: prompts that do not fit", *said)
    assert torch.equal(halves.attention, whole.attention)
    assert torch.equal(halves.response, whole.response)
    assert torch.equal(halves.ids * halves.attention, whole.ids * whole.attention)


def test_what_is_said_once_is_said_again_by_the_next_stage() -> None:
    for _ in range(2):
        said: list[str] = []
        learner = Learner(say=said.append)
        for text in ("a", "b", "a"):
            learner.say_once(text)
        assert said == ["a", "b"]


def test_a_prompt_whose_responses_do_not_fit_is_an_error() -> None:
    faults.arm("rollout.token@hit=1:oom")
    try:
        with pytest.raises(torch.OutOfMemoryError):
            sample(Policy(causal_lm(1)), prompts(5, 1), max_new_tokens=8, temperature=1.0, eos_id=EOS)
    finally:
        faults.arm("")


def test_the_state_before_a_step_is_copied_into_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes by way of a second copy on the CPU, and nothing is made anew."""
    learner, policy = Learner(), Policy(causal_lm(1))
    learner.train("policy", policy, OptimizerConfig(), 1e-3)
    SFT(SFTConfig(), {"policy": policy}, learner).step(sequences(5, 8))
    first = capture(learner).copied()
    places = [x.data_ptr() for part in (first.weights, first.moments) for x in part["policy"].values()]
    SFT(SFTConfig(), {"policy": policy}, learner).step(sequences(6, 8))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: pytest.fail("a second copy on the CPU"))
    with Made() as made:
        again = capture(learner).copied(first)
    assert made.bytes == 0
    assert [x.data_ptr() for p in (again.weights, again.moments) for x in p["policy"].values()] == places
    assert all(torch.equal(again.weights["policy"][k], p) for k, p in policy.model.named_parameters())


class Made(TorchDispatchMode):
    """Counts the bytes of tensors that share no memory with what they are made of."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("ask_every", [4, 16, 99])
def test_rows_that_have_ended_wait_for_the_next_look(ask_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the CPU looks every few tokens, and nothing else makes it wait: the responses are the same."""

    def draw() -> tuple[Sequences, int]:
        with Waits() as waits:
            rows = sample(policy, questions, max_new_tokens=16, temperature=1.0, eos_id=EOS)
        return rows, waits.count

    policy, questions = Policy(causal_lm(1)), prompts(5, 5)
    draw()  # the probe is over
    wanted, usual = draw()
    monkeypatch.setitem(sample_module._ASK_EVERY, "cpu", ask_every)
    found, fewer = draw()
    assert torch.equal(found.response, wanted.response)
    assert torch.equal(found.ids * found.attention, wanted.ids * wanted.attention)
    # A token has none of its own. A look has one, and a few where rows are cleared away.
    assert fewer <= 4 + 6 * (16 // ask_every)
    assert fewer < usual


class Waits(TorchDispatchMode):
    """Counts what a GPU is waited for: numbers and lists that are read, copies to the CPU, and shapes that
    depend on numbers.
    """

    count = 0

    def __enter__(self) -> Any:
        self.usual = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu")}
        for name, usual in self.usual.items():
            setattr(torch.Tensor, name, self.counted(usual))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, usual in self.usual.items():
            setattr(torch.Tensor, name, usual)

    def counted(self, usual: Any) -> Any:
        def once(tensor: torch.Tensor) -> Any:
            self.count += 1
            with _disable_current_modes():
                return usual(tensor)

        return once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        masks = name == "aten::index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1])
        backward = "aten::masked_scatter_backward"  # picks by the mask
        shapes = ("aten::nonzero", "aten::_unique2", "aten::masked_select", backward)
        self.count += masks or name == "aten::_local_scalar_dense" or name in shapes
        return func(*args, **(kwargs or {}))


def waits_of_updates() -> list[int]:
    """Of one update on 8 rows, in one, two and four microbatches."""
    counts = []
    for size in (8, 4, 2):
        learner, policy = Learner(microbatch_size=size), Policy(causal_lm(1))
        learner.train("policy", policy, OptimizerConfig(), 1e-3)
        algorithm, batch = SFT(SFTConfig(), {"policy": policy}, learner), sequences(5, 8)
        algorithm.step(batch)  # the probe is over
        with Waits() as waits:
            algorithm.step(batch)
        counts.append(waits.count)
    return counts


@pytest.mark.xdist_group("forked")
def test_a_microbatch_waits_for_the_device_twice_and_an_update_twice() -> None:
    """In a process of its own: what other tests leave behind in torch and accelerate does not count."""
    with forkserver().Pool(1) as pool:
        counts = pool.apply(waits_of_updates)
    each = (counts[2] - counts[1]) / 2
    assert each <= PER_MICROBATCH
    assert counts[0] - each <= PER_UPDATE


class Launches(TorchDispatchMode):
    """Counts operations that compute; views launch nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches_of(role: Policy | Reference) -> float:
    """Of one more token."""
    counts = []
    for tokens in (4, 12):
        with Launches() as launches:
            sample(role, prompts(5, 5), max_new_tokens=tokens, temperature=1.0, eos_id=-1)
        counts.append(launches.count)
    return (counts[1] - counts[0]) / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_launches_no_more_than_it_did(dtype: torch.dtype) -> None:
    """By the plain decoder, on two blocks of GPT-2's; a frozen model casts no weight again at every token."""
    trained, frozen = Policy(causal_lm(1)), Reference(causal_lm(1))
    frozen.model.requires_grad_(False)
    trained.dtype = frozen.dtype = dtype
    with without_kernel():
        # The first time each model is tried out.
        counts = [[launches_of(role) for _ in range(2)][1] for role in (trained, frozen)]
    assert counts[0] == counts[1] <= PER_TOKEN[dtype]


def test_an_update_launches_no_more_than_it_did() -> None:
    counts = []
    for size in (8, 4, 2):
        learner, policy = Learner(microbatch_size=size), Policy(causal_lm(1))
        learner.train("policy", policy, OptimizerConfig(), 1e-3)
        algorithm, batch = SFT(SFTConfig(), {"policy": policy}, learner), sequences(5, 8)
        algorithm.step(batch)
        with Launches() as launches:
            algorithm.step(batch)
        counts.append(launches.count)
    assert counts[0] <= A_MICROBATCH + AN_UPDATE
    assert counts[2] - counts[1] <= 2 * A_MICROBATCH
