"""The command line: fast and torch-free help, short errors, exit codes."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import preftune
from patience import PATIENCE
from preftune.cli import main
from preftune.errors import DataError, RunLocked, in_a_directory
from preftune.stops import Interrupted

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This interpreter in a process of its own, with the sources in reach."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for preftune.api, so that no test here imports torch."""
    calls: list[tuple[Any, ...]] = []

    def record(*arguments: Any, **named: Any) -> Any:
        calls.append((arguments, named))
        return fake.result() if callable(fake.result) else fake.result

    fake = SimpleNamespace(calls=calls, run_recipe=record, evaluate=record, sample=record, result=None)
    monkeypatch.setitem(sys.modules, "preftune.api", fake)
    import preftune

    monkeypatch.setattr(preftune, "api", fake, raising=False)
    monkeypatch.setitem(sys.modules, "preftune.api", fake)
    return fake


def raising(error: BaseException) -> Any:
    def result() -> None:
        raise error

    return result


def test_help_loads_little() -> None:
    """Its time hangs on what it imports; 0.2 s on a quiet machine, but a timing is no test."""
    done = python("-X", "importtime", "-m", "preftune", "--help")
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "datasets",
        "numpy",
        "scipy",
        "matplotlib",
        "pydantic",
        "rich",
    }


def test_light_commands_and_imports_do_not_load_torch() -> None:
    code = (
        "import sys, preftune, preftune.config, preftune.rundir, preftune.cli, preftune.report\n"
        "import preftune.evaluation.stats, preftune.measure.compare\n"
        "for words in (['--help'], ['options'], ['version'], ['run', 'quickstart', '--dry-run']):\n"
        "    assert preftune.cli.main(words) == 0\n"
        "assert preftune.cli.main(['audit', '/nope']) == 66\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'matplotlib', 'jinja2'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout.strip().endswith("LOADED []"), done.stdout[-300:] + done.stderr


@pytest.mark.parametrize("words", ["'run', 'tiny', '--out', sys.argv[1]", "'evaluate', sys.argv[1]"])
def test_on_a_locked_directory_a_command_leaves_before_it_loads_much(words: str, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = python(
            "-c",
            f"import sys; from preftune.cli import main; print(main([{words}]), "
            "*{'numpy', 'torch', 'rich', 'pyarrow'} & set(sys.modules))",
            str(tmp_path),
        )
    assert done.stdout == "73\n", done.stderr
    assert "is in use by another process" in done.stderr


def test_module_exits_with_the_code_of_the_error() -> None:
    done = python("-m", "preftune", "run", "nonesuch", "--dry-run")
    assert done.returncode == 64
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_the_directory_of_the_command_is_gone(
    api: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    api.result = raising(FileNotFoundError(errno.ENOENT, "No such file or directory"))  # of os.getcwd
    assert main(["run", "tiny"]) == 66
    assert "started is gone" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["runs"], ["label"]])
def test_the_short_option_of_help_works_everywhere(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "-h"]) == 0
    assert f"Usage: {' '.join(['preftune', *words])} " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["run"], ["run", "tiny", "--nonsense"], ["fly"]])
def test_wrong_usage_is_64(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 64
    assert "Traceback" not in capsys.readouterr().err


def test_run_passes_its_words_on(api: SimpleNamespace) -> None:
    assert main(["run", "tiny", "seed=1", "--out", "x", "stage.ppo.steps=2", "--restart"]) == 0
    named = {"out": "x", "resume": False, "until": None, "mirror": None, "from_run": None, "redo": ()}
    assert api.calls == [(("tiny", ("seed=1", "stage.ppo.steps=2")), named)]


def test_dry_run_names_the_command_that_reads_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", "--dry-run", "data.name=two words", "seed=1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(": preftune plan tiny 'data.name=two words' seed=1")
    words = ["model.trainable=top:1", "out=/nowhere/x"]
    assert main(["train", "tiny", "rm", "--dry-run", *words]) == 0
    shown = capsys.readouterr().out
    assert "rm: trains" in shown
    assert "ppo: trains" not in shown


def test_the_home_may_stand_in_words_that_no_shell_expands(
    api: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["run", "tiny", "out=~/mine", "--mirror=~/copies", "--from=~/theirs"]) == 0
    given = api.calls[-1][1]
    assert [given[key] for key in ("out", "mirror", "from_run")] == [
        f"{tmp_path}/{name}" for name in ("mine", "copies", "theirs")
    ]
    assert in_a_directory("~/it.json") == f"{tmp_path}/it.json"


@pytest.mark.parametrize("word", ["out=", "--out=", "--mirror=", "--from="])
def test_an_empty_name_is_not_this_directory(api: SimpleNamespace, word: str) -> None:
    """`--out "$UNSET"` filled the directory in which it was typed."""
    assert main(["run", "tiny", word]) == 64
    assert not api.calls


@pytest.mark.parametrize("word", ["out=", "--mirror=", "--keep="])
def test_an_empty_name_is_no_directory_of_a_study(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.study.launch.run_study", lambda *_, **__: pytest.fail("it was begun"))
    assert main(["study", "tiny", word]) == 64


def test_the_home_may_stand_in_the_directories_of_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict[str, Any]()
    monkeypatch.setattr(
        "preftune.study.launch.run_study", lambda *words, **named: given.update(named, words=words)
    )
    assert main(["study", "tiny", "out=~/a", "--mirror=~/b", "--keep=~/c"]) == 0
    places = (given["words"][1], given["placement"].mirror, given["keep"])
    assert places == tuple(Path.home() / name for name in "abc")


@pytest.mark.parametrize("command", [["compare", "a", "b"], ["doctor", "a"], ["inspect", "tiny"]])
def test_an_empty_name_is_no_file(command: list[str]) -> None:
    assert main([*command, "--json="]) == 64


def test_train_stops_after_its_stage(api: SimpleNamespace) -> None:
    assert main(["train", "tiny", "rm", "seed=1"]) == 0
    named = {"out": None, "resume": True, "until": "rm", "mirror": None, "from_run": None, "redo": ()}
    assert api.calls == [(("tiny", ("seed=1",)), named)]


def test_dry_run_starts_nothing(api: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", "seed=7", "--dry-run"]) == 0
    assert main(["train", "tiny", "dpo", "--dry-run"]) == 0
    assert main(["train", "tiny", "kto", "--dry-run"]) == 64
    assert main(["run", "tiny", "--dry-run", "--restart", "--redo", "dpo"]) == 64
    assert api.calls == []
    assert re.search(r"seed += 7 +command line", capsys.readouterr().out)


@pytest.mark.parametrize("error", [DataError("bad row\nin file", "mend it"), RunLocked("in use")])
def test_known_errors_are_short_and_set_the_code(
    error: Any, api: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    api.result = raising(error)
    assert main(["run", "tiny"]) == error.code
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {error}")
    assert f"hint: {error.hint}" in shown or not error.hint
    assert "Traceback" not in shown
    for words in (["--debug", "run", "tiny"], ["run", "tiny", "--debug"], ["run", "--debug", "tiny"]):
        assert main(words) == error.code
        assert "Traceback" in capsys.readouterr().err


def test_long_errors_are_cut_to_eight_lines(api: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    api.result = raising(DataError("\n".join(str(n) for n in range(30)), "the hint"))
    assert main(["evaluate", "r"]) == 65
    lines = capsys.readouterr().err.rstrip().split("\n")
    assert len(lines) == 8
    assert lines[-1] == "hint: the hint"


def test_internal_error_is_70_in_two_lines(api: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    api.result = raising(KeyError("x"))
    assert main(["run", "tiny"]) == 70
    shown = capsys.readouterr().err
    assert "internal error: KeyError: 'x'" in shown
    assert "--debug" in shown
    assert shown.count("\n") == 2
    assert main(["run", "tiny", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.94 GB)"),
    ],
)
def test_out_of_memory_names_what_to_lower(
    error: Exception, api: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    api.result = raising(error)
    assert main(["run", "tiny"]) == 70
    shown = capsys.readouterr().err
    assert shown.startswith("error: out of memory")
    assert "microbatch_size" in shown


def test_a_run_that_was_asked_to_stop(api: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)):
        api.result = raising(Interrupted(number, " after step 3 of 5"))
        assert main(["run", "tiny"]) == code
        assert capsys.readouterr().err.endswith(" after step 3 of 5; the same command resumes\n")


def test_interrupt_is_130(api: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    api.result = raising(KeyboardInterrupt())
    assert main(["run", "tiny"]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command resumes\n")


def test_options_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options"]) == 0
    assert "stage.ppo.learning_rate = 5e-06" in capsys.readouterr().out
    assert main(["version"]) == 0
    assert f"preftune {preftune.__version__}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"preftune {preftune.__version__}\n"


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = preftune.nonesuch


def test_alone_it_says_how_to_begin_and_what_lies_here(tmp_path: Path) -> None:
    code = (
        "import sys; from preftune.cli import main; assert main([]) == 0\n"
        "print('LOADED', sorted({'torch', 'pydantic', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert "preftune run quickstart" in done.stdout
    assert "this machine: " in done.stdout
    assert done.stdout.strip().endswith("LOADED []"), done.stdout + done.stderr


def test_a_name_that_is_nearly_right_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "tiny", "pop"], ["run", "tiny", "--redo", "ppoo", "--out", "/nowhere/x"]):
        assert main(words) == 64
        assert "did you mean ppo?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["compare", "a", "b"], ["audit", "a"], ["selftest"], ["doctor", "a"]])
def test_a_line_in_the_place_of_a_file_is_the_output(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And holds nothing but the result; what people read goes to the error stream."""
    from preftune import api, selftest
    from preftune.report import doctor

    def written(*given: str) -> dict[str, str]:
        print("a table")
        Path(given[-1]).write_text('{"verdict": "usable"}\n', encoding="utf-8")
        return {"verdict": "usable"}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "compare", written)
    monkeypatch.setattr(api, "audit", written)
    monkeypatch.setattr(selftest, "run", lambda file: (str(written(file)), 0))
    monkeypatch.setattr(doctor, "examine", lambda *given: str(written(*given)))
    assert main([*words, "--json", "-"]) == 0
    said = capsys.readouterr()
    assert said.out == '{"verdict": "usable"}\n'
    assert "a table" in said.err
    assert not [*tmp_path.iterdir()]
    assert main([*words, "--json", "-.json"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["-.json"]


def test_an_installation_has_no_findings_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "findings.json"]) == 64
    assert "no run is named" in capsys.readouterr().err
