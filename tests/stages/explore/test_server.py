"""Who may ask the server, what it may be asked for, and what it never gives away."""

import http.client
import json
import shutil
import socket
import threading
from contextlib import contextmanager

import pytest

from stages.explore.server import ExploreServer
from tests.stages.explore.conftest import HTML, ROWS, open_explorer

TOKEN = "a-token"


@contextmanager
def running(explorer):
    server = ExploreServer(explorer, token=TOKEN)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def opened(cache, tmp_path_factory):
    with running(open_explorer(cache, tmp_path_factory.mktemp("served"))) as server:
        yield server


@pytest.fixture
def server(opened):
    yield opened
    opened.explorer.sources.leave_out.path.unlink(missing_ok=True)


def ask(server, path, method="GET", body=None, **headers):
    """The answer's status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, data


def raw(server, text):
    """What the server says to bytes that no client library would send."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_it_listens_on_this_machine_only_and_the_token_is_random(opened):
    tokens = set()
    for _ in range(2):
        with ExploreServer(opened.explorer) as server:
            assert server.server_address[0] == "127.0.0.1"
            tokens.add(server.token)
    assert len(tokens) == 2
    assert all(len(token) >= 32 for token in tokens)


def test_the_page_and_its_parts_come_with_a_strict_policy(server):
    for name in ("", "style.css", "source.js", "list.js", "clip.js", "main.js"):
        status, headers, data = ask(server, f"/{TOKEN}/{name}")
        assert status == 200 and data
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert b"http:" not in data.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"innerHTML" not in data and b"eval(" not in data


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api/state",
        "/wrong/api/state",
        f"/{TOKEN[:-1]}/api/state",
        f"/{TOKEN}x/api/state",
        f"/x/{TOKEN}/api/state",
        f"/{TOKEN.upper()}/",
        "/%61-token/",
    ],
)
def test_without_the_whole_token_there_is_nothing(server, path):
    status, _, data = ask(server, path)
    assert status == 404
    assert TOKEN.encode() not in data


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "", "[::1]"])
def test_other_hosts_are_refused(server, host):
    status, _, data = ask(server, f"/{TOKEN}/api/state", Host=host.format(port=server.server_port))
    assert status == 421
    assert b"stores" not in data


def test_a_missing_or_second_host_is_refused(server):
    named = f"Host: 127.0.0.1:{server.server_port}\r\n"
    for lines in ("", f"{named}Host: evil.example\r\n"):
        assert b" 421 " in raw(server, f"GET /{TOKEN}/api/state HTTP/1.1\r\n{lines}\r\n")
    # With another host in the address itself.
    assert b" 404 " in raw(
        server, f"GET http://evil.example/{TOKEN}/api/state HTTP/1.1\r\n{named}\r\n"
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_requests_of_other_pages_are_refused(server, headers, method):
    body = b'{"leave_out": true}' if method == "POST" else None
    given = headers | ({"Content_Type": "application/json"} if body else {})
    status, _, _ = ask(server, f"/{TOKEN}/api/leave_out/0", method, body, **given)
    assert status == 403
    assert not server.explorer.sources.leave_out.path.exists()


@pytest.mark.parametrize(
    "path",
    [
        "..%2f..%2f..%2fetc%2fpasswd",
        "../../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "/etc/passwd",
        "//etc/passwd",
        "C:\\windows\\win.ini",
        "page/index.html",
        "server.py",
        "__init__.py",
        "style.css/",
        "style.css%00",
        "api/layer/0/..%2f..%2fstore.json",
        "api/layer/0/../../store.json",
        "api/layer/0/",
        "api/still/..",
        "api/still/-1",
        "api/still/1e0",
        "api/still/0x0",
        "api/still/%30",
        "api/still/%D9%A3",
        "api/still/99999999999999999999",
        "api/still/5",
        "api/clip/",
        "api/window/0/teacher/forward/0/0/-1?temperature=0.1",
        "api/window/0/teacher/forward/8/0/0?temperature=0.1",
        "api/window/0/teacher/forward/0/3/0?temperature=0.1",
        "api/window/0/teacher/__class__/0/0/0?temperature=0.1",
        "api/motion/0/teacher/..%2f?temperature=0.1",
        "api/motion/0/500/forward?temperature=0.1",
        "api/window/0/..%2f/forward/0/0/0?temperature=0.1",
        "api/student/0/500",
    ],
)
def test_paths_lead_nowhere_but_to_what_is_named(server, path):
    status, _, data = ask(server, f"/{TOKEN}/{path}")
    assert status == 404
    assert b"root:" not in data and b"crc32c" not in data


@pytest.mark.parametrize(
    "parameters",
    [
        "limit=1000000000",
        "limit=201",
        "limit=-1",
        "limit=1_0",
        "offset=10000000000",
        "offset=1e9",
        "offset=",
        "sort=__class__",
        "sort=key",
        "show=../..",
        "range=quality:nan:1",
        "range=quality:1:0",
        "range=quality:0",
        "range=shard:0:1",
        "label=quality:1",
        "search=" + "x" * 201,
        "&".join(["range=quality:0:1"] * 40),
        "&".join(["a=b"] * 100),
    ],
)
def test_what_cannot_be_asked_for_is_refused(server, parameters):
    status, _, data = ask(server, f"/{TOKEN}/api/clips?{parameters}")
    assert status == 400
    assert json.loads(data)["error"]


@pytest.mark.parametrize("temperature", ["", "nan", "inf", "0", "-1", "1e-9", "x"])
def test_temperatures_have_bounds(server, temperature):
    path = f"/{TOKEN}/api/window/0/teacher/forward/0/0/0?temperature={temperature}"
    assert ask(server, path)[0] == 400


def test_ranges_of_bytes_are_ignored_and_long_addresses_refused(server):
    status, _, data = ask(server, f"/{TOKEN}/style.css", Range="bytes=0-99999999999")
    assert status == 200 and len(data) > 1000
    assert ask(server, f"/{TOKEN}/{'x' * 70_000}")[0] == 414


@pytest.mark.parametrize(
    ("body", "media_type", "status"),
    [
        (b'{"leave_out": true}', "text/plain", 415),
        (b'{"leave_out": true}', "application/x-www-form-urlencoded", 415),
        (b"x" * 1025, "application/json", 413),
        (b"{", "application/json", 400),
        (b"[" * 1000, "application/json", 400),
        (b'{"leave_out": "yes"}', "application/json", 404),
        (b'{"leave_out": true, "path": "/etc/passwd"}', "application/json", 404),
        (b"[]", "application/json", 404),
    ],
)
def test_only_a_clear_wish_changes_the_list(server, body, media_type, status):
    path = f"/{TOKEN}/api/leave_out/0"
    assert ask(server, path, "POST", body, Content_Type=media_type)[0] == status
    assert not server.explorer.sources.leave_out.path.exists()


def test_other_methods_do_nothing(server):
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        assert ask(server, f"/{TOKEN}/api/leave_out/0", method)[0] == 501
    assert ask(server, f"/{TOKEN}/api/leave_out/0")[0] == 404


def test_a_clip_is_put_on_the_list_and_taken_off(server):
    path, chosen = f"/{TOKEN}/api/leave_out/1", server.explorer.sources.leave_out
    for leave, keys in ((True, {ROWS[1]}), (False, set())):
        body = json.dumps({"leave_out": leave}).encode()
        origin = f"http://127.0.0.1:{server.server_port}"
        status, _, data = ask(
            server, path, "POST", body, Content_Type="application/json", Origin=origin
        )
        assert status == 200
        assert json.loads(data)["left_out"] == len(keys)
        assert chosen.keys() == keys


def test_html_in_captions_is_data_and_never_a_page(server):
    status, headers, data = ask(server, f"/{TOKEN}/api/clips")
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert HTML in {clip["caption"] for clip in json.loads(data)["clips"]}


def test_a_link_in_a_store_is_not_followed(cache, tmp_path):
    root = shutil.copytree(cache, tmp_path / "linked")
    secret = tmp_path / "secret"
    secret.write_bytes(b"root:" * 100)
    (store,) = root.glob("masks-*")
    for file in store.glob("shards/*/forward/c.*"):
        file.unlink()
        file.symlink_to(secret)
    with running(open_explorer(root, tmp_path)) as server:
        status, _, data = ask(server, f"/{TOKEN}/api/clip/0")
        found = json.loads(data)
        assert status == 200
        assert "mask_forward" not in found["layers"]
        assert "components_fused" in found["layers"]
        assert any(note.startswith("masks: ") for note in found["notes"])
        assert b"root:" not in data
        assert ask(server, f"/{TOKEN}/api/layer/0/mask_forward")[0] == 404


def test_nothing_but_the_list_is_written(server, cache):
    def state():
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*")}

    before = state()
    for path in ("state", "clips?search=lion", "histograms", "clip/0", "still/0", "loop/0"):
        assert ask(server, f"/{TOKEN}/api/{path}")[0] == 200
    assert state() == before
    assert not server.explorer.sources.leave_out.path.exists()
