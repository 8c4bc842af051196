"""Web and object servers on this machine, for the tests of stores behind URLs."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileServer(ThreadingHTTPServer):
    """Serves a folder over HTTP with ranges and without listings, and misbehaves when told to."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, str | None]] = []
        """Path and range of each request."""
        self.ranges = True
        self.failures: dict[str, list[int]] = {}
        """Per path ending, the states of the next answers; a negative one stays for ever."""
        self.cut: dict[str, int] = {}
        """Per path ending, after how many bytes the connection breaks off."""
        self.endless: set[str] = set()
        """Path endings that are answered without end."""
        self._connections: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def state_of(self, path: str) -> int:
        for ending, states in self.failures.items():
            if path.endswith(ending) and states:
                return -states[0] if states[0] < 0 else states.pop(0)
        return 200


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = self.headers.get("Range") if self.server.ranges else None
        self.server.requests.append((self.path, asked))
        state = self.server.state_of(self.path)
        file = self.server.folder / self.path.lstrip("/")
        if state == 200 and not file.is_file():
            state = 404
        data = file.read_bytes() if state == 200 else b"no"
        if state == 200 and asked is not None:
            first, last = asked.removeprefix("bytes=").split("-")
            if int(first) >= len(data):
                state, data = 416, b""
            else:
                state, data = 206, data[int(first) : int(last) + 1]
        if any(self.path.endswith(ending) for ending in self.server.endless):
            self._send_without_end()
            return
        self.send_response(state)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        for ending, count in self.server.cut.items():
            if self.path.endswith(ending):
                data = data[:count]
                self.close_connection = True
        self.wfile.write(data)

    def _send_without_end(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):  # until the other side has had enough
            while True:
                self.wfile.write(bytes(2**20))

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """A server of a folder, for as long as the block runs."""
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        server.hang_up()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving_plainly(folder: Path) -> Iterator[str]:
    """The address of Python's own web server of a folder, which knows no ranges."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
