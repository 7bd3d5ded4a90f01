"""A model's directory is written whole or not at all. No torch."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from preftune.errors import StorageError


@contextmanager
def writing(target: Path, partial: Path) -> Iterator[None]:
    """A failed write is a StorageError, and leaves the directory as it was."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # tokenizers raises a bare Exception
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:
            raise StorageError(
                f"cannot write the model {target}: {error}",
                hint="free some space, then run the same command again",
            ) from error
        raise
