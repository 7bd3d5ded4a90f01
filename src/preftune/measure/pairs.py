"""A run's models on a foreign preference file: `preftune evaluate RUN --pairs FILE`."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune.config import judges_of
from preftune.data import Preference, first_encoded, read_preferences
from preftune.data.dataset import prompt_key
from preftune.data.files import find_files
from preftune.errors import DataError, InputMissing, PreftuneError
from preftune.evaluation.preference import PairLogprobs, pair_logprobs, preference
from preftune.hashing import sha256_file
from preftune.measure.conditions import (
    asked_of,
    frozen_policy,
    policies_of,
    reference_stage,
    shared_by_all,
)
from preftune.measure.evaluate import Measured, cache_of, examinations, measure_policies
from preftune.records.base import VERSION, Estimate, write_record, write_records
from preftune.records.policy import BestOfCurve, Comparison, PairsFile, PairsPolicy
from preftune.records.reward_model import Mistake, RewardModelRecord
from preftune.report.sections.other_pairs import policy_table
from preftune.rundir import BASE, RunDir, policy_name, read_json, short_name
from preftune.runs.roles import keep_rows
from preftune.runs.session import Session
from preftune.sums import model_sum, sum_of, sums, write_sealed

Examined = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]  # a reward stage's record and its mistakes
_SUFFIXES = (".gz", ".jsonl", ".json", ".parquet")


def evaluate_on_pairs(session: Session, stages: Sequence[str], file: Path) -> Path:
    """Audit the run's reward models on the pairs, measure its policies on their prompts, and write it all
    under evaluation/pairs-<name>/, which is returned. Pairs whose prompt was trained on are left out.
    """
    if not file.exists():
        raise InputMissing(
            f"there is no preference file at {file}", hint="give a .jsonl, .gz or .parquet file"
        )
    pairs, left_out = _unseen(session, stages, file)
    policies, prompts = policies_of(session, stages), asked_of(session, pairs)
    if not prompts:
        raise DataError(
            f"the chat template of {session.base.name or session.base.path} refuses every prompt of {file}",
            hint="give dialogues that the template can write: preftune inspect --data shows what it refuses",
        )
    digest = _digest(file)
    name = _name(session.run, file, digest)
    cache = cache_of(session, policies, prompts, None, f"parts-{name}")
    judges = [s for s in judges_of(session.config.stage) if s in stages]
    examined: Examined = {}
    for stage, (result, rows) in examinations(session, judges, pairs, cache, own_data=False):
        examined[stage] = ({**result, "seen_in_training": left_out}, rows)
        _show_judge(session, stage, result)
    measured = measure_policies(session, policies, prompts, None, cache)
    opinions = _opinions(session, policies, pairs)
    facts = {
        "file": file.name,
        "sha256": digest,
        "usable": len(pairs) + left_out,
        "seen_in_training": left_out,
        "made_from": {stage: model_sum(session.run, stage) for stage in stages},
        "shared": shared_by_all(session, stages),
        "n": len(pairs),
    }
    directory = session.run.pairs(name)
    _write(session, directory, examined, measured, opinions, facts)
    cache.remove()
    _show(session, measured, opinions, policy_name(reference_stage(session, policies)))
    return directory


def _unseen(session: Session, stages: Sequence[str], file: Path) -> tuple[list[Preference], int]:
    """The pairs of a file on whose prompts nothing was trained, and how many others it has."""
    settings = session.config.data
    read = read_preferences(file, settings.on_bad_row, settings.columns.named_columns(), settings.config)
    learnt = [session.dataset, *(session.data_of(name) for name in stages)]
    trained = {prompt_key(pair) for data in learnt for pair in data.rows_for("unpaired")}
    pairs = [replace(pair, row=i) for i, pair in enumerate(read) if prompt_key(pair) not in trained]
    left_out = len(read) - len(pairs)
    if not pairs:
        raise DataError(
            f"all {left_out} pairs of {file} have a prompt that this run was trained on",
            hint="give pairs that the run has not seen: a score on others says nothing",
        )
    return pairs, left_out


def _write(
    session: Session,
    directory: Path,
    examined: Examined,
    measured: Measured,
    opinions: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """All files of an evaluation on pairs, in the place of earlier ones. Its record is the last: without it
    the rest is not shown.
    """
    record = directory / "pairs.json"
    record.unlink(missing_ok=True)
    for old in directory.glob("*.json*"):  # of an earlier evaluation, perhaps of other stages
        old.unlink()
    for stage, (result, rows) in examined.items():
        name = "reward_model" if stage == session.judge else f"reward_model_{stage}"
        write_record(directory / f"{name}.json", result, RewardModelRecord)
        write_records(directory / f"{name}_mistakes.jsonl", rows, Mistake)
    write_records(directory / "comparisons.jsonl", measured.comparisons, Comparison)
    for name, summary in measured.summaries.items():
        write_record(directory / f"{name}.json", {**summary, "preference": opinions.get(name)}, PairsPolicy)
    if measured.best_of_n is not None:
        write_record(directory / "best_of_n.json", measured.best_of_n, BestOfCurve)
    written = [path for path in directory.iterdir() if path.suffix in (".json", ".jsonl")]
    content = {"version": VERSION, **facts, "files": sums(session.run, written)}
    PairsFile.model_validate(content)
    write_sealed(record, content)


def _digest(file: Path) -> str:
    """Of the file; of a directory, of its data files and their sums."""
    if file.is_file():
        return sha256_file(file)
    return sum_of({path.relative_to(file).as_posix(): sha256_file(path) for path in find_files(file)})


def _name(run: RunDir, file: Path, digest: str) -> str:
    """The file's name without its endings, fit for a directory's name; with the beginning of its sum where
    another file has that name already.
    """
    name = file.name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    name = short_name(name)[:60]
    record, taken = run.pairs(name) / "pairs.json", False
    with suppress(PreftuneError):  # damaged: nothing to lose
        taken = record.is_file() and read_json(record).get("sha256") not in (digest, None)
    return f"{name}-{digest[:8]}" if taken else name


def _opinions(
    session: Session, stages: Sequence[str], pairs: Sequence[Preference]
) -> dict[str, dict[str, Any]]:
    """What every policy's own log-probabilities prefer."""
    settings, reference = session.config.evaluation, reference_stage(session, stages)
    learner = session.learner(settings.batch_size)
    logps: dict[str, PairLogprobs] = {}
    for stage in [BASE, *stages]:
        policy, encoder = frozen_policy(session, learner, stage), session.encoder(session.source(stage))
        usable, encoded, _ = first_encoded(encoder, pairs, None)
        keep_rows(session, [policy], sum(ids.tokens for ids in encoded))
        with session.console.counting(f"pairs {stage}", len(usable)) as advance:
            logps[stage] = pair_logprobs(
                policy, encoder, usable, settings.batch_size, learner.device, advance
            )
    seed = session.config.seed
    return {
        policy_name(stage): preference(
            logprobs, None if stage == reference else logps[reference], settings.resamples, seed
        )
        for stage, logprobs in logps.items()
    }


def _show_judge(session: Session, stage: str, result: Mapping[str, Any]) -> None:
    rows = [("reward model", result["accuracy"]), *result["baselines"].items()]
    session.console.table(
        (f"{stage} on {result['n']:,} pairs", "accuracy [95 %]"),
        [(name.replace("_", " "), Estimate.model_validate(record).percent()) for name, record in rows],
    )
    temperature = result["temperature"]
    session.console.line(
        f"{stage}: Brier {result['brier']:.3f}, calibration error {result['ece']:.3f}"
        + (f", temperature {temperature['value']:.2f}" if temperature else "")
        + f", {result['n_mistakes']:,} mistakes"
    )


def _show(
    session: Session, measured: Measured, opinions: Mapping[str, Mapping[str, Any]], reference: str
) -> None:
    """The report's own table."""
    policies = [
        PairsPolicy.model_validate({**summary, "preference": opinions.get(name)})
        for name, summary in measured.summaries.items()
    ]
    table = policy_table(policies, measured.summaries[reference]["label"])
    session.console.table(table.headers, table.rows)
