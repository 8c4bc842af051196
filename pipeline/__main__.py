"""Entry point of `sam2vx-pipeline` and `python -m pipeline`.

Signal handlers are installed before anything else is imported.
"""

import signal

from stages.processes.stop_request import ENDED_BY_SIGNAL, stop_on_signals


def main() -> None:
    """Run the command line."""
    try:
        with stop_on_signals() as stop:
            try:
                from pipeline.cli import main as run

                run()
            except KeyboardInterrupt:
                raise SystemExit(ENDED_BY_SIGNAL) from None
            except SystemExit as ending:
                # Outside a command's own work, typer turns an interrupt into exit code 1.
                raise SystemExit(
                    ENDED_BY_SIGNAL if stop.requested and ending.code else ending.code
                ) from None
    finally:
        # The interpreter may wait for threads at exit; a further signal must end it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
