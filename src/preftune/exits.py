"""How a command ends: what is shown of an error, and the exit code (sysexits(3))."""

import os
import sys

from preftune.untrusted import printable

LESS_MEMORY = (
    "lower microbatch_size of the stage (same result), evaluation.batch_size, "
    "evaluation.pool or max_new_tokens, then run the same command again"
)


def exit_code(stop: SystemExit) -> int:
    """The code for an exit of the command line library, in which 2 means wrong usage and 130 Ctrl-C.

    A reader of the output that went away (`preftune options | head`) is no failure.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        forget_output()
        return 0
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if code == 130:
        print("interrupted; the same command resumes", file=sys.stderr)
    return 64 if code == 2 else code


def complain(message: str, hint: str, code: int) -> int:
    """At most eight lines on standard error; gives the code back."""
    text = printable("\n".join([f"error: {message}", *([f"hint: {hint}"] if hint else [])])).split("\n")
    lines = text if len(text) <= 8 else [*text[:6], "...", text[-1]]
    print("\n".join(lines), file=sys.stderr)
    return code


def forget_output() -> None:
    """Point standard output nowhere, so that the interpreter's last flush does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
