"""`report`: a page about a training run."""

from pathlib import Path

from pipeline.config.load import RunConfig
from pipeline.console import Answer, in_bytes
from stages.progress import Progress


def run(
    config: RunConfig, progress: Progress, *, run_dir: Path | None = None, out: Path | None = None
) -> Answer:
    """Make the page of a run, which may still be going on.

    Args:
        config: The whole configuration.
        progress: Told of the reading.
        run_dir: The run; None takes `config.train.run_dir`.
        out: The .html to write; None makes report.html in the run's folder.
    """
    from stages.train_student.report.figures import by_name, figures
    from stages.train_student.report.records import read_run
    from stages.train_student.report.report import write_page

    run_dir = run_dir or config.train.run_dir
    with progress.task("draw the curves", 1, unit="page") as task:
        records = read_run(run_dir)
        found = figures(records)
        page = write_page(records, out)
        task.advance()
    size = page.stat().st_size
    rows = [(one.name, one.told) for one in found]
    return Answer(
        title=f"run {run_dir}",
        rows=[*rows, ("page", in_bytes(size))],
        data={
            "run": str(run_dir),
            "report": str(page),
            "bytes": size,
            "figures": by_name(found),
        },
        notes=[str(page)],
    )
