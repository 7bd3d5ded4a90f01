"""Equal tokens: how much of its training a policy sees, in tokens through its training forward.

Counted are all tokens, prompt and response, of every sequence that updates pass through the policy: sampled
responses times epochs, both sides of pairs. Sampling and scoring cost extra and are reported
beside. The plan takes mean lengths of training rows for those of samples, so the tokens really spent, counted
during training, differ from it somewhat; both are reported.
"""

from pathlib import Path

from preftune.config import StageConfig
from preftune.records.base import read_records
from preftune.records.stage import MetricsRow
from preftune.rundir import RunDir
from preftune.runs.lengths import Lengths

_CLOSE = 0.02  # a stage whose plan is so near the budget stays as the recipe has it


def planned_tokens(stage: StageConfig, lengths: Lengths, rows: int = 0) -> float:
    """Tokens through the policy's training forward; 0 for what all policies share: reference and judges."""
    return stage.rows_planned(rows) * stage.tokens_per_row(*lengths) if stage.tunes else 0.0


def with_tokens(stage: StageConfig, budget: int, lengths: Lengths, rows: int) -> StageConfig:
    """The stage with as many steps, or rows and epochs, as take about `budget` tokens."""
    planned = planned_tokens(stage, lengths, rows)
    if planned == 0 or abs(planned / budget - 1) <= _CLOSE:
        return stage
    return stage.consuming(budget / stage.tokens_per_row(*lengths), rows)


def spent_tokens(run: RunDir, stage: str) -> dict[str, int]:
    """Tokens that a finished stage trained on and sampled, from its metrics; and its steps."""
    file: Path = run.metrics(stage)
    rows = read_records(file, MetricsRow) if file.is_file() else []
    return {
        "tokens_trained": round(sum(row.numbers.get("tokens/trained", 0) for row in rows)),
        "tokens_sampled": round(sum(row.numbers.get("tokens/sampled", 0) for row in rows)),
        "steps": len(rows),
    }
