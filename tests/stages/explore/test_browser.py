"""The page in a real browser: keys, filters, a phone's width, dark colours, hostile captions."""

import html
import json
import re
import shutil
import subprocess

import pytest

from stages.explore.export import saved_page
from stages.progress import SilentProgress
from tests.stages.explore.conftest import HTML, ROWS, open_explorer
from tests.stages.explore.test_server import TOKEN, running

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

HELPERS = """
const press = (key, options = {}) => (document.activeElement || document.body).dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...options }));
const until = async found => {
  for (let tries = 0; tries < 400; tries++) {
    if (found()) return;
    await new Promise(done => setTimeout(done, 25));
  }
  throw new Error(`never: ${found}`);
};
const cards = () => [...document.querySelectorAll("#cards a")];
const names = () => cards().map(card => card.querySelector(".name").textContent);
const wide = () => document.documentElement.scrollWidth - innerWidth;
const report = found => {
  const place = document.createElement("pre");
  place.id = "result";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
};
"""


def dumped(address, tmp_path, *options):
    """What a script reported in the page, once it has run."""
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=20000",
            *options,
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert "error" not in result, result
    return result


def script_of(body):
    return (
        f"{HELPERS} (async () => {{ {body} }})()"
        ".catch(error => report({ error: String(error), problem: "
        "document.getElementById('problem').textContent }));"
    )


@pytest.fixture(scope="module")
def server(cache, tmp_path_factory):
    with running(open_explorer(cache, tmp_path_factory.mktemp("browsed"))) as server:
        page, media_type = server.assets[""]
        more = page.replace(b"</body>", b'<script src="test.js"></script></body>')
        server.assets[""] = (more, media_type)
        yield server


@pytest.fixture
def browse(server, tmp_path):
    """Returns a function that runs a script in the page; the script's report."""

    def run(body, *options, at=""):
        server.assets["test.js"] = (script_of(body).encode(), "text/javascript")
        return dumped(f"{server.address}{at}", tmp_path, *options)

    yield run
    server.explorer.sources.leave_out.path.unlink(missing_ok=True)


def test_the_list_by_keyboard_on_a_phone_in_the_dark(browse):
    found = browse(
        """
        await until(() => cards().length === 4);
        const titles = document.title, all = names(), images = document.images.length;
        press("/");
        const searching = document.activeElement.id;
        press("ArrowRight");  // a letter of the search, not a move
        element("search").value = "LION";
        element("search").dispatchEvent(new Event("input"));
        await until(() => cards().length === 1);
        const lions = names();
        press("Escape");
        element("clear").click();
        await until(() => cards().length === 4);
        const chart = document.querySelector('[data-column="quality"] svg');
        await until(() => document.querySelector('[data-column="quality"] svg'));
        const box = document.querySelector('[data-column="quality"] svg').getBoundingClientRect();
        for (const [type, at] of [["pointerdown", 0], ["pointermove", 0.5], ["pointerup", 0.5]])
          document.querySelector('[data-column="quality"] svg').dispatchEvent(new PointerEvent(type,
            { clientX: box.left + at * box.width, clientY: box.top + 5, bubbles: true }));
        await until(() => cards().length === 2);
        const brushed = names();
        element("clear").click();
        await until(() => cards().length === 4);
        element("sort").value = "quality";
        element("sort").dispatchEvent(new Event("change"));
        await until(() => names()[0] === "walk/0002");
        press("ArrowRight");
        press("ArrowRight");
        const focused = document.activeElement.querySelector(".name").textContent;
        report({ titles, end: document.title, all, images, searching, lions, brushed, focused,
          wide: wide(), width: innerWidth,
          back: getComputedStyle(document.body).backgroundColor,
          bold: document.querySelectorAll("#cards b, #cards i").length });
        """,
        "--window-size=400,800",
        "--blink-settings=preferredColorScheme=0",
    )
    assert found["all"] == ROWS
    assert found["titles"] == found["end"] == "Clips of a cache"
    assert found["images"] == 4 and found["bold"] == 0
    assert found["searching"] == "search"
    assert found["lions"] == ["walk/0001"]
    assert found["brushed"] == ["run/0004", "walk/0002"]
    assert found["focused"] == "run/0004"
    assert found["wide"] <= 0
    red, green, blue = map(int, re.findall(r"\d+", found["back"])[:3])
    assert max(red, green, blue) < 64


def test_a_clip_by_keyboard_its_window_and_the_list_to_leave_out(browse, server):
    row = ROWS.index("walk/0002")
    found = browse(
        """
        await until(() => view.windows.teacher);
        const caption = element("caption").textContent;
        const first = [...view.token], frame = view.frame;
        press("ArrowRight");
        await until(() => view.frame === 1);
        press("ArrowDown", { shiftKey: true });
        press("ArrowRight", { shiftKey: true });
        const moved = [...view.token];
        await until(() => element("window-facts").textContent.includes(
          `row ${moved[0]}, column ${moved[1]}`));
        const shown = view.windows.teacher.probability;
        element("temperature").value = "-2";
        element("temperature").dispatchEvent(new Event("input"));
        await until(() => Math.max(...view.windows.teacher.probability) > Math.max(...shown));
        const sharp = view.windows.teacher.probability;
        press(" ");
        const playing = view.playing;
        press(" ");
        element("leave").click();
        await until(() => !element("leave-commands").hidden);
        const commands = [...document.querySelectorAll("#leave-commands pre")].map(
          place => place.textContent);
        const pressed = element("leave").getAttribute("aria-pressed");
        press("Escape");
        await until(() => !element("list").hidden && cards().length === 4);
        report({ caption, first, moved, shown, sharp, playing, stopped: !view.playing, commands,
          pressed, marked: cards().map(card => card.classList.contains("left-out")),
          panels: view.panels.length, wide: wide(), title: document.title });
        """,
        "--window-size=400,800",
        at=f"#clip={row}",
    )
    assert found["caption"] == HTML
    assert found["title"] == "Clips of a cache"
    y, x = found["moved"]
    layers = server.explorer.layers(row)
    assert found["shown"] == pytest.approx(
        layers.flow.window("forward", 1, y, x, 0.1)["probability"]
    )
    assert found["sharp"] == pytest.approx(
        layers.flow.window("forward", 1, y, x, 0.01)["probability"]
    )
    assert found["playing"] and found["stopped"]
    assert found["pressed"] == "true"
    assert found["marked"] == [key == "walk/0002" for key in ROWS]
    assert server.explorer.sources.leave_out.keys() == {"walk/0002"}
    assert "train.leave_out=" in found["commands"][0]
    assert found["commands"][1].startswith("sam2vx-pipeline cache drop ")
    assert found["wide"] <= 0


def test_a_saved_page_shows_its_clips_without_a_server(server, tmp_path):
    page = saved_page(server.explorer, ["walk/0002", "walk/0001"], SilentProgress())
    body = script_of(
        """
        await until(() => cards().length === 2);
        location.hash = "#clip=1";
        await until(() => view.windows.teacher && view.motions.teacher);
        report({ key: element("key").textContent, probability: view.windows.teacher.probability,
          token: view.token, motion: view.motions.teacher.length, title: document.title,
          leave: getComputedStyle(element("leave")).display,
          problem: element("problem").textContent });
        """
    )
    # The policy admits no script but the page's own; this one replaces it for the test.
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"<script>{body}</script></body>"), encoding="utf-8")
    found = dumped(f"file://{file}", tmp_path)
    assert (found["key"], found["problem"], found["leave"]) == ("walk/0001", "", "none")
    y, x = found["token"]
    layers = server.explorer.layers(ROWS.index("walk/0001"))
    wanted = layers.flow.window("forward", 0, y, x, 0.1)["probability"]
    assert found["probability"] == pytest.approx(wanted, abs=1 / 500)
    assert found["motion"] == 8 * 3 * 4 * 2
    assert TOKEN not in page
