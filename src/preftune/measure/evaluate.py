"""The measurement of a run: the reward model on validation pairs, every policy on the same prompts."""

import functools
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preftune.config import EVALUATION, from_outside, judges_of
from preftune.config.rewards import judges_in, source_hashes
from preftune.data import Preference
from preftune.evaluation.best_of_n import ESTIMATOR, SOURCE, best_of, curve, not_picked_from
from preftune.evaluation.by_prompt import gains_by_prompt
from preftune.evaluation.compare import compare_to
from preftune.evaluation.length import length_controlled
from preftune.evaluation.policy import Conditions, Gold, Row, Summary
from preftune.evaluation.summary import summarise
from preftune.measure.cache import Cache, content
from preftune.measure.conditions import (
    frozen_policy,
    held_out_prompts,
    make_conditions,
    policies_of,
    reference_stage,
    second_judge,
    shared_by_all,
    shares_prompts,
)
from preftune.measure.reward_models import bag_of_words, examine_model, examiner
from preftune.records.base import write_record, write_records
from preftune.records.policy import BestOfCurve, Comparison, PolicyRecord
from preftune.records.reward_model import Mistake, RewardModelRecord
from preftune.records.run import SampleRow
from preftune.records.stage import StageRecord
from preftune.report.view import CHOSEN
from preftune.rundir import BASE, RunDir, policy_name
from preftune.runs.cards import rewrite_cards
from preftune.runs.provenance import peak_memory_mb, reset_peak_memory
from preftune.runs.scoring import judge_hashes
from preftune.runs.session import Session, columns_hash
from preftune.runs.stages import SIDE_FILE
from preftune.sums import CARD, faults, model_sum, read_sealed, recorded_sums, sum_of, sums
from preftune.training.learner import Learner

_VERSION = 6  # of what an evaluation measures: results of an earlier version are made again


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found out about all policies on one set of prompts."""

    rows: Mapping[str, Sequence[Row]]
    summaries: Mapping[str, Summary]
    comparisons: Sequence[Mapping[str, Any]]
    best_of_n: Summary | None


def evaluate_run(session: Session, stages: Sequence[str]) -> bool:
    """Measure everything that `stages` trained; False if that was done before with the same inputs. All
    processes of a run come here: they share the policies' responses, and the main one writes.
    """
    learner = session.learner(session.config.evaluation.batch_size)
    key, main = sum_of(_inputs(session, stages)), learner.is_main
    models = {name: model_sum(session.run, name) for name in stages} if main else {}
    if learner.gather_items([main and _keep(session, stages, key, models)])[0]:
        session.console.say_skipped(EVALUATION)
        return False
    judged_by = _judged_by(session)
    reset_peak_memory()
    began = time.monotonic()
    judges = [name for name in judges_of(session.config.stage) if name in stages]
    prompts, policies = held_out_prompts(session), policies_of(session, stages)
    cache = replace(cache_of(session, policies, prompts, session.gold), learner=learner)
    record = {"stage": EVALUATION, "algorithm": EVALUATION}
    if main:
        earlier = read_sealed(session.run.stage_json(EVALUATION))  # its files stay until these are there
        of_earlier = {name: earlier[name] for name in ("made_from", "shared") if name in earlier}
        StageRecord.write(session.run.stage_json(EVALUATION), {**record, "status": "running", **of_earlier})
    examined = _evaluate_reward_models(session, judges, cache, write=main)
    measured = measure_policies(session, policies, prompts, session.gold, cache)
    if not main:
        return True
    _write_policies(session, measured, examined)
    facts = {"seconds": time.monotonic() - began, "peak_memory_mb": peak_memory_mb()}
    record |= {"status": "finished", "key": key, "made_from": models, **facts}
    record |= {"shared": shared_by_all(session, stages), "judged_by": judged_by}
    _finish(session, stages, record)
    cache.remove()
    session.console.say_finished(EVALUATION, facts)
    return True


def _keep(session: Session, stages: Sequence[str], key: str, models: Mapping[str, str | None]) -> bool:
    """Keep the evaluation that there is, if nothing but model cards must be made again: they are. False if
    there is none of these models with these inputs; what differs is reported.
    """
    run = session.run
    record = read_sealed(run.stage_json(EVALUATION))
    stale = _stale(run, record, key, models)
    if stale is None:
        return False
    for fault in stale:
        session.console.line(f"{EVALUATION}: {fault}; it is made again")
    if not all(fault.startswith(str(run.models)) and CARD in fault for fault in stale):
        return False
    if stale or record.get("status") != "finished":  # that of one which was killed in its cards
        _finish(session, stages, record)
    # What a kill after the last line of an evaluation left.
    shutil.rmtree(run.stage_dir(EVALUATION) / "parts", ignore_errors=True)
    return True


def _stale(
    run: RunDir, record: Mapping[str, Any], key: str, models: Mapping[str, str | None]
) -> list[str] | None:
    """What is no longer as an evaluation of these models with these inputs wrote it; None if `record` is of
    none.
    """
    if record.get("key") != key:
        return None
    if recorded_sums(record) is None:  # from before sums were kept: names only
        names = record.get("files")
        whole = isinstance(names, list) and all((run.path / str(file)).is_file() for file in names)
        return [] if whole else None
    other_models = ["it was made of other models"] if record.get("made_from") != models else []
    return [*faults(run, record), *other_models]


def _finish(session: Session, stages: Sequence[str], record: Mapping[str, Any]) -> None:
    """Bring the models' cards up to date, and put the sums of all files into the evaluation's record. Cards
    show what is of the models that the record names.
    """
    StageRecord.write(session.run.stage_json(EVALUATION), {**record, "status": "running"})
    rewrite_cards(session, stages)
    files = sums(session.run, _files_written(session.run))
    StageRecord.write(session.run.stage_json(EVALUATION), {**record, "status": "finished", "files": files})


def _inputs(session: Session, stages: Sequence[str]) -> dict[str, Any]:
    """What the result of an evaluation depends on: an edited reward function makes another one."""
    settings = session.config.evaluation
    inputs = {
        "version": _VERSION,
        "settings": settings.model_dump(mode="json"),
        "stages": {name: session.stage(name).key for name in stages},
    }
    return inputs | functions_of(session)


def _judge_key(session: Session, judge: str | None) -> str | None:
    if judge is None or not session.is_trained(judge):
        return None
    return sum_of(session.contents(judge)) if from_outside(judge) else session.stage(judge).key


def made_of(session: Session, stage: str) -> list[str | None]:
    """A stage's key and the sum of its model: of one key, two machines make different bits."""
    return [session.stage(stage).key, model_sum(session.run, stage)]


def functions_of(session: Session) -> dict[str, Any]:
    """The functions and judges of an evaluation, and what they may read of the rows beside the texts."""
    settings = session.config.evaluation
    judges = judges_in(settings.gold)
    called = [settings.reward_functions, *(judge for judge in judges if ":" in judge)]
    read = [columns_hash(terms, session.dataset.test) for terms in called if terms]
    hashes = dict.fromkeys(reads["columns"] for reads in read if reads)  # one for each that reads some
    names = ("columns", *(f"columns_{n}" for n in range(2, len(hashes) + 1)))
    facts: dict[str, Any] = dict(zip(names, hashes, strict=False))
    if settings.reward_functions:
        facts["functions"] = source_hashes(settings.reward_functions)
    return facts | ({"golds": judge_hashes(judges)} if judges else {})


def _judged_by(session: Session) -> dict[str, Any]:
    """What scores the policies, for a comparison with another run: names, the judge's key, hashes."""
    key, functions = _judge_key(session, session.judge), functions_of(session)
    facts = {name: functions[name] for name in ("functions", "golds") if name in functions}
    return {"judge": session.judge if key else None, "key": key, **facts}


def cache_of(
    session: Session,
    stages: Sequence[str],
    prompts: Sequence[Preference],
    gold: Gold | None,
    folder: str = "parts",
) -> Cache:
    """Where the parts of an evaluation on `prompts` are kept, and what all of them depend on."""
    settings, judges = session.config.evaluation, [session.judge, second_judge(session)]
    reference = reference_stage(session, stages)
    return Cache(
        directory=session.run.stage_dir(EVALUATION) / folder,
        inputs={
            "version": _VERSION,
            "settings": settings.model_dump(mode="json"),
            "seed": session.config.seed,
            "precision": session.precision,
            "prompts": content(prompts),
            "reference": made_of(session, reference),
            "judges": [_judge_key(session, name) for name in judges],
            "judge_sums": [
                model_sum(session.run, name) for name in judges if name and not from_outside(name)
            ],
            "gold": gold is not None,
            **functions_of(session),
        },
        say=session.console.line,
    )


def _files_written(run: RunDir) -> list[Path]:
    """What an evaluation leaves behind."""
    files = [file for file in run.evaluations.iterdir() if file.is_file()]
    files += [*run.samples_files().values(), *([run.mistakes] if run.mistakes.is_file() else [])]
    files += [file.parent / CARD for file in run.models.glob(f"*/{SIDE_FILE}")]
    return [file for file in files if not file.name.startswith(".")]


def _evaluate_reward_models(
    session: Session, stages: Sequence[str], cache: Cache, *, write: bool
) -> set[Path]:
    """On held-out pairs, where the data are pairs; the report says where they are not. The files written."""
    if session.dataset.kind != "pairs":
        return set()
    run, pairs, written = session.run, session.dataset.validation, set[Path]()
    for name, (result, rows) in examinations(session, stages, pairs, cache, own_data=True):
        if not write:
            continue
        of_judge = name == session.judge
        file = run.reward_evaluation if of_judge else run.evaluation(f"reward_model_{name}")
        write_record(file, result, RewardModelRecord)
        written.add(file)
        if of_judge:
            write_records(run.mistakes, rows, Mistake)
            written.add(run.mistakes)
    return written


def examinations(
    session: Session, stages: Sequence[str], pairs: Sequence[Preference], cache: Cache, *, own_data: bool
) -> Iterator[tuple[str, tuple[dict[str, Any], list[Row]]]]:
    """Every reward stage with its record on `pairs` and the rows of its mistakes."""
    bag = functools.cache(lambda: bag_of_words(session))
    of = {"pairs": content(pairs), "own_data": own_data}
    for name in stages:
        of_stage = {**of, "stage": made_of(session, name)}

        def examine(name: str = name) -> tuple[dict[str, Any], list[Row]]:
            return examine_model(examiner(session, name), pairs, bag(), own_data=own_data)

        yield name, cache.take(f"audit_{name}", of_stage, examine)


def measure_policies(
    session: Session, stages: Sequence[str], prompts: Sequence[Preference], gold: Gold | None, cache: Cache
) -> Measured:
    """Base, every policy stage, and best-of-n of the reference. `gold`: the score by rule, if one is known
    for these prompts.
    """
    reference = reference_stage(session, stages)
    conditions, learner = make_conditions(session, reference, prompts, gold, cache.learner)
    names = [BASE, *stages]
    rows, reverse = _replies_and_kl(session, conditions, learner, reference, names, cache)
    human = cache.take("chosen", {}, lambda: conditions.human([pair.chosen for pair in prompts]))
    pool = list[Row]()
    if conditions.scorer is not None:
        pool = cache.take("pool", {}, lambda: _pool(session, conditions))
    return summarise_policies(session, conditions, names, rows, reverse, human, pool)


def summarise_policies(
    session: Session,
    conditions: Conditions,
    names: Sequence[str],
    rows: dict[str, list[Row]],
    reverse: Mapping[str, Sequence[float]],
    human: Sequence[Row],
    pool: Sequence[Row],
) -> Measured:
    """All numbers that follow from replies: `rows` and `reverse` by policy, the reference's `pool`."""
    baseline = policy_name(reference_stage(session, names[1:]))
    labels = {policy_name(name): label for name, label in _labels(session, names).items()}
    best = f"best_of_{conditions.settings.best_of}"
    if conditions.scorer is not None:
        rows[best] = best_of(pool, conditions.settings.best_of, conditions.settings.pool)
        labels[best] = f"best of {conditions.settings.best_of} ({labels[baseline]})"
    comparisons = _comparisons(conditions, rows, baseline, best, human)
    against, settings, seed = rows[baseline], conditions.settings, conditions.seed
    summaries = {}
    for name, measured in rows.items():
        n = settings.best_of if name == best else None
        summary = summarise(name, labels[name], measured, conditions, n, reverse.get(name), human)
        if name != baseline:
            summary["by_prompt"] = gains_by_prompt(measured, against, conditions.prompts, settings, seed)
        if pool and name != baseline:
            candidates = pool if n is None else not_picked_from(pool, n, settings.pool)
            summary["length_controlled"] = length_controlled(measured, against, candidates, settings, seed)
        summaries[name] = _with_comparisons(summary, comparisons, baseline) | _held_out(session, summary)
    curve = _curve(conditions, baseline, labels[baseline], pool) if pool else None
    return Measured(rows=rows, summaries=summaries, comparisons=comparisons, best_of_n=curve)


def _replies_and_kl(
    session: Session, under: Conditions, learner: Learner, reference: str, names: Sequence[str], cache: Cache
) -> tuple[dict[str, list[Row]], dict[str, list[float]]]:
    """Responses of all policies, in the order of `names`, and KL(reference || policy) of the reference's."""

    def of_policy(name: str, baseline_rows: Sequence[Row] | None) -> tuple[list[Row], list[float]]:
        def measure() -> tuple[list[Row], list[float]]:
            policy = under.reference if baseline_rows is None else frozen_policy(session, learner, name)
            with session.console.counting(f"sample {name}", len(under.prompts)) as advance:
                rows = under.rows(policy, advance)
            return rows, under.reverse_kl(policy, rows if baseline_rows is None else baseline_rows)

        return cache.take(policy_name(name), {"stage": made_of(session, name)}, measure)

    first = of_policy(reference, None)
    by_policy = {
        policy_name(name): first if name == reference else of_policy(name, first[0]) for name in names
    }
    rows = {name: rows for name, (rows, _) in by_policy.items()}
    return rows, {name: reverse for name, (_, reverse) in by_policy.items()}


def _pool(session: Session, conditions: Conditions) -> list[Row]:
    with session.console.counting("best of n", len(conditions.prompts)) as advance:
        return conditions.pool(advance, conditions.settings.pool)


def _comparisons(
    conditions: Conditions, rows: Mapping[str, Sequence[Row]], reference: str, best: str, human: Sequence[Row]
) -> list[dict[str, Any]]:
    """Every policy against the reference; the trained ones against best-of-n; all against the chosen."""
    settings, seed = conditions.settings, conditions.seed
    comparisons = compare_to(reference, rows, settings, seed)
    if conditions.scorer is None:
        return comparisons
    trained = {name: policy_rows for name, policy_rows in rows.items() if name not in (BASE, reference)}
    comparisons += compare_to(best, trained, settings, seed)
    return comparisons + compare_to(CHOSEN, {**rows, CHOSEN: human}, settings, seed)


def _curve(conditions: Conditions, reference: str, label: str, pool: Sequence[Row]) -> Summary:
    size = conditions.settings.pool
    return {
        "reference": reference,
        "label": label,
        "n_prompts": len(conditions.prompts),
        "n_samples": size,
        "estimator": ESTIMATOR,
        "source": SOURCE,
        "curve": curve(pool, size, conditions.settings, conditions.seed),
    }


def _with_comparisons(summary: Summary, comparisons: Sequence[Mapping[str, Any]], reference: str) -> Summary:
    """The summary with what its policy's comparisons say, under their names."""
    names = {
        (reference, "score"): ("score_difference_to_sft", "win_rate_vs_sft"),
        (reference, "held_out"): ("held_out_difference_to_sft", None),
        (CHOSEN, "score"): ("score_difference_to_chosen", "win_rate_vs_chosen"),
    }
    summary = dict(summary)
    for record in comparisons:
        difference, rate = names.get((record["reference"], record["measure"]), (None, None))
        if record["policy"] != summary["policy"] or difference is None:
            continue
        summary[difference] = {
            key: record[key] for key in ("mean", "interval", "n", "p_value", "p_holm", "verdict")
        }
        if rate is not None:
            summary[rate] = record["win_rate"]
    return summary


def _held_out(session: Session, summary: Summary) -> Summary:
    """Which reward model the held-out score is from, beside the score itself."""
    second, score = second_judge(session), summary["held_out_score"]
    if second is None or score is None:
        return {}
    return {"held_out_score": {**score, "stage": second, "shares_pairs": shares_prompts(session, second)}}


def _labels(session: Session, names: Sequence[str]) -> dict[str, str]:
    """SFT, PPO, ...; where an algorithm occurs twice, with the stage's name and what else it says."""
    stages = {name: session.config.stage[name] for name in names if name != BASE}
    kinds = [stage.label for stage in stages.values()]
    return {BASE: "base"} | {
        name: f"{stage.label} ({name}{stage.variant()})" if kinds.count(stage.label) > 1 else stage.label
        for name, stage in stages.items()
    }


def _write_policies(session: Session, measured: Measured, examined: Collection[Path]) -> None:
    run, config = session.run, session.config
    _remove_earlier(run, examined)
    write_records(run.comparisons, measured.comparisons, Comparison)
    for name, summary in measured.summaries.items():
        write_record(run.evaluation(name), summary, PolicyRecord)
        rows = measured.rows[name][: config.evaluation.samples]
        write_records(
            run.samples_file(name, config.model.base),
            [{k: v for k, v in row.items() if k != "ids"} for row in rows],
            SampleRow,
        )
    if measured.best_of_n is not None:
        write_record(run.best_of_n, measured.best_of_n, BestOfCurve)


def _remove_earlier(run: RunDir, written: Collection[Path]) -> None:
    """Numbers and samples of an earlier evaluation, perhaps of other stages, prompts or judges; not what this
    one has `written`.
    """
    earlier = [*run.evaluations.glob("*.json"), *run.samples_files().values(), run.mistakes]
    for path in earlier:
        if path not in written:
            path.unlink(missing_ok=True)
