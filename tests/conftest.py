"""One thread per process before torch is imported, and shared reference material where there is some."""

import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell has what it runs in the background ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402

import preftune  # noqa: E402
from made_once import drawn_once, figures, made_once, small_world  # noqa: E402
from preftune.judges import endpoint  # noqa: E402
from preftune.rundir import RunDir  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """What tests of one file share is made once: one worker has them all. Those of no group fill the gaps.

    pytest-xdist 3.8 tells its scheduler the group of a test by writing it behind the node id. pytest 9.2
    keeps the id elsewhere, so that every group fell apart without a word (pytest-xdist, issue 1386).
    """
    for item in items:
        asked = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009 - pytest shows it nowhere else
        if not item.get_closest_marker("xdist_group") and any(each[-1].scope == "module" for each in asked):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    yield
    for item in items:
        with_group: str = getattr(item, "_nodeid", item.nodeid)
        if with_group != item.nodeid:
            setattr(item, "_id", type(getattr(item, "_id")).parse(with_group))  # noqa: B009, B010 - as above
        if with_group != item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: this pytest does not take its group from pytest-xdist")


_MANY = 300  # modules: what a library brings in
_frozen = 0  # modules that no collection of garbage looks at


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays to the end: no collection of garbage looks at it, neither now nor
    later. Each took 0.3 s of processor time, and a run makes one after every stage.
    """
    gc.disable()
    yield
    _freeze()
    gc.enable()


def pytest_runtest_logfinish() -> None:
    """The same for what a test was the first to import."""
    if len(sys.modules) > _frozen + _MANY:
        _freeze()


def _freeze() -> None:
    global _frozen
    gc.collect()
    gc.freeze()
    _frozen = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_or_is_drawn_twice() -> Iterator[None]:
    """Worlds are drawn once a process (0.3 s each, in most commands), and nobody waits for a disk: no machine
    loses its power here. Tests that put something else in the place of os.fsync still see every call. An
    endpoint is asked again at once. Reports have no figures, but for files of tests that ask for
    `with_figures`.
    """
    with drawn_once(), figures(drawn=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        patch.setattr(endpoint, "FIRST_WAIT", 0.001)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of whoever runs the tests stays as it is: states in it would make room for others."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFTUNE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def own_states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For a file whose states of frozen blocks no other test sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory with real preference pairs and golden vectors; tests that need it are skipped without it."""
    path = Path(os.environ.get("PREFTUNE_SHARED", "../shared"))
    path = path if path.is_absolute() else ROOT / path
    if not path.is_dir():
        pytest.skip(f"no reference material at {path} (set PREFTUNE_SHARED)")
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """All stages, evaluation and report. Read only."""
    with figures(drawn=True):
        made = made_once(tmp_path_factory, "tiny", lambda out: preftune.run("tiny", out=str(out / "run")))
    return RunDir(made / "run")


@pytest.fixture
def copy(tiny_run: RunDir, tmp_path: Path) -> RunDir:
    """One that a test may change."""
    return RunDir(shutil.copytree(tiny_run.path, tmp_path / "run"))


@pytest.fixture(scope="module")
def with_figures() -> Iterator[None]:
    """For a file of tests that look at the figures of reports."""
    with figures(drawn=True):
        yield


@pytest.fixture
def small_data() -> Iterator[None]:
    """`few_pairs` for one test of a file whose others look at `tiny_run`."""
    with small_world():
        yield


@pytest.fixture(scope="module")
def few_pairs() -> Iterator[None]:
    """For a file that runs whole recipes and asks nothing about the built-in world. Not beside `tiny_run`."""
    with small_world():
        yield


@pytest.fixture(scope="session")
def second_judge_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """SFT and DPO, scored by a reward model on half of the prompts and by a second one on the other half."""
    halves = ["stage.rm.part=first", "stage.rm2.algorithm=reward", "stage.rm2.part=second"]
    small = ["stage.rm2.rows=128", "stage.rm2.learning_rate=1e-3", "stage.ppo=none", "stage.grpo=none"]
    words = [*halves, *small, "evaluation.prompts=12"]
    made = made_once(
        tmp_path_factory, "second_judge", lambda out: preftune.run("tiny", *words, out=str(out / "run"))
    )
    return RunDir(made / "run")
