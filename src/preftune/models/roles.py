"""The four roles of a model. How a forward pass is laid out is private to `models.fast`.

Alignment: column t of every result is about token t of `ids`. `logprobs[:, t] = log π(ids_t | ids_<t)` and
`values[:, t] = V(ids_<t)` are read at column t - 1 of the network's output: the shift happens in this file
alone, in `predicting_states` and `Critic.values`.
All models stay in eval mode: dropout would make log-ratios noisy (a loss at the start that is not ln 2 in
DPO).
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.data.batch import Sequences
from preftune.models.adapter import earlier_changes, linear_layers
from preftune.models.fast.head import after_head, logprobs_and_entropy, whole_logits
from preftune.models.fast.layout import fuse_activations
from preftune.models.fast.static import refuse
from preftune.models.fast.support import gather_masked, hidden_at, scatter_masked, states_below, takes_trees
from preftune.models.gate import PromptGate
from preftune.models.layers import language_head
from preftune.models.quantised import quantise
from preftune.models.scalar import POOLED, Pooling, ScalarPerPosition, one_token


def predicting_states(model: PreTrainedModel, sequences: Sequences, chosen: Tensor) -> Tensor:
    """Hidden states from which the tokens under `chosen` are predicted: (N, d)."""
    read = torch.nn.functional.pad(chosen[:, 1:], (0, 1))
    return hidden_at(model, sequences.ids, sequences.attention, read)


def logits_of(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The model's own logits, scaled or capped as its family does: states (n, d) -> (n, V), float32."""
    return after_head(model)(whole_logits(language_head(model), states))


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """Without dropout, which would make log-ratios noisy (a loss at the start of DPO that is not ln 2)."""
    return fuse_activations(model.eval())


class TokenLogprobs(nn.Module):
    """(ids, attention, response) -> log-probability and entropy of response tokens, (B, T), 0 elsewhere.

    The head runs on response positions only, and its logits never exist all at once. A module of its own, so
    that mixed precision sees one forward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, attention: Tensor, response: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        if not len(ids):
            logprobs, entropy = self.forward(*one_token(ids), temperature)
            return logprobs[:0].clone(), entropy[:0].clone()  # no views, which sharded modules may not return
        sequences = Sequences(ids, attention, response)
        states = predicting_states(self.model, sequences, response)
        targets = gather_masked(response, ids, len(states))
        logprobs, entropy = logprobs_and_entropy(
            language_head(self.model), states, targets, temperature, after_head(self.model)
        )
        return scatter_masked(logprobs, response), scatter_masked(entropy, response)


class CausalLM:
    """A causal LM. `dtype`: what its forward passes compute in, float32 unless the learner says otherwise."""

    dtype: torch.dtype = torch.float32

    def __init__(self, model: PreTrainedModel) -> None:
        self.module = TokenLogprobs(_ready(model))

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model inside."""
        return self.module.model

    def logprobs(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        """log π(ids_t | ids_<t) on response columns, 0 elsewhere: (B, T), float32."""
        return self.logprobs_and_entropy(sequences, temperature)[0]

    def logprobs_and_entropy(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `logprobs`, with the entropy (nats, no gradient) of each distribution: both (B, T)."""
        with casting(self):
            return self.module(sequences.ids, sequences.attention, sequences.response, temperature)


class Policy(CausalLM):
    """The causal LM being trained."""


class Reference(CausalLM):
    """A frozen causal LM: what the policy is kept close to. Its log-probs have no gradient."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.requires_grad_(False))

    logprobs_and_entropy = torch.no_grad()(CausalLM.logprobs_and_entropy)


def _at_end(sequences: Sequences) -> Tensor:
    """True at the last real token of each row, found by length and never by token id: (B, T)."""
    last = sequences.attention.sum(1, keepdim=True) - 1
    return torch.arange(sequences.ids.shape[1], device=last.device) == last.clamp(min=0)


def _of_whole(per_position: Tensor, sequences: Sequences) -> Tensor:
    """The number at the last real token of each row: (..., B, T) -> (..., B)."""
    return torch.where(_at_end(sequences), per_position, 0.0).sum(-1)


def _prompt_of(sequences: Sequences) -> Tensor:
    """True on the tokens of the prompts: (B, T)."""
    return sequences.attention.bool() & ~sequences.response


class LogRatioPerPosition(nn.Module):
    """(ids, attention, response) -> β Σ_{s≤t} log π(y_s)/π_ref(y_s) at response token t: (B, T); `averaged`
    over these tokens, where the policy was trained on such averages.
    """

    def __init__(
        self, policy: PreTrainedModel, reference: PreTrainedModel, beta: float, averaged: bool = False
    ) -> None:
        super().__init__()
        self.policy, self.reference, self.beta = TokenLogprobs(policy), TokenLogprobs(reference), beta
        self.averaged = averaged

    @property
    def model(self) -> PreTrainedModel:
        return self.policy.model

    def forward(self, ids: Tensor, attention: Tensor, response: Tensor) -> Tensor:
        policy, reference = (m(ids, attention, response, 1.0)[0] for m in (self.policy, self.reference))
        ratios = self.beta * (policy - reference).cumsum(1)
        if self.averaged:
            ratios = ratios / response.cumsum(1).clamp(min=1)
        return torch.where(response, ratios, 0.0)


class MembersPerPosition(nn.Module):
    """Several scalar heads at once, each normalised by its (mean, sd): (ids, attention, read, prompt), all
    (B, T) -> (M, B, T), 0 where none is read, and by a gate each one's share in the prompt, (M, B).
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        units: Sequence[tuple[float, float]],
        gate: PromptGate | None = None,
        pooling: Pooling = "last",
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(POOLED[pooling](model) for model in models)
        self.units, self.gate = units, gate

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        return tuple(member.model for member in self.members if isinstance(member, ScalarPerPosition))

    @property
    def model(self) -> PreTrainedModel:
        """The first one."""
        return self.models[0]

    def forward(
        self, ids: Tensor, attention: Tensor, read: Tensor, prompt: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        raw = [member(ids, attention, read) for member in self.members]
        normal = [(scores - mean) / std for scores, (mean, std) in zip(raw, self.units, strict=True)]
        return torch.where(read, torch.stack(normal), 0.0), self._shares(ids, attention, prompt)

    def _shares(self, ids: Tensor, attention: Tensor, prompt: Tensor) -> Tensor | None:
        if self.gate is None:
            return None
        if not len(ids):
            return self.gate(self.model, *one_token(ids))[:, :0].clone()
        return self.gate(self.model, ids, attention, prompt)


class _Scalar:
    """A backbone with one number per position, and the mean and sd by which that is normalised."""

    module: ScalarPerPosition | LogRatioPerPosition | MembersPerPosition
    dtype: torch.dtype = torch.float32

    def __init__(self, model: PreTrainedModel, mean: float = 0.0, std: float = 1.0) -> None:
        self.module, self.mean, self.std = ScalarPerPosition(_ready(model)), mean, std

    @property
    def model(self) -> PreTrainedModel:
        return self.module.model

    def normalised(self, raw: Tensor) -> Tensor:
        """(raw - mean) / std"""
        return (raw - self.mean) / self.std

    def per_position(self, sequences: Sequences, read: Tensor) -> Tensor:
        """Raw numbers where they are read, in the role's precision: (B, T), 0 elsewhere."""
        with casting(self):
            return self.module(sequences.ids, sequences.attention, read)


class RewardModel(_Scalar):
    """Scores whole responses; `mean` and `std` make that mean 0 and sd 1 on chosen responses. `pooling`: see
    `models.scalar`.
    """

    pooling: Pooling = "last"

    def __init__(
        self, model: PreTrainedModel, mean: float = 0.0, std: float = 1.0, pooling: Pooling = "last"
    ) -> None:
        self.module, self.mean, self.std = POOLED[pooling](_ready(model)), mean, std
        self.pooling = pooling

    def raw_scores(self, sequences: Sequences) -> Tensor:
        """The score at the last real token, of that token or of the response up to it: (B,)."""
        return _of_whole(self.per_position(sequences, self._read(sequences)), sequences)

    def _read(self, sequences: Sequences) -> Tensor:
        """Where a number has to be read for the score of whole responses: (B, T)."""
        end = _at_end(sequences)
        return end if self.pooling == "last" else end | sequences.response

    @torch.no_grad()
    def response_states(self, sequences: Sequences) -> Tensor:
        """What the head reads of whole responses, the last state or the mean one: (B, d), float32."""
        read = self._read(sequences)
        ids, attention, read_or_one = (
            (sequences.ids, sequences.attention, read) if len(read) else one_token(sequences.ids)
        )
        with casting(self):
            states = hidden_at(self.model, ids, attention, read_or_one).float()
        rows = states.split(read_or_one.sum(1).tolist())
        return torch.stack([row.mean(0) for row in rows])[: len(read)]

    @torch.no_grad()
    def prompt_states(self, sequences: Sequences, blocks: int) -> Tensor:
        """The states of the prompts' last tokens after so many blocks, by which a gate knows them: (B, d)."""
        with casting(self):
            return states_below(
                self.model, blocks, sequences.ids, sequences.attention, _prompt_of(sequences)
            ).float()

    def raw_and_members(self, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
        """Raw scores (B,), and those of an ensemble's members, (M, B); None where there is one model."""
        return self.raw_scores(sequences), None


class ImplicitReward(RewardModel):
    """A policy trained by DPO, read as a reward model: r(x, y) = β log π(y|x)/π_ref(y|x), which is the reward
    that DPO fits, up to a term of the prompt alone (Rafailov et al., arXiv:2305.18290, section 5; per token:
    Yuan et al., arXiv:2412.01981); `averaged`: divided by the length of y, as with length_average.
    It sees single tokens where a scalar head sees one state.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        beta: float,
        mean: float = 0.0,
        std: float = 1.0,
        averaged: bool = False,
    ) -> None:
        module = LogRatioPerPosition(_ready(policy), _ready(reference), beta, averaged)
        self.module, self.mean, self.std = module.requires_grad_(False), mean, std

    def _read(self, sequences: Sequences) -> Tensor:
        """All of the response, EOS included."""
        return sequences.response


Combine = Literal["mean", "min", "mean-sd"]


class Ensemble(RewardModel):
    """Reward models that differ in their head and order of rows. Their normalised scores r_i become one, the
    ensemble's raw score: mean r_i, min r_i, or mean - sd_coef · sd (Coste et al., arXiv:2310.02743, subtract
    the variance; an sd has the unit of the scores). With a `gate` they are experts, each trained on its own
    kind of rows, and the score is that of the expert to which the gate gives the largest share in the prompt.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        units: Sequence[tuple[float, float]],
        combine: Combine,
        sd_coef: float,
        mean: float,
        std: float,
        gate: PromptGate | None = None,
        pooling: Pooling = "last",
    ) -> None:
        members = MembersPerPosition([_ready(model) for model in models], units, gate, pooling)
        self.module, self.mean, self.std = members.requires_grad_(False), mean, std
        self.pooling = pooling
        self.combine, self.sd_coef, self.gate = combine, sd_coef, gate

    @property
    def in_words(self) -> str:
        """How the members' scores are combined: "mean - 0.5 sd"."""
        if self.gate is not None:
            return "the expert for the kind of prompt"
        return f"mean - {self.sd_coef:g} sd" if self.combine == "mean-sd" else self.combine

    def per_position(self, sequences: Sequences, read: Tensor) -> Tensor:
        return self._combined(*self._members(sequences, read))

    def raw_and_members(self, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
        per_position, shares = self._members(sequences, self._read(sequences))
        members = _of_whole(per_position, sequences)
        return self._combined(members, shares), members

    def _members(self, sequences: Sequences, read: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each member's normalised score where it is read, (M, B, T), and its share in the prompt, (M, B)."""
        with casting(self):
            return self.module(sequences.ids, sequences.attention, read, _prompt_of(sequences))

    def _combined(self, members: Tensor, shares: Tensor | None) -> Tensor:
        """(M, B, ...) -> (B, ...)"""
        if shares is not None:
            expert = shares.argmax(0).reshape(1, -1, *(1,) * (members.ndim - 2))
            return members.take_along_dim(expert, 0).squeeze(0)
        if self.combine == "min":
            return members.amin(0)
        spread = self.sd_coef * members.std(0, correction=0) if self.combine == "mean-sd" else 0.0
        return members.mean(0) - spread


class Critic(_Scalar):
    """Predicts the return from each state, with a reward model's backbone and head, in normalised scores."""

    def values(self, sequences: Sequences) -> Tensor:
        """V(ids_<t), the value of the state in which token t was chosen, on response columns: (B, T)."""
        read = torch.nn.functional.pad(sequences.response[:, 1:], (0, 1))
        values = self.normalised(self.per_position(sequences, read))
        shifted = torch.nn.functional.pad(values[:, :-1], (1, 0))
        return torch.where(sequences.response, shifted, torch.zeros_like(shifted))


Role = Policy | Reference | RewardModel | Critic


def models_of(role: Role) -> tuple[PreTrainedModel, ...]:
    """The models inside of a role: one, the two of an implicit reward, an ensemble's members."""
    return models_in(role.module)


def models_in(
    module: TokenLogprobs | ScalarPerPosition | LogRatioPerPosition | MembersPerPosition,
) -> tuple[PreTrainedModel, ...]:
    """The models inside of a role's module."""
    if isinstance(module, MembersPerPosition):
        return module.models
    if isinstance(module, LogRatioPerPosition):
        return module.policy.model, module.reference.model
    return (module.model,)


def quantise_role(role: Role) -> None:
    """The linear layers below the heads in 4 bits. Whether rows may be laid out as trees is tried before, in
    float32; bitsandbytes' kernels have never been recorded as a CUDA graph, so that is refused. What adapters
    of earlier stages have learnt stays in float32: rounded to 4 bits with the weights, most would be lost.
    """
    for model in models_of(role):
        takes_trees(model)
        refuse(model)
        path = model.name_or_path  # none: made in memory
        quantise(model, linear_layers(model), earlier_changes(Path(path)) if path else {})


def by_tree(role: Role) -> bool:
    """Whether a role's passes lay rows out as trees: not where a trial gave other numbers."""
    return all(takes_trees(model) for model in models_of(role))


@contextlib.contextmanager
def casting(role: CausalLM | _Scalar) -> Iterator[None]:
    """The precision of a role's forward passes. Without gradients each weight is rounded only once within
    `with`: the sampler uses it at every token.
    """
    if role.dtype == torch.float32:
        yield
        return
    # Autocast remembers only what requires a gradient.
    parameters = [] if torch.is_grad_enabled() else role.module.parameters()
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point()]
    with torch.autocast(next(role.model.parameters()).device.type, role.dtype):
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
