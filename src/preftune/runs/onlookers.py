"""What those who look on see besides metrics.jsonl: live.json of the stage that is under way.

It holds one reply to a held-out prompt, by the policy as it began and as it is now. Nothing that is trained
hangs on it: the numbers that a reply is drawn with are its own, and what goes wrong here is passed over.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from preftune import faults
from preftune.data import distinct_prompts, pad_prompts
from preftune.errors import PreftuneError
from preftune.models.roles import Policy
from preftune.models.shards import is_sharded
from preftune.records.base import write_record
from preftune.records.stage import LiveRecord
from preftune.rollout.sample import sample
from preftune.runs.job import Job
from preftune.runs.session import Session
from preftune.runs.stages import Stage
from preftune.seeding import derive_seed
from preftune.stops import Interrupted
from preftune.training.track import Tracked

OnStep = Callable[[int, Mapping[str, float]], None]
SHARE = 0.01  # of the time of a stage that replies may take
SECONDS = 5.0  # at least, from one to the next
_CHARACTERS = 600  # of the prompt's end and of a reply
_ROWS = 20  # that are looked through for a prompt


@contextmanager
def onlookers(session: Session, stage: Stage, job: Job, on_step: OnStep) -> Iterator[OnStep]:
    """`on_step`, with the tracker that is set told as well, and live.json kept up to date. To be entered
    before the first step, with the weights that the stage begins with: those of a resumed stage are restored
    later.
    """
    kind = session.config.track if job.learner.is_main else None
    if kind is None:
        yield _live(session, stage, job, on_step) if job.learner.is_main else on_step
        return
    tracked = Tracked(kind, session.config.name, stage.name, session.run.path, session.console.line)

    def tracked_step(step: int, metrics: Mapping[str, float]) -> None:
        on_step(step, metrics)
        tracked.add(step, metrics)

    try:
        yield _live(session, stage, job, tracked_step)
    finally:
        tracked.finish()


def _live(session: Session, stage: Stage, job: Job, on_step: OnStep) -> OnStep:
    """`on_step`, and live.json."""
    faults.begin_step(0)
    began = time.monotonic()
    config = session.config.stage.get(stage.name)
    record: dict[str, Any] = {"steps": job.steps, "tokens": job.tokens}
    record |= {"start": config.init} if config is not None else {}
    reply = _replies(session, job)
    record |= reply("before") if reply is not None else {}
    tell(session, stage, record)
    due = began + _pause(time.monotonic() - began)

    def looks(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal due
        on_step(step, metrics)
        if reply is None or (began := time.monotonic()) < due:
            return
        with suppress(Interrupted):  # the loop asks by itself whether to stop
            record.update({**reply("now"), "step": step})
            tell(session, stage, record)
        due = time.monotonic() + _pause(time.monotonic() - began)

    return looks


def _pause(cost: float) -> float:
    return max(SECONDS, cost / SHARE)


def _replies(session: Session, job: Job) -> Callable[[str], dict[str, str]] | None:
    """What draws the reply, by the name that it gets, always with the same numbers; None where nothing is
    written, or no prompt can be had.
    """
    policy, encoder, settings = job.model, job.encoder, session.config.evaluation
    rows = session.dataset.validation or session.dataset.train
    if not isinstance(policy, Policy) or not rows or is_sharded(policy):  # which all would have to gather
        return None
    try:
        _, (ids, *_) = distinct_prompts(encoder, rows[:_ROWS], 1)
    except PreftuneError:  # a template that takes none of these
        return None
    batch = pad_prompts([list(ids)], [derive_seed(session.config.seed, "onlookers")], encoder.pad_id)
    batch, text = batch.to(job.learner.device), encoder.prompt_text(ids)[-_CHARACTERS:]

    tokens = settings.max_new_tokens
    if encoder.max_length is not None:  # what the model can read
        tokens = min(tokens, encoder.max_length - len(ids))

    def reply(name: str) -> dict[str, str]:
        try:
            out = sample(
                policy,
                batch,
                max_new_tokens=tokens,
                temperature=settings.temperature,
                eos_id=encoder.ends,
            )
        except RuntimeError:  # memory, above all
            return {}
        response = encoder.decode(out.ids[0][out.response[0]].tolist(), list(ids))
        return {"prompt": text, name: response[:_CHARACTERS]}

    return reply


def tell(session: Session, stage: Stage, record: Mapping[str, Any]) -> None:
    """Write live.json. A full disk must not stop training."""
    with suppress(PreftuneError):
        write_record(session.run.live(stage.name), record, LiveRecord)
