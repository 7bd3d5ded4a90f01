"""Where things of a study lie."""

from pathlib import Path


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
