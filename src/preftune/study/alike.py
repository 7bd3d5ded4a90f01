"""What the stages of a study's seeds are made of: the same for all, or they are no seeds of one study.

Settings alone do not say it: the source of a reward function, a base model in a directory or a judge from
elsewhere may change between two seeds. A stage's key covers all of that, and the seed besides.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from preftune.config import stage_order
from preftune.errors import DataError
from preftune.study.design import Design
from preftune.study.kept import kept_files
from preftune.study.places import numbers_in
from preftune.sums import read_sealed, sum_of

if TYPE_CHECKING:
    from preftune.runs.session import Session

MADE_OF = "made with another reward function, base model or judge"
# Rows have hashes of their own (`content_sha256`); what `auto` is differs by machine.
_APART = ("seed", "precision", "data")
_OF_ROWS = ("columns", "undesirable")  # which in the built-in world are each seed's own


def stage_keys(session: "Session") -> dict[str, str]:
    """By stage, a hash of its inputs, and of those of the stages above it, but for the seed and the data."""
    keys = dict[str, str]()
    left_out = {*_APART, *(_OF_ROWS if session.is_world else ()), "parents"}
    for name in [*session.scratch, *stage_order(session.config.stage)]:
        stage = session.stage(name)
        above = {p: keys[p] if p in keys else sum_of(session.stage(p).inputs) for p in stage.parents}
        inputs = {key: value for key, value in stage.inputs.items() if key not in left_out}
        keys[name] = sum_of({**inputs, "parents": above})
    return keys


def refuse_others(
    session: "Session", design: Design, out: Path, mirror: Path | None, keep: Path | None
) -> None:
    """DataError, before anything is trained, if a finished seed of this study was made of something else."""
    keys = stage_keys(session)
    places = [keep] if keep else []
    places += [numbers_in(mirror)] if mirror else []
    once_each = {directory.resolve(): directory for directory in places}.values()
    for file in _finished_seeds(design, out, once_each):
        theirs = read_sealed(file).get("stages")
        recorded = theirs if isinstance(theirs, Mapping) else {}
        if differ := [name for name, key in keys.items() if recorded.get(name, key) != key]:
            raise DataError(
                f"{file.parent} was {MADE_OF} than there is now (stages: {', '.join(differ)})",
                "give those that it was made with, or begin another study with out=DIR",
            )


def _finished_seeds(design: Design, out: Path, directories: Iterable[Path]) -> Iterable[Path]:
    """The seed.json of each finished seed of this design, in `out` and in directories of kept numbers, which
    may hold those of other designs, too.
    """
    for file in sorted(out.glob("seed-*/study/seed.json")):
        record = read_sealed(file)
        if type(record.get("seed")) is int and record.get("key") == design.key(record["seed"]):
            yield file
    for directory in directories:
        yield from kept_files(directory, design)
