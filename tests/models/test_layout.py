"""The tree gives what padded forwards give: values and gradients, for every family that may use it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation

from families import PLAIN, TREES, made
from preftune.data import Sequences, pad_sequences
from preftune.data.batch import concatenate
from preftune.evaluation.divergence import divergences
from preftune.models.fast.head import next_logits
from preftune.models.fast.layout import _grown, fuse_activations, grow
from preftune.models.fast.support import plain_layout, takes_trees
from preftune.models.roles import Critic, Policy, Reference, RewardModel
from preftune.training.learner import Learner
from sweeps import ALL
from tiny import EOS, VOCABULARY, flat, pairs, sequences, widened


def groups() -> Sequences:
    """Three prompts with four responses each, in a mixed order: equal ones, one that begins another."""
    prompts = [[1, 2, 3, 4, 5], [1, 2, 9], [7]]
    replies = [[6, 7, EOS], [6, 7, EOS], [6], [8, 9, 10, 11, 12, EOS]]
    rows = [(p, r) for r in replies for p in prompts]
    return pad_sequences([p for p, _ in rows], [r for _, r in rows], EOS)


BATCHES: dict[str, Callable[[], Sequences]] = {
    "ragged": lambda: sequences(3, 7),
    "pairs": lambda: concatenate(pairs(2).chosen, pairs(2).rejected),
    "groups": groups,
    "one row": lambda: sequences(1, 1),
    "wide": lambda: widened(groups(), 6),
}


def looked_up(config: PreTrainedConfig, batch: Sequences, what: str) -> tuple[Tensor, PreTrainedModel]:
    if what in ("logprobs", "entropy"):
        policy = Policy(made(config))
        return policy.logprobs_and_entropy(batch, 0.7)[what == "entropy"], policy.model
    kind = RewardModel if what == "scores" else Critic
    role = kind(made(config, AutoModelForSequenceClassification), 0.3, 2.0)
    return (role.raw_scores if isinstance(role, RewardModel) else role.values)(batch), role.model


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "batch"),
    [(f, b) for f in TREES for b in BATCHES if ALL or f in ("gpt2", "llama") or b == "groups"],
)
@pytest.mark.parametrize("what", ["logprobs", "scores", "values"])
def test_values_and_gradients_are_those_of_padded_forwards(family: str, batch: str, what: str) -> None:
    rows, results = BATCHES[batch](), []
    for plain in (False, True):
        with plain_layout() if plain else torch.enable_grad():
            found, model = looked_up(TREES[family](), rows, what)
            assert takes_trees(model)
            signs = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
            (found * signs).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((found.detach(), flat(gradients), sorted(gradients)))
    (values, slopes, names), (wanted, wanted_slopes, wanted_names) = results
    close(values, wanted)
    assert names == wanted_names
    assert (slopes - wanted_slopes).norm() <= 1e-5 * wanted_slopes.norm()
    assert wanted_slopes.norm() > 1e-3


@pytest.mark.parametrize("family", TREES)
@torch.no_grad()
def test_entropy_and_exact_kl_are_those_of_padded_forwards(family: str) -> None:
    batch = groups()

    def entropy() -> Tensor:
        return looked_up(TREES[family](), batch, "entropy")[0]

    close(entropy(), _plainly(entropy))
    policy, reference = Policy(made(TREES[family]())), Reference(made(TREES[family]()))
    for parameter in reference.model.parameters():
        parameter.mul_(0.9)

    def exact_kl() -> Tensor:
        return torch.tensor(divergences(policy, reference, batch, 0.7)[1])

    kl = exact_kl()
    close(kl, _plainly(exact_kl))
    assert kl.sum() > 0.1


def _plainly(look: Callable[[], Tensor]) -> Tensor:
    with plain_layout():
        return look()


@pytest.mark.parametrize("family", PLAIN)
@torch.no_grad()
def test_other_kinds_of_attention_keep_their_padded_forward(family: str) -> None:
    model = made(PLAIN[family]())
    assert not takes_trees(model.eval())
    batch = sequences(3, 7)
    close(Policy(model).logprobs(batch), _plainly(lambda: Policy(model).logprobs(batch)))


def test_what_the_trial_of_a_model_found_is_said() -> None:
    said: list[str] = []
    learner = Learner(say=said.append)
    for config in (PLAIN["mistral with a window"], TREES["gpt2"]):
        learner.freeze(Reference(made(config())))
    assert len(said) == 1
    assert "MistralForCausalLM: rows are padded" in said[0]


def test_a_model_whose_tokens_meet_outside_attention_is_refused() -> None:
    model = made(TREES["gpt2"]()).eval()
    assert takes_trees(model)
    leaking = made(TREES["gpt2"]()).eval()
    leaking.base_model.h[1].mlp.register_forward_hook(lambda _, __, out: out + 0.01 * out.roll(1, 1))
    assert not takes_trees(leaking)


def test_the_models_attention_is_as_before() -> None:
    model = made(TREES["llama"]()).eval()
    usual = model.config._attn_implementation
    Policy(model).logprobs(sequences(0))
    assert model.config._attn_implementation == usual


def test_every_distinct_beginning_is_one_node() -> None:
    batch = groups()
    lengths = batch.attention.sum(1)
    tree = grow(batch.ids, lengths)
    rows = [tuple(ids[:n].tolist()) for ids, n in zip(batch.ids, lengths.tolist(), strict=True)]
    beginnings = {row[: t + 1] for row in rows for t in range(len(row))}
    assert tree.ids.shape == (1, len(beginnings))
    for i, row in enumerate(rows):
        for t in range(len(row)):
            node = tree.node[i, t]
            assert tree.ids[0, node] == row[t]
            assert tree.positions[0, node] == t


def test_where_nothing_is_read_one_token_is_and_the_callers_list_stays() -> None:
    sizes = [0, 0]
    tree, nodes, grown = _grown(np.array([[7, 8], [7, 9]]), sizes, torch.device("cpu"))
    assert (tree.ids.tolist(), nodes.tolist(), grown) == ([[7]], [], [1, 0])
    assert sizes == [0, 0]


def test_tokens_after_the_last_that_is_read_are_left_out() -> None:
    """The last token of a response predicts nothing, and rows without a response hold nothing to read."""
    seen: list[int] = []
    policy, batch = Policy(made(TREES["gpt2"]())), groups()
    policy.logprobs(batch)  # probes the model
    policy.model.base_model.wte.register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    policy.logprobs(batch)
    empty = Sequences(batch.ids, batch.attention, torch.zeros_like(batch.response))
    assert (policy.logprobs(empty) == 0).all()
    distinct = {tuple(r[: t + 1]) for r in _read_parts(batch) for t in range(len(r))}
    assert seen == [len(distinct), 1]


def _read_parts(batch: Sequences) -> list[list[int]]:
    return [ids[real][:-1].tolist() for ids, real in zip(batch.ids, batch.attention, strict=True)]


def test_the_fused_activation_is_the_same_function() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=VOCABULARY)).eval()
    ids = sequences(0).ids
    with torch.no_grad():
        before = model(ids).logits
        fused = fuse_activations(model)(ids).logits
    assert not any(isinstance(m, NewGELUActivation) for m in model.modules())
    torch.testing.assert_close(fused, before, atol=1e-6, rtol=1e-6)
    assert model.config.activation_function == "gelu_new"


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_next_logits_are_those_of_the_head(rows: int, bias: bool) -> None:
    head = torch.nn.Linear(16, VOCABULARY, bias=bias)
    states = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    got = next_logits(head, states)
    torch.testing.assert_close(got, head(states), atol=1e-6, rtol=1e-6)
    assert got.is_contiguous()
    wrapped = torch.nn.Sequential(head)
    torch.testing.assert_close(next_logits(wrapped, states), head(states), atol=1e-6, rtol=1e-6)
