"""Trains as the JSON in its argument says; the tests start it as a process of its own.

`fault` may hold, joined by commas: `no sam2` (importing sam2 or stage one fails) and `kill at STEP`
(SIGKILL once the line of that step is written).
"""

import json
import os
import signal
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Forbid(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "sam2" or name.startswith(("sam2.", "stages.extract_features")):
            raise ImportError(f"{name} is forbidden here")


def kill_at(step):
    from stages.train_student.logging.run_log import RunLog

    add = RunLog.add

    def add_then_die(self, rows):
        add(self, rows)
        if rows.performance.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.add = add_then_die


def main():
    request = json.loads(sys.argv[1])
    fault = request["fault"]
    if "no sam2" in fault:
        sys.modules["sam2"] = None
        sys.meta_path.insert(0, Forbid())

    from stages.clips.config import ClipsConfig
    from stages.config import BaseModelConfig
    from stages.progress import SilentProgress
    from stages.train_student.config import TrainConfig
    from stages.train_student.train import train_student
    from stages.train_student.validation import validation

    validation.write_report = lambda run_dir: None  # curves take seconds, and are tested apart

    for one in fault.split(", "):
        if one.startswith("kill at "):
            kill_at(int(one.removeprefix("kill at ")))
    summary = train_student(
        TrainConfig(**request["train"]),
        ClipsConfig(**request["clips"]),
        BaseModelConfig(path=request["base"]),
        Path(request["cache"]),
        resolved_config={},
        provenance={},
        progress=SilentProgress(),
    )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"steps": summary.steps_done, "resumed_from": summary.resumed_from}))


if __name__ == "__main__":
    main()
