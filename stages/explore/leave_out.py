"""The list of clips to leave out of training: the file that `train.leave_out` reads."""

import json
import threading
from pathlib import Path

from cache_schema.atomic_io import make_directories, write_atomic
from stages.train_student.data.splits import read_keys

_REASON = "left out in explore"


class LeaveOutList:
    """A JSON lines file with a `key` per line; lines that others wrote are kept as they are."""

    def __init__(self, path: Path) -> None:
        """Use the file at `path`, which need not exist yet."""
        self.path = path.expanduser()
        self._lock = threading.Lock()

    def keys(self) -> frozenset[str]:
        """The keys in the file now.

        Raises:
            ValueError: The file is not such a list.
        """
        return read_keys(self.path) if self.path.exists() else frozenset()

    def change(self, key: str, *, leave_out: bool) -> None:
        """Add a clip's line, or remove all lines of the clip; the file is replaced atomically.

        Raises:
            ValueError: The file is not such a list; it stays as it is.
            OSError: It cannot be written.
        """
        with self._lock:
            listed = self.keys()
            if (key in listed) == leave_out:
                return
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            lines = [line for line in text.split("\n") if line.strip()]
            if leave_out:
                lines.append(json.dumps({"key": key, "reason": _REASON}))
            else:
                lines = [line for line in lines if json.loads(line)["key"] != key]
            make_directories(self.path.parent)
            write_atomic(self.path, "".join(f"{line}\n" for line in lines).encode("utf-8"))
