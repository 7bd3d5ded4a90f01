"""Which split a file belongs to, by the names of the file and of its folders: the rule of the hub.

`datasets` (data_files.py) reads a word of `KEYWORDS` between separators in a folder's or a file's name, and
leaves files without one alone where others have one. The same here, except that a name that says two splits
is refused instead of being read twice.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from preftune.errors import DataError

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLITS = {word: split for split, words in KEYWORDS.items() for word in words}
NO_LETTERS = re.compile(r"[\W\d_]+")
# testset, mytests, heldout: no word of the rule, but somebody may have meant one
LOOKS_LIKE = re.compile(r"^(test|train|valid|eval|held|holdout)|(test|train|valid|eval)(s|set|ing)?$")
# What a train_sft, train_gen and train_prefs are for: one conversation in three forms.
PURPOSES = ("prefs", "sft", "gen")


@dataclass(slots=True)
class Chosen:
    """The files of a directory that are read, with their splits, and sentences about the others."""

    files: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def words(name: str) -> list[str]:
    return [word for word in NO_LETTERS.split(name.lower()) if word]


def split_of(relative: PurePath, suffixes: Sequence[str]) -> str | None:
    """The split that the path of a file inside its data set says; None if it says none.

    Raises DataError for a path that says two, such as test/train.jsonl.
    """
    name = relative.name.lower()
    stem = next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name)
    named = {SPLITS[word] for text in (*relative.parts[:-1], stem) for word in words(text) if word in SPLITS}
    if len(named) > 1:
        raise DataError(
            f"{relative}: file and folder names say {' and '.join(sorted(named))}, so its split is not known",
            "rename it, or name the folder that is meant: data.name=FOLDER (hub: data.data_dir=FOLDER)",
        )
    return next(iter(named), None)


def named_split(name: str) -> str | None:
    """The split of a name that is given as such (a hub split, a column): test_prefs is test."""
    splits = {SPLITS[word] for word in words(name) if word in SPLITS}
    return splits.pop() if len(splits) == 1 else None


def choose(
    root: Path, paths: Sequence[Path], suffixes: Sequence[str], names: Mapping[Path, str] | None = None
) -> Chosen:
    """The split of every file under `root` that is to be read; the rest is named in notes. `names`: what a
    README.md calls their splits, in the place of their paths.
    """
    inside = {path: path.relative_to(root) for path in paths}
    if names is None:
        splits = {path: split_of(relative, suffixes) for path, relative in inside.items()}
    else:
        splits = {path: named_split(names[path]) for path in paths}
        inside = {path: relative / names[path] for path, relative in inside.items()}
    chosen = Chosen()
    unnamed = [path for path in paths if splits[path] is None]
    if "train" in splits.values():  # as `datasets` does
        left_out = "not read: no split in the name, and other files are named train"
        chosen.notes += named_files([inside[path] for path in unnamed], left_out)
    else:
        odd = [path for path in unnamed if any(map(LOOKS_LIKE.search, words(inside[path].stem)))]
        looks = "read as train, though the name looks like a split: it is none of the names in docs/data.md"
        chosen.notes += named_files([inside[path] for path in odd], looks)
        splits |= dict.fromkeys(unnamed, "train")
    files = {path: split for path, split in splits.items() if split is not None}
    for path in (extra := _other_purposes(files, inside)):
        del files[path]
    chosen.notes += named_files(
        [inside[path] for path in extra], "not read: the same rows for another purpose"
    )
    chosen.files = list(files.items())
    return chosen


def _other_purposes(files: dict[Path, str], inside: dict[Path, Path]) -> list[Path]:
    """Files marked sft or gen in a split that also has unmarked ones or such for pairs."""
    marks = {path: _purpose(inside[path]) for path in files}
    best = {split: min(marks[p] for p in files if files[p] == split) for split in set(files.values())}
    return [path for path, split in files.items() if marks[path] > best[split]]


def _purpose(relative: Path) -> int:
    purposes = [PURPOSES.index(word) for piece in relative.parts for word in words(piece) if word in PURPOSES]
    return purposes[-1] if purposes else 0


def named_files(files: Sequence[PurePath], remark: str) -> list[str]:
    """A sentence about files, if there are any."""
    if not files:
        return []
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return [f"{', '.join(file.as_posix() for file in files[:5])}{more}: {remark}"]
