"""The outer loop: it counts, logs and checkpoints, and does not know which algorithm it drives.

A batch is a pure function of the step, so a resumed run sees the same batches as an uninterrupted one. A step
is taken completely or not at all: after a signal, or a number that is not finite, it is abandoned, and the
state in which it began is restored or saved.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from preftune import faults
from preftune.algorithms.base import Algorithm, Metrics
from preftune.errors import BackendMissing, ConfigError, DataError, InputMissing, PreftuneError, StorageError
from preftune.rundir import write_json
from preftune.stops import Interrupted, deferred, held_back
from preftune.training import checkpoint
from preftune.training.learner import Learner
from preftune.training.metrics import Ledger, MetricsLog, Say
from preftune.training.state import TrainState, capture, load_state

MAX_BAD_STEPS = 3  # in a row, with numbers that are not finite, before the run stops
# Of what a step asks others: a server that samples, a reward function.
_ABANDONED = (BackendMissing, ConfigError, DataError, InputMissing, StorageError)


@dataclass(frozen=True, slots=True)
class Worth:
    """By what checkpoints are compared, higher is better: `measure` looks at the models as they are; else the
    mean of `of_step` over the steps since the previous checkpoint.
    """

    measure: Callable[[], float] | None = None
    of_step: Callable[[Metrics], float] | None = None


@dataclass(frozen=True, slots=True)
class EarlierState:
    """The final state is not that of the last step, but that after step `kept`. `why` "kl_budget": the metric
    had this `value`, beyond the budget, at `step`, the last that was taken; "best": of the checkpoints up to
    `step` that one has the highest worth, `value`.
    """

    step: int
    value: float
    kept: int
    why: Literal["kl_budget", "best"] = "kl_budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to train, where to write, and what to tell whom.

    `updates` of the weights in a step: with several of them, a copy of the state is kept in memory while a
    step is under way. `budget`: a metric, measured before the updates of a step, and the
    most that it may be. `rows_at` names the data rows of a step; `on_saved` is called for every checkpoint,
    `begin` before the first step, unless there is a checkpoint.
    """

    steps: int
    metrics: Path
    checkpoints: Path
    checkpoint_every: int
    keep: int
    updates: int = 1
    budget: tuple[str, float] | None = None
    worth: Worth | None = None
    begin: Callable[[], None] | None = None
    ledger: Path | None = None
    rows_at: Callable[[int], Sequence[str]] | None = None
    on_saved: Callable[[Path], None] = lambda path: None
    say: Say = print


def train(
    algorithm: Algorithm,
    learner: Learner,
    batch_at: Callable[[int], Any],
    plan: Plan,
    on_step: Callable[[int, Metrics], None],
) -> EarlierState | None:
    """Run the remaining steps; the last state is left in the learner's models and in the last checkpoint. A
    step that is beyond the budget is the last, and the state that of a checkpoint from before.

    Raises Interrupted, with the state saved, when a signal asks for it.
    """
    start = checkpoint.restore(plan.checkpoints, learner, plan.say)
    if start == 0 and plan.begin is not None:
        plan.begin()
    keeper, record = _Keeper(learner, plan, saved=start), _Record(learner, plan, start)
    with deferred(anywhere=learner.is_alone):
        for step in range(start, plan.steps):
            began = time.monotonic()
            faults.begin_step(step + 1)
            keeper.begin_step()
            factor = learner.set_progress(step, plan.steps)
            try:
                faults.faultpoint("step")
                metrics = algorithm.step(batch_at(step))
            except Interrupted as stop:
                raise keeper.interruption(step, stop.number) from None
            except _ABANDONED:
                keeper.keep_begun(step)
                raise
            skipped = bool(learner.not_finite)
            times = {"lr_factor": factor, "step_seconds": time.monotonic() - began}
            times["sampling_seconds"] = float(learner.noted.get("sampling_seconds", 0.0))
            row = {**metrics, "skipped": float(skipped), **times}
            record.took(step, row)
            if skipped:
                keeper.undo_step()
                record.was_bad(step, row)
            elif not learner.is_settling:
                learner.bad_steps = 0
            on_step(step + 1, row)
            if (ended := keeper.beyond(step + 1, row)) is not None:
                return ended
            keeper.end_step(step + 1, row)
    return keeper.best()


class _Best(NamedTuple):
    """The best checkpoint so far, by its step and its worth. It is noted among the learner's scalars, as a
    part of the state: a resumed stage comes to the same.
    """

    step: int
    value: float


def _best_of(scalars: Mapping[str, float]) -> _Best | None:
    """What is noted of the best checkpoint."""
    return _Best(int(scalars["best_step"]), scalars["best"]) if "best" in scalars else None


def _note_best(scalars: dict[str, float], best: _Best | None) -> None:
    """Note it, or that there is none."""
    if best is None:
        scalars.pop("best", None)
        scalars.pop("best_step", None)
    else:
        scalars["best"], scalars["best_step"] = best.value, float(best.step)


@dataclass(slots=True)
class _Keeper:
    """Keeps the state: in memory while a step is under way, on disk now and then, and before a stop."""

    learner: Learner
    plan: Plan
    saved: int  # the step of the newest checkpoint
    before: TrainState | None = None  # the state in which this step began, if it makes several updates
    scalars_before: Mapping[str, float] = field(default_factory=dict)  # the learner's, as this step began
    former: _Best | None = None  # as it was before the newest checkpoint was weighed

    def __post_init__(self) -> None:
        if self.plan.budget is not None and self.saved == 0:  # step 0 is saved, too: a state to go back to
            self.learner.wait()  # every process has looked what there is
            self._write(0, capture(self.learner))
            self.learner.wait()

    def begin_step(self) -> None:
        self.learner.begin_step()
        self.scalars_before = dict(self.learner.scalars)
        if self.plan.updates > 1:
            self.before = capture(self.learner).copied(self.before)

    def _weigh(self, step: int, row: Metrics, worth: Worth, due: bool) -> None:
        """Note the checkpoint that is best so far. Until one is due, the sums are scalars of the learner, so
        that a resumed stage has them.
        """
        scalars = self.learner.scalars
        if worth.of_step is not None and not row["skipped"]:
            scalars["worth_sum"] = scalars.get("worth_sum", 0.0) + worth.of_step(row)
            scalars["worth_steps"] = scalars.get("worth_steps", 0.0) + 1
        if not due:
            return
        self.former = _best_of(scalars)
        total, steps = scalars.pop("worth_sum", 0.0), scalars.pop("worth_steps", 0.0)
        mean = total / steps if steps else -math.inf
        value = mean if worth.measure is None else worth.measure()
        if value > (self.former.value if self.former is not None else -math.inf):
            _note_best(scalars, _Best(step, value))

    def best(self) -> EarlierState | None:
        """Go back to the best checkpoint; None for the last one, a damaged one, or if nothing is compared."""
        best, last = _best_of(self.learner.scalars), self.plan.steps
        if best is None or self._back_to_the_best(last) == last:
            return None
        return EarlierState(last, best.value, best.step, "best")

    def _back_to_the_best(self, last: int) -> int:
        """From the state after step `last` to the best one that it knows of; returns the step of the state
        that is there now: `last` if that is the best, the best one is damaged, or nothing is compared.
        """
        best = _best_of(self.learner.scalars)
        if self.plan.worth is None or best is None or best.step == last:
            return last
        path = checkpoint.checkpoint_at(self.plan.checkpoints, best.step)
        if (fault := checkpoint.fault_of(path)) is not None:
            if self.learner.is_main:
                problem = f"the best checkpoint, {path}, cannot be read ({fault})"
                self.plan.say(f"warning: {problem}; the model is that of step {last}")
            return last
        self.learner.wait()
        checkpoint.load(path, self.learner, self.plan.say)
        return best.step

    def undo_step(self) -> None:
        """Back to where the step began; a single update that was skipped has changed nothing."""
        self.learner.scalars = dict(self.scalars_before)
        if self.learner.updates and self.before is not None:
            skipped = {name: trained.skipped for name, trained in self.learner.trained.items()}
            load_state(self.before, self.learner)
            for name, count in skipped.items() if self.learner.scaler_state() else ():
                self.learner.trained[name].skipped = count  # the count of what the scaler skipped goes on

    def beyond(self, step: int, row: Metrics) -> EarlierState | None:
        """The earlier state that counts if what a step measured before its updates is beyond the budget; None
        within it. The previous step's updates led there, so it is that of the newest scheduled checkpoint
        from before them, or of the best one up to it. Checkpoints left by a signal are passed over: a stage
        ends alike with and without one. DataError if no such checkpoint is left.
        """
        metric, most = self.plan.budget or ("", math.inf)
        if row["skipped"] or (value := row.get(metric, 0.0)) <= most:
            return None
        self.learner.wait()
        before, every = max(step - 1, 1), self.plan.checkpoint_every
        newest = checkpoint.newest_step(self.plan.checkpoints, below=before, every=every)
        path = checkpoint.checkpoint_at(self.plan.checkpoints, newest)
        if checkpoint.fault_of(path) is not None:  # no scheduled one is left: another interval, a full disk
            newest = checkpoint.newest_step(self.plan.checkpoints, below=before)
            path = checkpoint.checkpoint_at(self.plan.checkpoints, newest)
        if (fault := checkpoint.fault_of(path)) is not None:
            raise DataError(
                f"step {step} measures {value:.3g}, beyond the budget of {most:g}, and no checkpoint from "
                f"before step {before} is there to go back to ({path}: {fault})",
                "raise kl_budget, or train the stage again (--redo)",
            )
        checkpoint.load(path, self.learner, self.plan.say)
        return EarlierState(step, value, self._back_to_the_best(newest))

    def end_step(self, step: int, row: Metrics) -> None:
        """Save if it is time. Raises Interrupted, with the state saved, if a process was asked to stop."""
        due = step % self.plan.checkpoint_every == 0 or step == self.plan.steps
        before = _best_of(self.learner.scalars)
        if self.plan.worth is not None:
            with held_back():
                self._weigh(step, row, self.plan.worth, due)
        number = self.learner.asked_to_stop()
        if number or due:
            self._save(step, capture(self.learner))
            if self.saved < step < self.plan.steps:  # one that is not on the disk is none to go back to
                _note_best(self.learner.scalars, before)
        if number:
            raise self._reason(step, number)

    def keep_begun(self, step: int) -> None:
        """Save the state in which a step began that failed before it changed anything; not if there are
        several processes, since the others do not know of it.
        """
        if self.learner.is_alone and not self.learner.updates:
            self._save_begun(step)

    def interruption(self, step: int, number: int) -> Interrupted:
        """Save the state in which the abandoned step began; returns the exception to raise."""
        self._save_begun(step)
        return self._reason(step, number)

    def _save_begun(self, step: int) -> None:
        """Save the state in which this step began, if it is still there. An update that an fp16 scaler
        skipped is none, and yet has changed the scaler: so what was kept comes first.
        """
        if self.before is not None:
            self._save(step, self.before)
        elif not self.learner.updates:
            self._save(step, capture(self.learner))

    def spared(self, step: int) -> set[int]:
        """The best checkpoint so far; with a budget also the two newest that were due, and the best one of
        before the newest: what a signal leaves is none to go back to, and the newest may be beyond the budget
        already.
        """
        best, every = _best_of(self.learner.scalars), self.plan.checkpoint_every
        spared = set[int]() if best is None else {best.step}
        if self.plan.budget is not None:
            due = step // every * every
            spared |= {due, due - every}
            if self.former is not None:
                spared.add(self.former.step)
        return spared

    def _reason(self, step: int, number: int) -> Interrupted:
        lost = f", work since step {self.saved} will be done again" if self.saved != step else ""
        return Interrupted(number, f" after step {step} of {self.plan.steps}{lost}")

    def _save(self, step: int, state: TrainState) -> None:
        """A checkpoint, unless there is one. A full disk costs a warning."""
        if step != self.saved:
            try:
                self._write(step, state)
            except StorageError as error:
                self.plan.say(f"warning: {error.message}; the newest one is of step {self.saved}")
                step = self.saved
        self.saved = self.learner.gather_items([step])[0]  # the main process's, once every process is here

    def _write(self, step: int, state: TrainState) -> None:
        """A checkpoint, by the processes that have something to write."""
        if self.learner.is_main or self.learner.shard:
            directory, spared = self.plan.checkpoints, self.spared(step)
            path = checkpoint.save(directory, step, state, self.plan.keep, spared, self.learner)
            if self.learner.is_main:
                self.plan.on_saved(path)


@dataclass(slots=True)
class _Record:
    """What each step did, for people: numbers, data rows, and all about a step that went wrong."""

    learner: Learner
    plan: Plan
    start: int
    metrics: MetricsLog | None = None
    ledger: Ledger | None = None
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.learner.is_main:
            return
        self.metrics = MetricsLog(self.plan.metrics, self.start, self.plan.say)
        if self.plan.ledger is not None:
            self.ledger = Ledger(self.plan.ledger, self.start, self.plan.say)

    def took(self, step: int, row: Metrics) -> None:
        if self.metrics is not None:
            self.metrics.add(step + 1, row)
        if self.ledger is not None:
            self.ledger.add(step + 1, self._rows(step))

    def was_bad(self, step: int, row: Metrics) -> None:
        """Write down a step that was skipped; the third in a row is the last: PreftuneError."""
        self.learner.bad_steps += 1
        why = self.learner.not_finite[0]
        self.reasons.append(f"step {step + 1}: {why}")
        if self.learner.is_main:
            self._dump(step, row)
            self.plan.say(f"warning: step {step + 1} was skipped: {why}")
        if self.learner.bad_steps >= MAX_BAD_STEPS:
            file = nonfinite_file(self.plan.metrics, step + 1)
            raise PreftuneError(
                f"{self.learner.bad_steps} steps in a row had numbers that are not finite:\n  "
                + "\n  ".join(self.reasons[-MAX_BAD_STEPS:])
                + f"\nrows and rewards of the last: {file}",
                hint="lower the learning rate or look at those rows, and use another --out DIR",
            )

    def _dump(self, step: int, row: Metrics) -> None:
        rewards = self.learner.noted.get("rewards")
        record = {
            "step": step + 1,
            "not_finite": list(self.learner.not_finite),
            "rows": self._rows(step),
            "rewards": None if rewards is None else rewards.tolist(),
            "metrics": row,
        }
        try:
            write_json(nonfinite_file(self.plan.metrics, step + 1), record)
        except StorageError as error:
            self.plan.say(f"warning: {error.message}")

    def _rows(self, step: int) -> list[str]:
        return list(self.plan.rows_at(step)) if self.plan.rows_at is not None else []


def nonfinite_file(metrics: Path, step: int) -> Path:
    """Where a skipped step is written down: beside metrics.jsonl."""
    return metrics.with_name(f"nonfinite-step-{step}.json")
