"""From a data configuration to three splits of preferences and an account of every row."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.data.continuation import cut_texts
from preftune.data.dialogue import Dialogue, Kind, Preference, Turn
from preftune.data.files import SUFFIXES, local_files, read_files
from preftune.data.hub import ALTERNATIVES, read_hub
from preftune.data.notes import reasons_of, rows_report
from preftune.data.readme import README, refuse_both
from preftune.data.rows import OnBadRow, Tally
from preftune.errors import ConfigError, DataError, InputMissing

if TYPE_CHECKING:
    from preftune.config import DataConfig

SPLIT_NAMES = ("train", "validation", "test")
KINDS: dict[Kind, str] = {
    "pairs": "preference pairs",
    "unpaired": "replies without a rival",
    "prompts": "prompts without replies",
    "text": "texts for continuation",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Preferences by split; each `row` is the index in its split. `report` (JSON-able) goes to data.json.

    Rows of another `kind` than pairs have "" for what they lack (`Preference`); which stages can
    use them is checked before anything is trained (`runs.plan.check_kind`). `undesirable`: training replies
    without a rival that are not to be imitated, each as `rejected`.
    """

    train: tuple[Preference, ...]
    validation: tuple[Preference, ...]
    test: tuple[Preference, ...]
    report: dict[str, Any]
    kind: Kind = "pairs"
    others: Mapping[str, "Dataset"] = field(default_factory=dict)  # stages' own, by their setting `data`
    undesirable: tuple[Preference, ...] = ()

    def of(self, data: str | None) -> "Dataset | None":
        """The rows behind a stage's setting `data`; None for those that are collected when it comes to it."""
        return self if data is None else self.others.get(data)

    def rows_for(self, batch: str) -> tuple[Preference, ...]:
        """The training rows behind batches of a kind: those of labels hold undesirable ones, too."""
        return (*self.train, *self.undesirable) if batch == "unpaired" else self.train


def load_dataset(config: "DataConfig", commit: str | None = None) -> Dataset:
    """Read a data set from a local path or a hub id, in this order. Splits do not depend on the run's seed.
    `commit`: the state of a hub data set that a run has recorded; its report names the one that was read.

    Raises InputMissing for what cannot be found, DataError for what cannot be read or used.
    """
    name = str(config.name)
    tallies, commit = _read_tallies(config, commit)
    kind = _kind(name, tallies)
    if config.prompt_words is not None:
        if kind != "text":
            raise ConfigError(
                f"data.prompt_words = {config.prompt_words} cuts texts, "
                f"and the rows of {name} are {KINDS[kind]}",
                "leave data.prompt_words out, or name a data set with a column text (data.columns.text=NAME)",
            )
        cut_texts(tallies, config.prompt_words)
        kind = "unpaired"
    splits = _by_split(name, tallies)
    if not splits["train"]:
        raise DataError(
            f"{name}: no training pairs, only {_counts(splits)}",
            "add a file named train, or name one file alone to have it split",
        )
    cut = _cut_missing(splits, config.held_out)
    report = {
        "name": name,
        "data_dir": config.data_dir,
        **({} if commit is None else {"commit": commit}),
        "held_out": config.held_out,
        "cut_from_train": cut,
    }
    held_out = {prompt_key(row) for name in SPLIT_NAMES[1:] for row in splits[name]}
    report |= rows_report(tallies) | _kind_facts(kind, tallies)
    return make_dataset(splits, report, kind, _undesirable(tallies, held_out))


def read_training(config: "DataConfig", held_out: Collection[str], commit: str | None = None) -> Dataset:
    """Rows for training alone, as one stage wants them beside the run's data: those of the split train,
    without the ones whose prompt (`prompt_key`) the run holds out. The columns and the configuration that
    `config` names are read where they are there. Raises what `load_dataset` raises.
    """
    name = str(config.name)
    tallies, commit = _read_tallies(config, commit, foreign=True)
    kind = _kind(name, tallies)
    if kind == "text" and config.prompt_words is not None:
        cut_texts(tallies, config.prompt_words)
        kind = "unpaired"
    report = {"name": name, **({} if commit is None else {"commit": commit})}
    report |= rows_report(tallies) | _kind_facts(kind, tallies)
    rows = _by_split(name, tallies)["train"]
    return training_only(rows, held_out, report, kind, _undesirable(tallies, held_out))


def training_only(
    rows: Sequence[Preference],
    held_out: Collection[str],
    report: dict[str, Any],
    kind: Kind = "pairs",
    undesirable: Sequence[Preference] = (),
) -> Dataset:
    """A data set of training rows, without those whose prompt (`prompt_key`) is held out."""
    train = [row for row in rows if prompt_key(row) not in held_out]
    if not train:
        raise DataError(
            f"{report['name']}: no training rows beside the {len(rows) - len(train)} with held-out prompts",
            "give other rows: what policies are compared on is not trained on",
        )
    splits: dict[str, Sequence[Preference]] = {**dict.fromkeys(SPLIT_NAMES, ()), "train": train}
    report = report | {"held_out_prompts": len(rows) - len(train)}
    return make_dataset(splits, report, kind, undesirable)


def _undesirable(tallies: Sequence[Tally], held_out: Collection[str]) -> list[Preference]:
    """Undesirable replies of the split train to prompts that are not held out."""
    undesirable = [row for tally in tallies for row, split in tally.undesirable if split == "train"]
    return [row for row in undesirable if prompt_key(row) not in held_out]


def read_preferences(
    path: str | Path,
    on_bad_row: OnBadRow = "error",
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
) -> list[Preference]:
    """All usable pairs of a file or directory, the train, validation and test splits one after the other.

    `row` counts within a split. Unusable pairs are left out; a malformed row is a DataError unless
    `on_bad_row="skip"`, and so are rows that are no pairs. `columns` (known name to the file's) and the
    configuration `config` of a README.md are taken where they are there.
    """
    root = Path(os.path.expanduser(path))
    tallies = read_files(root, on_bad_row, local_files(root, config, True), columns, foreign=True)
    if (kind := _kind(str(path), tallies)) != "pairs":
        raise DataError(
            f"{path}: its rows are {KINDS[kind]}, and preference pairs are needed here",
            f"row 1 has the columns {tallies[0].first_keys}; docs/data.md shows the forms of pairs",
        )
    splits = _by_split(str(path), tallies)
    return [replace(pair, row=row) for name in SPLIT_NAMES for row, pair in enumerate(splits[name])]


def prompt_hash(prompt: Dialogue) -> str:
    """SHA-256 of the prompt's transcript: decides which split a prompt is cut into, finds equal prompts."""
    return hashlib.sha256(prompt.transcript().encode("utf-8")).hexdigest()


def row_key(row: Preference) -> str:
    """The hash that decides which split a row is cut into: of its prompt, or of the text if it has none."""
    return prompt_hash(row.prompt or Dialogue([Turn("human", row.chosen)]))


def prompt_key(row: Preference) -> str:
    """A key of a row's prompt, or of the text if it has none. White space around turns does not count, since
    it differs when files of two forms hold the same prompt.
    """
    turns = row.prompt or [Turn("human", row.chosen)]
    return prompt_hash(Dialogue([Turn(turn.role, turn.text.strip()) for turn in turns]))


def _read_tallies(
    config: "DataConfig", commit: str | None, foreign: bool = False
) -> tuple[list[Tally], str | None]:
    name, data_dir = str(config.name), config.data_dir
    path = Path(os.path.expanduser(name))
    if path.exists():
        root = path / data_dir if data_dir else path
        if not (root / README).is_file():
            refuse_both(config.config, data_dir)
        chosen = local_files(root, config.config, foreign)
        return read_files(root, config.on_bad_row, chosen, config.columns.named_columns(), foreign), None
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.lower().endswith(SUFFIXES):
        raise InputMissing(f"{name}: no such file or directory", ALTERNATIVES)
    return read_hub(config, commit, foreign)


def _kind(name: str, tallies: Sequence[Tally]) -> Kind:
    """What the rows are; a data set of several kinds is refused, since no stage could use them all."""
    kinds = sum((tally.kinds for tally in tallies), Counter[Kind]())
    if len(kinds) > 1:
        counts = ", ".join(f"{n} {KINDS[kind]}" for kind, n in kinds.most_common())
        raise DataError(
            f"{name}: rows of several kinds: {counts}", "keep one kind in the data set, by data.name"
        )
    for kind in kinds:
        return kind
    return "pairs"


def _kind_facts(kind: Kind, tallies: Sequence[Tally]) -> dict[str, str]:
    """For the report: of what kind the rows are, if not pairs, and the columns that showed it."""
    return {} if kind == "pairs" else {"kind": KINDS[kind], "columns": tallies[0].first_keys}


def _by_split(name: str, tallies: Sequence[Tally]) -> dict[str, list[Preference]]:
    splits: dict[str, list[Preference]] = {split: [] for split in SPLIT_NAMES}
    for tally in tallies:
        for row, split in zip(tally.rows, tally.splits, strict=True):
            splits[split].append(row)
    undesirable = sum(len(tally.undesirable) for tally in tallies)
    if undesirable and not splits["train"]:
        raise DataError(
            f"{name}: no desirable reply to train on, only {undesirable} undesirable ones",
            "a run imitates and samples by desirable ones: add rows whose label is true",
        )
    if not any(splits.values()):
        counts = reasons_of(tallies)
        bad = sum(tally.bad for tally in tallies)
        read = sum(tally.read for tally in tallies)
        raise DataError(
            f"{name}: none of the {read} rows is a usable pair: {counts or 'no rejects'}; {bad} malformed",
            "chosen and rejected are two whole HH transcripts that differ in the last assistant turn, "
            "or two replies beside a prompt; docs/data.md lists the other forms",
        )
    return splits


def _cut_missing(splits: dict[str, list[Preference]], held_out: float) -> list[str]:
    """Move a share of the training prompts into each missing split, in place; the names of the splits made.

    A prompt's hash alone decides, so equal prompts stay together and a prompt stays where it is when rows are
    added.
    """
    missing = [name for name in ("test", "validation") if not splits[name]]
    hashes = [row_key(pair) for pair in splits["train"]]
    ordered = sorted(set(hashes))
    homes: dict[str, str] = {}
    for name in missing:
        # test owns the first share of the hash space and validation the second, whichever of them is missing
        low = held_out if name == "validation" else 0.0
        chosen = [h for h in ordered if h not in homes and low <= int(h[:13], 16) / 16**13 < low + held_out]
        if not chosen:  # few prompts: one rather than none
            chosen = [h for h in ordered if h not in homes][:1]
        for h in chosen[: len(ordered) - len(homes) - 1]:  # train keeps at least one
            homes[h] = name
    pairs, splits["train"] = splits["train"], []
    for pair, h in zip(pairs, hashes, strict=True):
        splits[homes.get(h, "train")].append(pair)
    return [name for name in missing if splits[name]]


def make_dataset(
    splits: Mapping[str, Iterable[Preference]],
    report: dict[str, Any],
    kind: Kind = "pairs",
    undesirable: Sequence[Preference] = (),
) -> Dataset:
    """Splits with rows renumbered (undesirable replies go on where train ends), and `report` with counts,
    repeats and hashes of what they hold.
    """
    numbered = {
        name: tuple(
            pair if pair.row == row else replace(pair, row=row) for row, pair in enumerate(splits[name])
        )
        for name in SPLIT_NAMES
    }
    if undesirable:
        report = report | {"undesirable": {"rows": len(undesirable), "sha256": _content_hash(undesirable)}}
    start = len(numbered["train"])
    return Dataset(
        train=numbered["train"],
        validation=numbered["validation"],
        test=numbered["test"],
        report=report | _contents(numbered),
        kind=kind,
        undesirable=tuple(replace(pair, row=row) for row, pair in enumerate(undesirable, start)),
    )


def _contents(splits: Mapping[str, tuple[Preference, ...]]) -> dict[str, Any]:
    """Counts, repeats and hashes of what the splits hold."""
    prompts = {name: {row_key(pair) for pair in pairs} for name, pairs in splits.items()}
    pairs = Counter((p.prompt, p.chosen, p.rejected) for rows in splits.values() for p in rows)
    swapped = sum(a != b and (prompt, b, a) in pairs for prompt, a, b in pairs) // 2
    combinations = (("train", "validation"), ("train", "test"), ("validation", "test"))
    return {
        "splits": {name: len(rows) for name, rows in splits.items()},
        "sources": {
            name: dict(sorted(Counter(p.source for p in rows).items())) for name, rows in splits.items()
        },
        "distinct_prompts": {name: len(keys) for name, keys in prompts.items()},
        "prompt_overlap": {f"{a}/{b}": len(prompts[a] & prompts[b]) for a, b in combinations},
        "duplicates": sum(pairs.values()) - len(pairs),
        "swapped": swapped,
        "words": {name: _words(rows) for name, rows in splits.items()},
        "content_sha256": {name: _content_hash(rows) for name, rows in splits.items()},
    }


def _words(pairs: Sequence[Preference]) -> dict[str, list[int]]:
    """Median, 95th percentile and maximum of words of prompts, chosen and rejected responses of a split."""
    texts = {
        "prompt": [pair.prompt.transcript() for pair in pairs],
        "chosen": [pair.chosen for pair in pairs],
        "rejected": [pair.rejected for pair in pairs],
    }
    sizes = {kind: sorted(len(text.split()) for text in rows) for kind, rows in texts.items()}
    return {kind: [n[len(n) // 2], n[len(n) * 19 // 20], n[-1]] for kind, n in sizes.items() if n}


def _content_hash(pairs: Iterable[Preference]) -> str:
    """One hash of a split's texts in order, and of which replies did not end; independent of files and
    packing. If all ended, that adds nothing, so that such hashes stay what they were before it was part of
    them.
    """
    digest = hashlib.sha256()
    for pair in pairs:
        for text in (pair.prompt.transcript(), pair.chosen, pair.rejected):
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "big") + data)
        if pair.ended != (True, True):
            digest.update(b"\xff" * 8 + bytes(pair.ended))  # no text has such a length
    return digest.hexdigest()


def _counts(splits: Mapping[str, Sequence[Preference]]) -> str:
    return ", ".join(f"{len(pairs)} of {name}" for name, pairs in splits.items() if pairs)
