"""The notebook is thin, valid, committed without outputs, and its cells run on the files of a run."""

from pathlib import Path

import nbformat
import pytest
from synthetic import make_run

import preftune
from preftune.report import build
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shell = pytest.importorskip("IPython.display")
    shown: list[object] = []
    monkeypatch.setattr(shell, "display", shown.append)
    asked: list[str] = []

    def finished(recipe: str) -> RunDir:
        asked.append(recipe)
        run = make_run(tmp_path)
        build(run)
        return run

    monkeypatch.setitem(preftune.__dict__, "run", finished)
    names: dict[str, object] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), names)  # noqa: S102 - our own notebook
    printed = capsys.readouterr().out
    assert asked == ["quickstart"]
    assert "On 100 held-out prompts" in printed
    assert "PPO (score" in printed
    assert "report.html" in printed
    figures = list(tmp_path.rglob("figures/*.svg"))
    assert sum(isinstance(item, shell.SVG) for item in shown) == len(figures) > 5  # each once
