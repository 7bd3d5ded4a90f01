"""One measurement for every policy: the same prompts, seeds, lengths and temperature for all.

Rows are prompts; intervals are bootstrapped over prompts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from preftune.config import EvaluationConfig
from preftune.data import Encoder, Preference, Sequences
from preftune.evaluation import stats
from preftune.models.roles import Policy, Reference, exact_kl
from preftune.rollout.sample import ended, sample
from preftune.rollout.score import Scorer
from preftune.seeding import derive_seed

Gold = Callable[[str, str, bool], float]  # (prompt, response, ended) -> score by rule
Summary = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """All that is the same for every policy that is measured."""

    prompts: Sequence[Preference]
    encoder: Encoder
    scorer: Scorer | None  # None where the run has no reward model
    reference: Reference  # SFT, or the base without an SFT stage
    settings: EvaluationConfig
    seed: int
    device: torch.device
    gold: Gold | None = None

    def rows(
        self,
        policy: Policy | Reference,
        advance: Callable[[int], None],
        responses: int = 1,
        purpose: str = "evaluation",
    ) -> list[Row]:
        """Sample and measure `responses` to every prompt; rows of one prompt follow each other. Another
        `purpose` gives other samples: best-of-n must not choose from the very sample it is compared with.
        """
        per_batch = max(self.settings.batch_size // responses, 1)
        rows: list[Row] = []
        for start in range(0, len(self.prompts), per_batch):
            part = self.prompts[start : start + per_batch]
            rows += self._measure(policy, part, start, responses, purpose)
            advance(len(part))
        return rows

    def _measure(
        self, policy: Policy | Reference, part: Sequence[Preference], start: int, responses: int, purpose: str
    ) -> list[Row]:
        settings = self.settings
        seeds = [derive_seed(self.seed, purpose, start + i) for i in range(len(part))]
        sequences = sample(
            policy,
            self.encoder.prompts([p.prompt for p in part], seeds).to(self.device),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            eos_id=self.encoder.eos_id,
            responses_per_prompt=responses,
        )
        k1 = self._k1(policy, sequences)
        exact = exact_kl(policy, self.reference, sequences, settings.temperature).sum(1).tolist()
        scores = self.scorer.scores(sequences).tolist() if self.scorer else [None] * len(sequences)
        closed = ended(sequences, self.encoder.eos_id).tolist()
        rows = []
        for i in range(len(sequences)):
            ids = sequences.ids[i][sequences.response[i]].tolist()
            prompt, text = part[i // responses].prompt, self.encoder.decode(ids)
            row = {
                "row": start + i // responses,
                "prompt": prompt.transcript(),
                "response": text,
                "score": scores[i],
                "ended": closed[i],
                "length": len(ids),
                "kl": exact[i],
                "k1": k1[i],
                "ids": ids,
            }
            if self.gold is not None:
                row["gold"] = self.gold(prompt.transcript(), text, closed[i])
            rows.append(row)
        return rows

    @torch.no_grad()
    def _k1(self, policy: Policy | Reference, sequences: Sequences) -> list[float]:
        temperature = self.settings.temperature
        difference = policy.logprobs(sequences, temperature) - self.reference.logprobs(sequences, temperature)
        return difference.sum(1).tolist()


@torch.no_grad()
def response_nll(policy: Policy, batches: Sequence[Sequences]) -> Summary:
    """Mean negative log-likelihood of response tokens in nats, over all tokens, and its perplexity."""
    tokens = sum(int(batch.response.sum()) for batch in batches)
    total = -sum(policy.logprobs(batch).sum().item() for batch in batches)
    return {"nll": total / tokens, "perplexity": math.exp(min(total / tokens, 700)), "tokens": tokens}


def best_of(rows: Sequence[Row], n: int) -> list[Row]:
    """The row with the highest score of each prompt's `n`, the first among equals; its KL is not that of the
    policy which wrote it, so it goes without.
    """
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    chosen = [max(group, key=lambda row: row["score"]) for group in groups]
    return [{k: v for k, v in row.items() if k not in ("kl", "k1")} for row in chosen]


def summarise(
    policy: str, label: str, rows: Sequence[Row], bench: Bench, best_of_n: int | None = None
) -> Summary:
    """The content of evaluation/<policy>.json but for the comparison with SFT."""
    settings, seed = bench.settings, bench.seed
    lengths = [row["length"] for row in rows]
    ids = [row["ids"] for row in rows]
    stopped = sum(row["ended"] for row in rows)
    return {
        "policy": policy,
        "label": label,
        "n_prompts": len(bench.prompts),
        "n_samples": len(rows),
        "reward": _spread([row["score"] for row in rows], settings, seed) if bench.scorer else None,
        "reward_difference_to_sft": None,
        "win_rate_vs_sft": None,
        "kl": _kl(rows, settings, seed) if best_of_n is None else _best_of_kl(best_of_n),
        "length": {
            "mean": float(np.mean(lengths)),
            "median": float(np.median(lengths)),
            "interval": list(stats.bootstrap_mean(lengths, settings.resamples, seed)),
        },
        "eos_rate": {
            "value": stopped / len(rows),
            "interval": list(stats.wilson(stopped, len(rows))),
            "n": len(rows),
        },
        "empty_share": sum(not row["response"].strip() for row in rows) / len(rows),
        "distinct_1": stats.corpus_distinct_n(ids, 1),
        "distinct_2": stats.corpus_distinct_n(ids, 2),
        "repetition_4": float(np.mean([stats.repetition_n(row, 4) for row in ids])),
        "role_leakage": sum("Human:" in row["response"] for row in rows) / len(rows),
        "gold": _spread([row["gold"] for row in rows], settings, seed) if bench.gold else None,
    }


def _spread(values: Sequence[float], settings: EvaluationConfig, seed: int) -> Summary:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    interval = stats.bootstrap_mean(values, settings.resamples, seed)
    return {"mean": float(np.mean(values)), "sd": sd, "interval": list(interval), "n": len(values)}


def _kl(rows: Sequence[Row], settings: EvaluationConfig, seed: int) -> Summary:
    """Per sequence: sums over the response. Per token: the ratio of total KL to total length."""
    tokens = sum(row["length"] for row in rows)

    def per_sequence(name: str) -> Summary:
        values = [row[name] for row in rows]
        return {
            "mean": float(np.mean(values)),
            "interval": list(stats.bootstrap_mean(values, settings.resamples, seed)),
            "n": len(values),
        }

    return {
        "exact_per_sequence": per_sequence("kl"),
        "exact_per_token": sum(row["kl"] for row in rows) / tokens,
        "k1_per_sequence": per_sequence("k1"),
        "k1_per_token": sum(row["k1"] for row in rows) / tokens,
    }


def _best_of_kl(n: int) -> Summary:
    """An upper bound on the KL of best-of-n (Stiennon et al. 2020): ln n - (n - 1)/n."""
    return {"formula": math.log(n) - (n - 1) / n}
