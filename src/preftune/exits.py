"""How a command ends: what is shown of an error, and the exit code (sysexits(3))."""

import os
import sys

from preftune.errors import StorageError
from preftune.untrusted import printable

LESS_MEMORY = (
    "lower microbatch_size of the stage (same result), evaluation.batch_size, "
    "evaluation.pool or max_new_tokens, then run the same command again"
)


def open_streams() -> None:
    """Give a command that was started with a closed stream (`<&- >&- 2>&-`) one that goes nowhere. Otherwise
    the first file that it opens would take the number, and what is printed would land in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


def exit_code(stop: SystemExit) -> int:
    """The code for an exit of the command line library, in which 2 means wrong usage and 130 Ctrl-C.

    A reader of the output that went away (`preftune options | head`) is no failure; click and rich call it 1.
    """
    if isinstance(stop.__context__, BrokenPipeError):
        return 0
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if code == 130:
        say("interrupted; the same command resumes")
    return 64 if code == 2 else code


def finished(code: int) -> int:
    """The code, once all of the output is written; 74 if all went well but for that."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        forget_output()
    except OSError as error:
        forget_output()
        message = f"what this command prints cannot be written: {error.strerror}"
        return code or complain(message, "give its output another place", StorageError.code)
    return code


def complain(message: str, hint: str, code: int) -> int:
    """At most eight lines on standard error; gives the code back."""
    text = printable("\n".join([f"error: {message}", *([f"hint: {hint}"] if hint else [])])).split("\n")
    lines = text if len(text) <= 8 else [*text[:6], "...", text[-1]]
    say("\n".join(lines))
    return code


def say(text: str) -> None:
    """To standard error, if that can be written: the exit code says it, too."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        forget_output(2)


def forget_output(number: int = 1) -> None:
    """Point standard output, or error, nowhere, so that the interpreter's last flush does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
