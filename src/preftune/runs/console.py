"""What a person sees while a run goes on: the plan, one progress bar a stage, and the table at the end."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from preftune.config import config_of
from preftune.untrusted import printable

_LINE_SECONDS = 30  # between lines where no bar can be shown

Panel = Callable[[RichConsole], RenderableType]

_HEADLINE = {"loss": "loss"}  # of a base model that is pretrained


class Console:
    """Plain lines where the output is not a terminal; never interprets markup in data."""

    def __init__(self, log: Path | None = None, quiet: bool = False, panel: Panel | None = None) -> None:
        """`panel`: what is shown on a terminal while a stage goes on, instead of a bar."""
        self._out = _Output(highlight=False, soft_wrap=True, quiet=quiet)
        self._log = None if quiet else log
        self._out.kept_elsewhere = log is not None
        self._panel = panel

    def line(self, text: str) -> None:
        """One line, to the terminal and to the log of this attempt. Nothing in it is trusted."""
        text = printable(text)
        self._out.print(Text(text))
        if self._log is not None:
            stamp = datetime.now().astimezone().isoformat(timespec="seconds")
            with contextlib.suppress(OSError):  # a full disk must not stop training
                self._log.parent.mkdir(parents=True, exist_ok=True)
                with self._log.open("a", encoding="utf-8") as file:
                    file.write(f"{stamp} {text}\n")

    def plan(self, name: str, directory: str, rows: Sequence[tuple[str, str, str]]) -> None:
        """Stages with what each starts from and how long it is."""
        title = Text(printable(f"{name}  ->  {directory}"))
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading in ("stage", "algorithm", "what it does"):
            table.add_column(heading)
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._out.print(table)

    def say_skipped(self, stage: str) -> None:
        self.line(f"{stage:<12} already finished")

    def say_finished(self, stage: str, facts: Mapping[str, Any]) -> None:
        memory = facts.get("peak_memory_mb")
        peak = f", peak memory {memory:,.0f} MiB" if memory else ""
        rejected = sum(facts.get("rejected", {}).values())
        dropped = f", left out: {rejected} of its rows" if rejected else ""
        steps = f"{facts['steps']} steps in " if "steps" in facts else ""
        self.line(f"{stage:<12} {steps}{facts['seconds']:.1f} s{peak}{dropped}")

    @contextmanager
    def progress(
        self, stage: str, algorithm: str, steps: int
    ) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """The panel, or a bar with ETA; the body calls the function it is given with (step, metrics). Where
        nothing can be drawn, a line now and then instead.
        """
        if (panel := self._panel) is not None and is_live(self._out):
            looks = {"console": self._out, "refresh_per_second": 1, "transient": True}
            with Live(get_renderable=lambda: panel(self._out), **looks):
                yield lambda step, metrics: None
            return
        kind = config_of(algorithm)
        headline = kind.headline if kind else _HEADLINE
        with self._bar() as bar:
            task = bar.add_task(f"{stage:<12}", total=steps, info="")
            last_line = time.monotonic()

            def on_step(step: int, metrics: Mapping[str, float]) -> None:
                nonlocal last_line
                info = "  ".join(
                    f"{name} {metrics[key]:.3g}" for key, name in headline.items() if key in metrics
                )
                bar.update(task, completed=step, info=info)
                if not is_live(self._out) and time.monotonic() - last_line > _LINE_SECONDS:
                    last_line = time.monotonic()
                    self.line(f"{stage:<12} step {step} of {steps}  {info}")

            yield on_step

    @contextmanager
    def counting(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar that the body advances by a number of items."""
        with self._bar() as bar:
            task = bar.add_task(f"{label:<12}", total=total, info="")
            yield lambda n: bar.advance(task, n)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """All columns in full: those that do not fit follow below, with the first repeated."""
        headers = [printable(text) for text in headers]
        rows = [[printable(cell) for cell in row] for row in rows]
        self._out.print()
        widths = [max(cell_len(row[i]) for row in [headers, *rows]) + 2 for i in range(len(headers))]
        for columns in _fitting(widths, self._out.width):
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
            for i in columns:
                table.add_column(Text(headers[i]), justify="left" if i == 0 else "right", no_wrap=True)
            for row in rows:
                table.add_row(*(Text(row[i]) for i in columns))
            self._out.print(table)
            self._out.print()

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}", markup=False),
            console=self._out,
            transient=True,
            disable=not is_live(self._out),
        )


class _Output(RichConsole):
    """Of a run, whose log has the lines too: a reader, a terminal or space on a disk may go away, and that
    stops no training. Where there is no log, what is printed is the result, and errors are raised.
    """

    kept_elsewhere = False

    def _check_buffer(self) -> None:  # all ways to print end here
        try:
            super()._check_buffer()
        except OSError as error:
            if not self.kept_elsewhere:
                raise
            self.quiet = True
            with contextlib.suppress(OSError):
                warning = f"warning: no more can be printed ({error.strerror}); the run goes on, with its log"
                print(warning, file=sys.stderr, flush=True)

    def on_broken_pipe(self) -> None:
        if not self.kept_elsewhere:
            super().on_broken_pipe()  # which ends the command
        self.quiet = True


def is_live(out: RichConsole) -> bool:
    """Whether output may be redrawn in place: on a terminal that can move its cursor, and not where
    NO_COLOR or CI asks for plain lines.
    """
    plain = any(os.environ.get(name, "") for name in ("NO_COLOR", "CI"))
    return out.is_terminal and not out.is_dumb_terminal and not plain


def _fitting(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns in groups no wider than `room` where that is possible; column 0 leads each group."""
    groups, used = [[0]], widths[0]
    for i in range(1, len(widths)):
        if used + widths[i] > room and len(groups[-1]) > 1:
            groups.append([0])
            used = widths[0]
        groups[-1].append(i)
        used += widths[i]
    return groups
