"""The `configs` in the YAML at the head of a data set's README.md: which files are read, as which split.

The rules are those of `datasets` (utils/metadata.py, data_files.py): one configuration, or the one named
"default" or marked as such, unless another is asked for; patterns relative to its `data_dir`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preftune.data.checks import kind, quote
from preftune.errors import ConfigError, DataError

README = "README.md"
LONGEST = 1 << 20  # characters of a README that are looked at
SHAPE = (
    "configs is a list of {config_name, data_files, data_dir}; data_files is a path, a list of paths, or a "
    "list of {split, path}; mend README.md, or give the folder or file that is meant"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """One configuration: its folder ("" for all) and patterns by split (None: by the names of the files)."""

    folder: str
    patterns: Mapping[str, tuple[str, ...]] | None

    def split_names(self, files: Sequence[str]) -> dict[str, str | None]:
        """The files, by their paths in the data set, that it names, with the name of their split. DataError
        for a pattern that no file is meant by.
        """
        if self.patterns is None:
            return dict.fromkeys(file for file in files if file.startswith(self.folder))
        from fsspec.utils import glob_translate

        splits: dict[str, str | None] = {}
        for split, patterns in self.patterns.items():
            for pattern in patterns:
                try:
                    matcher = re.compile(glob_translate(self.folder + pattern))
                except (ValueError, re.error) as error:
                    message = f"README.md: {quote(pattern)} is no pattern of paths: {quote(str(error))}"
                    raise DataError(message, SHAPE) from None
                named = [file for file in files if matcher.match(file)]
                if not named:
                    raise DataError(
                        f"README.md: no file that can be read here is meant by {quote(pattern)}", SHAPE
                    )
                if twice := [file for file in named if splits.get(file, split) != split]:
                    raise DataError(f"README.md: {quote(twice[0])} is in two splits", SHAPE)
                splits |= dict.fromkeys(named, split)
        return splits


def layout(text: str, config: str | None = None, foreign: bool = False) -> Layout | None:
    """The configuration `config`, or the default one, of a README's text; None if it declares none. In a
    `foreign` data set `config` may be missing. Raises ConfigError for a name that is not there, DataError for
    what is not YAML of this shape.
    """
    configs = _configs(text)
    if foreign and config not in configs:
        config = None
    if not configs:
        if config is not None:
            raise ConfigError(f"data.config = {config}, and no README.md declares configurations")
        return None
    names = ", ".join(quote(name) for name in [*configs][:20])
    if config is None:
        marked = [n for n, entry in configs.items() if n == "default" or entry.get("default") is True]
        names_left = list(configs) if len(configs) == 1 else marked
        if len(names_left) != 1:
            raise ConfigError(
                f"README.md declares several configurations: {names}",
                "name the file that is meant" if foreign else "choose one by data.config=NAME",
            )
        config = names_left[0]
    if config not in configs:
        raise ConfigError(f"data.config = {config}, and README.md declares {names}")
    return _layout(configs[config])


def refuse_both(config: str | None, data_dir: str | None) -> None:
    """ConfigError for a configuration of the README.md that is not read, since a folder is named."""
    if config is not None and data_dir is not None:
        raise ConfigError(
            f"data.config = {config} and data.data_dir = {data_dir}: with data_dir, the README.md that "
            "declares configurations is not read",
            "leave one of them out",
        )


def _configs(text: str) -> dict[str, dict[str, Any]]:
    lines = text[:LONGEST].removeprefix("\ufeff").splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    import yaml

    try:
        head = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"README.md: its head is not YAML: {quote(str(error))}", SHAPE) from None
    configs = head.get("configs") if isinstance(head, dict) else None
    if not configs:
        return {}
    if not isinstance(configs, list):
        raise DataError(f"README.md: configs is {kind(configs)}, not a list", SHAPE)
    by_name = {}
    for entry in configs:
        if not isinstance(entry, dict) or not isinstance(entry.get("config_name"), str):
            raise DataError("README.md: one of its configs has no config_name", SHAPE)
        by_name[entry["config_name"]] = entry
    return by_name


def _layout(config: Mapping[str, Any]) -> Layout:
    folder, files = config.get("data_dir") or "", config.get("data_files")
    if not isinstance(folder, str):
        raise DataError(f"README.md: data_dir is {kind(folder)}, not text", SHAPE)
    folder = folder.removeprefix("./").strip("/")
    return Layout(f"{folder}/" if folder and folder != "." else "", _patterns(files))


def _patterns(files: Any) -> dict[str, tuple[str, ...]] | None:
    if files is None:
        return None
    items = files if isinstance(files, list) else [files]
    if not any(isinstance(item, dict) for item in items):
        return {"train": _paths(items)}
    by_split: dict[str, tuple[str, ...]] = {}
    for item in items:
        split = item.get("split") if isinstance(item, dict) else None
        if not isinstance(split, str) or split in by_split:
            raise DataError("README.md: data_files names no split, or one twice", SHAPE)
        path = item.get("path")
        by_split[split] = _paths(path if isinstance(path, list) else [path])
    return by_split


def _paths(items: Sequence[Any]) -> tuple[str, ...]:
    if not items or not all(isinstance(item, str) and item for item in items):
        raise DataError("README.md: a path in data_files is no text", SHAPE)
    return tuple(item.removeprefix("./") for item in items)
