"""Half precision, against float64: what is rounded, and what never is."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prose
from preftune.algorithms.base import Loss
from preftune.config import OptimizerConfig
from preftune.evaluation.divergence import divergences
from preftune.functional import token_mean
from preftune.models.fast import head, support
from preftune.models.fast.support import hidden_at, takes_trees
from preftune.models.roles import Critic, Policy, Reference, RewardModel, casting
from preftune.models.scalar import score_head
from preftune.rollout.sample import sample
from preftune.training import learner as learning
from preftune.training import precision as precisions
from preftune.training.learner import Learner
from preftune.training.precision import effective_precision, multiplies_bf16, refuse_emulation, remark
from tiny import causal_lm, classifier, prompts, sequences

HALF = {torch.bfloat16: 0.02, torch.float16: 0.003}  # the largest error of a log-probability, in nats
ROWS, WIDTH, VOCABULARY = 64, 48, 500


class Counted(TorchDispatchMode):
    """The operations that reach the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, object]] = []  # name, elements of the first tensor, dtype asked for

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        size = args[0].numel() if args and isinstance(args[0], Tensor) else 0
        name = func.name().removeprefix("aten::").split(".")[0]
        self.seen.append((name, size, (kwargs or {}).get("dtype")))
        return func(*args, **(kwargs or {}))

    def count(self, *names: str) -> int:
        return sum(name in names for name, *_ in self.seen)

    def rounded(self, numels: set[int]) -> int:
        """Tensors of these sizes that were made half."""
        return sum(name == "_to_copy" and size in numels and dtype in HALF for name, size, dtype in self.seen)


def near_gpt2() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """Head, states and targets whose logits lie near -100, and their log-probabilities in float64. The shift
    is one product of 10 and -10, which no precision rounds: only what is done to sums can go wrong.
    """
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=False)
    layer.weight.data = torch.randn(VOCABULARY, WIDTH, generator=random) / WIDTH**0.5
    layer.weight.data[:, 0] = -10
    states = torch.randn(ROWS, WIDTH, generator=random)
    states[:, 0] = 10
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=random)
    logits = states.double() @ layer.weight.detach().double().t()
    assert -110 < logits.min() < logits.max() < -90
    return layer, states, targets, torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("dtype", HALF)
def test_logits_near_minus_100_are_not_rounded_to_half(dtype: torch.dtype) -> None:
    layer, states, targets, exact = near_gpt2()
    with torch.autocast("cpu", dtype), torch.no_grad():
        found, _ = head.logprobs_and_entropy(layer, states, targets, 1.0)
        adapted, _ = head.logprobs_and_entropy(nn.Sequential(layer), states, targets, 1.0)
        for sampling in (layer, head.for_sampling(layer, states.device), nn.Sequential(layer)):
            logits = head.next_logits(sampling, states)
            drawn = torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
            assert (drawn - exact).abs().max() < HALF[dtype]
        rounded = torch.log_softmax(layer(states).float(), -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert (found - exact).abs().max() < HALF[dtype]
    assert (adapted - exact).abs().max() < HALF[dtype]
    assert (rounded - exact).abs().max() > 2 * HALF[dtype]  # what a plain head under autocast gives


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", [RewardModel, Critic])
def test_scalar_heads_are_float32(kind: type[RewardModel | Critic], dtype: torch.dtype) -> None:
    role, batch = kind(classifier(3)), sequences(6)
    role.dtype = dtype
    read = batch.response
    with torch.no_grad():
        found = role.per_position(batch, read)[read]
        with casting(role):
            hidden = hidden_at(role.model, batch.ids, batch.attention, read)
    exact = hidden.double() @ score_head(role.model).weight.detach().double()[0]
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", HALF)
def test_exact_kl_is_measured_in_float32(dtype: torch.dtype) -> None:
    policy, other, batch = Policy(causal_lm(1)), Reference(causal_lm(2)), sequences(6)
    exact = divergences(policy, other, batch, 0.7)
    policy.dtype = other.dtype = dtype
    assert divergences(policy, other, batch, 0.7) == exact


def test_the_probe_has_all_digits_and_passes_memory_on(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, seen = support.tree_states, list[str]()

    def states(*given: object) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return usual(*given)  # type: ignore[arg-type]

    def full(*given: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        monkeypatch.setattr(support, "tree_states", states)
        assert takes_trees(causal_lm(1).eval())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]
    monkeypatch.setattr(support, "tree_states", full)
    model = causal_lm(1).eval()
    with pytest.raises(torch.OutOfMemoryError):
        takes_trees(model)
    monkeypatch.setattr(support, "tree_states", usual)
    assert takes_trees(model)  # nothing was decided by it


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_are_rounded_once_for_all_tokens(frozen: bool) -> None:
    """Autocast remembers by itself only what requires a gradient."""
    role: Policy | Reference = Reference(causal_lm(1)) if frozen else Policy(causal_lm(1))
    matrices = {p.numel() for p in role.model.parameters() if p.dim() == 2}
    role.dtype = torch.bfloat16
    counts = []
    for tokens in (2, 6):
        with Counted() as seen:
            sample(role, prompts(5), max_new_tokens=tokens, temperature=1.0, eos_id=VOCABULARY)
        counts.append(seen.rounded(matrices - {ROWS * 4}))
    assert counts[0] == counts[1] > 0
    assert all(p.requires_grad != frozen for p in role.model.parameters())


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What goes by itself goes; cycles stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_stages_models_go_with_its_learner(precision: learning.Precision) -> None:
    batch = sequences(5)

    def stage() -> list[weakref.ref]:
        learner, policy, reference = Learner(precision), Policy(causal_lm(1)), Reference(causal_lm(2))
        learner.train("policy", policy, OptimizerConfig(), 1e-3)
        learner.freeze(reference)
        reference.logprobs(batch)
        weights = token_mean(batch.response)
        learner.update("policy", batch, weights, lambda part: Loss(-policy.logprobs(part)))
        return [weakref.ref(x) for x in (learner, policy.model, reference.model, policy.model.lm_head.weight)]

    assert [ref() for ref in stage()] == [None] * 4


def test_a_learner_keeps_no_model_that_was_only_looked_up() -> None:
    """An evaluation freezes one policy after the other with one learner."""
    learner, role = Learner("bf16"), Reference(causal_lm(1))
    learner.freeze(role)
    left = weakref.ref(role.model)
    del role
    gc.collect()
    assert left() is None


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_emulated_bfloat16_is_refused(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says that a T4 supports it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for device, precision in (("cuda", "bf16"), ("cuda", "fp16"), ("cpu", "bf16")):
        expected = refused and (device, precision) == ("cuda", "bf16")
        if expected:
            with pytest.raises(Exception, match="precision=fp16"):
                refuse_emulation(torch.device(device), precision)  # type: ignore[arg-type]
        else:
            refuse_emulation(torch.device(device), precision)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpu", "processor", "expected"),
    [(None, True, True), (None, False, False), ((7, 5), True, False), ((8, 0), False, True)],
)
def test_auto_is_bf16_where_the_gpu_or_else_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, processor: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: processor)
    assert multiplies_bf16() is expected
    assert effective_precision("auto") == ("bf16" if expected else "float32")
    assert effective_precision("bf16") == "bf16"  # who asks for it gets it
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert multiplies_bf16() is processor
    assert effective_precision("fp16") == "float32"


@pytest.mark.parametrize("there", [True, False])
def test_a_user_is_told_what_auto_is_and_what_is_slow(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(precisions, "multiplies_bf16", lambda: there)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    emulated = "this processor only emulates bf16"
    assert remark("float32", "float32") is None
    assert remark("auto", effective_precision("auto")) == f"precision auto: {'bf16' if there else 'float32'}"
    went_on, explicit = remark("auto", "bf16") or "", remark("bf16", "bf16") or ""
    assert (
        (emulated in went_on)
        == (emulated in explicit)
        == ("with which the run began" in went_on)
        == (not there)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_falls_back_where_there_is_no_gpu() -> None:
    assert effective_precision("fp16") == "float32"
    said = remark("fp16", "fp16") or ""
    assert "this run uses float32" in said
    prose.compare("models/precision: fp16 without a GPU", said)
