"""Whether two runs were scored by the same judges, and whether their scores have a common unit."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from preftune.config import EVALUATION, from_outside
from preftune.config.rewards import judges_in, reward_terms
from preftune.hashing import sha256_file
from preftune.models.locate import GATE
from preftune.records.base import read_record
from preftune.records.policy import PolicyRecord
from preftune.records.reward_model import RewardModelRecord
from preftune.records.stage import JudgedRecord, StageRecord
from preftune.report.view import scored_by_model, setting
from preftune.rundir import RunDir, read_object
from preftune.runs.stages import check_model


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedBy:
    """What scored a run's policies. `model`: the stage of a reward model, or a reward model from elsewhere;
    `functions`: reward functions beside it, or alone; `gold`: whose score is gold (() nobody's, None the
    world's). `recorded`: what the evaluation noted of them; None for an older one, which noted only names.
    """

    run: RunDir
    model: str | None
    functions: str | None
    gold: tuple[str, ...] | None
    recorded: JudgedRecord | None = None

    def edited(self, another: "JudgedBy") -> bool:
        """Whether functions of the same name are known to have other sources."""
        if self.recorded is None or another.recorded is None:
            return False
        return self.recorded.functions != another.recorded.functions


def _weighted(terms: str | None) -> object:
    """Weights by function, however the sum is written; the text itself of what is no sum of functions."""
    try:
        return reward_terms(terms) if terms else None
    except ValueError:
        return terms


def judged_by(run: RunDir, config: Mapping[str, Any], policies: Collection[PolicyRecord]) -> JudgedBy:
    """From the evaluation's record; of an older one from its settings and files."""
    evaluation, file = config.get("evaluation", {}), run.stage_json(EVALUATION)
    recorded = read_record(file, StageRecord).judged_by if file.is_file() else None
    world = config.get("data", {}).get("name") == "world"
    return JudgedBy(
        run=run,
        model=recorded.judge if recorded else _by_name(run, config, policies),
        functions=setting(evaluation, "reward_functions"),
        gold=None if world else tuple(judges_in(setting(evaluation, "gold"))[:1]),
        recorded=recorded,
    )


def _by_name(run: RunDir, config: Mapping[str, Any], policies: Collection[PolicyRecord]) -> str | None:
    """The reward model of an older run: the judge that was examined, else one of the usual name."""
    file = run.reward_evaluation
    stage = (read_record(file, RewardModelRecord).stage if file.is_file() else "") or "rm"
    has_judge = run.model_dir(stage, trains_policy=False).is_dir() or scored_by_model(config, policies)
    return stage if has_judge else None


def same_score(a: JudgedBy, b: JudgedBy) -> bool:
    """Whether the reward models that score both runs have the same weights, and normalise them in the same
    way, beside the same functions; or the same functions alone score them.
    """
    if _weighted(a.functions) != _weighted(b.functions) or a.edited(b):
        return False
    if a.model is None or b.model is None:
        return bool(a.model == b.model and a.functions and a.recorded and b.recorded)
    if from_outside(a.model) or from_outside(b.model):
        outside = from_outside(a.model) and from_outside(b.model)
        keys = [judged.recorded and judged.recorded.key for judged in (a, b)]
        return outside and keys[0] is not None and keys[0] == keys[1]
    return _same_weights((a.run, a.model), (b.run, b.model))


def _same_weights(*judges: tuple[RunDir, str]) -> bool:
    models = [run.model_dir(stage, trains_policy=False) for run, stage in judges]
    weights = [
        sorted(file for name in ("model.safetensors", GATE) for file in model.rglob(name))  # of an ensemble
        for model in models
    ]
    if not all(weights) or not all((model / "preftune.json").is_file() for model in models):
        return False
    notes = [read_object(model / "preftune.json") for model in models]
    for (run, stage), model in zip(judges, models, strict=True):
        check_model(run, stage, model)
    keys = ("mean", "std", "members", "combine", "sd_coef", "experts", "pooling")
    constants = [[note.get(key) for key in keys] for note in notes]
    hashes = [[sha256_file(file) for file in files] for files in weights]
    return constants[0] == constants[1] and hashes[0] == hashes[1]


def same_gold(a: JudgedBy, b: JudgedBy) -> bool:
    """Whether "gold", the score of the first judge that is named, is that of the same judge."""
    if not a.gold or not b.gold or a.recorded is None or b.recorded is None:
        return a.gold == b.gold
    if _weighted(a.gold[0]) != _weighted(b.gold[0]) and not from_outside(a.gold[0]):
        return False
    contents = [a.recorded.golds.get(a.gold[0]), b.recorded.golds.get(b.gold[0])]
    return contents[0] is not None and contents[0] == contents[1]


def no_common_unit(a: JudgedBy, b: JudgedBy) -> str:
    """Why a gain of one run is in another unit than a gain of the other; "" where it is not: reward models
    are normalised, to the sd of their own scores over chosen replies.
    """
    if _weighted(a.functions) != _weighted(b.functions):
        return f"evaluation.reward_functions: {a.functions or 'none'} -> {b.functions or 'none'}"
    if a.edited(b):
        return f"the source of {a.functions} has changed between them"
    if (a.model is None) != (b.model is None):
        return "one run is scored by a reward model, the other by functions alone"
    return ""
