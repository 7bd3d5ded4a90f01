"""A stage that makes data: replies of a policy are sampled, judged, paired and written.

    collected/STAGE/replies.jsonl       {"row", "prompt", "replies", "scores"}, one prompt a line; "members":
                                        of an ensemble each member's score of each reply
    collected/STAGE/preferences.jsonl   TRL's preference rows, with scores, judge, policy, seed and row
    collected/STAGE/preftune.json       who judged what, and how often
    collected/STAGE/README.md           the same for people: a data card

A reply depends on (run seed, stage, data row, which of its replies) alone, so that a stage that was stopped
goes on after the last prompt that is written down, and ends with the same files.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from preftune import faults
from preftune.config.algorithms.collect import CollectConfig
from preftune.data import Encoder, Preference, Sequences, distinct_prompts, pad_prompts
from preftune.data.pairing import Pair, Rule, pairs_of, prompt_of, reply_of
from preftune.errors import DataError
from preftune.models.load import load_causal_lm
from preftune.models.locate import fingerprint
from preftune.models.roles import Policy
from preftune.rollout.sample import as_lists, sample
from preftune.rollout.score import Scorer
from preftune.rundir import RunDir, append_jsonl, read_jsonl, write_json, write_jsonl, write_text
from preftune.runs.collected import collecting, data_card, earlier, in_words, labels
from preftune.runs.feed import row_name
from preftune.runs.llm_judge import LLMJudge, llm_judge
from preftune.runs.onlookers import tell
from preftune.runs.provenance import peak_memory_mb, reset_peak_memory
from preftune.runs.roles import share
from preftune.runs.scoring import reward_model_of
from preftune.runs.session import Session
from preftune.runs.stages import SIDE_FILE, Stage, begin, drop_checkpoints, finish, is_finished
from preftune.runs.train import scorer_for
from preftune.seeding import derive_seed
from preftune.sums import CARD
from preftune.training.learner import Learner
from preftune.training.metrics import Ledger, MetricsLog, seconds_until

Json = dict[str, Any]
_ROUNDS = 4  # questions that each connection asks while the other processes wait


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collector:
    """All that sampling and judging take."""

    session: Session
    name: str
    config: CollectConfig
    policy: Policy
    encoder: Encoder
    scorer: Scorer | LLMJudge
    rows: Sequence[Preference]
    prompts: Sequence[Sequence[int]]

    def seed(self, row: int) -> int:
        """The seed of all that is drawn for a data row."""
        return derive_seed(self.session.config.seed, self.name, "sample", row)

    def numbers(self, step: int) -> range:
        size = self.config.batch_size
        return range(step * size, min((step + 1) * size, len(self.rows)))

    def step(self, step: int, learner: Learner) -> tuple[list[Json], dict[str, float]]:
        """Replies to the prompts of a step with their scores, one row a prompt, and what to log of them:
        those of all processes, each of which samples for its share.
        """
        config, numbers = self.config, learner.share(list(self.numbers(step)))
        seeds = [self.seed(self.rows[i].row) for i in numbers]
        prompts = pad_prompts([self.prompts[i] for i in numbers], seeds, self.encoder.pad_id, numbers)
        replies = sample(
            self.policy,
            prompts.to(learner.device),
            max_new_tokens=self.session.new_tokens(self.name),
            temperature=config.temperature,
            eos_id=self.encoder.ends,
            responses_per_prompt=config.replies,
            say=learner.say_once,
            keeps_states=self.config.scored_by is not None,
        )
        lists = as_lists(replies, self.encoder.ends)
        texts, closed = [self.encoder.decode(ids) for _, ids, _ in lists], [closed for *_, closed in lists]
        plain, collected = self.encoder.form == "plain", list[Json]()
        for index, number in enumerate(numbers):
            row, span = self.rows[number], slice(index * config.replies, (index + 1) * config.replies)
            answers = {"replies": texts[span], "ended": closed[span], "scores": []}
            collected.append({"row": row.row, "prompt": prompt_of(row.prompt, plain), **answers})
        if isinstance(self.scorer, Scorer):
            for row, scored in zip(collected, self._scores(self.scorer, replies, numbers), strict=True):
                row |= {**scored, "scores": _finite(scored["scores"], self.name)}
        lengths = zip(replies.response.sum(1).tolist(), closed, strict=True)
        rows, sizes = learner.gather_items(collected), learner.gather_items([*lengths])
        if isinstance(self.scorer, LLMJudge):
            self._ask(self.scorer, rows, learner)
        if not learner.is_main:
            return rows, {}
        return rows, self._metrics(rows, sizes)

    def _ask(self, judge: LLMJudge, rows: Sequence[Json], learner: Learner) -> None:
        """Scores by a language model: the main process asks and keeps the answers in one file. Others wait
        for it after every few rows, each time anew, since none waits longer than `process_timeout`.
        """
        questions = self.config.replies * (self.config.replies - 1)  # of a row
        few = max(len(rows) if learner.is_alone else _ROUNDS * judge.config.parallel // questions, 1)
        for start in range(0, len(rows), few):
            chunk = rows[start : start + few]
            for row, scores in zip(chunk, judge.scores(chunk) if learner.is_main else (), strict=False):
                row["scores"] = _finite(scores, self.name)
            if learner.is_main and start + few >= len(rows):
                judge.check()  # of a whole step, however many processes there are
            learner.wait()

    def _scores(self, scorer: Scorer, replies: Sequences, numbers: Sequence[int]) -> list[Json]:
        """Scores of each prompt's replies; of an ensemble those of its members, too."""
        size = self.config.replies
        of = [number for number in numbers for _ in range(size)]
        scores, members, _ = scorer.shaped(replies, self.config.missing_eos_score, of)
        spans = [slice(start, start + size) for start in range(0, len(scores), size)]
        more = [{} if members is None else {"members": members[:, span].T.tolist()} for span in spans]
        return [{"scores": scores[span].tolist(), **extra} for span, extra in zip(spans, more, strict=True)]

    def _metrics(self, rows: Sequence[Json], replies: Sequence[tuple[int, bool]]) -> dict[str, float]:
        """Metrics of rows, and of the length of each reply and whether it has ended."""
        spreads = [pstdev(row["scores"]) for row in rows]
        lost = dict[str, float]()
        if isinstance(self.scorer, LLMJudge):
            verdicts = [judgement["verdict"] for judgement in self.scorer.judgements(rows)]
            lost = {"no_verdict": float(verdicts.count(None))}
        return {
            "score": fmean(score for row in rows for score in row["scores"]),
            "score_std_within": fmean(spreads),
            "frac_score_zero_std": fmean(spread == 0 for spread in spreads),
            "completions/mean_length": fmean(length for length, _ in replies),
            "eos_rate": fmean(closed for _, closed in replies),
            **lost,
        }

    def pairs(self, row: Json) -> list[Pair | None]:
        """The pairs of a prompt's replies; None for each that is left out."""
        config = self.config
        rule = Rule(
            pairing=config.pairing,
            ties=config.ties,
            tie_margin=config.tie_margin,
            temperature=config.label_temperature,
        )
        places = [i for i, closed in enumerate(row["ended"]) if closed or config.truncated == "keep"]
        if len(places) < 2:
            return []
        texts, scores = ([row[key][i] for i in places] for key in ("replies", "scores"))
        pairs = pairs_of(texts, scores, rule, self.seed(row["row"]))
        return [pair and Pair(places[pair.chosen], places[pair.rejected], pair.chance) for pair in pairs]


def collect_stage(session: Session, stage: Stage) -> bool:
    """Collect unless it is finished; returns whether anything was done. The main process writes."""
    run, config = session.run, collecting(session, stage.name)
    if is_finished(run, stage):
        drop_checkpoints(run, stage)
        session.console.say_skipped(stage.name)
        return False
    reset_peak_memory()
    began, learner = time.monotonic(), session.learner(config.microbatch_size)
    collector = _collector(session, stage.name, config, learner)
    if learner.is_main:
        begin(run, stage)
    steps = config.steps_on(len(collector.rows))
    resumed = _resumed(run, stage.name, config.batch_size) if learner.is_main else 0
    first_step = learner.gather_items([resumed])[0]
    began -= seconds_until(run.metrics(stage.name), first_step) if learner.is_main else 0.0
    with session.console.progress(stage.name, stage.algorithm, steps) as on_step:
        if learner.is_main:
            tell(session, stage, {"steps": steps, "start": config.init})
        for step in _logged(session, collector, first_step, steps, learner):
            on_step(*step)
    if learner.is_main:
        facts = _write(collector, stage, steps)
        facts |= {"seconds": time.monotonic() - began, "peak_memory_mb": peak_memory_mb()}
        facts |= {"world_size": learner.world}
        finish(run, stage, facts)
        session.console.say_finished(stage.name, facts)
        session.console.line(f"{stage.name:<12} {in_words(facts['collected'])}")
    learner.wait()
    return True


def _logged(
    session: Session, collector: _Collector, first_step: int, steps: int, learner: Learner
) -> Iterator[tuple[int, dict[str, float]]]:
    """The remaining steps, each written down before any process goes on."""
    run, name = session.run, collector.name
    logs = (
        (MetricsLog(run.metrics(name), first_step), Ledger(run.ledger(name), first_step))
        if learner.is_main
        else None
    )
    for step in range(first_step, steps):
        began = time.monotonic()
        faults.begin_step(step + 1)
        faults.faultpoint("step")
        learner.begin_step()
        rows, numbers = collector.step(step, learner)
        numbers["step_seconds"] = time.monotonic() - began
        if logs is not None:
            for row in rows:
                append_jsonl(run.replies(name), row)
            logs[0].add(step + 1, numbers)
            logs[1].add(step + 1, [row_name(collector.rows[i]) for i in collector.numbers(step)])
        learner.wait()
        yield step + 1, numbers


def _resumed(run: RunDir, name: str, size: int) -> int:
    """How many steps are written down completely; replies of a later one are dropped."""
    logs = [run.replies(name), run.metrics(name), run.ledger(name)]
    rows, *steps = [read_jsonl(log) if log.is_file() else [] for log in logs]
    complete = min(len(rows) // size, *(len(log_rows) for log_rows in steps))
    write_jsonl(run.replies(name), rows[: complete * size])
    return complete


def _collector(session: Session, name: str, config: CollectConfig, learner: Learner) -> _Collector:
    source = session.source(config.init)
    encoder, policy = session.encoder(source, session.new_tokens(name)), Policy(load_causal_lm(source))
    share(policy, session.config.shared_blocks())
    learner.freeze(policy)
    rows, prompts = distinct_prompts(encoder, session.training_rows(stage=name), config.rows)
    return _Collector(
        session=session,
        name=name,
        config=config,
        policy=policy,
        encoder=encoder,
        scorer=_judge(session, name, config, encoder, learner, rows),
        rows=rows,
        prompts=prompts,
    )


def _judge(
    session: Session,
    name: str,
    config: CollectConfig,
    encoder: Encoder,
    learner: Learner,
    rows: Sequence[Preference],
) -> Scorer | LLMJudge:
    """What scores the replies."""
    if config.asks is not None:
        return llm_judge(config.judge, config.asks, session.run.answers(name))
    judge, size = config.scored_by or config.judge_directory, config.microbatch_size
    model = reward_model_of(session, judge, learner) if judge else None
    if model is not None and config.scored_by:
        share(model, session.config.shared_blocks())
    return scorer_for(session, encoder, model, judge, size, rows, config.functions())


def _finite(scores: Sequence[float], name: str) -> list[float]:
    if not all(map(math.isfinite, scores)):
        raise DataError(f"stage {name}: its judge gives a reply no finite score", "use another judge")
    return list(scores)


def _write(collector: _Collector, stage: Stage, steps: int) -> Json:
    """Write the stage's files; returns the facts about them."""
    run, config = collector.session.run, collector.config
    rows, target = read_jsonl(run.replies(stage.name)), run.collected(stage.name)
    candidates = [(row, pair) for row in rows for pair in collector.pairs(row)]
    labelled = [(row, pair) for row, pair in candidates if pair is not None]
    if not labelled:
        longer = " and a larger max_new_tokens" if config.truncated == "drop" else ""
        raise DataError(
            f"stage {stage.name}: no two replies with different scores, so there is no pair",
            f"use a judge that tells replies apart, or set stage.{stage.name}.ties=random{longer}",
        )
    policy = fingerprint(collector.session.source(config.init))
    facts = {
        "judge": config.judge,
        "policy_sha256": policy,
        "prompts": len(rows),
        "replies": sum(len(row["replies"]) for row in rows),
        "pairs": len(labelled),
        "left_out_pairs": len(candidates) - len(labelled),
        "score_mean": fmean(score for row in rows for score in row["scores"]),
        **labels(labelled, config.label_temperature),
    }
    if beats := earlier(collector.session, stage.name, rows):
        facts["beats"] = beats
    provenance = {"judge": config.judge, "policy_sha256": policy, "stage": stage.name}
    preferences = [{**_preference(collector, row, pair), **provenance} for row, pair in labelled]
    llm = collector.scorer if isinstance(collector.scorer, LLMJudge) else None
    facts |= {} if llm is None else {"llm": llm.summary(rows)}
    write_json(target / SIDE_FILE, {"stage": stage.name, "key": stage.key, **facts})  # first: it is ours
    if llm is not None:
        write_jsonl(target / "judgements.jsonl", llm.judgements(rows))
        write_text(target / "template.txt", llm.template)
    write_jsonl(target / "replies.jsonl", rows)
    write_jsonl(target / "preferences.jsonl", preferences)
    write_text(target / CARD, data_card(collector.session, stage.name, facts))
    faults.faultpoint("model.rename")
    return {"steps": steps, "collected": facts}


def _preference(collector: _Collector, row: Json, pair: Pair) -> Json:
    """A row as TRL and everybody else reads it: conversations, or texts in plain form."""
    plain, texts, scores = collector.encoder.form == "plain", row["replies"], row["scores"]
    return {
        "prompt": row["prompt"],
        "chosen": reply_of(texts[pair.chosen], plain),
        "rejected": reply_of(texts[pair.rejected], plain),
        "ended_chosen": row["ended"][pair.chosen],
        "ended_rejected": row["ended"][pair.rejected],
        "score_chosen": scores[pair.chosen],
        "score_rejected": scores[pair.rejected],
        "row": row["row"],
        "seed": collector.seed(row["row"]),
    }
