"""A step of fixed shapes, recorded once and repeated: what a CUDA graph does, shown on a CPU.

Here the record is a trace of tensor operations: it repeats the very operations on the very tensors, runs no
Python of the model, and refuses whatever depends on a number.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from families import PLAIN, TREES, made
from preftune.data import Sequences
from preftune.models.fast import static
from preftune.models.fast.native import without_kernel
from preftune.models.fast.static import WARM_UP, recorder, without_graphs
from preftune.models.layers import language_head
from preftune.models.roles import Policy
from preftune.rollout import sample as module
from preftune.rollout.sample import sample
from tiny import EOS, prompts

CPU = torch.device("cpu")
LIMIT = 9


@pytest.fixture(autouse=True)
def torch_alone() -> Iterator[None]:
    with without_kernel():
        yield


def traced(step: Any) -> Any:
    with step.__self__.undone():  # a trace does what it records; a CUDA graph does not
        return make_fx(lambda: step())()


def compiled(step: Any) -> Any:
    """In one piece, and once: a second compilation is an error."""
    torch._dynamo.reset()
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    with step.__self__.undone():
        whole()
    return torch._dynamo.config.patch(error_on_recompile=True)(whole)


def draw(policy: Policy, said: list[str], temperature: float = 1.0, **more: Any) -> Sequences:
    how = {"max_new_tokens": LIMIT, "eos_id": EOS, "responses_per_prompt": 3} | more
    return sample(policy, prompts(3, 5), temperature=temperature, say=said.append, **how)


def same(found: Sequences, wanted: Sequences) -> bool:
    ids = torch.equal(found.ids * found.attention, wanted.ids * wanted.attention)
    return ids and torch.equal(found.response, wanted.response)


@pytest.mark.parametrize(
    ("record", "family"),
    [(traced, "gpt2"), (traced, "llama"), (compiled, "gpt2"), (compiled, "llama")]
    + [(lambda step: step, family) for family in TREES],
)
def test_a_recorded_step_draws_what_the_plain_decoder_draws(
    record: Callable[[Any], Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very tokens, in float32: the two differ by rounding only."""
    policy, said, calls = Policy(made(TREES[family]())), list[str](), list[int]()
    temperatures = (1.0, 0.0) if record is not compiled else (1.0,)
    plain = [draw(policy, said, t) for t in temperatures]
    if record is traced:
        policy.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setitem(static.RECORDERS, "cpu", record)
    found = [draw(policy, said, t) for t in temperatures]
    assert all(same(*both) for both in zip(found, plain, strict=True))
    assert said == []
    if record is traced:  # the prompts, the first steps, one while it is traced and one to compare with
        assert len(calls) == len(temperatures) * (1 + WARM_UP + 2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_all_steps_are_the_same_operations_on_the_same_shapes(family: str) -> None:
    """And none of them asks for a number, or for a shape that depends on one: the trace would not exist."""
    model, given = made(TREES[family]()).eval(), module._packed_prompts(prompts(3, 5))
    uniforms, ends = module._uniforms(prompts(3, 5).seeds, 2, LIMIT), torch.tensor([EOS, 3])
    drawing = module._Drawing(model, given, 2, uniforms, ends, EOS, 0.7)
    rows, seen = module._FixedSteps(drawing, language_head(model)), list[list[Any]]()
    for t in range(1, LIMIT):
        if t in (2, 7):
            nodes = traced(rows.step).graph.nodes
            shapes = [getattr(n.meta.get("tensor_meta"), "shape", None) for n in nodes]
            seen.append([(str(n.target), shape) for n, shape in zip(nodes, shapes, strict=True)])
        rows.step()
    assert seen[0] == seen[1]
    assert len(seen[0]) > 200
    assert sum(shape is not None for _, shape in seen[0]) > 150


def test_half_precision_keeps_to_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    for family in ("gpt2", "llama"):
        policy = Policy(made(TREES[family]()))
        policy.dtype = torch.bfloat16
        plain = draw(policy, said, eos_id=-1).ids
        with monkeypatch.context() as patch:
            patch.setitem(static.RECORDERS, "cpu", lambda step: step)
            found = draw(policy, said, eos_id=-1).ids
        assert (found == plain).float().mean() > 0.7
    assert said == []


def test_replies_that_have_ended_are_seen_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, said, steps = Policy(made(TREES["gpt2"]())), list[str](), list[int]()

    def counted(step: Any) -> Any:
        return lambda: (steps.append(1), step())

    ends = list(range(EOS + 1))  # every token is one
    wanted = draw(policy, said, eos_id=ends, max_new_tokens=40)
    monkeypatch.setitem(static.RECORDERS, "cpu", counted)
    assert same(draw(policy, said, eos_id=ends, max_new_tokens=40), wanted)
    assert len(steps) == module._ASK_EVERY_ELSEWHERE - 1 - WARM_UP


def test_elsewhere_the_plain_decoders_go_on() -> None:
    model = made(TREES["gpt2"]()).eval()
    cuda = torch.device("cuda")
    assert recorder(model, CPU) is None
    assert recorder(model, cuda) is static.recorded
    assert recorder(made(PLAIN["bloom"]()).eval(), cuda) is None
    with without_graphs():
        assert recorder(model, cuda) is None
    hook = model.base_model.register_forward_pre_hook(lambda *_: None)  # as where blocks are gathered
    assert recorder(model, cuda) is None
    hook.remove()
    assert recorder(model, cuda) is static.recorded


def refuses(step: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def does_nothing(step: Any) -> Any:
    return lambda: None


@pytest.mark.parametrize(
    ("record", "why"), [(refuses, "not permitted when stream is capturing"), (does_nothing, "other tokens")]
)
def test_what_cannot_be_recorded_is_said_once_and_drawn_plainly(
    record: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, said = Policy(made(TREES["gpt2"]())), list[str]()
    wanted = draw(policy, said)
    monkeypatch.setitem(static.RECORDERS, "cpu", record)
    assert all(same(draw(policy, said), wanted) for _ in range(2))
    assert len(said) == 1
    assert why in said[0]
    assert "and more" not in said[0]


def test_memory_that_runs_out_while_recording_halves_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, said, tried = Policy(made(TREES["gpt2"]())), list[str](), list[int]()

    def short_of_memory(step: Any) -> Any:
        tried.append(1)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step

    wanted = draw(policy, said)
    monkeypatch.setitem(static.RECORDERS, "cpu", short_of_memory)
    assert same(draw(policy, said), wanted)
    assert len(tried) == 3
    (line,) = said
    assert "for 5 prompts at a time" in line
    assert line.endswith("going on with 2")
