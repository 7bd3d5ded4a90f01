"""Models of a few thousand weights and batches of ragged rows, for tests of what is built on them.

The vocabulary is 0..22; 22 is EOS and, as with GPT-2, also what rows are padded with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from preftune.algorithms import ALGORITHMS
from preftune.algorithms.base import Metrics
from preftune.config import OptimizerConfig
from preftune.data import (
    Pairs,
    Prompts,
    Sequences,
    Unpaired,
    pad_prompts,
    pad_sequences,
    pad_unpaired,
)
from preftune.models.aligned import ALIGNMENT
from preftune.models.roles import Critic, Policy, Reference, RewardModel, Role
from preftune.rollout import Rollout
from preftune.rollout.score import Scored
from preftune.rundir import RunDir, read_json, write_json
from preftune.training.learner import Learner

VOCABULARY, EOS, POSITIONS = 23, 22, 40
GROUP = 4
TRAINED = [(name, role) for name, kind in ALGORITHMS.items() for role in kind.trains]


def _config(vocabulary: int, **more: Any) -> GPT2Config:
    """Dropout stays at GPT-2's 0.1, so that a role that leaves it on is noticed; the weights are large."""
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=min(EOS, vocabulary - 1),
        eos_token_id=min(EOS, vocabulary - 1),
        **more,
    )


def causal_lm(seed: int, vocabulary: int = VOCABULARY) -> GPT2LMHeadModel:
    """A GPT-2 in train mode, as its constructor leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(_config(vocabulary))


def classifier(seed: int, vocabulary: int = VOCABULARY + 1) -> GPT2ForSequenceClassification:
    """A one-number GPT-2 whose last id is a pad token of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2ForSequenceClassification(_config(vocabulary, num_labels=1, pad_token_id=vocabulary - 1))


def roles(algorithm: str, seed: int = 1) -> dict[str, Role]:
    """Fresh models for an algorithm; every role its own weights."""
    made: dict[str, Callable[[], Role]] = {
        "policy": lambda: Policy(causal_lm(seed)),
        "reference": lambda: Reference(causal_lm(seed + 1)),
        "reward_model": lambda: RewardModel(classifier(seed + 2), 0.3, 2.0),
        "critic": lambda: Critic(classifier(seed + 3), 0.3, 2.0),
    }
    return {name: made[name]() for name in ALGORITHMS[algorithm].needs}


def rows(seed: int, count: int, longest_prompt: int = 7, longest_response: int = 9) -> tuple[list, list]:
    """Prompts and responses of random lengths from 1; every other response ends in EOS."""
    random = torch.Generator().manual_seed(seed)

    def draw(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (), generator=random))
        return torch.randint(0, EOS, (length,), generator=random).tolist()

    prompts = [draw(longest_prompt) for _ in range(count)]
    return prompts, [draw(longest_response) + [EOS] * (i % 2) for i in range(count)]


def sequences(seed: int, count: int = 6) -> Sequences:
    return pad_sequences(*rows(seed, count), EOS)


def pairs(seed: int, count: int = 6) -> Pairs:
    prompts, chosen = rows(seed, count)
    _, rejected = rows(seed + 1000, count)
    return Pairs(pad_sequences(prompts, chosen, EOS), pad_sequences(prompts, rejected, EOS))


def unpaired(seed: int, count: int = 6) -> Unpaired:
    """As many desirable as undesirable responses, in turns."""
    return pad_unpaired(*rows(seed, count), [i % 2 == 0 for i in range(count)], EOS, POSITIONS)


def prompts(seed: int, count: int = 4) -> Prompts:
    return pad_prompts(rows(seed, count)[0], [seed * 100 + i for i in range(count)], EOS)


def rollout(seed: int, count: int = 8, policy: Policy | None = None, noise: float = 0.3) -> Rollout:
    """Responses in groups of 4 with old log-probs near the policy's; far enough for some ratios to be
    clipped.
    """
    random = torch.Generator().manual_seed(seed)
    batch = sequences(seed, count)
    shape = batch.ids.shape
    with torch.no_grad():
        own = (policy or Policy(causal_lm(1))).logprobs(batch)
        reference = Reference(causal_lm(2)).logprobs(batch)
        values = Critic(classifier(4), 0.3, 2.0).values(batch)
    return Rollout(
        sequences=batch,
        logprobs=own + noise * torch.randn(shape, generator=random) * batch.response,
        reference_logprobs=reference,
        values=values + noise * torch.randn(shape, generator=random) * batch.response,
        scores=torch.randn(count, generator=random),
        group=torch.arange(count // GROUP).repeat_interleave(GROUP),
    )


def batch_for(algorithm: str, seed: int = 5, count: int = 8) -> Any:
    """What one step of the algorithm consumes."""
    make = {"sequences": sequences, "pairs": pairs, "unpaired": unpaired, "prompts": rollout}
    return make[ALGORITHMS[algorithm].Config.batch](seed, count)


def online(algorithm: str) -> bool:
    return ALGORITHMS[algorithm].Config.batch == "prompts"


def grouped(algorithm: str) -> bool:
    return "group_size" in ALGORITHMS[algorithm].Config.model_fields


def widened(batch: Sequences, columns: int, junk: int = 3) -> Sequences:
    """The same rows with more padding, of another id."""
    pad = torch.nn.functional.pad
    ids = torch.where(batch.attention, batch.ids, junk)
    return Sequences(
        pad(ids, (0, columns), value=junk),
        pad(batch.attention, (0, columns)),
        pad(batch.response, (0, columns)),
    )


def widened_batch(batch: Any, columns: int) -> Any:
    """`widened` for every kind of batch; off the response a rollout then holds NaN, to show that nobody
    looks.
    """
    if isinstance(batch, Sequences):
        return widened(batch, columns)
    if isinstance(batch, Pairs):
        return Pairs(widened(batch.chosen, columns), widened(batch.rejected, columns))
    if isinstance(batch, Unpaired):
        wide = (widened(part, columns) for part in (batch.sequences, batch.mismatched))
        return Unpaired(next(wide), batch.desirable, next(wide))
    wide = widened(batch.sequences, columns)

    def grown(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, columns)).masked_fill(~wide.response, torch.nan)

    return Rollout(
        sequences=wide,
        logprobs=grown(batch.logprobs),
        reference_logprobs=grown(batch.reference_logprobs),
        values=grown(batch.values),
        scores=batch.scores,
        group=batch.group,
    )


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients of every step and changes nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(list(model.parameters()), {"lr": 1.0})
        self.model = model
        self.steps: list[dict[str, Tensor]] = []

    def step(self, closure: Any = None) -> None:
        named = self.model.named_parameters()
        self.steps.append({n: p.grad.detach().clone() for n, p in named if p.grad is not None})


NO_CLIPPING = OptimizerConfig(max_grad_norm=1e30)


def runner(
    algorithm: str, models: Mapping[str, Role], microbatch_size: int | None = None, **config: Any
) -> tuple[Any, dict[str, Recorder]]:
    """The real algorithm on the real learner, with optimizers that only record."""
    kind = ALGORITHMS[algorithm]
    settings = {"epochs": 1, "minibatches": 1} if online(algorithm) else {}
    settings |= {"group_size": GROUP} if grouped(algorithm) else {}
    settings |= {"microbatch_size": microbatch_size} if microbatch_size else {}
    learner = Learner(microbatch_size=microbatch_size)
    recorders = {}
    for name, role in models.items():
        if name in kind.trains:
            recorders[name] = Recorder(role.model)
            learner.adopt(name, role, recorders[name], NO_CLIPPING)
        else:
            learner.freeze(role)
    return kind(kind.Config(**{**settings, "algorithm": algorithm, **config}), models, learner), recorders


def step(algorithm: str, made: Any, batch: Any) -> Metrics:
    """All updates on one batch, as one step makes them."""
    return made.improve(batch) if online(algorithm) else made.step(batch)


def gradients(
    algorithm: str,
    batch: Any,
    *,
    models: Mapping[str, Role] | None = None,
    microbatch_size: int | None = None,
    **config: Any,
) -> tuple[dict[str, dict[str, Tensor]], Metrics]:
    """Unclipped gradients of the first update by role and parameter, and the step's metrics."""
    made, recorders = runner(algorithm, models or roles(algorithm), microbatch_size, **config)
    metrics = step(algorithm, made, batch)
    return {name: recorder.steps[0] for name, recorder in recorders.items()}, metrics


def flat(gradient: Mapping[str, Tensor]) -> Tensor:
    """All gradients as one float64 vector."""
    return torch.cat([g.double().flatten() for g in gradient.values()])


def relative(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|a - b| / |b| over all parameters."""
    assert a.keys() == b.keys()
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


class Tabular(torch.nn.Module):
    """A model by table, for sequences of one prompt token and up to two more: stands in for policy and
    critic.

    The state is 0 after the prompt and 1 + a after the response token a; `table` (states, outputs) holds the
    logits of the next token, or with one output the value.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.config = _config(table.shape[0])
        self.head = torch.nn.Linear(*table.shape, bias=False)
        self.head.weight.data.copy_(table.T)

    @property
    def table(self) -> Tensor:
        return self.head.weight.T

    @property
    def score(self) -> torch.nn.Linear:
        return self.head

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def base_model(self, ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> Any:
        """Hidden states are the states, one-hot: (B, T, states)."""
        places = torch.arange(ids.shape[1]).expand_as(ids) if position_ids is None else position_ids
        states = torch.where(places == 1, ids + 1, 0).clamp(max=self.head.in_features - 1)
        hidden = torch.nn.functional.one_hot(states, self.head.in_features).to(self.head.weight.dtype)
        return SimpleNamespace(last_hidden_state=hidden)


@dataclass(frozen=True)
class Judge:
    """A scorer that looks scores up by rule instead of asking a reward model."""

    rule: Callable[[Sequences], Tensor]
    eos_id: int = EOS
    sampler: Any = None

    @property
    def encoder(self) -> Any:
        return SimpleNamespace(ends=(self.eos_id,))

    def scores(self, batch: Sequences, rows: Any = ()) -> Tensor:
        return self.rule(batch)

    def scored(self, batch: Sequences, rows: Any = ()) -> Scored:
        return Scored(self.rule(batch), None, {})

    def shaped(self, batch: Sequences, missing_eos_score: float | None, rows: Any = ()) -> Scored:
        return self.scored(batch)


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_sums(run: RunDir) -> RunDir:
    """The run as one from before sums were kept, whose files a test may change."""
    for file in [*run.path.glob("stages/*/stage.json"), run.marker]:
        record = read_json(file)
        names = [name for name in record.get("files", ()) if not name.startswith("models/")]
        later = ("record_sha256", "files", "made_from", "shared", "judged_by")
        left = {k: v for k, v in record.items() if k not in later}
        write_json(file, left | ({"files": names} if "evaluation" in file.parts else {}))
    return run


def misplaced(model: torch.nn.Module) -> list[str]:
    """Parameters and buffers that do not begin where torch's allocator would have put them."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.data_ptr() % ALIGNMENT]


def passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass through the lowest block."""
    block, seen = model.base_model.get_submodule("h.0"), list[int]()
    own = block.forward

    def counted(states: Tensor, *args: Any, **named: Any) -> Any:
        seen.append(states.shape[1])
        return own(states, *args, **named)

    monkeypatch.setattr(block, "forward", counted)
    return seen
