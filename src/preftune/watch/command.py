"""`preftune watch RUN`, and the panel that `preftune run` shows on a terminal."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from preftune.rundir import RunDir

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from preftune.config import RunConfig
    from preftune.watch.following import Watched

_SECONDS = 1.0  # between two looks
_WIDEST = 110


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run.")],
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
) -> None:
    """Look on while a run goes on, from any terminal that sees its directory; ends when it is done, or when
    the process that works on it ends.
    """
    from rich.console import Console
    from rich.live import Live

    from preftune.runs.console import is_live
    from preftune.runs.inputs import existing
    from preftune.watch.following import Watched

    directory = existing(run, "`preftune runs` lists those that lie here")
    watched, out = Watched(directory), Console(highlight=False)
    if once or not is_live(out):
        out.print(_panel(watched, out))
        return
    with Live(_panel(watched, out), console=out, auto_refresh=False) as live:
        try:
            held = False  # whether it was: what holds it now may train some of its stages only
            while not (look := watched.look()).finished and (look.locked or not held):
                held = look.locked
                time.sleep(_SECONDS)
                live.update(_panel(watched, out), refresh=True)
        except KeyboardInterrupt:  # the run goes on
            return


def panel(run: RunDir, config: "RunConfig", stages: Sequence[str]) -> Callable[["Console"], "RenderableType"]:
    """What `Console.progress` shows of the process's own run."""
    from rich.text import Text

    from preftune.untrusted import printable
    from preftune.watch.following import Watched

    watched = Watched(run, config, stages, inside=True)

    def draw(out: "Console") -> "RenderableType":
        try:
            return _panel(watched, out)
        except Exception as error:  # whatever is wrong with a picture, the run goes on
            return Text(printable(f"no picture: {type(error).__name__}: {error}")[:200])

    return draw


def _panel(watched: "Watched", out: "Console") -> "RenderableType":
    from preftune.watch.frame import frame

    return frame(watched.look(), min(out.width, _WIDEST), blocks=out.encoding.startswith("utf"))
