"""The notebook is thin, valid, committed without outputs, and its cells run on the files of a run."""

import importlib.util
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import nbformat
import pytest

from preftune import api
from preftune.config import load_recipe
from preftune.rundir import RunDir

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "preftune_colab.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_valid_with_ids_and_no_outputs(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert all(
        not cell.outputs and cell.execution_count is None
        for cell in notebook.cells
        if cell.cell_type == "code"
    )


def test_cells_run_from_top_to_bottom(
    notebook: nbformat.NotebookNode,
    tiny_run: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a finished run of `tiny` in the place of what would be trained; a drive and own pairs are given."""
    shell = pytest.importorskip("IPython.display")
    shown: list[object] = []
    monkeypatch.setattr(shell, "display", shown.append)
    monkeypatch.setenv("DRIVE", str(tmp_path / "drive"))
    monkeypatch.setenv("MY_PAIRS", "mine.jsonl")
    asked: list[tuple[str, list[str], dict[str, object]]] = []

    def finished(recipe: str, overrides: Sequence[str] = (), **places: object) -> RunDir:
        load_recipe(recipe, overrides)
        asked.append((recipe, list(overrides), places))
        return tiny_run

    monkeypatch.setattr(api, "run_recipe", finished)
    names: dict[str, object] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), names)  # noqa: S102 - our own notebook
    printed = capsys.readouterr().out
    assert [recipe for recipe, _, _ in asked] == ["quickstart", "hh-scratch"]
    assert asked[0][2] == {"mirror": str(tmp_path / "drive" / "quickstart")}
    assert "data.name=mine.jsonl" in asked[1][1]
    assert "On 16 held-out prompts" in printed
    assert printed.count("DPO (score") == 2  # among the samples, and asked
    assert "report.html" in printed
    assert (tmp_path / "drive" / "runs" / tiny_run.path.name / "report.html").is_file()
    figures = sorted(tiny_run.figures.glob("*.svg"))
    assert sum(isinstance(item, shell.SVG) for item in shown) == len(figures) > 5  # each once


def test_the_install_keeps_the_torch_that_is_there(
    notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = [cell for cell in notebook.cells if cell.id == "install"]
    found = importlib.util.find_spec
    called: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "preftune" else found(name))
    monkeypatch.setattr(subprocess, "run", lambda words, check: called.append(words))
    monkeypatch.chdir(tmp_path)
    text = cell.source.replace('SOURCE = ""', 'SOURCE = "preftune.whl"')
    exec(compile(text, cell.id, "exec"), {})  # noqa: S102 - our own notebook
    assert (tmp_path / "keep.txt").read_text() == f"torch=={metadata.version('torch')}\n"
    assert called[0][-3:] == ["-c", "keep.txt", "preftune.whl"]
