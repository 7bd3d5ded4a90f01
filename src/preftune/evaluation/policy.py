"""One measurement for every policy: the same prompts, seeds, lengths and temperature for all."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from preftune.config import EvaluationConfig
from preftune.data import Encoder, Preference, RejectedRow, Sequences, pad_sequences
from preftune.errors import PreftuneError
from preftune.evaluation.divergence import divergences
from preftune.models.roles import Policy, Reference
from preftune.rollout.sample import as_lists, sample
from preftune.rollout.score import Scorer
from preftune.seeding import derive_seed
from preftune.training.learner import Learner

Gold = Callable[[str, str, bool], float]  # (prompt, response, ended) -> score by rule
Summary = dict[str, Any]
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What is the same for every policy that is measured, and how one is measured under it."""

    prompts: Sequence[Preference]
    encoder: Encoder
    scorer: Scorer | None  # None where the run has no reward model
    reference: Reference  # SFT, or the base without an SFT stage
    settings: EvaluationConfig
    seed: int
    device: torch.device
    gold: Gold | None = None
    golds: Mapping[str, Scorer] = field(default_factory=dict)  # judges called gold, by name
    held_out: Scorer | None = None  # a second reward model, which trained no policy
    say: Callable[[str], None] | None = None  # what to tell whoever runs this
    learner: Learner | None = None  # where batches are shared by its processes, all of which come by

    def rows(
        self, policy: Policy | Reference, advance: Callable[[int], None], responses: int = 1
    ) -> list[Row]:
        """Sample and measure `responses` to every prompt; rows of one prompt follow each other."""
        batches: list[tuple[int, list[Row]]] = []
        for start, sequences in self._sampled(policy, advance, responses, "evaluation"):
            k1, exact = divergences(policy, self.reference, sequences, self.settings.temperature)
            rows = self._described(sequences, start, responses)
            batches.append((start, [row | {"kl": exact[i], "k1": k1[i]} for i, row in enumerate(rows)]))
        return self._of_all(batches)

    def pool(self, advance: Callable[[int], None], size: int) -> list[Row]:
        """`size` other responses of the reference to every prompt, those to one prompt in succession, without
        KL.

        Other ones, because best-of-n must not choose from the very sample it is compared with.
        """
        purpose = f"best of {self.settings.best_of}"
        sampled = self._sampled(self.reference, advance, size, purpose)
        return self._of_all([(start, self._described(batch, start, size)) for start, batch in sampled])

    def human(self, texts: Sequence[str]) -> list[Row]:
        """A given response to every prompt, measured like a policy's; score None where it does not fit."""
        rows: list[Row] = []
        for i, (pair, text) in enumerate(zip(self.prompts, texts, strict=True)):
            try:
                prompt_ids, response_ids = self.encoder.sequence(pair.prompt, text, pair.ended[0])
            except RejectedRow:
                rows.append({"row": i, "response": text, "score": None, "held_out": None, "gold": None})
                continue
            batch = pad_sequences([prompt_ids], [response_ids], self.encoder.pad_id).to(self.device)
            rows += self._described(batch, i, 1)
        return rows

    def batch(self, rows: Sequence[Row]) -> Sequences:
        """Measured `rows` as models read them: prompts and the ids of their responses."""
        prompts = [self.encoder.prompt(self.prompts[row["row"]].prompt) for row in rows]
        return pad_sequences(prompts, [row["ids"] for row in rows], self.encoder.pad_id).to(self.device)

    def reverse_kl(self, policy: Policy | Reference, rows: Sequence[Row]) -> list[float]:
        """KL(reference || policy) on each of the reference's own `rows`, summed over each, in nats."""
        batches: list[tuple[int, list[float]]] = []
        size = self.settings.batch_size
        for start in self._mine(range(0, len(rows), size)):
            batch = self.batch(rows[start : start + size])
            exact = divergences(self.reference, policy, batch, self.settings.temperature)[1]
            batches.append((start, exact))
        return self._of_all(batches)

    def _mine(self, starts: range) -> range:
        """Which batches are this process's: whole ones, in turns, so that each is what one process has."""
        return starts if self.learner is None else starts[self.learner.rank :: self.learner.world]

    def _of_all(self, batches: list[tuple[int, list[T]]]) -> list[T]:
        """What all processes have found, in the order of rows."""
        gathered = batches if self.learner is None else self.learner.gather_items(batches)
        return [value for _, values in sorted(gathered, key=lambda batch: batch[0]) for value in values]

    def _sampled(
        self, policy: Policy | Reference, advance: Callable[[int], None], responses: int, purpose: str
    ) -> Iterator[tuple[int, Sequences]]:
        """(number of the first prompt, responses to it and the next ones), batch by batch."""
        settings = self.settings
        per_batch = max(settings.batch_size // responses, 1)
        for start in self._mine(range(0, len(self.prompts), per_batch)):
            prompts = self.prompts[start : start + per_batch]
            seeds = [derive_seed(self.seed, purpose, start + i) for i in range(len(prompts))]
            yield (
                start,
                sample(
                    policy,
                    self.encoder.prompts([p.prompt for p in prompts], seeds).to(self.device),
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    eos_id=self.encoder.ends,
                    responses_per_prompt=responses,
                    say=self.say,
                    keeps_states=True,
                ),
            )
            advance(len(prompts) * (1 if self.learner is None else self.learner.world))

    def _described(self, sequences: Sequences, start: int, responses: int) -> list[Row]:
        """Texts, lengths and scores of sampled rows; the first belongs to prompt number `start`."""
        unscored = [None] * len(sequences)
        numbers = [start + i // responses for i in range(len(sequences))]  # of the prompts
        scores, members = _finite(self.scorer, sequences, numbers) if self.scorer else (unscored, None)
        second = _finite(self.held_out, sequences, numbers)[0] if self.held_out else unscored
        golds = {name: _finite(scorer, sequences, numbers)[0] for name, scorer in self.golds.items()}
        rows = []
        for i, (_, ids, closed) in enumerate(as_lists(sequences, self.encoder.ends)):
            number = numbers[i]
            prompt, text = self.prompts[number].prompt, self.encoder.decode(ids)
            row = {
                "row": number,
                "prompt": self.encoder.readable_prompt(prompt),
                "response": text,
                "score": scores[i],
                "held_out": second[i],
                "ended": closed,
                "length": len(ids),
                "ids": ids,
            }
            if members is not None:
                row["members"] = members[i]
            if self.gold is not None:
                row["gold"] = self.gold(prompt.transcript(), text, closed)
            by_judge = {name: values[i] for name, values in golds.items()}
            rows.append(row | gold_columns(by_judge, self.gold is not None))
        return rows


def gold_columns(by_judge: Mapping[str, Any], of_the_world: bool) -> Row:
    """What named judges give, as columns of a row: "gold" is the world's score by rule, where there is one,
    else the first judge's; the others stand under "gold:NAME".
    """
    return {
        "gold" if i == 0 and not of_the_world else f"gold:{name}": value
        for i, (name, value) in enumerate(by_judge.items())
    }


@torch.no_grad()
def response_nll(policy: Policy, batches: Sequence[Sequences]) -> Summary:
    """Mean negative log-likelihood of response tokens in nats, over all tokens, and its perplexity."""
    tokens = sum(int(batch.response.sum()) for batch in batches)
    total = -sum(policy.logprobs(batch).sum().item() for batch in batches)
    return {"nll": total / tokens, "perplexity": math.exp(min(total / tokens, 700)), "tokens": tokens}


def _finite(
    scorer: Scorer, sequences: Sequences, rows: Sequence[int] = ()
) -> tuple[list[float], list[list[float]] | None]:
    """Scores of all rows, and of an ensemble its members' for each. PreftuneError if the reward model gives
    one of them no finite number.
    """
    scores, members, _ = scorer.scored(sequences, rows)
    if not bool(scores.isfinite().all()):
        raise PreftuneError(
            "the reward model's score of a response is NaN or infinite",
            hint="train it again with a lower learning rate, or in float32",
        )
    return scores.tolist(), None if members is None else members.T.tolist()
