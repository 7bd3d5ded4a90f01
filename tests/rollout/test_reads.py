"""What the CPU reads of a device: once a batch, never row by row."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.config import EvaluationConfig
from preftune.data import Dialogue, Encoder, Preference, Sequences, Turn
from preftune.data.corpus import train_tokenizer
from preftune.evaluation.policy import Conditions
from preftune.models.fast import layout, support
from preftune.models.fast.support import takes_trees
from preftune.models.roles import Policy, Reference, RewardModel
from preftune.rollout.functions import RewardFunctions, load_functions
from preftune.rollout.score import Scorer
from tiny import causal_lm, classifier, sequences

BYTES = 257  # every byte and the end token


class Elsewhere(Tensor):
    """As on a device: counts how often the CPU reads from it. What is made of it is elsewhere, too."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        home = name == "cpu" or (name == "to" and "cpu" in args)
        masks = name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        Elsewhere.reads += (
            home or masks or name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__")
        )
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(Tensor) if home else out


def letters(prompt: str, response: str) -> int:
    return len(response)


def conditions(count: int) -> tuple[Conditions, Sequences]:
    """`count` prompts with a reply each, scored by reward models that read text and that read ids."""
    rows = [
        Preference(
            prompt=Dialogue((Turn("human", f" Q{i}?"),)), chosen=" Yes.", rejected=" No", source="", row=i
        )
        for i in range(count)
    ]
    encoder = Encoder(train_tokenizer(rows * 3, BYTES), "transcript", 36, 12)
    judge = RewardModel(classifier(3, BYTES + 1))
    made = Conditions(
        prompts=rows,
        encoder=encoder,
        scorer=Scorer(reward_model=judge, encoder=encoder, translate=encoder),
        held_out=Scorer(reward_model=judge, encoder=encoder, translate=None),
        reference=Reference(causal_lm(1, BYTES + 1)),
        settings=EvaluationConfig(),
        seed=0,
        device=torch.device("cpu"),
    )
    return made, encoder.sequences([(row.prompt, row.chosen) for row in rows])


def elsewhere(sequences: Sequences) -> Sequences:
    Elsewhere.reads = 0
    return Sequences(
        *(x.as_subclass(Elsewhere) for x in (sequences.ids, sequences.attention, sequences.response))
    )


def test_rows_are_described_with_as_many_reads_as_one() -> None:
    counts = []
    for count in (2, 9):
        made, batch = conditions(count)
        there = elsewhere(batch)
        rows = made._described(there, 0, 1)
        counts.append(Elsewhere.reads)
        assert [row["response"] for row in rows] == [" Yes."] * count
    assert counts[0] == counts[1] > 0


def test_reward_functions_read_all_rows_at_once() -> None:
    counts = []
    for count in (2, 9):
        made, batch = conditions(count)
        own = RewardFunctions(
            functions=load_functions("test_reads:letters"),
            encoder=made.encoder,
            rows=made.prompts,
            on_error="stop",
        )
        assert own.rewards(elsewhere(batch), range(count), alone=True).total.tolist() == [5.0] * count
        counts.append(Elsewhere.reads)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(("by_tree", "reads"), [(True, 1), (False, 3)])  # two are transformers' own
def test_states_are_laid_out_with_one_read(
    by_tree: bool, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids, lengths and what is read of the states come in one transfer; log-probs are the same as at home."""
    policy, batch = Policy(causal_lm(1)), sequences(5, 8)
    assert takes_trees(policy.model)
    monkeypatch.setitem(support._allowed, policy.model, by_tree)
    wanted = policy.logprobs(batch)
    found = policy.logprobs(elsewhere(batch))
    assert 0 < Elsewhere.reads <= reads
    assert torch.equal(found, wanted)


def test_the_arrays_of_a_tree_go_up_in_one_transfer() -> None:
    arrays = [np.arange(6).reshape(2, 3), np.arange(4), np.arange(0)]
    made = layout._on(torch.device("meta"), arrays)
    assert [tuple(x.shape) for x in made] == [(2, 3), (4,), (0,)]
    assert len({x.untyped_storage()._cdata for x in made}) == 1
