"""All files of the report, from the files of a run."""

import os
from pathlib import Path

from preftune.report.contents import sections
from preftune.report.load import load_run
from preftune.report.plots.figures import draw
from preftune.report.writers.analysis import analysis_text
from preftune.report.writers.page import page_text
from preftune.rundir import RunDir, write_text


def build(run: RunDir | str | os.PathLike[str]) -> list[Path]:
    """Write figures/*.svg, ANALYSIS.md and report.html of a run; the same files give the same bytes.

    Raises InputMissing if there is no such directory, DataError for a file in it that cannot be understood.
    """
    directory = run if isinstance(run, RunDir) else RunDir(run)
    view = load_run(directory)
    drawn = draw(view)
    parts = sections(view, {file: words for file, (_, words) in drawn.items()})
    texts = {directory.figures / file: svg for file, (svg, _) in drawn.items()}
    texts[directory.analysis_text] = analysis_text(view, parts)
    texts[directory.report_page] = page_text(view, parts, {file: svg for file, (svg, _) in drawn.items()})
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)
