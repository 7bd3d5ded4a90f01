"""The version, once: the package, its command line, model cards and checkpoints read it here, and so does
pyproject.toml.
"""

__version__ = "0.1.0"
