"""What leaves the checkout: the version, a wheel, an sdist, the Dockerfile's steps.

`make test` builds both archives and calls the installed command; `make wheel-check` and `make docker-check`
run `tiny` with it. Other packages are those of this environment, behind a new one on the path.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import preftune
from made_once import made_once

ROOT = Path(__file__).resolve().parent.parent
WHOLE = os.environ.get("PREFTUNE_SHIP") == "all"
NEEDED = ("recipes/tiny.toml", "models/fast/native.cpp", "report/templates/report.html")
STAGES = ("cpu", "cuda")
BUILD = """import sys; from setuptools import build_meta
to = sys.argv[1]; build_meta.build_wheel(to); build_meta.build_sdist(to)"""

pytest.importorskip("setuptools", minversion="77", reason="needs setuptools >= 77 to build")


def call(*words: str | Path, at: Path, **environment: str) -> str:
    """What a command prints; it sees neither the checkout nor PYTHONPATH."""
    seen = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    line = [str(word) for word in words]
    done = subprocess.run(line, cwd=at, env=seen, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_checkout(to: Path) -> Path:
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", ".dockerignore", "Dockerfile"):
        shutil.copyfile(ROOT / name, to / name)
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    shutil.copytree(ROOT / "src", to / "src", ignore=left_out)
    return to


def environment(at: Path) -> Path:
    """A new virtual environment in which the packages of this one are found behind its own."""
    call(sys.executable, "-m", "venv", "--without-pip", at, at=at.parent)
    inside = next(at.glob("lib/python*/site-packages"))
    (inside / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return at / "bin"


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(out: Path) -> None:
        (out / "tree").mkdir()
        call(sys.executable, "-c", BUILD, out, at=copy_of_the_checkout(out / "tree"))

    return made_once(tmp_path_factory, "archives", make)


def wheel(archives: Path) -> Path:
    (found,) = archives.glob("preftune-*.whl")
    return found


def install(where: Path, what: Path) -> Path:
    scripts = environment(where)
    words = ["-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    call(scripts / "python", *words, "--ignore-installed", what, at=where)
    return scripts


def test_the_wheel_holds_what_a_run_reads(archives: Path) -> None:
    names = zipfile.ZipFile(wheel(archives)).namelist()
    assert all(f"preftune/{name}" in names for name in NEEDED)
    assert not [name for name in names if name.startswith(("tests", "benchmarks")) or name.endswith(".so")]
    assert wheel(archives).name.startswith(f"preftune-{preftune.__version__}-")


def test_the_sdist_holds_the_wheels_files(archives: Path) -> None:
    (sdist,) = archives.glob("preftune-*.tar.gz")
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    ours = {name for name in zipfile.ZipFile(wheel(archives)).namelist() if ".dist-info/" not in name}
    assert {f"src/{name}" for name in ours} | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_installed_command_works_outside_of_the_checkout(archives: Path, tmp_path: Path) -> None:
    scripts = install(tmp_path / "venv", wheel(archives))
    assert call(scripts / "preftune", "--version", at=tmp_path).strip() == f"preftune {preftune.__version__}"
    assert "then: every policy on 16" in call(scripts / "preftune", "run", "tiny", "--dry-run", at=tmp_path)
    place = call(scripts / "python", "-c", "import preftune; print(preftune.__file__)", at=tmp_path)
    assert place.startswith(str(tmp_path / "venv"))
    if WHOLE:
        call(scripts / "preftune", "run", "tiny", at=tmp_path)
        assert (tmp_path / "runs/tiny/report.html").is_file()


@pytest.mark.skipif(not WHOLE, reason="make wheel-check: a minute")
def test_the_sdist_installs_and_runs(archives: Path, tmp_path: Path) -> None:
    (sdist,) = archives.glob("preftune-*.tar.gz")
    scripts = install(tmp_path / "venv", sdist)
    call(scripts / "preftune", "train", "tiny", "sft", at=tmp_path)
    assert (tmp_path / "runs/tiny/models/policy_sft/model.safetensors").is_file()


# --- Dockerfile ---------------------------------------------------------------------------------------------


def steps(stage: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a stage, those of the stage that it begins from before it."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    found: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^FROM ", text, flags=re.M)[1:]:
        head, *lines = [line for line in part.replace("\\\n", " ").splitlines() if line]
        base, _, name = head.split()
        found[name] = found.get(base, []) + [tuple(line.split(maxsplit=1)) for line in lines]  # type: ignore[misc]
    return found[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_the_dockerfile_copies_what_is_there_and_not_ignored(stage: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for kind, rest in steps(stage) if kind == "COPY" for name in rest.split()[:-1]}
    assert copied <= allowed
    assert all((ROOT / name).exists() for name in copied)
    assert {kind for kind, _ in steps(stage)} <= {"WORKDIR", "COPY", "ENV", "ARG", "RUN", "ENTRYPOINT", "CMD"}


def copied(names: list[str], context: Path, to: Path) -> None:
    """COPY: several files into a directory, or one directory as another."""
    for name in names:
        if (context / name).is_dir():
            shutil.copytree(context / name, to)
        else:
            shutil.copyfile(context / name, to / name)


def without_index(line: str) -> str:
    """A RUN whose install needs no index: what is installed here counts; our own package is put in anew."""
    return (
        line.replace("pip install", "pip install --force-reinstall --no-deps") if "[gguf]" in line else line
    )


@pytest.mark.skipif(not WHOLE, reason="make docker-check: a minute")
@pytest.mark.parametrize("stage", STAGES)
def test_the_steps_of_the_dockerfile_end_in_a_command_that_trains(stage: str, tmp_path: Path) -> None:
    """Directories are put below `tmp_path`; `pip` and `python` are those of a new environment."""
    context, at, seen = tmp_path / "context", tmp_path, {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    context.mkdir()
    copy_of_the_checkout(context)
    scripts = environment(tmp_path / "venv")
    (scripts / "pip").write_text(f'#!/bin/sh\nexec {scripts}/python -m pip "$@"\n')
    (scripts / "pip").chmod(0o755)
    seen["PATH"] = f"{scripts}:{os.environ['PATH']}"
    for kind, rest in steps(stage):
        if kind == "WORKDIR":
            at = tmp_path / rest.lstrip("/")
            at.mkdir(exist_ok=True)
        elif kind == "COPY":
            *sources, to = rest.split()
            copied(sources, context, at / to)
        elif kind in ("ENV", "ARG"):
            pairs = re.findall(r'(\w+)="?([^"\s]*)"?', rest)
            seen |= {name: value.replace("/data", str(tmp_path / "data")) for name, value in pairs}
        elif kind == "RUN":
            call("bash", "-c", without_index(rest), at=at, **seen)
        elif kind == "ENTRYPOINT":
            (program,) = json.loads(rest)
            assert call("which", program, at=at, **seen).strip() == str(scripts / program)
            call(scripts / program, "train", "tiny", "sft", at=at, **seen)
            assert (tmp_path / "data/runs/tiny/models/policy_sft").is_dir()
        elif kind == "CMD":
            assert "Usage: preftune" in call(scripts / "preftune", *json.loads(rest), at=at, **seen)


# --- the version --------------------------------------------------------------------------------------------


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == preftune.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
