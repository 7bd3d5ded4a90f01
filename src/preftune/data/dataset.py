"""From a data configuration to three splits of preferences and an account of every row."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.data.dialogue import Dialogue, Preference
from preftune.data.files import SUFFIXES, read_files
from preftune.data.hh import REASONS
from preftune.data.hub import ALTERNATIVES, read_hub
from preftune.data.rows import OnBadRow, Tally
from preftune.errors import ConfigError, DataError, InputMissing

if TYPE_CHECKING:
    from preftune.config import DataConfig

SPLIT_NAMES = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Preferences by split; each `row` is the index in its split. `report` (JSON-able) goes to data.json."""

    train: tuple[Preference, ...]
    validation: tuple[Preference, ...]
    test: tuple[Preference, ...]
    report: dict[str, Any]


def read_dataset(config: "DataConfig", commit: str | None = None) -> Dataset:
    """Read a data set from a local path or a hub id, in this order. Splits do not depend on the run's seed.
    `commit`: the state of a hub data set that a run has recorded; its report names the one that was read.

    Raises ConfigError without a name, InputMissing for what cannot be found, DataError for what cannot be
    read or used.
    """
    if config.name is None:
        raise ConfigError(
            "data.name is not set, and this recipe ships without data",
            "say where the preference pairs are: data.name=PATH (a directory, .jsonl, .jsonl.gz or .parquet "
            "file), or data.name=Anthropic/hh-rlhf to fetch them",
        )
    tallies, commit = _read(config.name, config.data_dir, config.on_bad_row, commit)
    splits = _by_split(config.name, tallies)
    if not splits["train"]:
        raise DataError(
            f"{config.name}: no training pairs, only {_counts(splits)}",
            "add a file named train, or name one file alone to have it split",
        )
    cut = _cut_missing(splits, config.held_out)
    report = {
        "name": config.name,
        "data_dir": config.data_dir,
        **({} if commit is None else {"commit": commit}),
        "held_out": config.held_out,
        "cut_from_train": cut,
    }
    return make_dataset(splits, report | _rows_report(tallies))


def read_preferences(path: str | Path, on_bad_row: OnBadRow = "error") -> list[Preference]:
    """All usable pairs of a file or directory, the train, validation and test splits one after the other.

    `row` counts within a split. Unusable pairs are left out; a malformed row is a DataError unless
    `on_bad_row="skip"`.
    """
    splits = _by_split(str(path), read_files(Path(os.path.expanduser(path)), on_bad_row))
    return [replace(pair, row=row) for name in SPLIT_NAMES for row, pair in enumerate(splits[name])]


def prompt_hash(prompt: Dialogue) -> str:
    """SHA-256 of the prompt's transcript: decides which split a prompt is cut into, finds equal prompts."""
    return hashlib.sha256(prompt.transcript().encode("utf-8")).hexdigest()


def _read(
    name: str, data_dir: str | None, on_bad_row: OnBadRow, commit: str | None
) -> tuple[list[Tally], str | None]:
    path = Path(os.path.expanduser(name))
    if path.exists():
        return read_files(path / data_dir if data_dir else path, on_bad_row), None
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.lower().endswith(SUFFIXES):
        raise InputMissing(f"{name}: no such file or directory", ALTERNATIVES)
    return read_hub(name, data_dir, on_bad_row, commit)


def _by_split(name: str, tallies: Sequence[Tally]) -> dict[str, list[Preference]]:
    splits: dict[str, list[Preference]] = {split: [] for split in SPLIT_NAMES}
    for tally in tallies:
        splits[tally.split] += tally.kept
    if not any(splits.values()):
        rejected = sum((tally.rejected for tally in tallies), Counter())
        counts = ", ".join(f"{n} {reason} ({REASONS[reason]})" for reason, n in rejected.most_common())
        bad = sum(tally.bad for tally in tallies)
        read = sum(tally.read for tally in tallies)
        raise DataError(
            f"{name}: none of the {read} rows is a usable pair: {counts or 'no rejects'}; {bad} malformed",
            "chosen and rejected are two whole HH transcripts that differ in the last assistant turn, "
            "or two replies beside a prompt",
        )
    return splits


def _cut_missing(splits: dict[str, list[Preference]], held_out: float) -> list[str]:
    """Move a share of the training prompts into each missing split, in place; the names of the splits made.

    A prompt's hash alone decides, so equal prompts stay together and a prompt stays where it is when rows are
    added.
    """
    missing = [name for name in ("test", "validation") if not splits[name]]
    hashes = [prompt_hash(pair.prompt) for pair in splits["train"]]
    ordered = sorted(set(hashes))
    homes: dict[str, str] = {}
    for name in missing:
        # test owns the first share of the hash space and validation the second, whichever of them is missing
        low = held_out if name == "validation" else 0.0
        chosen = [h for h in ordered if low <= int(h[:13], 16) / 16**13 < low + held_out]
        if not chosen:  # few prompts: one rather than none
            chosen = [h for h in ordered if h not in homes][:1]
        for h in chosen[: len(ordered) - len(homes) - 1]:  # train keeps at least one
            homes[h] = name
    pairs, splits["train"] = splits["train"], []
    for pair, h in zip(pairs, hashes, strict=True):
        splits[homes.get(h, "train")].append(pair)
    return [name for name in missing if splits[name]]


def make_dataset(splits: Mapping[str, Iterable[Preference]], report: dict[str, Any]) -> Dataset:
    """Splits with rows numbered anew, and `report` with counts, repeats and hashes of what they hold."""
    numbered = {
        name: tuple(
            pair if pair.row == row else replace(pair, row=row) for row, pair in enumerate(splits[name])
        )
        for name in SPLIT_NAMES
    }
    return Dataset(**numbered, report=report | _contents(numbered))


def _rows_report(tallies: Sequence[Tally]) -> dict[str, Any]:
    rejected = sum((tally.rejected for tally in tallies), Counter())
    files = [
        {
            "path": tally.name,
            "split": tally.split,
            "source": tally.source,
            "sha256": tally.sha256,
            "bytes": tally.size,
            "read": tally.read,
            "kept": len(tally.kept),
            "rejected": dict(sorted(tally.rejected.items())),
            "skipped": tally.bad,
        }
        for tally in tallies
    ]
    return {
        "rows_read": sum(tally.read for tally in tallies),
        "rows_kept": sum(len(tally.kept) for tally in tallies),
        "rejected": dict(sorted(rejected.items())),
        "reasons": {reason: REASONS[reason] for reason in sorted(rejected)},
        "rows_skipped": sum(tally.bad for tally in tallies),
        "skipped_examples": [example for tally in tallies for example in tally.bad_examples][:20],
        "ignored_columns": sorted(set().union(*(tally.ignored_columns for tally in tallies))),
        "files": files,
    }


def _contents(splits: Mapping[str, tuple[Preference, ...]]) -> dict[str, Any]:
    """Counts, repeats and hashes of what the splits hold."""
    prompts = {name: {prompt_hash(pair.prompt) for pair in pairs} for name, pairs in splits.items()}
    pairs = Counter((p.prompt, p.chosen, p.rejected) for each in splits.values() for p in each)
    swapped = sum((prompt, b, a) in pairs for prompt, a, b in pairs) // 2
    combinations = (("train", "validation"), ("train", "test"), ("validation", "test"))
    return {
        "splits": {name: len(each) for name, each in splits.items()},
        "sources": {
            name: dict(sorted(Counter(p.source for p in each).items())) for name, each in splits.items()
        },
        "distinct_prompts": {name: len(each) for name, each in prompts.items()},
        "prompt_overlap": {f"{a}/{b}": len(prompts[a] & prompts[b]) for a, b in combinations},
        "duplicates": sum(pairs.values()) - len(pairs),
        "swapped": swapped,
        "words": {name: _words(each) for name, each in splits.items()},
        "content_sha256": {name: _content_hash(each) for name, each in splits.items()},
    }


def _words(pairs: Sequence[Preference]) -> dict[str, list[int]]:
    """Median, 95th percentile and maximum of words of prompts, chosen and rejected responses of a split."""
    texts = {
        "prompt": [pair.prompt.transcript() for pair in pairs],
        "chosen": [pair.chosen for pair in pairs],
        "rejected": [pair.rejected for pair in pairs],
    }
    sizes = {kind: sorted(len(text.split()) for text in each) for kind, each in texts.items()}
    return {kind: [n[len(n) // 2], n[len(n) * 19 // 20], n[-1]] for kind, n in sizes.items() if n}


def _content_hash(pairs: Iterable[Preference]) -> str:
    """One hash of a split's texts in order, independent of files and packing."""
    digest = hashlib.sha256()
    for pair in pairs:
        for text in (pair.prompt.transcript(), pair.chosen, pair.rejected):
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _counts(splits: Mapping[str, Sequence[Preference]]) -> str:
    return ", ".join(f"{len(pairs)} of {name}" for name, pairs in splits.items() if pairs)
