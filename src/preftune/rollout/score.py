"""Scores for sampled responses: by token ids where policy and reward model share them, else by text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from preftune.data import Encoder, Sequences, pad_sequences
from preftune.functional import missing_eos_scores
from preftune.models.load import vocabulary_hash
from preftune.models.roles import RewardModel
from preftune.models.scalar import PAD_TOKEN
from preftune.rollout.sample import ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """Normalised scores under a reward model. `translate` is set where its tokenizer is not the policy's."""

    reward_model: RewardModel
    encoder: Encoder  # the policy's
    translate: Encoder | None
    batch_size: int = 32

    @torch.no_grad()
    def scores(self, sequences: Sequences) -> Tensor:
        """(B,), before any missing-EOS rule."""
        batches = range(0, len(sequences), self.batch_size)
        return torch.cat([self._scores(sequences[slice(i, i + self.batch_size)]) for i in batches])

    def _scores(self, sequences: Sequences) -> Tensor:
        if self.translate is None:
            return self.reward_model.scores(sequences)
        theirs, rows = self.translate, []
        for i, closed in enumerate(ended(sequences, self.encoder.eos_id).tolist()):
            real = sequences.ids[i][sequences.attention[i]]
            written = sequences.response[i][sequences.attention[i]]
            prompt = self.encoder.tokenizer.decode(
                real[~written].tolist(), clean_up_tokenization_spaces=False
            )
            response = theirs.response(self.encoder.decode(real[written].tolist()), ended=closed)
            prompt_ids = theirs.text(prompt)
            if theirs.max_length is not None:  # its tokens may be shorter than ours
                prompt_ids = prompt_ids[-max(theirs.max_length - len(response), 1) :]
            rows.append((prompt_ids, response))
        prompts, responses = zip(*rows, strict=True)
        batch = pad_sequences(prompts, responses, theirs.pad_id)
        return self.reward_model.scores(batch.to(sequences.ids.device))

    def shaped(self, sequences: Sequences, missing_eos_score: float | None) -> Tensor:
        """Scores after the missing-EOS rule: an unfinished response gets `missing_eos_score`, if set."""
        scores = self.scores(sequences)
        if missing_eos_score is None:
            return scores
        return missing_eos_scores(scores, ended(sequences, self.encoder.eos_id), replace=missing_eos_score)


def same_vocabulary(policy: Encoder, reward: Encoder) -> bool:
    """Whether token ids mean the same to both, the reward model's own pad token aside."""
    if vocabulary_hash(policy.tokenizer) == vocabulary_hash(reward.tokenizer):
        return True
    ours, theirs = policy.tokenizer.get_vocab(), reward.tokenizer.get_vocab()
    return {t: i for t, i in theirs.items() if t != PAD_TOKEN} == {
        t: i for t, i in ours.items() if t != PAD_TOKEN
    }
