"""A small HTTP server on this machine alone that serves the page and its answers.

It listens on 127.0.0.1. Every address contains a random token; requests with another Host or Origin
are refused, so that other pages in the browser can neither read nor guess anything (DNS rebinding,
cross-site requests). Nothing in a request is used as a path. The only thing that it writes is the
list of clips to leave out.
"""

import hmac
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from cache_schema import CacheError
from stages.explore.explorer import Explorer, NoSuchClip
from stages.explore.flow_view import NoSuchToken
from stages.explore.query import BadQuery

PAGE_FOLDER = Path(__file__).with_name("page")
_ASSETS = {
    "": ("index.html", "text/html; charset=utf-8"),
    "style.css": ("style.css", "text/css; charset=utf-8"),
    "source.js": ("source.js", "text/javascript; charset=utf-8"),
    "list.js": ("list.js", "text/javascript; charset=utf-8"),
    "clip.js": ("clip.js", "text/javascript; charset=utf-8"),
    "main.js": ("main.js", "text/javascript; charset=utf-8"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_JSON = "application/json"
_ROW = re.compile(r"[0-9]{1,9}")
_NUMBER = re.compile(r"[0-9]{1,6}")
_MAX_BODY = 1024
_TIMEOUT_S = 30
TEMPERATURES = (0.001, 10.0)
"""Lowest and highest temperature that may be asked for."""


class ExploreServer(ThreadingHTTPServer):
    """The server; `serve_forever` answers until `shutdown`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, explorer: Explorer, *, port: int = 0, token: str | None = None) -> None:
        """Bind to 127.0.0.1.

        Args:
            explorer: Answers the requests.
            port: 0 takes a free one.
            token: The first part of every address; None makes a random one.
        """
        self.explorer = explorer
        self.token = token or secrets.token_urlsafe(24)
        self.assets = {
            name: ((PAGE_FOLDER / file).read_bytes(), media_type)
            for name, (file, media_type) in _ASSETS.items()
        }
        super().__init__(("127.0.0.1", port), _Handler)

    @cached_property
    def hosts(self) -> tuple[str, ...]:
        """Values of the Host header that are answered."""
        return f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{self.hosts[0]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that break off."""


class _Refused(Exception):  # noqa: N818 (an answer, not an error)
    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S
    server: ExploreServer

    def version_string(self) -> str:
        return "explore"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: addresses contain the token."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, respond: Any) -> None:
        try:
            data, media_type = respond(*self._target())
            status = HTTPStatus.OK
        except _Refused as refusal:
            status, data, media_type = refusal.status, _error(refusal), _JSON
        except (NoSuchClip, NoSuchToken) as error:
            status, data, media_type = HTTPStatus.NOT_FOUND, _error(error), _JSON
        except BadQuery as error:
            status, data, media_type = HTTPStatus.BAD_REQUEST, _error(error), _JSON
        except (CacheError, ValueError, OSError) as error:
            status, data, media_type = HTTPStatus.INTERNAL_SERVER_ERROR, _error(error), _JSON
        if status is not HTTPStatus.OK:
            # A body that was not read would be taken for the next request.
            self.close_connection = True
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _target(self) -> tuple[list[str], Mapping[str, Sequence[str]]]:
        """The parts of the address after the token, and its parameters; checks who asks."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name")
        origin = self.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "requests of other pages are refused")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise _Refused(HTTPStatus.FORBIDDEN, "requests of other pages are refused")
        path, _, parameters = self.path.partition("?")
        first, *rest = path.split("/")
        token, *parts = rest or [""]
        if first or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise _Refused(HTTPStatus.NOT_FOUND, "no such page; the address needs its whole token")
        try:
            found = parse_qs(parameters, keep_blank_values=True, max_num_fields=64)
        except ValueError:
            raise _Refused(HTTPStatus.BAD_REQUEST, "too many parameters") from None
        return parts, found

    def _get(self, parts: list[str], parameters: Mapping[str, Sequence[str]]) -> tuple[bytes, str]:
        explorer = self.server.explorer
        match parts:
            case [name] if name in self.server.assets:
                return self.server.assets[name]
            case ["api", "state"]:
                return _json(explorer.state())
            case ["api", "clips"]:
                return _json(explorer.clips(parameters))
            case ["api", "histograms"]:
                return _json(explorer.histograms(parameters))
            case ["api", "clip", row]:
                return _json(explorer.clip(_row(row)))
            case ["api", "still", row]:
                return explorer.thumbnail(_row(row))[0], "image/webp"
            case ["api", "loop", row]:
                return explorer.thumbnail(_row(row))[1], "image/webp"
            case ["api", "layer", row, name]:
                layers = explorer.layers(_row(row)).layers
                if name not in layers:
                    raise _Refused(HTTPStatus.NOT_FOUND, "no such layer")
                return layers[name].sheet.data, layers[name].sheet.media_type
            case ["api", "student", row, timestep]:
                found = explorer.student(_row(row), _number(timestep))
                loss = found.loss if math.isfinite(found.loss) else None
                return _json({"loss": loss, "step": found.step, "weights": found.weights})
            case ["api", "window", row, side, direction, pair, y, x]:
                place = (_number(pair), _number(y), _number(x))
                flow = explorer.flow(_row(row), _side(side))
                return _json(flow.window(direction, *place, _temperature(parameters)))
            case ["api", "motion", row, side, direction]:
                flow = explorer.flow(_row(row), _side(side))
                motion = flow.motion(direction, _temperature(parameters))
                return motion.astype("<f4").tobytes(), "application/octet-stream"
        raise _Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _post(self, parts: list[str], parameters: Mapping[str, Sequence[str]]) -> tuple[bytes, str]:
        if self.headers.get_content_type() != _JSON:
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"send {_JSON}")
        length = self.headers.get("Content-Length", "")
        if not _NUMBER.fullmatch(length) or int(length) > _MAX_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {_MAX_BODY} bytes")
        try:
            wanted = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the body is not JSON") from None
        match parts, wanted:
            case ["api", "leave_out", row], {"leave_out": bool(leave_out)} if len(wanted) == 1:
                return _json(self.server.explorer.set_left_out(_row(row), leave_out))
        raise _Refused(HTTPStatus.NOT_FOUND, "no such page")


def _json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value, allow_nan=False).encode(), _JSON


def _error(error: Exception) -> bytes:
    return json.dumps({"error": str(error)}).encode()


def _row(text: str) -> int:
    if not _ROW.fullmatch(text):
        raise NoSuchClip("a clip is named by the number of its row")
    return int(text)


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise NoSuchToken("pairs and tokens are numbers")
    return int(text)


def _side(text: str) -> str:
    return text if text == "teacher" else str(_number(text))


def _temperature(parameters: Mapping[str, Sequence[str]]) -> float:
    low, high = TEMPERATURES
    try:
        found = float(parameters.get("temperature", [""])[-1])
    except ValueError:
        found = 0.0
    if not low <= found <= high:  # also for NaN
        raise BadQuery(f"temperature must be from {low:g} to {high:g}")
    return found
