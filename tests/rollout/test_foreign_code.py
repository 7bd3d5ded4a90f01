"""What a reward function does to the process never reaches training; and the forms people hand one in."""

import asyncio
import locale
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preftune.data import Dialogue, Encoder, Preference, Turn
from preftune.data.corpus import train_tokenizer
from preftune.errors import BackendMissing, ConfigError, DataError, InputMissing
from preftune.isolated import isolated
from preftune.rollout.functions import RewardFunctions, load_functions
from preftune.rollout.score import Scorer
from preftune.stops import Interrupted

REPLIES = [" Yo.", " No", " It is.", " Go on."]
ROWS = [
    Preference(
        prompt=Dialogue((Turn("human", f" Q{i}?"),)), chosen="c", rejected="r", row=i, columns={"answer": i}
    )
    for i in range(len(REPLIES))
]
DO: Callable[[], Any] = lambda: 1.0  # noqa: E731


def does(prompt: str, response: str) -> Any:
    return DO()


def as_trl(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    assert set(columns) == {"answer", "ended", "source", "row", "chosen", "rejected"}
    assert prompts == [row.prompt.transcript() for row in ROWS]
    return [None if a == 2 else len(c) + 10 * a for c, a in zip(completions, columns["answer"], strict=True)]


def too_few(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0]


def knows_answer(prompt: str, response: str, answer: int) -> float:
    return 100.0 + answer


async def later(prompt: str, response: str) -> float:
    await asyncio.sleep(0)
    return float(len(response))


async def many_later(completions: list[str], **columns: Any) -> np.ndarray:
    await asyncio.sleep(0)
    return np.array([len(text) for text in completions])


def only_go(prompt: str, response: str) -> float | None:
    return 5.0 if "Go" in response else None


@pytest.fixture
def encoder() -> Encoder:
    pairs = [Preference(prompt=ROWS[0].prompt, chosen=" Yo.", rejected=" No", source="", row=0)] * 3
    return Encoder(train_tokenizer(pairs, 257), "transcript", 36, 12)


def scores(encoder: Encoder, terms: str, on_error: Any = "stop", alone: bool = True) -> list[float]:
    batch = encoder.sequences([(row.prompt, reply) for row, reply in zip(ROWS, REPLIES, strict=True)])
    found = load_functions(terms.replace("*", "* test_foreign_code:"), 5.0)
    own = RewardFunctions(functions=found, encoder=encoder, rows=ROWS, on_error=on_error)
    return own.rewards(batch, range(len(ROWS)), alone=alone).total.tolist()


def doing(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    def act() -> float:
        action()
        return 1.0

    monkeypatch.setitem(globals(), "DO", act)


def state() -> list[Any]:
    """All that training depends on."""
    numbers = np.random.get_state()
    return [
        os.getcwd(),
        dict(os.environ),
        random.getstate(),
        (numbers[0], numbers[1].tobytes(), *numbers[2:]),  # type: ignore[union-attr]
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.overrides._get_current_function_mode_stack(),  # a default device is one, the CPU, too
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        locale.setlocale(locale.LC_ALL),
        list(warnings.filters),
        [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        np.geterr(),
        sys.getrecursionlimit(),
    ]


CHANGES: dict[str, Callable[[], Any]] = {
    "directory": lambda: os.chdir("/"),
    "environment": lambda: os.environ.update(OMP_NUM_THREADS="7", PREFTUNE_NEW="x"),
    "no environment": lambda: os.environ.pop("PATH", None),
    "random": lambda: random.seed(1),
    "numpy": lambda: np.random.seed(1),
    "torch": lambda: torch.manual_seed(1),
    "draws": lambda: (random.random(), np.random.rand(), torch.rand(1)),
    "data type": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "the same device": lambda: torch.set_default_device("cpu"),
    "gradients": lambda: torch.set_grad_enabled(False),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "exactness": lambda: torch.use_deterministic_algorithms(True),
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8" if locale.setlocale(0) == "C" else "C"),
    "warnings": lambda: warnings.simplefilter("error"),
    "signals": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "floating point": lambda: np.seterr(all="raise"),
    "recursion": lambda: sys.setrecursionlimit(5000),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_function_changes_in_the_process_is_put_back(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with isolated():  # of the change itself, below
        before = state()
        CHANGES[what]()
        assert state() != before, "this change is none"
    assert state() == before
    doing(monkeypatch, CHANGES[what])
    assert scores(encoder, "1 *does") == [1.0] * 4
    assert state() == before


@pytest.mark.parametrize(
    "leave", [lambda: sys.exit(0), sys.exit, lambda: sys.exit("bye"), lambda: os._exit(0)]
)
def test_a_function_that_exits_has_failed(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, leave: Callable[[], Any]
) -> None:
    doing(monkeypatch, leave)
    with pytest.raises(DataError, match=r"test_foreign_code:does, row 0: it raised SystemExit"):
        scores(encoder, "1 *does")


@pytest.mark.parametrize("error", [GeneratorExit, BaseException, MemoryError])
def test_whatever_a_function_raises_is_a_failure_with_its_name(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def act() -> None:
        raise error("x")

    doing(monkeypatch, act)
    with pytest.raises(DataError, match=rf"it raised {error.__name__}: x") as caught:
        scores(encoder, "1 *does")
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize("error", [Interrupted(signal.SIGTERM), InputMissing("x"), BackendMissing("x")])
def test_a_wish_to_stop_is_none_nor_what_it_needs_and_is_not_there(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def act() -> None:
        raise error

    doing(monkeypatch, act)
    with pytest.raises(type(error)):
        scores(encoder, "1 *does")


def test_a_function_that_removes_its_directory_is_survived(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    doing(monkeypatch, lambda: (os.chdir(tmp_path), os.mkdir("x"), os.chdir("x"), os.rmdir(tmp_path / "x")))
    place = Path.cwd()
    assert scores(encoder, "1 *does") == [1.0] * 4
    assert Path.cwd() == place


@pytest.mark.parametrize(
    "line", ["raise SystemExit(0)", "exit(0)", "import os; os.chdir('/'); raise OSError"]
)
def test_a_module_that_exits_when_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    name = f"module_{abs(hash(line))}"
    (tmp_path / f"{name}.py").write_text(f"{line}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    place = Path.cwd()
    with pytest.raises(ConfigError, match=rf"{name}:f: importing its module fails"):
        load_functions(f"{name}:f")
    assert Path.cwd() == place


def test_a_function_in_trls_form_is_called_once_with_lists(encoder: Encoder) -> None:
    assert scores(encoder, "1 *as_trl", alone=False) == [4, 13, 0, 37]
    with pytest.raises(DataError, match=r"row 2: it gave None, as every other function did"):
        scores(encoder, "1 *as_trl")
    with pytest.raises(DataError, match=r"returned a list of length 1, not a list of 4 rewards"):
        scores(encoder, "1 *too_few")


def test_a_function_gets_the_columns_of_the_data_that_it_names(encoder: Encoder) -> None:
    assert scores(encoder, "1 *knows_answer") == [100, 101, 102, 103]


@pytest.mark.parametrize("name", ["later", "many_later"])
def test_an_async_function_is_waited_for(encoder: Encoder, name: str) -> None:
    lengths = [len(reply) for reply in REPLIES]
    assert scores(encoder, f"1 *{name}") == lengths

    async def in_a_notebook() -> list[float]:
        return scores(encoder, f"1 *{name}")

    with ThreadPoolExecutor(1) as other:  # this one may have a loop of its own: that of the browser tests
        assert other.submit(asyncio.run, in_a_notebook()).result() == lengths


def test_what_does_not_apply_is_left_out(encoder: Encoder) -> None:
    assert scores(encoder, "1 *only_go + 0.5 *knows_answer") == [50, 50.5, 51, 56.5]
    assert scores(encoder, "1 *only_go", alone=False) == [0, 0, 0, 5]


def test_a_weighted_sum_beyond_float32_is_refused(encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"brings the weighted sum to 1e\+40, beyond float32"):
        scores(encoder, "1e38 *knows_answer")


def test_the_scorer_knows_whether_functions_are_alone(encoder: Encoder) -> None:
    batch = encoder.sequences([(row.prompt, reply) for row, reply in zip(ROWS, REPLIES, strict=True)])
    own = RewardFunctions(
        functions=load_functions("test_foreign_code:only_go"),
        encoder=encoder,
        rows=ROWS,
        on_error="mask",
    )
    scorer = Scorer(reward_model=None, encoder=encoder, translate=None, functions=own)
    with pytest.raises(DataError, match=r"3 of 4 responses got no reward"):
        scorer.scores(batch, range(len(ROWS)))
    assert replace(own, on_error="stop").rewards(batch[torch.tensor([3])], [3]).total.tolist() == [5]
