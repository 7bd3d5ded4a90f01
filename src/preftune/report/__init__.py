"""The report: ANALYSIS.md, report.html and figures, written from the files of a run. Never imports torch."""

from preftune.report.blocks import Table
from preftune.report.build import build, is_current
from preftune.report.load import load_run
from preftune.report.sections.cautions import cautions
from preftune.report.sentences import summary
from preftune.report.tables import comparison_table
from preftune.report.view import RunView

__all__ = ["RunView", "Table", "build", "cautions", "comparison_table", "is_current", "load_run", "summary"]
