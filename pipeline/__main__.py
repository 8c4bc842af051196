"""The entry point of `sam2vx-pipeline` and of `python -m pipeline`, which launchers start.

Signals are taken before anything else is imported.
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
                # Outside of a command's own work, typer makes 1 of it.
                raise SystemExit(
                    ENDED_BY_SIGNAL if stop.made and ending.code else ending.code
                ) from None
    finally:
        # While the interpreter ends, it may wait for threads: another signal ends it all the same.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
