"""Where a run's pairs and pretraining text come from: the built-in world, files or the hub."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from preftune.config import DataConfig
from preftune.data import Dataset, Preference, read_dataset
from preftune.data.corpus import Corpus, train_tokenizer, transcripts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORLD = "world"


def load_dataset(config: DataConfig, seed: int, commit: str | None = None) -> Dataset:
    """The data of a run. The world is generated from `seed`; splits of real data do not depend on it, and of
    the hub it is the state at `commit`, if the run has recorded one.

    Raises what `preftune.data.read_dataset` raises.
    """
    if config.name != WORLD:
        return read_dataset(config, commit)
    from preftune.world.dataset import world_dataset  # generates and scores: only where it is asked for

    return world_dataset(seed, config.pairs)


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
