"""Decoders give the hidden states of full forwards, whatever rows have dropped out on the way."""

from collections.abc import Iterator

import pytest
import torch

from families import PLAIN, TREES, made
from preftune.models.fast.decode import CachedDecoder, GridDecoder, decoder
from preftune.models.fast.layout import fuse_activations
from preftune.models.fast.support import plain_layout
from preftune.models.roles import Policy
from preftune.rollout.sample import sample
from tiny import EOS, prompts

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
LENGTHS = torch.tensor([4, 2, 1])
# Which of the n rows go on before a step: first every prompt loses one, later but one row is left.
KEPT = [None, [0, 1, 3, 4, 6, 8], None, [1, 2, 5], [1], None]


@pytest.mark.parametrize("kind", [GridDecoder, CachedDecoder])
@pytest.mark.parametrize("family", [*TREES, *PLAIN])
@torch.no_grad()
def test_states_are_those_of_full_forwards(family: str, kind: type) -> None:
    if kind is GridDecoder and family in PLAIN:
        pytest.skip("refused by the probe")
    model = fuse_activations(made((TREES | PLAIN)[family]()).eval())
    one = kind(model, IDS, LENGTHS, 3, 8)
    written = [ids[:n].tolist() for ids, n in zip(IDS, LENGTHS.tolist(), strict=True)]
    check(model, one.start(), written)
    rows = [list(prompt) for prompt in written for _ in range(3)]
    for states, left in stepped(one, rows):
        check(model, states, left)


def stepped(
    one: GridDecoder | CachedDecoder, rows: list[list[int]]
) -> Iterator[tuple[torch.Tensor, list[list[int]]]]:
    """States after each random token, and all tokens of the rows they belong to, while rows drop out."""
    random = torch.Generator().manual_seed(2)
    for kept in KEPT:
        if kept is not None:
            one.keep(torch.tensor(kept))
            rows = [rows[i] for i in kept]
        tokens = torch.randint(0, EOS, (len(rows),), generator=random)
        states = one.step(tokens)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        yield states, rows


def check(model: torch.nn.Module, states: torch.Tensor, rows: list[list[int]]) -> None:
    assert len(states) == len(rows)
    for state, row in zip(states, rows, strict=True):
        expected = model.base_model(torch.tensor([row]), use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_window_that_a_model_does_not_have_takes_nothing_from_its_cache() -> None:
    """A stray key of the config: the library's cache goes by it, and the model's masks do not."""
    config = TREES["llama"]()
    config.sliding_window = 2
    model = fuse_activations(made(config).eval())
    one = CachedDecoder(model, IDS, LENGTHS, 1, 4)
    check(
        model,
        one.start(),
        written := [ids[:n].tolist() for ids, n in zip(IDS, LENGTHS.tolist(), strict=True)],
    )
    for token in (3, 8, 4):
        states = one.step(torch.full((3,), token))
        written = [[*row, token] for row in written]
        check(model, states, written)


def test_the_grid_is_taken_where_trees_are() -> None:
    assert isinstance(decoder(made(TREES["gpt2"]()).eval(), IDS, LENGTHS, 2, 3), GridDecoder)
    assert isinstance(decoder(made(PLAIN["bloom"]()).eval(), IDS, LENGTHS, 2, 3), CachedDecoder)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", TREES)
def test_samples_are_those_of_the_plain_decoder(family: str, temperature: float) -> None:
    policy, batch = Policy(made(TREES[family]())), prompts(3, 5)

    def draw() -> torch.Tensor:
        return sample(
            policy, batch, max_new_tokens=9, temperature=temperature, eos_id=EOS, responses_per_prompt=3
        ).ids

    by_tree = draw()
    with plain_layout():
        assert torch.equal(draw(), by_tree)
