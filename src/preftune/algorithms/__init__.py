"""One file an algorithm. Which there are is written in one place, `config.algorithms`: torch-free."""

from collections.abc import Iterator, Mapping
from importlib import import_module

from preftune.algorithms.base import Algorithm
from preftune.config import ALGORITHM_CONFIGS


class _Classes(Mapping[str, type[Algorithm]]):
    """The registered algorithms by name, each loaded when it is asked for."""

    def __getitem__(self, name: str) -> type[Algorithm]:
        module, _, class_name = ALGORITHM_CONFIGS[name].implementation.partition(":")
        return getattr(import_module(module), class_name)

    def __iter__(self) -> Iterator[str]:
        return iter(ALGORITHM_CONFIGS)

    def __len__(self) -> int:
        return len(ALGORITHM_CONFIGS)


ALGORITHMS = _Classes()


def __getattr__(name: str) -> type[Algorithm]:
    """`from preftune.algorithms import PPO`, for every registered class."""
    for algorithm, config in ALGORITHM_CONFIGS.items():
        if config.implementation.endswith(f":{name}"):
            return ALGORITHMS[algorithm]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["ALGORITHMS", "Algorithm"]
