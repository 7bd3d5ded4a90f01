"""What Linux has and others do not: each has a way round it, which is taken here. Neither macOS nor Windows
was there to try.
"""

import ast
import multiprocessing
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import chat_template_utils

import prose
from preftune.data import template
from preftune.models import memory
from preftune.models.fast import native
from preftune.models.fast.compiled import compile_kernel
from preftune.rollout.sample import _draw
from preftune.rundir import RunDir
from preftune.runs import lock
from preftune.verify.attempts import Lives

SOURCE = Path(__file__).parents[1] / "src" / "preftune"
POSIX = {"fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty"}


def test_no_file_needs_a_posix_module_to_be_imported() -> None:
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not names & POSIX, file


# Files that name these where they have made sure of them: a child was forked, or the signal is there.
GUARDED = {"data/template.py", "rollout/calls.py"}
ELSEWHERE = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIGBREAK", "SIG_IGN", "SIG_DFL"}
NOT_THERE = {"fork", "forkserver", "alarm", "setitimer", "killpg", "getuid", "setsid"}


def test_no_file_takes_a_signal_or_a_fork_for_granted() -> None:
    found = set[str]()
    for file in sorted(SOURCE.rglob("*.py")):
        place = file.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            signals = node.value.id == "signal" and node.attr.startswith("SIG") and node.attr not in ELSEWHERE
            if signals or (node.value.id in ("os", "signal") and node.attr in NOT_THERE):
                found |= {f"{place}: {node.attr}"} if place not in GUARDED else set()
    assert found == {"faults.py: SIGUSR2"}  # of `hold`, for tests


def test_where_nothing_forks_commands_to_be_killed_are_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    lives = Lives()
    assert lives._context.get_start_method() == "spawn"
    assert lives.run(["--version"], tmp_path / "log") == 0
    assert (tmp_path / "log").read_text().startswith("preftune ")


class Tokenizer:
    """As much of one as a template needs."""

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        if messages[0]["role"] == "system":
            raise ValueError("no system message")
        day: Any = chat_template_utils.datetime  # type: ignore[attr-defined]
        return f"{day.now():%Y} {messages[0]['content']}" * (10**5 if messages[0]["content"] == "long" else 1)


def test_templates_without_fork_are_filled_in_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "_FORKS", False)
    monkeypatch.delattr(os, "fork")
    own = template.Template(Tokenizer())  # type: ignore[arg-type]
    assert own.fill([{"role": "user", "content": "hello"}]) == "2024 hello"
    for role, content in (("system", "x"), ("user", "long")):
        with pytest.raises(template.Refused):
            own.fill([{"role": role, "content": content}])
    assert chat_template_utils.datetime is datetime  # type: ignore[attr-defined]  # of this process again


def test_a_system_without_locks_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with lock.held(RunDir(tmp_path / "run")):
        pass
    (line,) = (line for line in "".join(capsys.readouterr()).splitlines() if "cannot be locked" in line)
    prose.compare("other_systems: a system without locks", line.replace(str(tmp_path), "DIR"))


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_without_glibc_memory_is_left_to_the_system(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", platform)
    assert not memory.keep_freed_memory()


def test_a_processor_without_avx_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NO AVX")  # as on arm64
    assert not native.kernel_file().exists()
    with pytest.raises(Exception, match="torch does the work"):
        compile_kernel(torch.backends.cpu.get_cpu_capability())


def test_draws_need_no_float64_where_there_is_none() -> None:
    """MPS has none."""

    class Narrow(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            assert not isinstance(out, torch.Tensor) or out.dtype != torch.float64
            return out

    with Narrow():
        drawn = _draw(torch.empty(4, 600, device="meta"), torch.empty(4, device="meta"), 1.0)
    assert drawn.shape == (4,)


def test_draws_in_float32_follow_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the inverse of the distribution in float64, at a thousand uniform numbers."""
    random = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(1, 600, generator=random), torch.rand(1000, generator=random)
    bounds = torch.softmax(logits[0].double(), 0).cumsum(0)
    monkeypatch.setattr("preftune.rollout.sample._WIDE", ())
    drawn = _draw(logits.expand(1000, -1).clone(), uniform, 1.0)
    wanted = torch.searchsorted(bounds, uniform.double(), right=True)
    assert (drawn != wanted).sum() <= 2  # at a bound, to rounding
    assert ((drawn - wanted).abs() <= 1).all()
