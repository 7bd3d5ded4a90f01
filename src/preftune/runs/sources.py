"""Where a run's pairs and pretraining text come from: the built-in world, files or the hub."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from preftune.config import DataConfig, RunConfig
from preftune.config.algorithms.base import WORLD, Part, StageSettings, names_a_stage
from preftune.config.run import ColumnsConfig
from preftune.data import Dataset, Preference, load_dataset
from preftune.data.corpus import Corpus, train_tokenizer, transcripts
from preftune.data.dataset import prompt_key, read_training, row_key, training_only
from preftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def dataset_of(config: DataConfig, seed: int, commit: str | None = None) -> Dataset:
    """The data of a run. The world is generated from `seed`; splits of real data do not depend on it, and of
    the hub it is the state at `commit`, if the run has recorded one.

    Raises what `preftune.data.load_dataset` raises.
    """
    if config.name != WORLD:
        return load_dataset(config, commit)
    from preftune.world.dataset import world_dataset  # generates and scores: only where it is asked for

    return world_dataset(seed, config.pairs)


def with_stage_data(config: RunConfig, dataset: Dataset, commits: Mapping[str, str]) -> Dataset:
    """The data of a run with what its stages name besides, read once each and kept apart from the prompts
    that the run holds out. `commits`: of those from the hub, as the run has recorded them.
    """
    named = dict.fromkeys(stage.data for stage in config.stage.values() if stage.data is not None)
    names = [name for name in named if not names_a_stage(name)]
    if not names:
        return dataset
    held_out, datasets = held_out_prompts(dataset), dict[str, Dataset]()
    for name in names:
        if name == WORLD:
            world = dataset_of(config.data.model_copy(update={"name": WORLD}), config.seed)
            datasets[name] = training_only(world.train, held_out, {"name": WORLD})
        else:
            datasets[name] = read_training(data_settings(config, name), held_out, commits.get(name))
    reports = {name: data.report for name, data in datasets.items()}
    return replace(dataset, others=datasets, report=dataset.report | {"others": reports})


def held_out_prompts(dataset: Dataset) -> set[str]:
    """What no stage may learn from: the keys of the rows that the run holds out."""
    return {prompt_key(row) for row in (*dataset.validation, *dataset.test)}


def own_rows(rows: Sequence[Preference], settings: StageSettings, stage: str) -> list[Preference]:
    """The rows of the sources that a stage learns from. DataError if there are rows, and none of them is."""
    of_sources = [row for row in rows if settings.learns_from(row.source)]
    if rows and not of_sources:
        names = ", ".join(repr(name) for name in sorted({row.source for row in rows})[:8])
        raise DataError(
            f"stage {stage}: none of the {len(rows):,} training rows is of a source that it learns from; "
            f"theirs are {names}",
            hint="in sources or experts, write a part of such a name, or set it to none",
        )
    return of_sources


def in_part(rows: Sequence[Preference], part: Part) -> list[Preference]:
    """The rows of one half of the prompts, by their hash; all of them for "all"."""
    half = {"first": 0, "second": 1}
    return [row for row in rows if part == "all" or int(row_key(row)[-1], 16) % 2 == half[part]]


def learners_rows(rows: Sequence[Preference], settings: StageSettings, stage: str) -> list[list[Preference]]:
    """The training rows that each of a stage's `learners` can learn from.

    DataError as `own_rows`, and if there are rows, and none is of a learner's half of the prompts.
    """
    by_learner = list[list[Preference]]()
    names = [f"{stage}, expert {kind}" for kind in settings.kinds] or [stage]
    for name, learner in zip(names, settings.learners(), strict=True):
        of_sources = own_rows(rows, learner, name)
        by_learner.append(in_part(of_sources, part := learner.training_part()))
        if of_sources and not by_learner[-1]:
            raise DataError(
                f"stage {name}: none of its {len(of_sources):,} training rows is of the {part} half of the "
                "prompts",
                hint="leave part out, or give it more prompts",
            )
    return by_learner


def sources_left_out(rows: Sequence[Preference], settings: StageSettings) -> str:
    """Of which sources a stage learns nothing, in words; "" where it learns from all."""
    unused = Counter(row.source for row in rows if not settings.learns_from(row.source))
    counts = ", ".join(f"{count:,} of {source}" for source, count in sorted(unused.items()))
    return f"left out, by source: {counts} rows" if counts else ""


def data_settings(config: RunConfig, name: str, collected: bool = False) -> DataConfig:
    """How a stage's own data is read: as the run's, whose columns and configuration it may have, too; what a
    stage has `collected` has its own.
    """
    of_collected = {"config": None, "columns": ColumnsConfig()} if collected else {}
    return config.data.model_copy(update={"name": name, "data_dir": None, **of_collected})


def load_corpus(name: str, train: Sequence[Preference], seed: int, count: int) -> Corpus:
    """`count` documents of the world, in the order in which they must be read; elsewhere every transcript of
    `train`.
    """
    if name != WORLD:
        return transcripts(train)
    from preftune.world.dataset import make_world

    return Corpus(make_world(seed, 1, 1, 1).documents(count), ordered=True)


def make_tokenizer(name: str, train: Sequence[Preference], vocab_size: int) -> "PreTrainedTokenizerBase":
    """The world's own words, or a vocabulary of `vocab_size` entries learnt on the transcripts of `train`."""
    if name != WORLD:
        return train_tokenizer(train, vocab_size)
    from preftune.world.grammar import world_tokenizer

    return world_tokenizer()
