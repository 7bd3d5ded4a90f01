"""One thread per process before torch is imported, and shared reference material where there is some."""

import os
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory with real preference pairs and golden vectors; tests that need it are skipped without it."""
    path = Path(os.environ.get("PREFTUNE_SHARED", "../shared"))
    path = path if path.is_absolute() else ROOT / path
    if not path.is_dir():
        pytest.skip(f"no reference material at {path} (set PREFTUNE_SHARED)")
    return path
