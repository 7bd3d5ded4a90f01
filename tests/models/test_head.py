"""Log-probs through tiles of logits: blocks of rows and tiles of columns do not show."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from preftune.models.fast import head

STATES, WIDTH, VOCABULARY = 7, 5, 700


def plain(layer: nn.Linear, states: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    logprobs = torch.log_softmax(layer(states) / temperature, -1)
    return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("rows_a_block", [1, 3, 7, 1024])
@pytest.mark.parametrize("rows", [0, 1, STATES])
@pytest.mark.parametrize("kept", [0, 800, 1 << 25])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_a_log_softmax(
    rows_a_block: int, rows: int, bias: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_ROWS", rows_a_block)
    monkeypatch.setattr(head, "_SAVED", kept)
    monkeypatch.setitem(head._ENTRIES, "cpu", 256 * min(rows_a_block, STATES))  # tiles of 256 columns
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    states = torch.randn(rows, WIDTH, requires_grad=True)
    targets, upstream = torch.randint(0, VOCABULARY, (rows,)), torch.randn(rows)
    found = []
    for logprobs in (
        head.logprobs_and_entropy(layer, states, targets, 0.7)[0],
        plain(layer, states, targets, 0.7),
    ):
        layer.zero_grad()
        states.grad = None
        (logprobs * upstream).sum().backward()
        found.append([logprobs.detach(), states.grad, *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("room", "computed"), [(0, 6), (STATES * 256, 5), (STATES * 512, 4), (STATES * 700, 3)]
)
def test_tiles_that_find_room_are_computed_once(
    room: int, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tiles, of 256, 256 and 188 columns."""
    monkeypatch.setitem(head._ENTRIES, "cpu", 256 * STATES)
    monkeypatch.setattr(head, "_SAVED", room)
    tiles: list[slice] = []
    usual = head._Head.logits
    monkeypatch.setattr(head._Head, "logits", lambda self, h, c: tiles.append(c) or usual(self, h, c))
    layer, states = nn.Linear(WIDTH, VOCABULARY), torch.randn(STATES, WIDTH)
    logprobs, _ = head.logprobs_and_entropy(layer, states, torch.zeros(STATES, dtype=torch.long), 1.0)
    held = sum(tile.numel() for tile in logprobs.grad_fn.saved_tensors[5:])
    assert held <= room
    logprobs.sum().backward()
    assert len(tiles) == computed


def test_a_large_card_keeps_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of its memory, at four bytes a logit; a small one as much as a CPU."""
    for memory, room in ((80 << 30, (5 << 30) // 4), (1 << 30, 1 << 25)):
        card = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert head._room(torch.device("cuda")) == room
    assert head._room(torch.device("cpu")) == 1 << 25


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    usual = head._one_pass
    monkeypatch.setattr(head, "_one_pass", lambda *a: kept.extend(tile.saved for tile in a[3]) or usual(*a))
    layer, states = nn.Linear(WIDTH, VOCABULARY), torch.randn(STATES, WIDTH)
    targets = torch.zeros(STATES, dtype=torch.long)
    with torch.no_grad():
        head.logprobs_and_entropy(layer, states, targets, 1.0)
    head.logprobs_and_entropy(layer.requires_grad_(False), states, targets, 1.0)
    assert kept == [False, False]
    head.logprobs_and_entropy(layer, states.requires_grad_(), targets, 1.0)
    head.logprobs_and_entropy(layer.requires_grad_(), states.detach(), targets, 1.0)
    assert kept[2:] == [True, True]


def test_tiles_are_computed_in_the_precision_of_the_forward_pass() -> None:
    """Factors in bfloat16 under autocast, their sums in float32: far from float32, near each other."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=False)
    states, targets = torch.randn(STATES, WIDTH, requires_grad=True), torch.randint(0, VOCABULARY, (STATES,))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for precise, tiled in ((False, True), (False, False), (True, True)):
        states.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            half = (x if precise else x.bfloat16().float() for x in (states, layer.weight))
            with torch.autocast("cpu", enabled=False):
                logits = nn.functional.linear(*half)
            logprobs = (
                head.logprobs_and_entropy(layer, states, targets, 1.0)[0]
                if tiled
                else torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
            )
        logprobs.sum().backward()
        assert logprobs.dtype == torch.float32
        found.append((logprobs.detach(), states.grad))
    (ours, slope), (plainly, plain_slope), (exact, exact_slope) = found
    assert (ours - exact).abs().max() > 10 * (ours - plainly).abs().max()
    assert (slope - exact_slope).norm() > 0
    torch.testing.assert_close(slope, plain_slope, atol=0.02, rtol=0.02)


class Adapted(nn.Linear):
    """More than its weight, as a head with an adapter is."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


class Wrapped(torch.Tensor):
    """Data of another kind, as in a sharded or quantised head."""


@pytest.mark.parametrize("kind", ["plain", "adapted", "wrapped"])
def test_tiles_are_for_plain_heads_and_the_others_compute_their_own_logits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    usual = head._one_pass
    monkeypatch.setattr(head, "_one_pass", lambda *a: passes.append(1) or usual(*a))
    torch.manual_seed(0)
    layer = (Adapted if kind == "adapted" else nn.Linear)(WIDTH, VOCABULARY)
    if kind == "wrapped":
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped))
    states, targets = torch.randn(STATES, WIDTH), torch.randint(0, VOCABULARY, (STATES,))
    logprobs, entropy = head.logprobs_and_entropy(layer, states, targets, 0.7)
    assert bool(passes) == (kind == "plain")
    torch.testing.assert_close(logprobs, plain(layer, states, targets, 0.7), atol=1e-5, rtol=1e-5)
    p = torch.softmax(layer(states).detach() / 0.7, -1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1), atol=1e-5, rtol=1e-5)
    assert logprobs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("rows", [1, 3, head._FEW, head._FEW + 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
def test_logits_of_the_next_token_are_those_of_the_head(
    rows: int, bias: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows go through the kernel, or through the product the other way round where there is none."""
    asked: list[nn.Module] = []

    def product(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor] | None:
        asked.append(layer)
        return (lambda states: layer(states) + 1) if kernel else None  # seen by what it adds

    monkeypatch.setattr(head, "layer_product", product)
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    states = torch.randn(rows, WIDTH)
    few = rows <= head._FEW
    with torch.no_grad():
        found, expected = head.next_logits(layer, states), layer(states)
    assert asked == ([layer] if few else [])
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected + 1 if kernel and few else expected)


@pytest.mark.parametrize("precise", [False, True])
def test_few_rows_without_a_kernel_take_the_way_that_is_right_for_the_head(
    precise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transposed product only for a plain Linear in its own precision; no graph comes out of it."""
    transposed = []
    usual = torch.mm
    monkeypatch.setattr(head, "layer_product", lambda layer: None)
    monkeypatch.setattr(torch, "mm", lambda a, b: transposed.append(a.shape) or usual(a, b))
    layer, states = nn.Linear(WIDTH, VOCABULARY), torch.randn(head._FEW, WIDTH)
    adapted = nn.Sequential(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        logits = [head.next_logits(layer, states), head.next_logits(adapted, states)]
        assert all(x.dtype == torch.float32 for x in logits)
        assert transposed == ([(VOCABULARY, WIDTH)] if precise else [])
        assert logits[0].requires_grad != precise
    expected = layer(states)
    torch.testing.assert_close(logits[0], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits[1], expected, atol=0, rtol=0)
