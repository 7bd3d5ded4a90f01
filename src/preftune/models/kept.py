"""States of rows on disk, for all runs of this machine: a directory per trunk, with a file of numbers that
only grows and an index into it. No torch.

Several processes may write at once (a lock of the system orders them), and any of them may die: bytes count
once their record is in the index, and each record has a hash of itself and of the bytes it points to. A row
is used only if its hash is right; a damaged one is computed and written again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from preftune.models.locate import cache_dir

_RECORD = struct.Struct("<16s16sQI")  # key, hash of the numbers, where they begin, how many tokens
_HASH = 8  # bytes of a record's own hash, behind it
_SIZE = _RECORD.size + _HASH
_NUMBERS, _INDEX, _ABOUT = "states.bin", "rows.idx", "about.json"


class Extent(NamedTuple):
    """Where a row lies: its first byte, its number of tokens, the hash of its states."""

    start: int
    tokens: int
    digest: bytes


class KeptStates:
    """The rows of one trunk, (T, width) each of `dtype`, in files of at most `limit` bytes."""

    def __init__(
        self,
        directory: Path,
        width: int,
        dtype: "np.dtype[Any]",
        limit: int,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """OSError if the directory cannot be written."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.width, self.dtype, self.limit = directory, width, dtype, limit
        self._extents: dict[bytes, Extent] = {}
        self._right: set[bytes] = set()  # rows whose hash has been compared, in `_numbers`
        self._read = 0  # bytes of the index
        self.full = False  # whether a row has found no room
        self._numbers: np.ndarray[Any, Any] | None = None
        for name in (_NUMBERS, _INDEX):
            (directory / name).touch()
        turns = (_turn(folder) for folder in directory.parent.iterdir())
        record = {**about, "turn": max(turns, default=0) + 1}
        (directory / _ABOUT).write_text(json.dumps(record), encoding="utf-8")

    def get(self, key: bytes) -> np.ndarray[Any, Any] | None:
        """A row's states as they lie in the file, or None for one that is not there or damaged, or whose
        directory another process has removed.
        """
        try:
            if key not in self._extents:
                self._look()
            if (extent := self._extents.get(key)) is None:
                return None
            row = self._row(extent)
        except OSError:
            return None
        if row is None or (key not in self._right and _digest(row) != extent.digest):
            del self._extents[key]
            return None
        self._right.add(key)
        return row

    def add(self, key: bytes, states: np.ndarray[Any, Any]) -> None:
        """Write a row after the others; sets `full` if there is no room. OSError if the disk refuses."""
        data = np.ascontiguousarray(states, self.dtype)
        with self._locked(), (self.directory / _NUMBERS).open("ab") as numbers:
            start = numbers.seek(0, os.SEEK_END)
            if start + data.nbytes > self.limit:
                self.full = True
                return
            numbers.write(data.tobytes())
            numbers.flush()
            record = _RECORD.pack(key, _digest(data), start, len(data))
            with (self.directory / _INDEX).open("ab") as index:
                end = index.seek(0, os.SEEK_END)
                index.write(bytes(-end % _SIZE))  # fill up a record that a kill left half written
                index.write(record + hashlib.blake2b(record, digest_size=_HASH).digest())

    def _row(self, extent: Extent) -> np.ndarray[Any, Any] | None:
        end = extent.start + extent.tokens * self.width * self.dtype.itemsize
        if self._numbers is None or len(self._numbers) < end:
            if (self.directory / _NUMBERS).stat().st_size < end:
                return None
            self._right.clear()  # the file may be another one: removed, and begun again
            # "c": what is changed in memory stays there
            self._numbers = np.memmap(self.directory / _NUMBERS, np.uint8, "c")
        return self._numbers[extent.start : end].view(self.dtype).reshape(extent.tokens, self.width)

    def _look(self) -> None:
        """Read what has been added to the index."""
        with (self.directory / _INDEX).open("rb") as index:
            index.seek(self._read)
            added = index.read()
        complete = len(added) // _SIZE * _SIZE
        self._read += complete
        for i in range(0, complete, _SIZE):
            record, checksum = added[i : i + _RECORD.size], added[i + _RECORD.size : i + _SIZE]
            if hashlib.blake2b(record, digest_size=_HASH).digest() == checksum:
                key, digest, start, tokens = _RECORD.unpack(record)
                self._extents[key] = Extent(start, tokens, digest)
                self._right.discard(key)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, where the system has such locks (Windows has not)."""
        with (self.directory / ".lock").open("a") as file:
            with contextlib.suppress(ImportError):
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _digest(states: np.ndarray[Any, Any]) -> bytes:
    return hashlib.blake2b(states.tobytes(), digest_size=16).digest()


def states_dir() -> Path:
    """Where states are kept: a folder of preftune's cache."""
    return cache_dir() / "states"


def sizes() -> dict[Path, int]:
    """Bytes by trunk, those used longest ago first."""
    folders = sorted((file.parent for file in states_dir().glob(f"*/{_ABOUT}")), key=_turn)
    return {
        folder: sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) for folder in folders
    }


def empty(to: int = 0, keep: Path | None = None) -> int:
    """Remove trunks, those used longest ago first, until at most `to` bytes remain besides `keep`; returns
    the bytes removed.
    """
    folders = {folder: size for folder, size in sizes().items() if folder != keep}
    remaining = total = sum(folders.values())
    for folder, size in folders.items():
        if remaining <= to:
            break
        shutil.rmtree(folder, ignore_errors=True)
        remaining -= size
    return total - remaining


def cache_lines(*, remove: bool) -> Iterator[str]:
    """The lines that `preftune cache` prints; with `remove` it empties the cache."""
    for folder, size in sizes().items():
        yield f"{folder}  {size / 1e6:,.0f} MB"
    if remove:
        yield f"removed: {empty() / 1e6:,.0f} MB"
    yield f"{states_dir()}: {sum(sizes().values()) / 1e6:,.0f} MB"


def _turn(folder: Path) -> int:
    """When a trunk was last opened: a count, since clocks jump; 0 where there is no such record."""
    try:
        turn = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))["turn"]
    except (OSError, ValueError, TypeError, KeyError):
        return 0
    return turn if isinstance(turn, int) else 0
