"""Scores for sampled responses: a reward model's, those of reward functions, or their sum.

The reward model reads token ids where policy and reward model share them, else text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from preftune.data import Encoder, Preference, Sequences, pad_sequences
from preftune.errors import DataError
from preftune.functional import missing_eos_scores
from preftune.models.roles import RewardModel
from preftune.models.scalar import PAD_TOKEN
from preftune.models.shards import readable
from preftune.rollout.functions import RewardFunctions
from preftune.rollout.sample import as_lists, ended
from preftune.rollout.sampler import Sampler


class Scored(NamedTuple):
    """Of B responses: scores (B,); those by member, (M, B), of an ensemble; what each reward function gave,
    (B,) by its name (`Rewards.by_function`).
    """

    scores: Tensor
    members: Tensor | None
    by_function: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """Normalised scores under a reward model, plus the weighted sum of reward functions; one may be absent.

    `translate` is set where the reward model's tokenizer is not the policy's; in chat form the reward
    model's own template then writes the dialogue of the prompt's data row, one of `rows`.
    """

    reward_model: RewardModel | None
    encoder: Encoder  # the policy's
    translate: Encoder | None
    batch_size: int = 32
    functions: RewardFunctions | None = None
    rows: Sequence[Preference] = ()
    say: Callable[[str], None] | None = None  # whom to warn
    warned: set[str] = field(default_factory=set)
    sampler: Sampler | None = None  # what draws the responses, if not the sampler here

    @torch.no_grad()
    def scores(self, sequences: Sequences, rows: Sequence[int] = ()) -> Tensor:
        """(B,), before any missing-EOS rule; NaN where a reward function failed and its response is masked.

        `rows`: see `RewardFunctions.rewards`. Infinite where the reward model gives no finite number: NaN
        would mean masked. DataError where a function failed and `on_error` is "stop".
        """
        return self.scored(sequences, rows).scores

    @torch.no_grad()
    def scored(self, sequences: Sequences, rows: Sequence[int] = ()) -> Scored:
        """As `scores`, with what they are made of."""
        scores, members = torch.zeros(len(sequences), device=sequences.ids.device), None
        if self.reward_model is not None:
            size, model = self.batch_size, self.reward_model
            spans = [slice(i, i + size) for i in range(0, max(len(sequences), 1), size)]
            with readable(model):
                outputs = [
                    model.raw_and_members(self._for_judge(sequences[span], rows[span])) for span in spans
                ]
            scores = torch.cat([model.normalised(raw) for raw, _ in outputs])
            scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
            member_scores = [by_member for _, by_member in outputs if by_member is not None]
            members = torch.cat(member_scores, 1) if member_scores else None
        by_function: dict[str, Tensor] = {}
        if self.functions is not None:
            total, by_function = self.functions.rewards(sequences, rows, alone=self.reward_model is None)
            scores = scores + total
        return Scored(scores, members, by_function)

    def _for_judge(self, sequences: Sequences, rows: Sequence[int]) -> Sequences:
        """The rows as the reward model reads them."""
        if self.translate is None or not len(sequences):
            return sequences
        numbers, texts = list(rows), []
        for i, (prompt_ids, ids, closed) in enumerate(as_lists(sequences, self.encoder.ends)):
            response = self.encoder.decode(ids, prompt_ids)
            row = self.rows[numbers[i]] if numbers and self.rows else None
            texts.append(self._translated(self.translate, prompt_ids, row, response, closed))
        prompts, responses = zip(*texts, strict=True)
        return pad_sequences(prompts, responses, self.translate.pad_id).to(sequences.ids.device)

    def _translated(
        self, judge: Encoder, prompt_ids: list[int], row: Preference | None, response: str, closed: bool
    ) -> tuple[list[int], list[int]]:
        """Prompt and response as the reward model reads them; its tokens may be shorter than the policy's. A
        response that leaves no room for a token of the prompt loses its end.
        """
        room = judge.max_length
        most = None if room is None else room - 1
        if judge.form == self.encoder.form == "transcript":
            ids, prompt = judge.response(response, closed), judge.text(self.encoder.prompt_text(prompt_ids))
            ids = ids[:most]
            return prompt if room is None else prompt[len(ids) - room :], ids
        if row is None:
            raise DataError(
                "a prompt of no data row cannot be written in the reward model's form",
                hint="use a reward model with the policy's tokenizer",
            )
        ids = judge.response(response, closed, row.prompt)[:most]
        limit = judge.max_prompt_length if room is None else room - len(ids)
        return judge.prompt(row.prompt, min(limit, judge.max_prompt_length)), ids

    def shaped(
        self, sequences: Sequences, missing_eos_score: float | None, rows: Sequence[int] = ()
    ) -> Scored:
        """As `scored`, with scores after the missing-EOS rule: an unfinished response gets
        `missing_eos_score`, if set; a masked one stays NaN.
        """
        scored = self.scored(sequences, rows)
        if missing_eos_score is None:
            return scored
        scores, closed = scored.scores, ended(sequences, self.encoder.ends)
        self._warn(scores[closed & ~scores.isnan()], missing_eos_score)
        shaped = missing_eos_scores(scores, closed | scores.isnan(), replace=missing_eos_score)
        return scored._replace(scores=shaped)

    def _warn(self, ended_scores: Tensor, missing_eos_score: float) -> None:
        """Once, where no reward model gives the scores a scale and an end pays less than being cut off."""
        worse = ended_scores[ended_scores < missing_eos_score]
        if self.reward_model is not None or self.say is None or self.warned or not len(worse):
            return
        self.warned.add("missing_eos_score")
        self.say(
            f"warning: {len(worse)} of {len(ended_scores)} responses that ended scored below "
            f"missing_eos_score = {missing_eos_score:g} (down to {worse.min().item():.3g}): "
            "being cut off pays more than an end; set missing_eos_score=none, or lower than any score"
        )


def read_alike(policy: Encoder, reward: Encoder) -> bool:
    """Whether both write a dialogue as the same token ids, to its last one."""
    if policy.form != reward.form or reward.after_end:
        return False
    if policy.form == "chat" and (policy.tokenizer.chat_template, policy.template_arguments) != (
        reward.tokenizer.chat_template,
        reward.template_arguments,
    ):
        return False
    return same_vocabulary(policy, reward)


def same_vocabulary(policy: Encoder, reward: Encoder) -> bool:
    """Whether token ids mean the same to both, the reward model's own pad token aside."""
    vocabularies = (policy.tokenizer.get_vocab(), reward.tokenizer.get_vocab())
    first, second = ({t: i for t, i in ids.items() if t != PAD_TOKEN} for ids in vocabularies)
    return first == second
