"""Storage of a store's files: a local folder, or any URL supported by fsspec.

Reads return the exact bytes of the file or raise; they never pad or truncate. Changing a store
follows no symbolic link inside it; readers follow links to regular files only.
"""

import errno
import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from cache_schema.errors import StoreUnreachable, SymlinkInStore
from cache_schema.names import MAX_RECORD_BYTES, StoreLayout
from cache_schema.shown_text import lacks_credentials


def refuse_links(layout: StoreLayout) -> None:
    """Raise `SymlinkInStore` if a store's folder, or a direct entry of one, is a symbolic link."""
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
    """Raise `SymlinkInStore` if anything below a folder is a symbolic link."""
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (Path(at) / name).is_symlink():
                raise _symlink_error(Path(at) / name)


def refuse_links_on_path(root: Path, path: str) -> None:
    """Raise `SymlinkInStore` if any component of `path` below `root` is a symbolic link."""
    at = root
    for part in Path(path).parts:
        at /= part
        if at.is_symlink():
            raise _symlink_error(at)


def _refuse(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink():
        raise _symlink_error(Path(entry.path))


def _symlink_error(path: Path) -> SymlinkInStore:
    return SymlinkInStore(
        f"{path} is a symbolic link, so a change could affect files outside the store; "
        "replace it by the files themselves, or remove it"
    )


RETRY_DELAYS_S = (0.2, 1.0, 4.0)
"""Delays between attempts to access a network storage."""

UNREADABLE = (errno.EIO, errno.EFBIG, errno.EISDIR, errno.ELOOP, errno.ENXIO)
"""Values of `OSError.errno` that mean damage: the disk cannot read a file, or it is not a file of a
store."""

_Result = TypeVar("_Result")

_PIECE_BYTES = 2**20
_READ_TIMEOUT_S = 60
_CONNECT_TIMEOUT_S = 20


class OpenFile(AbstractContextManager["OpenFile"], Protocol):
    """A file, or a byte range of one, that is read into buffers."""

    size: int | None
    """Size of the whole file, or None if only a byte range was fetched."""

    def fill(self, offset: int, buffers: Sequence[Any]) -> int:
        """Read from `offset` into consecutive buffers; returns the number of bytes read.

        It is less than the size of the buffers only if the file ends before.
        """


class Storage(Protocol):
    """A folder on some medium; paths in it are relative and use forward slashes."""

    location: str

    def read(self, path: str, limit: int = MAX_RECORD_BYTES) -> bytes:
        """Read a whole file of at most `limit` bytes.

        Raises:
            FileNotFoundError: the storage responded that there is no such file.
            OSError: the file is larger (EFBIG), or not a regular file (EIO).
            StoreUnreachable: several attempts failed without a valid response.
        """

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Read some bytes of a file; fewer only if the file ends before `stop`."""

    def open(self, path: str, start: int = 0, stop: int | None = None) -> OpenFile:
        """Open a file for reading bytes from `start` to `stop`."""

    def list_folder(self, path: str) -> list[str] | None:
        """Sorted names in a folder, empty if it does not exist; None if it cannot be listed."""


def is_url(location: Path | str) -> bool:
    """Whether `location` is a URL rather than a local path."""
    return isinstance(location, str) and "://" in location


def open_storage(location: Path | str) -> Storage:
    """The storage at a local path or a URL; nothing is accessed yet."""
    if isinstance(location, str) and is_url(location):
        return FsspecStorage(location)
    return LocalStorage(Path(location))


def open_regular(path: str) -> int:
    """Open a regular file for reading and return its descriptor; never blocks on a FIFO or device.

    Raises `FileNotFoundError`, `IsADirectoryError`, or `OSError` (EIO) if it is not a regular file.
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


class LocalStorage:
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        """The folder need not exist."""
        self.folder = Path(folder)
        self.location = str(folder)

    def read(self, path: str, limit: int = MAX_RECORD_BYTES) -> bytes:
        """Read a whole file of at most `limit` bytes."""
        full = f"{self.location}/{path}"
        with open(open_regular(full), "rb", buffering=0) as file:
            _refuse_larger(os.fstat(file.fileno()).st_size, limit, full)
            return file.readall()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Read some bytes of a file; fewer only if the file ends before `stop`."""
        descriptor = open_regular(f"{self.location}/{path}")
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123
            file.seek(start)
            return file.read(stop - start)

    def open(self, path: str, start: int = 0, stop: int | None = None) -> "LocalFile":
        """Open a file; nothing is read yet."""
        return LocalFile(f"{self.location}/{path}")

    def list_folder(self, path: str) -> list[str]:
        """Sorted names in a folder, empty if it does not exist."""
        try:
            return sorted(os.listdir(self.folder / path))  # noqa: PTH208 (only names are needed)
        except (FileNotFoundError, NotADirectoryError):
            return []


class LocalFile(AbstractContextManager["LocalFile"]):
    """An open local file."""

    def __init__(self, path: str) -> None:
        """`FileNotFoundError` if it does not exist, `OSError` if it is not a regular file."""
        self._descriptor = open_regular(path)
        self.size: int | None = os.fstat(self._descriptor).st_size

    def fill(self, offset: int, buffers: Sequence[Any]) -> int:
        """Read from `offset` into the buffers without intermediate copies."""
        return os.preadv(self._descriptor, buffers, offset)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


class FetchedFile(AbstractContextManager["FetchedFile"]):
    """Bytes of a file that are already in memory."""

    def __init__(self, data: bytes | memoryview, *, offset: int = 0, whole: bool = True) -> None:
        """`offset` is the position of `data` in the file; `whole` if it is the entire file."""
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

    def __exit__(self, *_: object) -> None:
        pass


class FsspecStorage:
    """A folder behind a URL with any protocol that fsspec supports, such as http, https or s3.

    It can be pickled, and used in forked or spawned processes: each opens its own connections.
    """

    _inherited: list[Any] = []  # noqa: RUF012 (shared on purpose)
    """File systems of the parent process, kept alive because releasing one would close its
    connections."""

    def __init__(self, url: str) -> None:
        """Nothing is accessed before the first request.

        Raises `ValueError` for a URL whose credentials were redacted.
        """
        if lacks_credentials(url):
            raise ValueError(
                f"{url} is shown without its credentials, which are never saved; give the whole "
                "URL again, or a URL without credentials and configure them in the settings of its "
                "protocol"
            )
        self.location = url.rstrip("/")
        self._connected: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}

    def read(self, path: str, limit: int = MAX_RECORD_BYTES) -> bytes:
        """Read a whole file of at most `limit` bytes."""
        data = self._with_retries(path, lambda fs, full: _fetch_whole(fs, full, limit))
        _refuse_larger(len(data), limit, f"{self.location}/{path}")
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Read some bytes of a file; fewer only if the file ends before `stop`."""
        if start >= stop:
            return b""
        return self._with_retries(path, lambda fs, full: _fetch_range(fs, full, start, stop))

    def open(self, path: str, start: int = 0, stop: int | None = None) -> FetchedFile:
        """Fetch a file, or some bytes of it, in one request."""
        if stop is None:
            return FetchedFile(self.read(path))
        data = self.read_range(path, start, stop)
        # A range that ends past the end of the file is the entire file.
        whole = start == 0 and len(data) < stop
        return FetchedFile(data, offset=start, whole=whole)

    def list_folder(self, path: str) -> list[str] | None:
        """Sorted names in a folder, empty if it does not exist; None on web servers."""
        if self.location.startswith(("http://", "https://")):
            return None

        def names(fs: Any, full: str) -> list[str]:
            fs.invalidate_cache()
            found = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(full, detail=False))
            return sorted(found)

        try:
            return self._with_retries(path, names)
        except FileNotFoundError:
            return []

    def _with_retries(self, path: str, operation: Callable[[Any, str], _Result]) -> _Result:
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                fs, root = self._file_system()
                return operation(fs, f"{root}/{path}".rstrip("/"))
            except FileNotFoundError:
                raise
            except Exception as error:  # each protocol's client raises its own types
                if isinstance(error, OSError) and error.errno in UNREADABLE:
                    raise
                if _ends_before_range(error):
                    return b""  # type: ignore[return-value]
                if delay_s is None or not _is_transient(error):
                    raise StoreUnreachable(
                        f"{self.location}/{path} could not be read ({_describe(error)}); check the "
                        "address, the network and the credentials, and try again"
                    ) from error
                time.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    def _file_system(self) -> tuple[Any, str]:
        if self._connected is None or self._connected[0] != os.getpid():
            import fsspec

            if self._connected is not None:
                self._inherited.append(self._connected)
            fs, root = fsspec.core.url_to_fs(self.location, **_client_options(self.location))
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
    """Send a range request as fsspec does, but read no more of the response than requested."""
    options = {**fs.kwargs}
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers=headers, **options) as response:
        fs._raise_not_found_for_status(response, url)
        # A server without support for ranges sends the whole file.
        skip = start if response.status == 200 else 0
        wanted, data = skip + stop - start, bytearray()
        async for piece in response.content.iter_chunked(_PIECE_BYTES):
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
        total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S
    )
    return {"client_kwargs": {"timeout": timeout}}


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt can help."""
    if isinstance(error, PermissionError | ImportError | ValueError | TypeError):
        return False
    status = _status(error)
    return status is None or status >= 500 or status in (408, 425, 429)


def _ends_before_range(error: BaseException) -> bool:
    """Whether the error says that the file ends before the start of the range."""
    cause = error.__cause__
    response = getattr(cause, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return _status(error) == 416 or code in ("InvalidRange", "416")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
