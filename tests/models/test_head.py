"""Log-probs through tiles of logits: blocks of rows and tiles of columns do not show."""

import pytest
import torch
from torch import nn

from preftune.models import head

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
    monkeypatch.setattr(head, "_KEPT", kept)
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
