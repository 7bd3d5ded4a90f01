"""Code of others that is called in the middle of a run: what it changes in the process is put back.

A reward function may draw from the global generators, change directory, set a data type or a locale. None of
that may reach training, whose result would then depend on it without a word. What is not put back: files,
modules, and objects that the function shares with others. Standard library only: torch and numpy are looked
after where they are loaded.
"""

import contextlib
import locale
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from preftune.errors import DataError
from preftune.stops import SIGNALS, Interrupted

_SIGNALS = (*SIGNALS, *(number for number in signal.Signals if number.name == "SIGALRM"))

Undo = Callable[[], None]


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Run a body of foreign code and put the process back, whatever became of it."""
    undo = [*_process(), *_numpy(), *_torch()]
    with warnings.catch_warnings():  # puts back the filters
        try:
            yield
        finally:
            for restore in undo:
                restore()


def passes(error: BaseException) -> bool:
    """Whether an error is the user's wish to stop, and no failure of the foreign code."""
    return isinstance(error, Interrupted | KeyboardInterrupt)


def is_panic(error: BaseException) -> bool:
    """Whether it is Rust code that gave up: no Exception, so that every handler lets it pass."""
    return type(error).__name__ == "PanicException"


def from_panic(error: BaseException) -> DataError:
    """A tokenizer is the only such code of ours that reads other people's rules and texts."""
    first = str(error).partition("\n")[0][:200]
    return DataError(
        f"the tokenizer gave up: {first}",
        hint="its tokenizer.json has a rule that cannot be applied to a text of the data; use another model",
    )


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """DataError instead of a panic of Rust code."""
    try:
        yield
    except BaseException as error:
        if is_panic(error):
            raise from_panic(error) from error
        raise


def _process() -> Iterator[Undo]:
    directory, environment, drawn = Path.cwd(), dict(os.environ), random.getstate()
    leave, pid = os._exit, os.getpid()
    words, mask, depth = locale.setlocale(locale.LC_ALL), os.umask(0), sys.getrecursionlimit()
    os.umask(mask)

    def refuse(code: int) -> NoReturn:
        """os._exit would end the run without a word, as a success even; a child of the code may end so."""
        if os.getpid() != pid:
            leave(code)
        raise SystemExit(f"os._exit({code})")

    os._exit = refuse

    def put_back() -> None:
        os._exit = leave
        with contextlib.suppress(OSError):  # it removed the place
            os.chdir(directory)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        random.setstate(drawn)
        locale.setlocale(locale.LC_ALL, words)
        os.umask(mask)
        sys.setrecursionlimit(depth)

    yield put_back
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        yield lambda: _handle(handlers)


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _numpy() -> Iterator[Undo]:
    np: Any = sys.modules.get("numpy")
    if np is not None:
        drawn, errors = np.random.get_state(), np.geterr()
        yield lambda: np.random.set_state(drawn)
        yield lambda: np.seterr(**errors) and None


def _torch() -> Iterator[Undo]:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    gradients, threads, kind = torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()
    drawn, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    exact = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    device = torch.get_default_device()

    def put_back() -> None:
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(kind)
        torch.set_rng_state(drawn)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(exact, warn_only=warn)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        if device.type == "cpu":  # one set to the CPU, too, leaves a mode in which compiling fails
            torch.set_default_device(None)
        elif torch.get_default_device() != device:
            torch.set_default_device(device)

    yield put_back
