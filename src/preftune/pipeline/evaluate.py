"""The measurement of a run: the reward model on validation pairs, every policy on the same prompts."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from preftune.config import EVALUATION, DPOConfig, RewardConfig
from preftune.data import Preference, first_usable
from preftune.data.gold import best_reachable
from preftune.data.world import world_probes
from preftune.errors import DataError
from preftune.evaluation.compare import compare_to
from preftune.evaluation.policy import Bench, Row, best_of, summarise
from preftune.evaluation.reward_model import audit, gap, mistakes, score_pairs
from preftune.models.load import load_causal_lm
from preftune.models.roles import Policy, Reference
from preftune.pipeline.provenance import peak_memory_mb, reset_peak_memory
from preftune.pipeline.save import load_reward_model
from preftune.pipeline.session import Session
from preftune.pipeline.stages import digest
from preftune.pipeline.train import scorer_for
from preftune.rundir import BASE, RunDir, policy_name, read_json, write_json, write_jsonl


def evaluate_run(session: Session, stages: Sequence[str]) -> bool:
    """Measure everything that `stages` trained; False if that was done before with the same inputs."""
    done = session.run.stage_json(EVALUATION)
    key = digest(
        {
            "settings": session.config.evaluation.model_dump(mode="json"),
            "stages": {name: session.stage(name).key for name in stages},
        }
    )
    earlier = read_json(done) if done.exists() else {}
    complete = all((session.run.path / file).is_file() for file in earlier.get("files", ()))
    if earlier.get("key") == key and complete:
        session.console.skipped(EVALUATION)
        return False
    reset_peak_memory()
    began = time.monotonic()
    for name in stages:
        if isinstance(session.config.stage[name], RewardConfig):
            _evaluate_reward_model(session, name)
    _evaluate_policies(session, [n for n in stages if not isinstance(session.config.stage[n], RewardConfig)])
    facts = {"seconds": time.monotonic() - began, "peak_memory_mb": peak_memory_mb()}
    record = {"stage": EVALUATION, "algorithm": EVALUATION, "status": "finished", "key": key, **facts}
    record["files"] = _written(session.run)
    write_json(done, record)
    session.console.finished(EVALUATION, facts)
    return True


def _written(run: RunDir) -> list[str]:
    """What an evaluation leaves behind, relative to the run directory."""
    files = [*run.comparisons.parent.iterdir(), *run.samples_files().values()]
    files += [run.mistakes] if run.mistakes.is_file() else []
    return sorted(str(file.relative_to(run.path)) for file in files if not file.name.startswith("."))


def _evaluate_reward_model(session: Session, name: str) -> None:
    source, size = session.source(name), session.config.evaluation.batch_size
    model, encoder, learner = load_reward_model(source), session.encoder(source), session.learner(size)
    learner.freeze(model)

    def scored(what: str, pairs: Sequence[Preference]) -> list[dict[str, Any]]:
        with session.console.counting(what, len(pairs)) as advance:
            return score_pairs(model, encoder, pairs, size, learner.device, advance)

    usable, rejected = first_usable(encoder, session.dataset.validation, None)
    pairs = scored(f"{name} pairs", usable)
    result = audit(name, pairs, session.config.seed) | {"left_out": rejected}
    if rejected:
        session.console.line(f"{name:<12} {sum(rejected.values())} validation pairs left out: {rejected}")
    if session.is_world:
        result["best_reachable"] = best_reachable([s["pair"] for s in pairs])
        result["gold_component_gaps"] = {
            part: gap(scored(f"{name} {part}", usable))
            for part, probes in world_probes(session.config.seed).items()
            if (usable := encoder.usable(probes)[0])
        }
    if name != session.judge:
        write_json(session.run.evaluation(f"reward_model_{name}"), result)
        return
    write_json(session.run.reward_evaluation, result)
    write_jsonl(session.run.mistakes, mistakes(pairs))


def _evaluate_policies(session: Session, stages: Sequence[str]) -> None:
    """Base, every policy stage, and best-of-n of the reference (SFT, or the base without an SFT stage)."""
    settings = session.config.evaluation
    reference_name = next((n for n in stages if session.config.stage[n].algorithm == "sft"), BASE)
    bench, learner = _bench(session, reference_name)
    names = [BASE, *stages]
    rows: dict[str, list[Row]] = {}
    for name in names:
        policy = Policy(load_causal_lm(session.source(name)))
        learner.freeze(policy)
        with session.console.counting(f"sample {name}", len(bench.prompts)) as advance:
            rows[_policy(name)] = bench.rows(policy, advance)
    labels = _labels(session, names)
    chosen: dict[str, tuple[list[Row], str, int | None]] = {
        _policy(name): (rows[_policy(name)], labels[name], None) for name in names
    }
    if bench.scorer is not None:
        n = settings.best_of
        with session.console.counting(f"best of {n}", len(bench.prompts)) as advance:
            best = best_of(bench.rows(bench.reference, advance, n, f"best of {n}"), n)
        rows[f"best_of_{n}"] = best
        chosen[f"best_of_{n}"] = (best, f"best of {n} ({labels[reference_name]})", n)
    comparisons = compare_to(_policy(reference_name), rows, settings, session.config.seed)
    against_best = []
    if bench.scorer is not None:
        trained = {p: r for p, r in rows.items() if p not in (BASE, _policy(reference_name))}
        against_best = compare_to(f"best_of_{settings.best_of}", trained, settings, session.config.seed)
    _remove_earlier(session.run)
    write_jsonl(session.run.comparisons, [*comparisons, *against_best])
    for name, (measured, label, n) in chosen.items():
        _write(session, name, summarise(name, label, measured, bench, n), comparisons, measured)


def _labels(session: Session, names: Sequence[str]) -> dict[str, str]:
    """SFT, PPO, ...; where an algorithm occurs twice, with the stage's name (and DPO's beta)."""
    kinds = {name: session.config.stage[name].algorithm for name in names if name != BASE}
    labels = {BASE: "base"}
    for name, kind in kinds.items():
        config = session.config.stage[name]
        beta = f", β {config.beta:g}" if isinstance(config, DPOConfig) else ""
        repeated = list(kinds.values()).count(kind) > 1
        labels[name] = f"{kind.upper()} ({name}{beta})" if repeated else kind.upper()
    return labels


def _remove_earlier(run: RunDir) -> None:
    """Numbers and samples of policies that an earlier evaluation measured, perhaps on other prompts."""
    for path in run.comparisons.parent.glob("*.json"):
        if not path.name.startswith("reward_model"):
            path.unlink()
    for path in run.samples_files().values():
        path.unlink()


def _bench(session: Session, reference_name: str) -> tuple[Bench, Any]:
    """Everything held equal: distinct held-out prompts, one reward model, one reference."""
    config, settings = session.config, session.config.evaluation
    source = session.source(reference_name)
    reference = Reference(load_causal_lm(source))
    encoder = session.encoder(source, settings.max_new_tokens)
    learner = session.learner(settings.batch_size)
    learner.freeze(reference)
    judge, scorer = session.judge, None
    if judge is not None and session.source(judge).exists():
        reward_model = load_reward_model(session.source(judge))
        learner.freeze(reward_model)
        scorer = scorer_for(session, encoder, reward_model, judge, settings.batch_size)
    bench = Bench(
        prompts=_prompts(session),
        encoder=encoder,
        scorer=scorer,
        reference=reference,
        settings=settings,
        seed=config.seed,
        device=learner.device,
        gold=session.gold,
    )
    return bench, learner


def _prompts(session: Session) -> list[Preference]:
    """Held-out prompts, different from each other."""
    prompts = distinct(session.shuffled(session.dataset.test), session.config.evaluation.prompts)
    if not prompts:
        raise DataError(
            "there is no test prompt to compare policies on",
            hint="give a file named test, or more training prompts from which one can be cut",
        )
    return prompts


def distinct(rows: Sequence[Preference], n: int) -> list[Preference]:
    """The first `n` rows with different prompts; fewer if there are no more."""
    found: dict[str, Preference] = {}
    for row in rows:
        if len(found) == n:
            break
        found.setdefault(row.prompt.transcript(), row)
    return list(found.values())


def _policy(stage: str) -> str:
    return BASE if stage == BASE else policy_name(stage)


def _write(
    session: Session,
    name: str,
    summary: dict[str, Any],
    comparisons: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
) -> None:
    for record in comparisons:
        if record["policy"] == name and record["measure"] == "score":
            summary["reward_difference_to_sft"] = {
                key: record[key] for key in ("mean", "interval", "n", "p_value", "verdict")
            }
            summary["win_rate_vs_sft"] = record["win_rate"]
    write_json(session.run.evaluation(name), summary)
    kept = [{k: v for k, v in row.items() if k != "ids"} for row in rows[: session.config.evaluation.samples]]
    write_jsonl(session.run.samples_file(name, session.config.model.base), kept)
