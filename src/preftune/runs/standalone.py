"""Saved models as objects to use: score text, look up log-probabilities, generate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from preftune.data import Encoder, Sequences, pad_prompts, pad_sequences
from preftune.errors import DataError, InputMissing
from preftune.models.load import context_length, load_causal_lm, load_tokenizer
from preftune.models.locate import Source, locate
from preftune.models.roles import Policy, RewardModel
from preftune.rollout.sample import sample
from preftune.runs.save import load_reward_model as _load_roles
from preftune.runs.save import read_side_file
from preftune.seeding import derive_seed

_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelHandle:
    """A reward model on text. Prompts end in "Assistant:", responses start with a space, as in HH-RLHF."""

    role: RewardModel
    encoder: Encoder

    def score(self, prompts: Sequence[str], responses: Sequence[str], ended: bool = True) -> Tensor:
        """Normalised scores (B,): mean 0 and sd 1 over the chosen training responses. `ended`: append EOS."""
        return (self.raw_score(prompts, responses, ended) - self.role.mean) / self.role.std

    @torch.no_grad()
    def raw_score(self, prompts: Sequence[str], responses: Sequence[str], ended: bool = True) -> Tensor:
        """What the weights give: (B,). Independent of batch and padding."""
        rows = [
            (self.encoder.text(prompt), self.encoder.response(response, ended=ended))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        for i, (prompt_ids, response_ids) in enumerate(rows):
            _room(i, len(prompt_ids) + len(response_ids), self.encoder)
        scores = [torch.zeros(0)]
        for start in range(0, len(rows), _BATCH):
            prompt_ids, response_ids = zip(*rows[start : start + _BATCH], strict=True)
            scores.append(self.role.raw_scores(pad_sequences(prompt_ids, response_ids, self.encoder.pad_id)))
        return torch.cat(scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyHandle:
    """A causal language model on text."""

    role: Policy
    encoder: Encoder

    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> Tensor:
        """log π(ids_t | ids_<t) on response columns: (B, T)."""
        return self.role.logprobs(sequences)

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 64, temperature: float = 1.0, seed: int = 0
    ) -> list[str]:
        """One reply a prompt, EOS stripped; prompt i's reply depends on (seed, i) alone. temperature 0 is
        greedy. A reply ends where the model's context does.
        """
        rows = [self.encoder.text(text) for text in prompts]
        limits = [min(max_new_tokens, _room(i, len(row) + 1, self.encoder) + 1) for i, row in enumerate(rows)]
        replies: dict[int, str] = {}
        for limit in sorted(set(limits)):
            equal = [i for i in range(len(rows)) if limits[i] == limit]
            for start in range(0, len(equal), _BATCH):
                part = equal[start : start + _BATCH]
                seeds = [derive_seed(seed, "generate", i) for i in part]
                out = sample(
                    self.role,
                    pad_prompts([rows[i] for i in part], seeds, self.encoder.eos_id),
                    max_new_tokens=limit,
                    temperature=temperature,
                    eos_id=self.encoder.eos_id,
                )
                for i, ids, own in zip(part, out.ids, out.response, strict=True):
                    replies[i] = self.encoder.decode(ids[own].tolist())
        return [replies[i] for i in range(len(rows))]


def load_reward_model(directory: str | Path) -> RewardModelHandle:
    """A reward model saved by preftune, or any one-label sequence-classification directory (then mean 0, sd
    1).
    """
    source = _directory(directory)
    return RewardModelHandle(role=_load_roles(source), encoder=_encoder(source))


def load_policy(directory: str | Path) -> PolicyHandle:
    """A policy saved by preftune, or any causal LM directory."""
    source = _directory(directory)
    read_side_file(source)
    return PolicyHandle(role=Policy(load_causal_lm(source)), encoder=_encoder(source))


def _encoder(source: Source) -> Encoder:
    return Encoder.of_texts(load_tokenizer(source), context_length(source))


def _room(row: int, length: int, encoder: Encoder) -> int:
    """Tokens that the context leaves beside `length` of them. DataError if there are too many already."""
    assert encoder.max_length is not None
    if length > encoder.max_length:
        raise DataError(
            f"prompt {row} is too long: {length} tokens in a context of {encoder.max_length} tokens",
            hint="shorten the prompt or the response",
        )
    return encoder.max_length - length


def _directory(directory: str | Path) -> Source:
    if not Path(directory).is_dir():
        raise InputMissing(
            f"no model directory at {directory}", hint="models lie in models/ of a run directory"
        )
    return locate(str(directory))
