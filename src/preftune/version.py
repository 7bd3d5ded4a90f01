"""The version, once: the package, its command line, model cards and checkpoints read it here."""

__version__ = "0.1.0"  # the same as in pyproject.toml; a test compares them
