"""The hash of a file. Standard library only."""

import hashlib
from pathlib import Path


def sha256_file(path: Path) -> str:
    """Of a file's bytes, read piece by piece. OSError if it cannot be read."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
