"""Whether a run came out as the runs did that its recipe was measured with."""

import json
from importlib import resources

import numpy as np
from scipy.special import stdtrit

from preftune.config import RunConfig, config_hash
from preftune.records.expected import ExpectedRecord
from preftune.records.verdict import MIN_PROMPTS
from preftune.report.text import join
from preftune.report.view import RunView
from preftune.rundir import BASE

SHOWN = 3  # of the numbers that differ; the others are counted


def numbers_of(run: RunView) -> dict[str, float]:
    """What is compared: the reward model's accuracy; every policy's gain in score and gold, KL, EOS rate, if
    it was measured on enough prompts for a claim.
    """
    model = run.reward_model
    values = dict[str, float]()
    if model is not None and model.accuracy is not None:
        values["reward model accuracy"] = model.accuracy.value
    for policy in run.policies:
        if policy.n_prompts is not None and policy.n_prompts < MIN_PROMPTS:
            continue
        label = policy.label if policy.policy != BASE else "base"
        if policy.policy != run.reference:
            for measure, words in (("score", "gain"), ("gold", "gold gain")):
                compared = run.comparison(policy.policy, measure)
                if compared is not None:
                    values[f"{label} {words}"] = compared.difference.value
        for words, estimate in (("KL", policy.kl_sequence), ("EOS rate", policy.eos_rate)):
            if estimate is not None:
                values[f"{label} {words}"] = estimate.value
    return values


def settings_sha256(config: RunConfig) -> str:
    """Of all that numbers depend on but the seed; not of the place where the data lie, nor of the name."""
    return config_hash(config.wherever().model_copy(update={"seed": 0, "name": "run"}))


def expectation(recipe: str) -> ExpectedRecord | None:
    """What runs of a shipped recipe gave; None where there is none."""
    file = resources.files("preftune") / "recipes" / f"{recipe}.expected.json"
    if not file.is_file():
        return None
    return ExpectedRecord.model_validate(json.loads(file.read_text(encoding="utf-8")))


def band(values: tuple[float, ...]) -> tuple[float, float] | None:
    """Where 95 of 100 further runs are expected: Student's prediction interval from independent runs; None
    with fewer than two.
    """
    n = len(values)
    if n < 2:
        return None
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    reach = float(stdtrit(n - 1, 0.975)) * sd * (1 + 1 / n) ** 0.5
    return mean - reach, mean + reach


def _slack(end: float) -> float:
    """The files keep six digits, and runs may all have had one number."""
    return 1e-5 * abs(end) + 1e-9


def outcome(run: RunView, config: RunConfig) -> str | None:
    """One sentence for the end of a run; None where its settings are not those of a measured recipe."""
    from scipy.stats import binom  # slow to import, for one number

    expected = expectation(config.name)
    if expected is None or expected.settings_sha256 != settings_sha256(config):
        return None
    measured = numbers_of(run)
    bands = {name: band(values) for name, values in expected.numbers.items() if name in measured}
    compared = {name: ends for name, ends in bands.items() if ends is not None}
    if not compared:
        return None
    outside = [
        f"{name} {measured[name]:+.2f} ({low:+.2f} to {high:+.2f})"
        for name, (low, high) in compared.items()
        if not low - _slack(low) <= measured[name] <= high + _slack(high)
    ]
    of = f"{len(expected.seeds)} runs of this recipe ({expected.made})"
    usual = int(binom.ppf(0.95, len(compared), 0.05))  # each leaves its band once in twenty runs by chance
    if len(outside) <= usual:
        inside = len(compared) - len(outside)
        return f"as expected: {inside} of {len(compared)} numbers lie where {of} put them"
    more = f" and {len(outside) - SHOWN} more" if len(outside) > SHOWN else ""
    return (
        f"not as expected: {len(outside)} of {len(compared)} numbers lie outside of where {of} put them, by "
        f"chance up to {usual}: {join(outside[:SHOWN])}{more}"
    )
