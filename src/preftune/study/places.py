"""Where things of a study lie."""

from pathlib import Path

from preftune.rundir import read_text
from preftune.untrusted import clean

CONCLUSIONS = "CONCLUSIONS.md"
_MOST = 6000  # characters of it


def seed_dir(out: Path, seed: int) -> Path:
    """A seed's run directory; in a mirror, what mirrors it."""
    return out / f"seed-{seed}"


def point_dir(out: Path, seed: int, stage: str) -> Path:
    """Where a stage of a sweep is trained apart, until the seed takes it over."""
    return out / "points" / f"seed-{seed}" / stage


def facts_file(out: Path, seed: int) -> Path:
    """Written last: a seed that has it is finished."""
    return seed_dir(out, seed) / "study" / "seed.json"


def numbers_in(mirror: Path) -> Path:
    """What is kept of finished seeds in a mirror."""
    return mirror / "numbers"


def conclusions(*directories: Path) -> str | None:
    """What a person has written about the study, from the first directory that holds it; cut at 6,000
    characters. Raises as `read_text`.
    """
    files = [directory / CONCLUSIONS for directory in directories]
    written = next((file for file in files if file.is_file()), None)
    return None if written is None else clean(read_text(written).strip(), _MOST)
