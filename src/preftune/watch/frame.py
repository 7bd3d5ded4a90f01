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

from preftune.config import config_of
from preftune.records.stage import StageRecord
from preftune.untrusted import printable
from preftune.watch.following import Seen, Tail, sparkline

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK = 16
_LINES = 3  # of a reply
_LONGEST = 1000  # characters that are looked at
# (name, metrics that it is called by, whether it comes with its standard error, as 1 - x in percent)
_NUMBERS = (
    ("loss", ("loss", "loss/policy_avg"), False, False),
    ("score", ("objective/scores", "reward", "score"), True, False),
    ("accuracy", ("accuracy", "rewards/accuracies"), False, False),
    ("margin", ("margin", "rewards/margins"), False, False),
    ("KL", ("objective/kl", "kl_per_sequence"), False, False),
    ("length", ("completions/mean_length",), False, False),
    ("ended", ("completions/clipped_ratio",), False, True),
)


def frame(seen: Seen, width: int = 100, *, blocks: bool = True) -> RenderableType:
    """The panel, at most `width` wide. `blocks`: the terminal knows more than ASCII."""
    room = max(width - 14, 20)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("stages", _stages(seen))
    if seen.stage:
        grid.add_row("step", _progress(seen, min(room, 40)))
        grid.add_row("time", _line(_times(seen), room * 2))
        grid.add_row("numbers", _numbers(seen.tail, room, blocks))
        grid.add_row("speed", _line(_speed(seen), room * 2))
        grid.add_row("saved", _line(_saved(seen), room))
        for label, said in _replies(seen):
            grid.add_row(Text(_flat(label, 12)), _line(said, room * _LINES))
    grid.add_row("doctor", _doctor(seen, room))
    title = Text(_flat(f"{seen.name}  ->  {seen.run.path}", room))
    return Panel(Group(grid), title=title, title_align="left", width=width, padding=(0, 1))


def duration(seconds: float) -> str:
    """`47 s`, `3:05`, `2:10:00`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if whole < 60:
        return f"{whole} s"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _flat(text: object, limit: int) -> str:
    """On one line, `limit` characters at most; a line's end shows as ⏎ when it stands inside."""
    shown = printable(str(text)[:_LONGEST].strip().replace("\n", " ⏎ "))
    return shown if len(shown) <= limit else shown[: max(limit - 1, 0)] + "…"


def _line(text: object, limit: int) -> Text:
    """Cut by cells: a wide character takes two."""
    line = Text(_flat(text, limit))
    line.truncate(limit, overflow="ellipsis")
    return line


def _stages(seen: Seen) -> Text:
    """All stages, those that are done and the one that is under way told apart without colour too."""
    line = Text()
    for name, record in seen.records.items():
        now = record.status == "running"
        mark = "✓ " if record.status == "finished" else "▶ " if now else "· "
        line.append(f"{mark}{_flat(name, 20)}  ", style="bold cyan" if now else "")
    line.append(f"({_state(seen)})", style="dim")
    return line


def _state(seen: Seen) -> str:
    if seen.finished:
        return "finished, reported"
    if not seen.held:
        return "stopped: the same command goes on" if seen.stage else "not begun"
    return "evaluating" if seen.trained else "running"


def _progress(seen: Seen, width: int) -> RenderableType:
    record = seen.records.get(seen.stage, StageRecord())
    kind = config_of(record.algorithm)
    label = kind.label if kind else record.algorithm
    told = Text(f"  {seen.step:,} of {seen.steps:,}   {_flat(label, 24)}")
    grid = Table.grid()
    grid.add_column(width=width // 2, no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_row(ProgressBar(total=max(seen.steps, 1), completed=seen.step, width=width // 2), told)
    return grid


def _times(seen: Seen) -> str:
    spent = seen.tail.course("time")
    parts = [f"this stage {duration(spent[-1])}" if spent else "this stage begins"]
    if seen.stage_left is not None and seen.step < seen.steps:
        parts.append(f"{duration(seen.stage_left)} left")
    whole = [record.seconds for record in seen.records.values() if record.seconds]
    done = sum(whole) + (spent[-1] if spent and seen.records[seen.stage].status == "running" else 0)
    run = f"training {duration(done)}"
    if seen.left is not None:
        run += f", about {duration(seen.left)} left without evaluation"
    return f"{', '.join(parts)}   ·   {run}" if not seen.trained else run


def _numbers(tail: Tail, room: int, blocks: bool) -> Text:
    """Means over the last steps, and how they came there: two to a line where there is room."""
    cells = []
    for name, metrics, error, share in _NUMBERS:
        found = tail.recent(*metrics)
        if found is None:
            continue
        value, se = (1 - found[0], found[1]) if share else found
        said = f"{value:.0%}" if share else f"{value:.3g}"
        said += f" ± {se:.2g}" if error and math.isfinite(se) else ""
        values = [1 - v for v in tail.course(*metrics)] if share else tail.course(*metrics)
        drawn = _drawn(values) if blocks else ""
        cells.append(f"{name:<8} {said:<15} {drawn:<{_SPARK}}")
    wide = max(room // 44, 1)
    rows = ["  ".join(cells[i : i + wide]).rstrip() for i in range(0, len(cells), wide)]
    return Text("\n".join(rows) or "none yet")


def _drawn(values: Sequence[float]) -> str:
    parts = list(sparkline(values, _SPARK))
    if len(parts) < 2:
        return ""
    low, high = min(parts), max(parts)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((part - low) * scale)] for part in parts)


def _speed(seen: Seen) -> str:
    step, sampling = seen.tail.recent("step_seconds"), seen.tail.recent("sampling_seconds")
    if step is None or not step[0] > 0:
        return "not known yet"
    sampled, trained = seen.tail.recent("tokens/sampled"), seen.tail.recent("tokens/trained")
    tokens = (sampled[0] if sampled else 0.0) + (trained[0] if trained else seen.live.tokens or 0.0)
    parts = [f"{tokens / step[0]:,.0f} tokens/s"] if tokens else []
    parts.append(f"{duration(step[0]) if step[0] >= 10 else f'{step[0]:.2g} s'} a step")
    share = sampling[0] / step[0] if sampling else 0.0
    parts += [f"sampling and scoring {share:.0%}, training {1 - share:.0%}"] if share else []
    return "   ".join(parts)


def _saved(seen: Seen) -> str:
    if seen.records[seen.stage].status == "finished":
        return f"the model of {seen.stage}"
    if not seen.checkpoint:
        return "no checkpoint of this stage yet"
    wanted = (seen.checkpoint, seen.step)
    at = {row.step: row.numbers.get("time", math.nan) for row in seen.tail.rows if row.step in wanted}
    ago = at.get(seen.step, math.nan) - at.get(seen.checkpoint, math.nan)
    when = f", {duration(ago)} of training ago" if math.isfinite(ago) else ""
    return f"checkpoint of step {seen.checkpoint}{when}"


def _replies(seen: Seen) -> list[tuple[str, str]]:
    """One prompt, what the policy said to it as it began, and what it says now."""
    live = seen.live
    if not live.before:
        return []
    now = [(f"at {live.step}", live.now or "(empty)")] if live.step else []
    start = "random" if not live.start else live.start.upper() if len(live.start) < 4 else live.start
    return [("prompt", live.prompt[-300:]), (start, live.before or "(empty)"), *now]


def _doctor(seen: Seen, room: int) -> Text:
    if not seen.findings:
        return Text(f"nothing found in {seen.step:,} steps" if seen.stage else "nothing to look at yet")
    first, more = seen.findings[0], len(seen.findings) - 1
    said = f"{first.where}: {first.kind}: {first.evidence}" + (f" (and {more} more)" if more else "")
    line = _line(said, room * 2)
    line.stylize("yellow")
    return line
