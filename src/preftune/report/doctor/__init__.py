"""Named pathologies of a run, each with evidence, reason and remedy; from the files of a run, torch-free."""

from dataclasses import asdict
from pathlib import Path

from preftune.report.doctor.diagnose import diagnose, text
from preftune.report.load import load_run
from preftune.rundir import RunDir, write_result


def examine(run: str | Path, json: str | Path | None = None) -> str:
    """What the doctor says of a run directory, for the terminal; findings go to `json` as well, if given.

    Raises InputMissing without such a run, DataError for files that are not what was written.
    """
    view = load_run(RunDir(run))
    findings = diagnose(view)
    if json is not None:
        write_result(Path(json), [asdict(finding) for finding in findings])
    return text(findings, view)
