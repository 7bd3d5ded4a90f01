"""Scores for sampled responses: a reward model's, those of reward functions, or their sum.

The reward model reads token ids where policy and reward model share them, else text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preftune.data import Encoder, Sequences, pad_sequences
from preftune.functional import missing_eos_scores
from preftune.models.load import vocabulary_hash
from preftune.models.roles import RewardModel
from preftune.models.scalar import PAD_TOKEN
from preftune.rollout.functions import RewardFunctions
from preftune.rollout.sample import ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """Normalised scores under a reward model, plus the weighted sum of reward functions; one may be absent.

    `translate` is set where the reward model's tokenizer is not the policy's.
    """

    reward_model: RewardModel | None
    encoder: Encoder  # the policy's
    translate: Encoder | None
    batch_size: int = 32
    functions: RewardFunctions | None = None

    @torch.no_grad()
    def scores(self, sequences: Sequences, rows: Sequence[int] = ()) -> Tensor:
        """(B,), before any missing-EOS rule; NaN where a reward function failed and its response is masked.

        `rows`: see `RewardFunctions.scores`.
        Infinite where the reward model gives no finite number: NaN would pass for masked. DataError where a
        function failed and that stops the run.
        """
        scores = torch.zeros(len(sequences), device=sequences.ids.device)
        if self.reward_model is not None:
            size, model = self.batch_size, self.reward_model
            batches = [sequences[slice(i, i + size)] for i in range(0, len(sequences), size)]
            scores = torch.cat([self._scores(model, batch) for batch in batches])
            scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
        return scores if self.functions is None else scores + self.functions.scores(sequences, rows)

    def _scores(self, model: RewardModel, sequences: Sequences) -> Tensor:
        if self.translate is None:
            return model.scores(sequences)
        judge, rows = self.translate, []  # the encoder of the reward model
        for i, closed in enumerate(ended(sequences, self.encoder.eos_id).tolist()):
            real = sequences.ids[i][sequences.attention[i]]
            written = sequences.response[i][sequences.attention[i]]
            prompt = self.encoder.text_of(real[~written].tolist())
            response = judge.response(self.encoder.decode(real[written].tolist()), ended=closed)
            prompt_ids = judge.text(prompt)
            if judge.max_length is not None:  # its tokens may be shorter than the policy's
                prompt_ids = prompt_ids[-max(judge.max_length - len(response), 1) :]
            rows.append((prompt_ids, response))
        prompts, responses = zip(*rows, strict=True)
        batch = pad_sequences(prompts, responses, judge.pad_id)
        return model.scores(batch.to(sequences.ids.device))

    def shaped(
        self, sequences: Sequences, missing_eos_score: float | None, rows: Sequence[int] = ()
    ) -> Tensor:
        """Scores after the missing-EOS rule: an unfinished response gets `missing_eos_score`, if set; a
        masked one stays NaN.
        """
        scores = self.scores(sequences, rows)
        if missing_eos_score is None:
            return scores
        whole = ended(sequences, self.encoder.eos_id) | scores.isnan()
        return missing_eos_scores(scores, whole, replace=missing_eos_score)


def same_vocabulary(policy: Encoder, reward: Encoder) -> bool:
    """Whether token ids mean the same to both, the reward model's own pad token aside."""
    if vocabulary_hash(policy.tokenizer) == vocabulary_hash(reward.tokenizer):
        return True
    vocabularies = (policy.tokenizer.get_vocab(), reward.tokenizer.get_vocab())
    first, second = ({t: i for t, i in ids.items() if t != PAD_TOKEN} for ids in vocabularies)
    return first == second
