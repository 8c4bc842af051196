"""Training batches read ahead by worker processes, in order.

A worker sends each batch as an anonymous file, which the training process maps without a copy:
nothing of it lies in /dev/shm, where torch's DataLoader waits for ever once it is full. A worker
that dies, or is silent for too long, ends the iteration with an error; none is waited for without a
limit.
"""

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
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from cache_schema import CacheError
from stages.train_student.config import WorkerStart
from stages.train_student.data.dataset import Batch, join_batches

SILENCE_PER_CLIP_S = 300.0
"""How long a worker may take for each clip of a batch before it counts as stuck."""

BATCHES_AHEAD = 2
"""How many batches each worker reads ahead of the step that needs them."""

_ALIGNMENT = 64
_LENGTHS = struct.Struct("=QQ")
"""A message: bytes of the file, and where in it the pickle starts."""


class Samples(Protocol):
    """Batches of one clip, by number: `CachedSamples`."""

    def __getitem__(self, sample: int) -> Batch:
        """Read and draw a sample."""


class BatchLoader(Iterator[Batch]):
    """Iterates over batches; close it, or leave its context, to end the workers."""

    def __init__(
        self,
        samples: Samples,
        numbers: Iterable[list[int]],
        *,
        workers: int,
        start: WorkerStart = "fork",
        pin_memory: bool,
    ) -> None:
        """Start the workers.

        Args:
            samples: what is read.
            numbers: the samples of each batch.
            workers: processes that read; 0 reads in this one.
            start: how they are started.
            pin_memory: put batches into page-locked memory, from where they are copied faster; a
                thread does that while the batch before is in use.
        """
        self._samples = samples
        self._numbers = iter(numbers)
        self._pin_memory = pin_memory
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(_Worker(samples, start, self._workers))
        self._idle = deque(worker for _ in range(BATCHES_AHEAD) for worker in self._workers)
        self._asked: deque[tuple[_Worker, list[int]]] = deque()
        self._ask()
        self._thread: ThreadPoolExecutor | None = None
        if workers and pin_memory:
            device = torch.cuda.current_device()
            self._thread = ThreadPoolExecutor(1, "pin", torch.cuda.set_device, (device,))
            self._pinned: Future[Batch | None] = self._thread.submit(self._receive)

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            ChildProcessError: its worker has died.
            TimeoutError: its worker was silent for `SILENCE_PER_CLIP_S` per clip.
            Exception: what reading it raised in the worker.
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
        """End the workers at once: they only read."""
        for worker in self._workers:
            worker.end()
        if self._thread is not None:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self) -> None:
        while self._idle and (numbers := next(self._numbers, None)) is not None:
            worker = self._idle.popleft()
            worker.ask(numbers)
            self._asked.append((worker, numbers))

    def _receive(self) -> Batch | None:
        if self._workers:
            if not self._asked:
                return None
            worker, numbers = self._asked.popleft()
            batch = worker.receive(numbers)
            self._idle.append(worker)
            self._ask()
        elif (numbers := next(self._numbers, [])) == []:
            return None
        else:
            batch = read_batch(self._samples, numbers)
        return batch.pin_memory() if self._pin_memory else batch


def read_batch(samples: Samples, numbers: Sequence[int]) -> Batch:
    """One batch of those samples."""
    return join_batches([samples[number] for number in numbers])


class _Worker:
    """A process that reads one batch after the other."""

    def __init__(self, samples: Samples, start: WorkerStart, others: Sequence["_Worker"]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A fork has these too, and would not notice that the training process is gone.
        inherited = [w._socket for w in (self, *others)] if start == "fork" else []
        context: Any = multiprocessing.get_context(start)
        self._process = context.Process(
            target=_work, args=(theirs, samples, inherited), name="loader", daemon=True
        )
        # The worker keeps this mask. A terminal and schedulers signal every process of a run, and
        # the training process finishes its step, for which it needs its workers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        # An interpreter that exits would send SIGTERM, and wait for it without a limit.
        self._finalizer = Finalize(self, _kill, args=(self._process,), exitpriority=100)

    def ask(self, numbers: list[int]) -> None:
        try:
            self._socket.send(pickle.dumps(numbers))
        except OSError:
            raise ChildProcessError(self._death(numbers)) from None

    def receive(self, numbers: Sequence[int]) -> Batch:
        """The batch it was asked for longest ago."""
        limit = SILENCE_PER_CLIP_S * len(numbers)
        self._socket.settimeout(limit)
        try:
            message, files, _, _ = socket.recv_fds(
                self._socket, _LENGTHS.size, 1, flags=socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise TimeoutError(
                f"loader process {self._process.pid} has sent nothing for {limit:g} s while "
                f"reading {len(numbers)} clips: it is stopped, or its storage does not answer. "
                f"{_REMEDY}"
            ) from None
        except ConnectionError:
            message, files = b"", []
        if not message:
            raise ChildProcessError(self._death(numbers))
        (file,) = files
        try:
            answer = _read(file, *_LENGTHS.unpack(message))
        finally:
            os.close(file)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Batch), "a worker sends batches and errors"
        return answer

    def end(self) -> None:
        self._finalizer()
        self._socket.close()

    def _death(self, numbers: Sequence[int]) -> str:
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", which is how memory that runs out ends a process"
        return (
            f"loader process {self._process.pid} died while reading {len(numbers)} clips ({how}). "
            f"{_REMEDY}"
        )


_REMEDY = (
    "train.loader_workers=0 reads in the training process, and takes less memory; run the same "
    "command again, and it continues from the last checkpoint"
)


def _kill(process: BaseProcess) -> None:
    """End a process, stopped ones too."""
    process.kill()
    process.join()


def _work(ours: socket.socket, samples: Samples, inherited: Sequence[socket.socket]) -> None:
    """Read what is asked for until the training process closes its end, or is gone."""
    for one in inherited:
        one.close()
    torch.set_num_threads(1)  # after a fork, a pool of several would wait for ever
    while question := ours.recv(1 << 20):
        try:
            answer: Any = read_batch(samples, pickle.loads(question))  # noqa: S301 (our own)
            parts = _pickled(answer)
        except Exception as error:
            parts = _pickled(_that_travels(error))
        try:
            _send(ours, *parts)
        except (BrokenPipeError, ConnectionResetError):
            return


def _that_travels(error: Exception) -> Exception:
    """The error as the training process raises it."""
    if not isinstance(error, CacheError):
        error.add_note(f"in a loader's process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
    except Exception:
        return RuntimeError(f"{type(error).__name__} in a loader's process: {error}")
    return error


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose bytes stay outside the pickle."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.contiguous().numpy(),)
        return NotImplemented


class _Sink:
    """Collects what a pickler writes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)


def _pickled(value: Any) -> tuple[bytes, list[memoryview]]:
    """The pickle, and the bytes outside it."""
    sink, buffers = _Sink(), list[memoryview]()
    _Pickler(sink, protocol=5, buffer_callback=lambda b: buffers.append(b.raw())).dump(value)
    return bytes(sink.data), buffers


def _send(ours: socket.socket, pickled: bytes, buffers: Sequence[memoryview]) -> None:
    """Write a file of the arrays' bytes, each aligned, then their lengths and the pickle."""
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
    """A file without a name: in memory on Linux, in the temporary folder elsewhere."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _read(file: int, length: int, pickle_at: int) -> Any:
    """What `_send` was given; tensors lie in the file's memory, which goes with the last one."""
    memory = mmap.mmap(file, length)
    memory.seek(pickle_at)
    buffers, offset, whole = [], 0, memoryview(memory)
    for count in pickle.load(memory):  # noqa: S301 (our own)
        buffers.append(whole[offset : offset + count])
        offset += -(-count // _ALIGNMENT) * _ALIGNMENT
    return pickle.load(memory, buffers=buffers)  # noqa: S301 (our own)
