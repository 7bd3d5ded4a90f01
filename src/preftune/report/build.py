"""All files of the report, from the files of a run."""

import contextlib
import os
from pathlib import Path

from preftune.errors import DataError
from preftune.report.load import load_run
from preftune.rundir import RunDir, write_text
from preftune.sums import faults, read_sealed, recorded_sums, refuse_links, sum_of, sums, write_sealed
from preftune.version import __version__


def build(run: RunDir | str | os.PathLike[str]) -> list[Path]:
    """Write figures/*.svg, ANALYSIS.md and report.html of a run; the same files give the same bytes.

    What they were made of is recorded last, so that a report that is stale or not whole is recognised.
    Raises InputMissing if there is no such directory, DataError for a file in it that cannot be understood or
    is not what was written, ConfigError for a link where a file should go.
    """
    # matplotlib and jinja2 take a second, and whoever only reads a run needs neither
    from preftune.report.contents import sections
    from preftune.report.plots.figures import draw
    from preftune.report.writers.analysis import analysis_text, apart_texts
    from preftune.report.writers.page import page_text

    directory = run if isinstance(run, RunDir) else RunDir(run)
    refuse_links(directory)
    key = _key(directory)
    view = load_run(directory)
    drawn = draw(view)
    contents = sections(view, {file: words for file, (_, words) in drawn.items()})
    texts = {directory.figures / file: svg for file, (svg, _) in drawn.items()}
    texts[directory.analysis_text] = analysis_text(view, contents)
    texts |= {directory.path / file: text for file, text in apart_texts(contents).items()}
    texts[directory.report_page] = page_text(view, contents, {file: svg for file, (svg, _) in drawn.items()})
    earlier: dict[str, object] = {}
    with contextlib.suppress(DataError):
        earlier = recorded_sums(read_sealed(directory.report_record)) or {}
    write_sealed(directory.report_record, {})
    for path, text in texts.items():
        write_text(path, text)
    for stale in {directory.path / name for name in earlier} - set(texts):  # what it has no more
        if stale.parent in (directory.figures, directory.analysis_details):
            stale.unlink(missing_ok=True)
    write_sealed(directory.report_record, {"key": key, "files": sums(directory, texts)})
    return list(texts)


def is_current(run: RunDir) -> bool:
    """Whether the report is there, whole, and made of the files that the run holds now."""
    try:
        record = read_sealed(run.report_record)
    except DataError:
        return False
    return bool(recorded_sums(record)) and record.get("key") == _key(run) and not faults(run, record)


def _key(run: RunDir) -> str:
    """Of everything that `load_run` reads, and of this version."""
    patterns = ("stages/*/stage.json", "stages/*/metrics.jsonl", "evaluation/*.json*", "evaluation/*/*.json")
    patterns += ("samples/*.jsonl", "analysis/*.jsonl")
    files = [path for pattern in patterns for path in run.path.glob(pattern)]
    files += [path for path in (run.config, run.run, run.data, run.origins) if path.is_file()]
    return sum_of({"version": __version__, "files": sums(run, files)})
