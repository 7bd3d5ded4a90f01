"""Measure the finished stages of a run, write its report and show the table."""

from collections.abc import Sequence

from preftune import report
from preftune.errors import StorageError
from preftune.measure.evaluate import evaluate_run
from preftune.report.sections.comparison import CAUTIONS
from preftune.runs.lock import is_main_process
from preftune.runs.session import Session
from preftune.training.processes import answering


def measure_and_report(session: Session, stages: Sequence[str]) -> None:
    """Evaluate, write the report, show the table and say where everything lies. All processes of a run
    evaluate together, the rest is the main one's.
    """
    from preftune.measure.expected import outcome

    run, console = session.run, session.console
    with answering(session.config.process_timeout):
        evaluate_run(session, stages)
    if not is_main_process():
        return
    if not report.is_current(run):
        try:
            report.build(run)
        except StorageError as error:  # the run is what took long, and it is there
            console.line(f"warning: {error.message}; preftune report {run.path} writes the report")
    view = report.load_run(run)
    table = report.comparison_table(view)
    console.table(table.headers, table.rows)
    if view.reward_model is not None and (accuracy := view.reward_model.accuracy) is not None:
        share = accuracy.text(digits=3)
        console.line(f"reward model: accuracy {share} on {accuracy.n:,} validation pairs")
    console.line(report.summary(view))
    for caution in report.cautions(view)[:CAUTIONS]:
        console.line(f"caution: {caution}")
    if expected := outcome(view, session.config):
        console.line(expected)
    for noun, path in (("analysis", run.analysis_text), ("report", run.report_page), ("models", run.models)):
        if path.exists():  # a full disk may have kept the report away
            console.line(f"{noun + ':':<10}{path}")
