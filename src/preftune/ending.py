"""How a command ends: with an exit code, and an error as a few lines on standard error."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any

from preftune.errors import PreftuneError, UsageError, from_system
from preftune.isolated import from_panic, is_panic
from preftune.stops import Interrupted
from preftune.untrusted import holds_credential, printable

_LESS_MEMORY = (
    "lower microbatch_size of the stage (same result), evaluation.batch_size or max_new_tokens, "
    "then run the same command again"
)


@dataclass(slots=True)
class Shown:
    """What `main` shows of an error, as the options of the app ask for it."""

    traceback: bool = False


def run_app(app: Callable[..., Any], arguments: Sequence[str] | None) -> int:
    """Run the command line and return its exit code (sysexits; 64 for wrong usage).

    Shows a traceback only with --debug, which may stand anywhere in the line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only gets escapes
    if bad := [word for word in words if holds_credential(word)]:
        return _complain(
            f"the command line holds what looks like a password or token: {bad[0]}",
            "everyone on this machine can read command lines; log in with `hf auth login`, or set HF_TOKEN",
            UsageError.code,
        )
    if "--debug" in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    shown = Shown()
    try:
        app(words, prog_name="preftune", obj=shown)
        return 0
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt:
        return _exit_code(SystemExit(130))
    except Interrupted as stop:
        print(stop.message, file=sys.stderr)
        return stop.code
    except BrokenPipeError:
        _forget_output()
        return 0
    except BaseException as error:
        if is_panic(error):
            error = from_panic(error)
        if not isinstance(error, Exception):
            raise
        if shown.traceback:
            print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
        if isinstance(error, OSError) and error.filename is not None:
            error = from_system(error)
        if isinstance(error, PreftuneError):
            return _complain(error.message, error.hint, error.code)
        first_line = str(error).partition("\n")[0][:300]
        if _is_out_of_memory(error):
            return _complain(f"out of memory: {first_line}", _LESS_MEMORY, PreftuneError.code)
        what = f"internal error: {type(error).__name__}: {first_line}"
        return _complain(what, "run again with --debug to see where, and report it", PreftuneError.code)


def _exit_code(stop: SystemExit) -> int:
    """The code for an exit of the command line library, in which 2 means wrong usage and 130 Ctrl-C.

    A reader of the output that went away (`preftune options | head`) is no failure.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        return 0
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if code == 130:
        print("interrupted; the same command resumes", file=sys.stderr)
    return 64 if code == 2 else code


def _is_out_of_memory(error: Exception) -> bool:
    """Python's own error, torch's for a GPU, and what torch says of ordinary memory."""
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kinds or "can't allocate memory" in str(error)


def _complain(message: str, hint: str, code: int) -> int:
    """At most eight lines on standard error; gives the code back."""
    text = printable("\n".join([f"error: {message}", *([f"hint: {hint}"] if hint else [])])).split("\n")
    shown = text if len(text) <= 8 else [*text[:6], "...", text[-1]]
    print("\n".join(shown), file=sys.stderr)
    return code


def _forget_output() -> None:
    """Point standard output nowhere, so that the interpreter's last flush does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
