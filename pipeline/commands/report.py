"""`report`: an HTML page about a training run."""

from pathlib import Path

from pipeline.config.load import RunConfig
from pipeline.console import CommandResult, format_bytes
from stages.progress import Progress


def run(
    config: RunConfig, progress: Progress, *, run_dir: Path | None = None, out: Path | None = None
) -> CommandResult:
    """Write the page of a run, which may still be training.

    Args:
        config: The whole configuration.
        progress: Shows one task.
        run_dir: The run's folder; None uses `config.train.run_dir`.
        out: The .html to write; None writes report.html in the run's folder.
    """
    from stages.train_student.report.figures import by_name, figures
    from stages.train_student.report.records import read_run
    from stages.train_student.report.report import write_page

    run_dir = run_dir or config.train.run_dir
    with progress.task("report", 1, unit="page") as task:
        records = read_run(run_dir)
        found = figures(records)
        page = write_page(records, out)
        task.advance()
    size = page.stat().st_size
    rows = [(one.name, one.text) for one in found]
    return CommandResult(
        title=f"run {run_dir}",
        rows=[*rows, ("page", format_bytes(size))],
        data={
            "run": str(run_dir),
            "report": str(page),
            "bytes": size,
            "figures": by_name(found),
        },
        notes=[str(page)],
    )
