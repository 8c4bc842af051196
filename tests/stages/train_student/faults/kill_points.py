"""Dies at a chosen file operation of a run's folder; `fork_server.py` uses it in each process.

Counted are what Python announces of its own accord (files opened, renamed, removed, folders made)
and, since libraries write past that, the beginning, middle and end of each file of tensors and
every sync.
"""

import os
import signal
import sys
from pathlib import Path

_ANNOUNCED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


class KillPoints:
    """Counts the operations below `folder`; SIGKILLs this process at number `kill_at`."""

    def __init__(self, folder, kill_at):
        self.folder, self.kill_at, self.count = str(folder), kill_at, 0

    def reach(self):
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self):
        sys.addaudithook(self._announced)
        self._watch_sync()
        self._watch_tensor_files()

    def _announced(self, event, arguments):
        if event in _ANNOUNCED and str(arguments[0]).startswith(self.folder):
            self.reach()

    def _watch_sync(self):
        fsync = os.fsync

        def reach_then_sync(descriptor):
            self.reach()
            fsync(descriptor)

        os.fsync = reach_then_sync

    def _watch_tensor_files(self):
        import safetensors.torch
        import torch

        save, serialize = torch.save, safetensors.torch.serialize_file

        def save_in_parts(content, file, *rest, **options):
            self.reach()
            save(content, file, *rest, **options)
            self._half(file)

        def serialize_in_parts(content, file, *rest, **options):
            self.reach()
            serialize(content, file, *rest, **options)
            self._half(file)

        torch.save = save_in_parts
        safetensors.torch.serialize_file = serialize_in_parts

    def _half(self, file):
        """As if only half of the file had been written when the process died here."""
        self.count += 1
        if self.count == self.kill_at:
            os.truncate(file, Path(file).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.reach()
