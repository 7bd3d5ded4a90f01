"""Errors a user can act on: what went wrong, where, what to do, and the exit code that says so.

Exit codes follow sysexits(3); the table is in docs/reliability.md.
"""

import difflib
import errno
import os
from collections import abc
from pathlib import Path

_FULL = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EFBIG: "this system limits how large a file may be (ulimit -f)",
    errno.EIO: "",
}


class PreftuneError(Exception):
    """An error with a message for people: `message` says what went wrong and where, `hint` what to do."""

    code = 70  # internal error: only for a fault of ours

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(PreftuneError):
    """The command line asks for something that does not exist."""

    code = 64


class DataError(PreftuneError):
    """Input data is malformed, empty or does not match what was recorded."""

    code = 65


class SamplerDisagrees(DataError):
    """Another sampler writes replies that the policy would not write, or none that can be read."""


class InputMissing(PreftuneError):
    """A file, directory, model or data set cannot be found or reached."""

    code = 66


class BackendMissing(PreftuneError):
    """An optional package, or the service behind it, is needed and not there."""

    code = 69


class RunLocked(PreftuneError):
    """Another process is using the run directory."""

    code = 73


class StorageError(PreftuneError):
    """Writing or reading back a result failed."""

    code = 74


class ProcessLost(PreftuneError):
    """Another process of a distributed run has ended, or does not answer."""

    code = 75


class PermissionMissing(PreftuneError):
    """A directory cannot be written."""

    code = 77


class ConfigError(PreftuneError):
    """A configuration is wrong, or differs from the one a run was started with."""

    code = 78


def in_a_directory(file: str | None) -> str | None:
    """The name of a file that a command is to write, asked before its work. InputMissing if there is no such
    directory; "-" and None are no file, and /dev/stdout is "-".
    """
    if file == "":
        raise UsageError("the name of the file to write is empty", "give one, or - to print the result")
    if file == "/dev/stdout":
        return "-"
    file = file and os.path.expanduser(file)  # in --json=~/it, which a shell passes on as it is
    if file not in (None, "-") and not Path(file).resolve().parent.is_dir():
        raise InputMissing(f"cannot write {file}: there is no such directory", "make it first")
    return file


def no_bare_text(name: str, values: object) -> None:
    """UsageError for one text where a list of them is taken: its characters would pass for the list."""
    if isinstance(values, str | bytes):
        raise UsageError(f"{name} is one text, not a list of texts", hint=f"{name}=[...]")


def did_you_mean(word: str, choices: abc.Iterable[str]) -> str:
    """The question of a hint, "did you mean X? ", or "" where no known word is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"did you mean {near[0]}? " if near else ""


def one_of(word: str, choices: abc.Collection[str]) -> str:
    """The hint for a word that is none of the choices."""
    return f"{did_you_mean(word, choices)}one of: {', '.join(choices)}"


def is_of_system(error: OSError) -> bool:
    """Whether `from_system` can say what happened: the error names a file, or says enough without one."""
    return error.filename is not None or error.errno in (*_FULL, errno.ENOENT)


def from_system(error: OSError) -> PreftuneError:
    """An unexpected system error about a file, as an error that a person can act on."""
    reason = error.strerror or str(error)
    message = (
        f"cannot write the output: {reason}" if error.filename is None else f"{error.filename}: {reason}"
    )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionMissing(message, "check who owns it and who may write there")
    if error.errno in _FULL:
        return StorageError(message, _FULL[error.errno])
    if error.errno == errno.ENOENT and error.filename is None:  # where am I?
        return InputMissing("the directory in which this command was started is gone", "change to another")
    return InputMissing(message, "check the path")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, torch's for a GPU, and what torch says of ordinary memory and of other devices."""
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    text = str(error) if isinstance(error, RuntimeError) else ""
    return kinds or "can't allocate memory" in text or "out of memory" in text
