"""Equal tokens: how much of its training a policy sees, in tokens through its training forward.

Counted are all tokens, prompt and response, of every sequence that updates pass through the policy: sampled
responses times epochs, both sides of pairs. Sampling and scoring cost extra and are reported
beside. The plan takes mean lengths of training rows for those of samples, so the tokens really spent, counted
during training, differ from it somewhat; both are reported.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from preftune.config import RunConfig, StageConfig
from preftune.data import Dataset, Encoder
from preftune.records.base import read_records
from preftune.records.stage import MetricsRow
from preftune.rundir import RunDir

_ROWS = 256
_CLOSE = 0.02  # a stage whose plan is so near the budget stays as the recipe has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean tokens of prompts and replies, end token counted."""

    prompt: float
    chosen: float
    rejected: float


def mean_lengths(config: RunConfig, dataset: Dataset) -> Lengths:
    """Over the first training rows, in the tokens of the base model (or of the one to be made)."""
    from preftune.models.load import load_tokenizer
    from preftune.models.locate import locate
    from preftune.runs.sources import make_tokenizer

    data, scratch = config.data, config.model.scratch
    if scratch is not None:
        tokenizer = make_tokenizer(str(data.name), dataset.train, scratch.vocab_size)
    else:
        tokenizer = load_tokenizer(locate(config.model.base))
    encoder = Encoder(
        tokenizer,
        data.form,
        data.max_prompt_length,
        data.max_response_length,
        template_arguments=data.template_arguments,
    )
    step = max(len(dataset.train) // _ROWS, 1)
    rows = list(islice(dataset.train, 0, None, step))[:_ROWS]

    def mean(sizes: list[int]) -> float:
        return sum(sizes) / len(sizes)

    return Lengths(
        prompt=mean([len(encoder.prompt(row.prompt)) for row in rows]),
        chosen=mean([len(encoder.response(row.chosen)) for row in rows]),
        rejected=mean([len(encoder.response(row.rejected)) for row in rows]),
    )


def planned_tokens(stage: StageConfig, lengths: Lengths, rows: int = 0) -> float:
    """Tokens through the policy's training forward; 0 for what all policies share: reference and judges."""
    return stage.rows_planned(rows) * _per_row(stage, lengths) if stage.tunes else 0.0


def _per_row(stage: StageConfig, lengths: Lengths) -> float:
    return stage.tokens_per_row(lengths.prompt, lengths.chosen, lengths.rejected)


def with_tokens(stage: StageConfig, budget: int, lengths: Lengths, rows: int) -> StageConfig:
    """The stage with as many steps, or rows and epochs, as take about `budget` tokens."""
    planned = planned_tokens(stage, lengths, rows)
    if planned == 0 or abs(planned / budget - 1) <= _CLOSE:
        return stage
    return stage.consuming(budget / _per_row(stage, lengths), rows)


def spent_tokens(run: RunDir, stage: str) -> dict[str, int]:
    """Tokens that a finished stage trained on and sampled, from its metrics; and its steps."""
    file: Path = run.metrics(stage)
    rows = read_records(file, MetricsRow) if file.is_file() else []
    return {
        "tokens_trained": round(sum(row.numbers.get("tokens/trained", 0) for row in rows)),
        "tokens_sampled": round(sum(row.numbers.get("tokens/sampled", 0) for row in rows)),
        "steps": len(rows),
    }
