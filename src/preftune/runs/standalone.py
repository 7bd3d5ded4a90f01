"""Saved models as objects to use: score text, look up log-probabilities, generate.

A prompt is text in the form that the model was trained with, or a list of messages {role, content}. That form
is in preftune.json; without it, it is the chat template of a tokenizer that has one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preftune.data import Dialogue, Encoder, Sequences, Turn, pad_prompts, pad_sequences
from preftune.data.dialogue import ROLES
from preftune.data.encode import UNLIMITED
from preftune.errors import DataError, InputMissing, UsageError, no_bare_text
from preftune.models.load import load_causal_lm
from preftune.models.locate import Source, locate
from preftune.models.roles import Policy, RewardModel
from preftune.rollout.sample import sample
from preftune.runs.outside import encoder_of
from preftune.runs.save import check_sums, read_side_file
from preftune.runs.save import load_reward_model as _load_roles
from preftune.seeding import derive_seed

_BATCH = 16
_ROLES: Mapping[str, Any] = {theirs: ours for ours, theirs in ROLES.items()}

Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelHandle:
    """A reward model on text. In transcript form prompts end in "Assistant:" and responses start with a
    space, as in HH-RLHF. Behind messages a response is closed as the model's template closes it, behind text
    by the end token alone.
    """

    role: RewardModel
    encoder: Encoder

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], ended: bool = True) -> Tensor:
        """Normalised scores (B,): mean 0 and sd 1 over the chosen training responses. `ended`: append EOS."""
        return self.role.normalised(self.raw_score(prompts, responses, ended))

    def raw_score(self, prompts: Sequence[Prompt], responses: Sequence[str], ended: bool = True) -> Tensor:
        """What the weights give: (B,). Independent of batch and padding. Of an ensemble: its members' scores
        combined.
        """
        return self._raw_and_members(prompts, responses, ended)[0]

    def member_scores(
        self, prompts: Sequence[Prompt], responses: Sequence[str], ended: bool = True
    ) -> Tensor:
        """Normalised scores of each member of an ensemble, (M, B); of one model, (1, B). Their sd over M says
        how far they disagree.
        """
        raw, members = self._raw_and_members(prompts, responses, ended)
        return self.role.normalised(raw).unsqueeze(0) if members is None else members

    @torch.no_grad()
    def _raw_and_members(
        self, prompts: Sequence[Prompt], responses: Sequence[str], ended: bool
    ) -> tuple[Tensor, Tensor | None]:
        _one_response_each(prompts, responses, ended)
        rows = [
            (_prompt(self.encoder, prompt), _response(self.encoder, prompt, response, ended))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        for i, (prompt_ids, response_ids) in enumerate(rows):
            _room(i, len(prompt_ids) + len(response_ids), self.encoder)
        results: list[tuple[Tensor, Tensor | None]] = []
        for start in range(0, len(rows), _BATCH):
            prompt_ids, response_ids = zip(*rows[start : start + _BATCH], strict=True)
            batch = pad_sequences(prompt_ids, response_ids, self.encoder.pad_id)
            results.append(self.role.raw_and_members(batch))
        members = [scores for _, scores in results if scores is not None]
        return torch.cat([torch.zeros(0), *(raw for raw, _ in results)]), torch.cat(
            members, 1
        ) if members else None


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
        self, prompts: Sequence[Prompt], max_new_tokens: int = 64, temperature: float = 1.0, seed: int = 0
    ) -> list[str]:
        """One reply a prompt, EOS stripped; prompt i's reply depends on (seed, i) alone. temperature 0 is
        greedy. A reply ends where the model's context does.
        """
        no_bare_text("prompts", prompts)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens = {max_new_tokens}: a reply has at least one token")
        if not 0 <= temperature < math.inf:
            raise UsageError(f"temperature = {temperature}: it is 0 (greedy) or a number above")
        rows = [_prompt(self.encoder, prompt) for prompt in prompts]
        limits = [min(max_new_tokens, _room(i, len(row) + 1, self.encoder) + 1) for i, row in enumerate(rows)]
        replies: dict[int, str] = {}
        for limit in sorted(set(limits)):
            equal = [i for i in range(len(rows)) if limits[i] == limit]
            for start in range(0, len(equal), _BATCH):
                numbers = equal[start : start + _BATCH]
                seeds = [derive_seed(seed, "generate", i) for i in numbers]
                out = sample(
                    self.role,
                    pad_prompts([rows[i] for i in numbers], seeds, self.encoder.eos_id),
                    max_new_tokens=limit,
                    temperature=temperature,
                    eos_id=self.encoder.ends,
                )
                for i, ids, mask in zip(numbers, out.ids, out.response, strict=True):
                    replies[i] = self.encoder.decode(ids[mask].tolist(), rows[i])
        return [replies[i] for i in range(len(rows))]


def load_reward_model(directory: str | Path) -> RewardModelHandle:
    """A reward model saved by preftune, or any one-label sequence-classification directory (then mean 0, sd
    1).
    """
    source = _directory(directory)
    encoder = encoder_of(source, read_side_file(source), judge=True)
    return RewardModelHandle(role=_load_roles(source), encoder=encoder)


def load_policy(directory: str | Path) -> PolicyHandle:
    """A policy saved by preftune, or any causal LM directory."""
    source = _directory(directory)
    encoder = encoder_of(source, read_side_file(source))
    return PolicyHandle(role=Policy(load_causal_lm(source)), encoder=encoder)


def _one_response_each(prompts: Sequence[Prompt], responses: Sequence[str], ended: bool) -> None:
    """UsageError unless there is a response to each prompt, each a text, and one answer for `ended`."""
    no_bare_text("prompts", prompts)
    no_bare_text("responses", responses)
    if len(prompts) != len(responses):
        raise UsageError(
            f"{len(prompts)} prompts and {len(responses)} responses: one response to each prompt"
        )
    for i, response in enumerate(responses):
        if not isinstance(response, str):
            raise UsageError(f"response {i} is {response!r:.80}, no text")
    if not isinstance(ended, int | np.bool_):  # a list would count as true, whatever is in it
        raise UsageError(f"ended is {type(ended).__name__}, not one bool for all responses")


def _prompt(encoder: Encoder, prompt: Prompt) -> list[int]:
    """Ids of a prompt, not truncated."""
    return encoder.text(prompt) if isinstance(prompt, str) else encoder.prompt(_dialogue(prompt), UNLIMITED)


def _response(encoder: Encoder, prompt: Prompt, response: str, ended: bool) -> list[int]:
    """Ids of a response. Behind text, template and all, nothing follows the end token that is not written."""
    if not isinstance(prompt, str):
        return encoder.response(response, ended, _dialogue(prompt))
    ids, after = encoder.response(response, ended), len(encoder.after_end)
    return ids[:-after] if after and ids[-after:] == encoder.after_end else ids


def _dialogue(messages: Sequence[Mapping[str, str]]) -> Dialogue:
    try:
        return Dialogue(Turn(_ROLES[m["role"]], f" {m['content'].strip()}") for m in messages)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"a prompt is no list of messages: {error!r}",
            hint='give text, or [{"role": "user", "content": "Hello"}]; roles are user, assistant and system',
        ) from None


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
    check_sums(Path(directory))
    return locate(str(directory))
