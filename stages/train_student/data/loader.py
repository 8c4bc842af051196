"""Data loader: worker processes that prefetch training batches in order.

A worker sends each batch as an anonymous file, which the training process maps without a copy.
Nothing is stored in /dev/shm, on which torch's DataLoader blocks forever once it is full. A worker
that dies, or sends nothing for too long, ends the iteration with an error; every wait has a
timeout.
"""

import io
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import tempfile
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Self

import torch
from torch import Tensor

from cache_schema import CacheError
from stages.train_student.config import WorkerStart
from stages.train_student.data.dataset import Batch, CachedSamples, join_batches

SILENCE_PER_CLIP_S = 300.0
"""Timeout of a worker, per clip of a batch."""

BATCHES_AHEAD = 2
"""Batches that each worker prefetches."""

_ALIGNMENT = 64
_LENGTHS = struct.Struct("=QQ")
"""Message format: size of the file in bytes, and offset of the pickle in it."""


class BatchLoader(Iterator[Batch]):
    """Iterator over batches; `close` it, or use it as a context manager, to stop the workers."""

    def __init__(
        self,
        samples: CachedSamples,
        numbers: Iterable[list[int]],
        *,
        workers: int,
        start: WorkerStart = "fork",
        pin_memory: bool,
    ) -> None:
        """Start the workers.

        Args:
            samples: samples by number.
            numbers: sample numbers of each batch.
            workers: number of worker processes; 0 reads in this process.
            start: start method of the workers.
            pin_memory: copy batches to page-locked memory, for faster transfers to the GPU, in a
                thread while the previous batch is in use.
        """
        self._samples = samples
        self._numbers = iter(numbers)
        self._pin_memory = pin_memory
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(_Worker(samples, start, self._workers))
        self._idle = deque(worker for _ in range(BATCHES_AHEAD) for worker in self._workers)
        self._pending: deque[tuple[_Worker, list[int]]] = deque()
        self._submit()
        self._thread: ThreadPoolExecutor | None = None
        if workers and pin_memory:
            device = torch.cuda.current_device()
            self._thread = ThreadPoolExecutor(1, "pin", torch.cuda.set_device, (device,))
            self._pinned: Future[Batch | None] = self._thread.submit(self._receive)

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            ChildProcessError: its worker died.
            TimeoutError: its worker sent nothing for `SILENCE_PER_CLIP_S` per clip.
            Exception: the error that reading it raised in the worker.
        """
        if self._thread is None:
            batch = self._receive()
        else:
            batch = self._pinned.result()
            self._pinned = self._thread.submit(self._receive)
        if batch is None:
            raise StopIteration
        return batch

    def close(self) -> None:
        """Kill the workers; this is safe because they only read."""
        for worker in self._workers:
            worker.end()
        if self._thread is not None:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _submit(self) -> None:
        while self._idle and (numbers := next(self._numbers, None)) is not None:
            worker = self._idle.popleft()
            worker.submit(numbers)
            self._pending.append((worker, numbers))

    def _receive(self) -> Batch | None:
        if self._workers:
            if not self._pending:
                return None
            worker, numbers = self._pending.popleft()
            batch = worker.receive(numbers)
            self._idle.append(worker)
            self._submit()
        elif (numbers := next(self._numbers, [])) == []:
            return None
        else:
            batch = read_batch(self._samples, numbers)
        return batch.pin_memory() if self._pin_memory else batch


def read_batch(samples: CachedSamples, numbers: Sequence[int]) -> Batch:
    """Read samples and join them into one batch."""
    return join_batches([samples[number] for number in numbers])


class _Worker:
    """A process that reads batches one at a time."""

    def __init__(
        self, samples: CachedSamples, start: WorkerStart, others: Sequence["_Worker"]
    ) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A fork inherits these sockets, which would stay open after the training process dies.
        inherited = [w._socket for w in (self, *others)] if start == "fork" else []
        context: Any = multiprocessing.get_context(start)
        self._process = context.Process(
            target=_work, args=(theirs, samples, inherited), name="loader", daemon=True
        )
        # The worker inherits this mask. Terminals and schedulers signal every process of a run, but
        # the training process needs its workers to finish the step.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        # Without this, the interpreter would send SIGTERM at exit and wait without a timeout.
        self._finalizer = Finalize(self, _kill, args=(self._process,), exitpriority=100)

    def submit(self, numbers: list[int]) -> None:
        try:
            self._socket.send(pickle.dumps(numbers))
        except OSError:
            raise ChildProcessError(self._describe_death(numbers)) from None

    def receive(self, numbers: Sequence[int]) -> Batch:
        """Receive the oldest submitted batch."""
        timeout_s = SILENCE_PER_CLIP_S * len(numbers)
        self._socket.settimeout(timeout_s)
        try:
            message, files, _, _ = socket.recv_fds(
                self._socket, _LENGTHS.size, 1, flags=socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise TimeoutError(
                f"loader process {self._process.pid} has sent nothing for {timeout_s:g} s while "
                f"reading {len(numbers)} clips: it is stopped, or its storage does not respond. "
                f"{_REMEDY}"
            ) from None
        except ConnectionError:
            message, files = b"", []
        if not message:
            raise ChildProcessError(self._describe_death(numbers))
        (file,) = files
        try:
            result = _read(file, *_LENGTHS.unpack(message))
        finally:
            os.close(file)
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, Batch), "workers send batches or errors"
        return result

    def end(self) -> None:
        self._finalizer()
        self._socket.close()

    def _describe_death(self, numbers: Sequence[int]) -> str:
        self._process.join(timeout=5)
        code = self._process.exitcode
        cause = f"exit code {code}"
        if code is not None and code < 0:
            cause = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            cause += ", as the system does when memory runs out"
        return (
            f"loader process {self._process.pid} died while reading {len(numbers)} clips "
            f"({cause}). {_REMEDY}"
        )


_REMEDY = (
    "train.loader_workers=0 reads in the training process and needs less memory; run the same "
    "command again to continue from the last checkpoint"
)


def _kill(process: BaseProcess) -> None:
    """Kill a process, even if it is stopped."""
    process.kill()
    process.join()


def _work(ours: socket.socket, samples: CachedSamples, inherited: Sequence[socket.socket]) -> None:
    """Worker main loop: serve requests until the training process closes its socket or dies."""
    for one in inherited:
        one.close()
    torch.set_num_threads(1)  # after a fork, a larger pool would deadlock
    while request := ours.recv(1 << 20):
        try:
            result: Any = read_batch(samples, pickle.loads(request))  # noqa: S301 (our own)
            parts = _pickled(result)
        except Exception as error:
            parts = _pickled(_picklable(error))
        try:
            _send(ours, *parts)
        except (BrokenPipeError, ConnectionResetError):
            return


def _picklable(error: Exception) -> Exception:
    """The error, or a RuntimeError if it cannot be pickled; adds the worker's traceback as a note.

    Cache errors get no note.
    """
    if not isinstance(error, CacheError):
        error.add_note(f"in a loader's process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
    except Exception:
        return RuntimeError(f"{type(error).__name__} in a loader's process: {error}")
    return error


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose bytes are out-of-band buffers."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.contiguous().numpy(),)
        return NotImplemented


def _pickled(value: Any) -> tuple[bytes, list[memoryview]]:
    """Pickle a value: the pickle and its out-of-band buffers."""
    file, buffers = io.BytesIO(), list[memoryview]()
    _Pickler(file, protocol=5, buffer_callback=lambda b: buffers.append(b.raw())).dump(value)
    return file.getvalue(), buffers


def _send(ours: socket.socket, pickled: bytes, buffers: Sequence[memoryview]) -> None:
    """Send a file with the aligned buffers, followed by their lengths and the pickle."""
    file = _anonymous_file()
    try:
        end = 0
        for buffer in buffers:
            _write(file, buffer, end)
            end += -(-len(buffer) // _ALIGNMENT) * _ALIGNMENT
        lengths = pickle.dumps([len(buffer) for buffer in buffers])
        _write(file, memoryview(lengths + pickled), end)
        message = _LENGTHS.pack(end + len(lengths) + len(pickled), end)
        socket.send_fds(ours, [message], [file])
    finally:
        os.close(file)


def _anonymous_file() -> int:
    """An unnamed file: in memory on Linux, in the temporary folder elsewhere."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _read(file: int, length: int, pickle_at: int) -> Any:
    """Unpickle a file of `_send`; tensors share its mapped memory, freed with the last of them."""
    memory = mmap.mmap(file, length)
    memory.seek(pickle_at)
    buffers, offset, whole = [], 0, memoryview(memory)
    for count in pickle.load(memory):  # noqa: S301 (our own)
        buffers.append(whole[offset : offset + count])
        offset += -(-count // _ALIGNMENT) * _ALIGNMENT
    return pickle.load(memory, buffers=buffers)  # noqa: S301 (our own)
