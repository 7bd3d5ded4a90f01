"""What the files of a run say while it goes on. Reads only what is new, keeps little, and writes nothing.

The training process asks here too, once a second from a thread of its own: what cannot be read is passed over
until the next time.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, stdev

from preftune.config import RunConfig, load_recipe, stage_order
from preftune.errors import PreftuneError
from preftune.records.base import read_record
from preftune.records.run import DataRecord
from preftune.records.stage import LiveRecord, MetricsRow, StageRecord
from preftune.report.doctor.base import Finding
from preftune.report.doctor.diagnose import diagnose
from preftune.report.load import load_run
from preftune.report.view import RunView, StageView
from preftune.rundir import BASE, RunDir, decoded
from preftune.runs.lock import is_held

KEPT = 2000  # rows of a stage
_BYTES = 1 << 22  # of a file, at a time
DOCTOR = 10.0  # seconds between two looks of the doctor, who reads all rows
RECENT = 10  # steps that a number is the mean of
_USUAL = 48.0  # tokens of a prompt and of a reply, where only their ratio over stages counts


@dataclass(slots=True)
class Tail:
    """The last rows of a metrics.jsonl, read as they are appended."""

    path: Path
    rows: deque[MetricsRow] = field(default_factory=lambda: deque(maxlen=KEPT))
    _at: int = 0
    _file: int = 0  # a resumed stage begins with another file

    def read(self) -> None:
        with suppress(OSError), self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._file or status.st_size < self._at:
                self.rows.clear()
                self._at, self._file = 0, status.st_ino
            end = b"\n"
            while end and self._at < status.st_size:  # a line without its end is read the next time
                file.seek(self._at)
                lines, end, _ = file.read(_BYTES).rpartition(b"\n")
                self._at += len(lines) + len(end)
                for line in filter(bytes.strip, lines.split(b"\n")):
                    with suppress(ValueError, RecursionError):  # the report says what is wrong with it
                        self.rows.append(MetricsRow.model_validate(decoded(json.loads(line))))

    def course(self, *names: str, last: int = KEPT) -> list[float]:
        """The finite values of the first of these metrics that the last row has, in the last rows."""
        name = next((n for n in names if self.rows and n in self.rows[-1].numbers), "")
        rows = islice(self.rows, max(len(self.rows) - last, 0), None) if name else ()
        return [v for row in rows if math.isfinite(v := row.numbers.get(name, math.nan))]

    def recent(self, *names: str) -> tuple[float, float] | None:
        """Mean over the last steps and its standard error, from their spread; None without a value."""
        values = self.course(*names, last=RECENT)
        if not values:
            return None
        return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at a run. `stage` is the one that is under way, or was last; "" before the first."""

    run: RunDir
    name: str
    config: RunConfig
    records: dict[str, StageRecord]  # in the order in which they are trained
    locked: bool
    stage: str
    part: str  # the stage, or the member of it that is under way, whose files the rest is of
    members_done: float  # seconds of its other members, as far as they are finished
    members_left: int  # that are still to begin
    tail: Tail
    live: LiveRecord
    checkpoint: int  # step of the newest, 0 without one
    findings: Sequence[Finding]
    seconds_left: float | None  # seconds of training of the whole run, as far as can be told

    @property
    def step(self) -> int:
        return self.tail.rows[-1].step if self.tail.rows else 0

    @property
    def steps(self) -> int:
        return self.live.steps or self.records.get(self.stage, StageRecord()).steps or self.step

    @property
    def finished(self) -> bool:
        """Whether all stages are done and the report is there."""
        return self.trained and self.run.report_page.is_file()

    @property
    def trained(self) -> bool:
        return all(record.status == "finished" for record in self.records.values())

    @property
    def pace(self) -> float | None:
        """Seconds of a step, by the last ones."""
        recent = self.tail.recent("step_seconds")
        return None if recent is None else recent[0]

    @property
    def stage_left(self) -> float | None:
        """Seconds of the stage, at the pace of the last steps; members to come are as long as this one."""
        steps_left = max(self.steps - self.step, 0) + self.members_left * self.steps
        return None if self.pace is None else steps_left * self.pace


class Watched:
    """A run directory that is looked at again and again. `inside`: by the process that holds it, which says
    what stages it trains.

    Raises InputMissing or ConfigError where there is no run, or its settings cannot be read.
    """

    def __init__(
        self,
        run: RunDir,
        config: RunConfig | None = None,
        stages: Sequence[str] = (),
        *,
        inside: bool = False,
    ) -> None:
        self.run, self._inside = run, inside
        self.config = config or load_recipe(str(run.config)).config
        scratch = [BASE] if self.config.model.scratch is not None else []
        self.names = [*scratch, *(stages or stage_order(self.config.stage))]
        self._tail = Tail(run.metrics(""))
        self._data: DataRecord | None = None
        self._judged, self._due = ("", False), -math.inf
        self._findings: Sequence[Finding] = ()

    def look(self) -> Look:
        records = {name: self._record(name) for name in self.names}
        under_way = [n for n in self.names if records[n].status == "running"]
        finished = [n for n in self.names if records[n].status == "finished"]
        stage = (under_way or finished[-1:] or [""])[0]
        members = self._members(stage) if under_way else {}
        part, members_left = _under_way(members) if members else (stage, 0)
        if self._tail.path != self.run.metrics(part):
            self._tail = Tail(self.run.metrics(part))
        self._tail.read()
        live = LiveRecord(steps=(members[part].steps or 0) if members else 0)
        with suppress(PreftuneError):
            live = read_record(self.run.live(part), LiveRecord)
        look = Look(
            run=self.run,
            name=self.config.name,
            config=self.config,
            records=records,
            locked=self._inside or is_held(self.run),
            stage=stage,
            part=part,
            members_done=sum(record.seconds or 0.0 for name, record in members.items() if name != part),
            members_left=members_left,
            tail=self._tail,
            live=live,
            checkpoint=self._checkpoint(part),
            findings=(),
            seconds_left=None,
        )
        return replace(look, findings=self._diagnosed(look), seconds_left=self._seconds_left(look))

    def _members(self, name: str) -> dict[str, StageRecord]:
        """The records of an ensemble's members, in the order in which they are trained; {} of one model."""
        stage = self.config.stage.get(name)
        members = stage.member_names(name) if stage is not None and stage.models > 1 else []
        return {member: self._record(member) for member in members}

    def _record(self, name: str) -> StageRecord:
        with suppress(PreftuneError):
            return read_record(self.run.stage_json(name), StageRecord)
        return StageRecord()

    def _checkpoint(self, stage: str) -> int:
        with suppress(OSError):  # the directory may go while it is read
            names = (path.name.removeprefix("step-") for path in self.run.checkpoints(stage).glob("step-*"))
            return max((int(name) for name in names if name.isdecimal()), default=0)
        return 0

    def _diagnosed(self, look: Look) -> Sequence[Finding]:
        """Of the stage under way, now and then; of everything, once the run is finished."""
        state, now = (look.stage, look.finished), time.monotonic()
        if state != self._judged or now >= self._due:
            self._judged, self._due, self._findings = state, now + DOCTOR, ()
            with suppress(PreftuneError, ValueError, ArithmeticError):
                self._findings = diagnose(load_run(self.run) if look.finished else _view(look))
        return self._findings

    def _seconds_left(self, look: Look) -> float | None:
        """Seconds left: of the stage under way, and of the remaining ones at the seconds per token of earlier
        stages; stages that sample at the rate of such stages, if it is known. None where nothing is known, or
        nothing is left.
        """
        if self._data is None:
            with suppress(PreftuneError):
                self._data = read_record(self.run.data, DataRecord)
        tokens = {name: self._tokens(name) for name in self.names}
        paces: dict[bool, float] = {}
        for name, record in look.records.items():
            seconds = record.seconds if record.status == "finished" else None
            if not seconds and name == look.stage and look.pace is not None and look.step:
                models = self.config.stage[name].models if name in self.config.stage else 1
                seconds = look.pace * look.steps * models
            if seconds and tokens[name]:
                paces[self._samples(name)] = seconds / tokens[name]
        if not paces or look.trained:
            return None
        seconds_left = look.stage_left or 0.0 if look.records[look.stage].status == "running" else 0.0
        for name in (n for n, record in look.records.items() if record.status == ""):
            seconds_left += tokens[name] * paces.get(self._samples(name), max(paces.values()))
        return seconds_left

    def _samples(self, name: str) -> bool:
        return name != BASE and self.config.stage[name].online

    def _tokens(self, name: str) -> float:
        """Through the training forward of a stage, by its settings; 0 where they do not say."""
        scratch, rows = self.config.model.scratch, self._data.splits.get("train", 0) if self._data else 0
        if name == BASE:
            return scratch.steps * scratch.batch_size * 2 * _USUAL if scratch is not None else 0.0
        stage = self.config.stage[name]
        with suppress(NotImplementedError, ValueError):
            maker = self.config.stage.get(stage.data or "")
            rows = rows if maker is None else maker.rows_made(rows)
            learners = stage.shares(rows)
            times = stage.models // len(learners)  # an ensemble's members all take the same rows
            planned = times * sum(map(stage.rows_planned, learners))
            return planned * stage.tokens_per_row(_USUAL, _USUAL, _USUAL)
        return 0.0


def _under_way(members: Mapping[str, StageRecord]) -> tuple[str, int]:
    """The member that is trained, or was last, and how many are still to begin."""
    begun = [name for name, record in members.items() if record.status]
    running = [name for name in begun if members[name].status == "running"]
    current = (running or begun[-1:] or [*members])[0]
    return current, sum(name != current and not record.status for name, record in members.items())


def _view(look: Look) -> RunView:
    """A run of the one stage, as the doctor looks at it."""
    record = look.records.get(look.stage, StageRecord())
    config = look.config.model_dump()
    stage = StageView(
        name=look.stage,
        status=record.status,
        record=record,
        metrics=tuple(look.tail.rows),
        settings=config["stage"].get(look.stage, {}),
    )
    return RunView(name=look.name, config=config, stages=(stage,) if look.stage else ())


def sparkline(values: Sequence[float], width: int) -> Iterator[float]:
    """Means of `width` parts of a course, or the course itself if it is shorter."""
    count = min(len(values), width)
    bounds = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    yield from (fmean(values[a:b]) for a, b in pairwise(bounds))
