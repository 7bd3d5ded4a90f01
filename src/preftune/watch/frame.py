"""One picture of a run for the terminal. What models, files and settings say goes in as text without markup,
with control characters written out, and cut: the picture is as high and as wide whatever they say.
"""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from preftune.config import StageSettings, config_of
from preftune.records.stage import StageRecord
from preftune.untrusted import printable
from preftune.watch.following import Look, Tail, sparkline

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK = 16
_LINES = 3  # of a reply
_LONGEST = 1000  # characters that are looked at
_CUT = "completions/clipped_ratio"  # of whatever samples what it learns from: shown as the share that ended


def frame(look: Look, width: int = 100, *, blocks: bool = True) -> RenderableType:
    """The panel, at most `width` wide. `blocks`: the terminal knows more than ASCII."""
    room = max(width - 14, 20)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("stages", _stages(look))
    if look.stage:
        grid.add_row("step", _progress(look, min(room, 40)))
        grid.add_row("time", _line(_times(look), room * 2))
        grid.add_row("numbers", _numbers(_kind(look) or StageSettings, look.tail, room, blocks))
        grid.add_row("speed", _line(_speed(look), room * 2))
        grid.add_row("saved", _line(_checkpoint_words(look), room))
        for label, words in _replies(look):
            grid.add_row(Text(_flat(label, 12)), _line(words, room * _LINES))
    grid.add_row("doctor", _doctor(look, room))
    title = Text(_flat(f"{look.name}  ->  {look.run.path}", room))
    return Panel(Group(grid), title=title, title_align="left", width=width, padding=(0, 1))


def duration(seconds: float) -> str:
    """`47 s`, `3:05`, `2:10:00`."""
    if not math.isfinite(seconds):
        return "?"
    rounded = round(seconds)
    hours, minutes = divmod(rounded // 60, 60)
    if rounded < 60:
        return f"{rounded} s"
    return f"{hours}:{minutes:02}:{rounded % 60:02}" if hours else f"{minutes}:{rounded % 60:02}"


def _flat(text: object, limit: int) -> str:
    """On one line, `limit` characters at most; a line's end shows as ⏎ when it stands inside."""
    visible = printable(str(text)[:_LONGEST].strip().replace("\n", " ⏎ "))
    return visible if len(visible) <= limit else visible[: max(limit - 1, 0)] + "…"


def _line(text: object, limit: int) -> Text:
    """Cut by cells: a wide character takes two."""
    line = Text(_flat(text, limit))
    line.truncate(limit, overflow="ellipsis")
    return line


def _stages(look: Look) -> Text:
    """All stages, those that are done and the one that is under way told apart without colour too."""
    line = Text()
    for name, record in look.records.items():
        under_way = record.status == "running"
        mark = "✓ " if record.status == "finished" else "▶ " if under_way else "· "
        line.append(f"{mark}{_flat(name, 20)}  ", style="bold cyan" if under_way else "")
    line.append(f"({_state(look)})", style="dim")
    return line


def _state(look: Look) -> str:
    if look.finished:
        return "finished, reported"
    if not look.locked:
        return "stopped: the same command resumes" if look.stage else "not begun"
    return "evaluating" if look.trained else "running"


def _kind(look: Look) -> type[StageSettings] | None:
    """What the algorithm of the stage says of itself; None of one that nobody knows, such as pretraining."""
    return config_of(look.records.get(look.stage, StageRecord()).algorithm)


def _progress(look: Look, width: int) -> RenderableType:
    kind = _kind(look)
    label = kind.label if kind else look.records.get(look.stage, StageRecord()).algorithm
    member = look.part.partition("/")[2].replace("-", " ")
    label += f", {member}" if member else ""
    count = Text(f"  {look.step:,} of {look.steps:,}   {_flat(label, 24)}")
    grid = Table.grid()
    grid.add_column(width=width // 2, no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_row(ProgressBar(total=max(look.steps, 1), completed=look.step, width=width // 2), count)
    return grid


def _times(look: Look) -> str:
    spent = look.tail.course("time")
    stage = look.members_done + (spent[-1] if spent else 0.0)
    clauses = [f"this stage {duration(stage)}" if stage else "this stage begins"]
    if look.stage_left:
        clauses.append(f"{duration(look.stage_left)} left")
    finished = [record.seconds for record in look.records.values() if record.seconds]
    trained_for = sum(finished) + (stage if look.records[look.stage].status == "running" else 0)
    run = f"training {duration(trained_for)}"
    if look.seconds_left is not None:
        run += f", about {duration(look.seconds_left)} left without evaluation"
    return f"{', '.join(clauses)}   ·   {run}" if not look.trained else run


def _numbers(kind: type[StageSettings], tail: Tail, room: int, blocks: bool) -> Text:
    """Means over the last steps, and how they came there: two to a line where there is room."""
    cells = []
    for metric, name in kind.watched_numbers().items():
        recent, share = tail.recent(metric), metric == _CUT
        if recent is None:
            continue
        value, se = (1 - recent[0], recent[1]) if share else recent
        text = f"{value:.0%}" if share else f"{value:.3g}"
        text += f" ± {se:.2g}" if metric == kind.score_metric and math.isfinite(se) else ""
        values = [1 - v for v in tail.course(metric)] if share else tail.course(metric)
        drawn = _bars(values) if blocks else ""
        cells.append(f"{name:<8} {text:<15} {drawn:<{_SPARK}}")
    wide = max(room // 44, 1)
    rows = ["  ".join(cells[i : i + wide]).rstrip() for i in range(0, len(cells), wide)]
    return Text("\n".join(rows) or "none yet")


def _bars(values: Sequence[float]) -> str:
    levels = list(sparkline(values, _SPARK))
    if len(levels) < 2:
        return ""
    low, high = min(levels), max(levels)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((level - low) * scale)] for level in levels)


def _speed(look: Look) -> str:
    step, sampling = look.tail.recent("step_seconds"), look.tail.recent("sampling_seconds")
    if step is None or not step[0] > 0:
        return "not known yet"
    sampled, trained = look.tail.recent("tokens/sampled"), look.tail.recent("tokens/trained")
    tokens = (sampled[0] if sampled else 0.0) + (trained[0] if trained else look.live.tokens or 0.0)
    clauses = [f"{tokens / step[0]:,.0f} tokens/s"] if tokens else []
    clauses.append(f"{duration(step[0]) if step[0] >= 10 else f'{step[0]:.2g} s'} a step")
    share = sampling[0] / step[0] if sampling else 0.0
    clauses += [f"sampling and scoring {share:.0%}, training {1 - share:.0%}"] if share else []
    return "   ".join(clauses)


def _checkpoint_words(look: Look) -> str:
    if look.records[look.stage].status == "finished":
        return f"the model of {look.stage}"
    if not look.checkpoint:
        return "no checkpoint of this stage yet"
    steps = (look.checkpoint, look.step)
    at = {row.step: row.numbers.get("time", math.nan) for row in look.tail.rows if row.step in steps}
    ago = at.get(look.step, math.nan) - at.get(look.checkpoint, math.nan)
    when = f", {duration(ago)} of training ago" if math.isfinite(ago) else ""
    return f"checkpoint of step {look.checkpoint}{when}"


def _replies(look: Look) -> list[tuple[str, str]]:
    """One prompt, what the policy said to it as it began, and what it says now."""
    live = look.live
    if not live.before:
        return []
    latest = [(f"at {live.step}", live.now or "(empty)")] if live.step else []
    start = "random" if not live.start else live.start.upper() if len(live.start) < 4 else live.start
    return [("prompt", live.prompt[-300:]), (start, live.before or "(empty)"), *latest]


def _doctor(look: Look, room: int) -> Text:
    if not look.findings:
        return Text(f"nothing found in {look.step:,} steps" if look.stage else "nothing to look at yet")
    first, more = look.findings[0], len(look.findings) - 1
    words = f"{first.where}: {first.kind}: {first.evidence}" + (f" (and {more} more)" if more else "")
    line = _line(words, room * 2)
    line.stylize("yellow")
    return line
