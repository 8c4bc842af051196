"""Storage of a store's files: a local folder or an fsspec URL; read, listed, and written to by
copies.

Reads return the exact bytes of the file or raise; they never pad or truncate. Changing a store
follows no symbolic link inside it; readers follow links to regular files only.
"""

import errno
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from cache_schema.atomic_io import make_directories, sync, write_whole
from cache_schema.errors import StoreUnreachable, SymlinkInStore
from cache_schema.names import MAX_RECORD_BYTES, StoreLayout
from cache_schema.shown_text import lacks_credentials


def refuse_links(layout: StoreLayout) -> None:
    """`SymlinkInStore` if the store's folders, or what lies directly in them, are links."""
    for folder in (
        layout.root,
        layout.shards,
        layout.commits,
        layout.staging,
        layout.quarantine,
    ):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    _refuse(entry)


def refuse_links_below(folder: Path) -> None:
    """`SymlinkInStore` if anything below a folder is a link."""
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (Path(at) / name).is_symlink():
                raise _error(Path(at) / name)


def refuse_links_on_the_way(root: Path, path: str) -> None:
    """`SymlinkInStore` if anything from `root` to `path`, `path` included, is a link."""
    at = root
    for part in Path(path).parts:
        at /= part
        if at.is_symlink():
            raise _error(at)


def _refuse(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink():
        raise _error(Path(entry.path))


def _error(path: Path) -> SymlinkInStore:
    return SymlinkInStore(
        f"{path} is a symbolic link, through which something outside the store would be changed; "
        "put the files themselves there, or remove the link"
    )


RETRY_DELAYS_S = (0.2, 1.0, 4.0)
"""Pauses before a network place is asked once more."""

UNREADABLE = (errno.EIO, errno.EFBIG, errno.EISDIR, errno.ELOOP, errno.ENXIO)
"""Numbers of an `OSError`: the disk cannot give a file back, or it is no file of a store."""

_Answer = TypeVar("_Answer")

_PIECE_BYTES = 2**20
_NO_ANSWER_S = 60
_NO_CONNECTION_S = 20


class OpenFile(AbstractContextManager["OpenFile"], Protocol):
    """A file, or a stretch of one, whose bytes can be had piece by piece."""

    size: int | None
    """Bytes of the whole file, or None where only a stretch was fetched."""

    def fill(self, offset: int, buffers: Sequence[Any]) -> int:
        """Read from `offset` of the file into buffers one after the other; returns how much came.

        Fewer bytes than the buffers hold come only where the file ends before.
        """


class Place(Protocol):
    """A folder on some medium; paths in it are relative and have forward slashes."""

    where: str

    def read(self, path: str, limit: int = MAX_RECORD_BYTES) -> bytes:
        """A whole file of at most `limit` bytes.

        Raises:
            FileNotFoundError: the place has answered that there is no such file.
            OSError: what is there is larger (EFBIG), or is not a regular file (EIO).
            StoreUnreachable: the place has not answered properly, repeatedly.
        """

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Some bytes of a file; fewer only where the file ends before `stop`."""

    def open(self, path: str, start: int = 0, stop: int | None = None) -> OpenFile:
        """A file, of which the bytes from `start` to `stop` will be asked for."""

    def list_folder(self, path: str) -> list[str] | None:
        """Sorted names in a folder, none if it does not exist; None where that cannot be known."""


def is_url(where: Path | str) -> bool:
    """Whether `where` is a URL and not a local path."""
    return isinstance(where, str) and "://" in where


def open_place(where: Path | str) -> Place:
    """The place at a local path or a URL; nothing is asked of it yet."""
    if isinstance(where, str) and is_url(where):
        return FsspecPlace(where)
    return LocalPlace(Path(where))


def open_regular(path: str) -> int:
    """Descriptor of a regular file, for reading; a FIFO or device never blocks or feeds a reader.

    Raises `FileNotFoundError`, `IsADirectoryError`, or `OSError` (EIO) for what is no file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EIO, "it is not a regular file", path)


def _refuse_larger(size: int, limit: int, path: str) -> None:
    if size > limit:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than {limit}", path)


class LocalPlace:
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        """The folder need not exist."""
        self.folder = Path(folder)
        self.where = str(folder)

    def read(self, path: str, limit: int = MAX_RECORD_BYTES) -> bytes:
        """A whole file of at most `limit` bytes."""
        full = f"{self.where}/{path}"
        with open(open_regular(full), "rb", buffering=0) as file:
            _refuse_larger(os.fstat(file.fileno()).st_size, limit, full)
            return file.readall()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Some bytes of a file; fewer only where the file ends before `stop`."""
        descriptor = open_regular(f"{self.where}/{path}")
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123
            file.seek(start)
            return file.read(stop - start)

    def open(self, path: str, start: int = 0, stop: int | None = None) -> "LocalFile":
        """A file; nothing is read before it is asked for."""
        return LocalFile(f"{self.where}/{path}")

    def list_folder(self, path: str) -> list[str]:
        """Sorted names in a folder, none if it does not exist."""
        try:
            return sorted(os.listdir(self.folder / path))  # noqa: PTH208 (names are all it takes)
        except (FileNotFoundError, NotADirectoryError):
            return []


class LocalFile(AbstractContextManager["LocalFile"]):
    """An open local file."""

    def __init__(self, path: str) -> None:
        """`FileNotFoundError` if it is not there, `OSError` if it is not a regular file."""
        self._descriptor = open_regular(path)
        self.size: int | None = os.fstat(self._descriptor).st_size

    def fill(self, offset: int, buffers: Sequence[Any]) -> int:
        """Read from `offset` into the buffers, straight from the kernel."""
        return os.preadv(self._descriptor, buffers, offset)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)


class FetchedFile(AbstractContextManager["FetchedFile"]):
    """Bytes of a file that are in memory already."""

    def __init__(self, data: bytes | memoryview, *, offset: int = 0, whole: bool = True) -> None:
        """`offset` is where in the file `data` begins; `whole` if it is all of it."""
        self._data = np.frombuffer(data, np.uint8)
        self._offset = offset
        self.size = len(self._data) if whole else None

    def fill(self, offset: int, buffers: Sequence[Any]) -> int:
        """Copy from `offset` of the file into the buffers."""
        position = offset - self._offset
        copied = 0
        for buffer in buffers:
            piece = self._data[position + copied : position + copied + len(buffer)]
            buffer[: len(piece)] = piece
            copied += len(piece)
        return copied

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


class FsspecPlace:
    """A folder behind a URL of any protocol that fsspec knows, such as http, https or s3.

    It can be pickled, and used in processes made by fork or spawn: each makes its own connections.
    """

    _inherited: list[Any] = []  # noqa: RUF012 (shared on purpose)
    """File systems of the parent process. Letting go of one would close its connections."""

    def __init__(self, url: str) -> None:
        """Nothing is connected to before the first question.

        `ValueError` for the URL of a record, whose credentials were left out.
        """
        if lacks_credentials(url):
            raise ValueError(
                f"{url} stands without its credentials, which are never written down; give the "
                "whole URL again, or a URL without any and the credentials as its protocol's own "
                "settings take them"
            )
        self.where = url.rstrip("/")
        self._connected: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}

    def read(self, path: str, limit: int = MAX_RECORD_BYTES) -> bytes:
        """A whole file of at most `limit` bytes."""
        data = self._ask(path, lambda fs, full: _fetch_whole(fs, full, limit))
        _refuse_larger(len(data), limit, f"{self.where}/{path}")
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Some bytes of a file; fewer only where the file ends before `stop`."""
        if start >= stop:
            return b""
        return self._ask(path, lambda fs, full: _fetch_range(fs, full, start, stop))

    def open(self, path: str, start: int = 0, stop: int | None = None) -> FetchedFile:
        """A file, or some bytes of it, fetched in one request."""
        if stop is None:
            return FetchedFile(self.read(path))
        data = self.read_range(path, start, stop)
        # Whoever asks for more than there is has all of it.
        whole = start == 0 and len(data) < stop
        return FetchedFile(data, offset=start, whole=whole)

    def list_folder(self, path: str) -> list[str] | None:
        """Sorted names in a folder, none if it does not exist; None on web servers."""
        if self.where.startswith(("http://", "https://")):
            return None

        def names(fs: Any, full: str) -> list[str]:
            fs.invalidate_cache()
            found = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(full, detail=False))
            return sorted(found)

        try:
            return self._ask(path, names)
        except FileNotFoundError:
            return []

    def _ask(self, path: str, question: Callable[[Any, str], _Answer]) -> _Answer:
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                fs, root = self._file_system()
                return question(fs, f"{root}/{path}".rstrip("/"))
            except FileNotFoundError:
                raise
            except Exception as error:  # each protocol's client has its own
                if isinstance(error, OSError) and error.errno in UNREADABLE:
                    raise
                if _ends_before_range(error):
                    return b""  # type: ignore[return-value]
                if delay_s is None or not _may_pass(error):
                    raise StoreUnreachable(
                        f"{self.where}/{path} could not be read ({_words(error)}); check the "
                        "address, the network and the credentials, and try again"
                    ) from error
                time.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    def _file_system(self) -> tuple[Any, str]:
        if self._connected is None or self._connected[0] != os.getpid():
            import fsspec

            if self._connected is not None:
                self._inherited.append(self._connected)
            fs, root = fsspec.core.url_to_fs(self.where, **_client_options(self.where))
            self._connected = (os.getpid(), fs, root.rstrip("/"))
        return self._connected[1:]


def _fetch_whole(fs: Any, full: str, limit: int) -> bytes:
    if _is_http(fs):
        return _fetch_range(fs, full, 0, limit + 1)
    _refuse_irregular(fs, full)
    _refuse_larger(fs.info(full)["size"], limit, full)
    data: bytes = fs.cat_file(full)
    return data


def _fetch_range(fs: Any, full: str, start: int, stop: int) -> bytes:
    if _is_http(fs):
        from fsspec.asyn import sync

        data: bytes = sync(fs.loop, _stream_range, fs, full, start, stop)
        return data
    _refuse_irregular(fs, full)
    data = fs.cat_file(full, start=start, end=stop)
    return data[: stop - start]


async def _stream_range(fs: Any, url: str, start: int, stop: int) -> bytes:
    """As fsspec asks a web server, and no more is taken of an answer than was asked for."""
    options = {**fs.kwargs}
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers=headers, **options) as answer:
        fs._raise_not_found_for_status(answer, url)
        # A server that knows nothing of ranges sends everything.
        skip = start if answer.status == 200 else 0
        wanted, data = skip + stop - start, bytearray()
        async for piece in answer.content.iter_chunked(_PIECE_BYTES):
            data += piece
            if len(data) > wanted:
                break
    return bytes(data[skip:wanted])


def _is_http(fs: Any) -> bool:
    return "http" in fs.protocol


def _refuse_irregular(fs: Any, full: str) -> None:
    if "file" in fs.protocol:
        os.close(open_regular(full))


def _client_options(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=_NO_CONNECTION_S, sock_read=_NO_ANSWER_S
    )
    return {"client_kwargs": {"timeout": timeout}}


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _may_pass(error: BaseException) -> bool:
    """Whether asking once more can help."""
    if isinstance(error, PermissionError | ImportError | ValueError | TypeError):
        return False
    status = _status(error)
    return status is None or status >= 500 or status in (408, 425, 429)


def _ends_before_range(error: BaseException) -> bool:
    """Whether the answer is that the file ends before the first byte asked for."""
    cause = error.__cause__
    response = getattr(cause, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return _status(error) == 416 or code in ("InvalidRange", "416")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


COPYING = ".staging/.copy"
"""What a copy keeps in its target until it is done; no shard can have that name."""


def is_inside(path: str) -> bool:
    """Whether a path that a listing gave stays inside the folder it is relative to."""
    return not path.startswith("/") and not {"", ".", ".."} & set(path.split("/"))


class Target(Place, Protocol):
    """A place that files can be put to; a file is whole or absent."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file, with the folders it lies in, over one that is there."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below a folder, by path relative to it; none if it does not exist."""

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all it holds, if it is there."""


def open_target(where: Path | str) -> Target:
    """The target at a local path or a URL; nothing is asked of it yet.

    Raises `ValueError` for a web server, which cannot be written to.
    """
    if isinstance(where, str) and is_url(where):
        if where.startswith(("http://", "https://")):
            raise ValueError(
                f"{where} is on a web server, which takes no files; copy to the folder that it "
                "serves, or to an object store such as s3://bucket/cache"
            )
        return UrlTarget(where)
    return FolderTarget(Path(where))


class FolderTarget(LocalPlace):
    """A local folder; what is put there is on the disk when `put` returns."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file by way of a temporary one."""
        refuse_links_on_the_way(self.folder, path)
        refuse_links_on_the_way(self.folder, COPYING)
        copying = self.folder / COPYING
        make_directories(copying)
        file = self.folder / path
        make_directories(file.parent)
        write_whole(file, data, temporary=copying / f".{threading.get_ident()}")

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below a folder."""
        refuse_links_on_the_way(self.folder, folder)
        root = self.folder / folder
        files = (Path(at) / name for at, _, names in os.walk(root) for name in names)
        return {file.relative_to(root).as_posix(): file.lstat().st_size for file in files}

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all it holds, if it is there."""
        refuse_links_on_the_way(self.folder, path)
        found = self.folder / path
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)
        if found.parent.is_dir():
            sync(found.parent)


class UrlTarget(FsspecPlace):
    """A folder of an object store, or of anything else that fsspec writes to."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file; object stores show it when all of it has arrived."""

        def write(fs: Any, full: str) -> None:
            fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
            fs.pipe_file(full, data)

        self._ask(path, write)

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below a folder."""

        def find(fs: Any, full: str) -> dict[str, int]:
            fs.invalidate_cache()
            found = fs.find(full, detail=True)
            root = f"{fs._strip_protocol(full)}/"
            paths = {name.removeprefix(root): info["size"] for name, info in found.items()}
            return {path: size for path, size in paths.items() if is_inside(path)}

        try:
            return self._ask(folder, find)
        except FileNotFoundError:
            return {}

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all it holds, if it is there."""

        def remove(fs: Any, full: str) -> None:
            fs.invalidate_cache()
            if fs.exists(full):
                fs.rm(full, recursive=True)

        self._ask(path, remove)
