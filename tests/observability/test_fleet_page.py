"""The fleet page in a real browser, over the fake fleet: live, honest, and usable without eyes, mouse or patience."""

import json
import re
import time
from dataclasses import replace
from importlib.resources import files
from itertools import count

import httpx
import pytest

from replicas.fleet_page import fleet_page
from tests.observability.browser import running_chromium
from tests.observability.debian import ProgramMissing
from tests.observability.page_server import running_pages

WIDE, PHONE = (1280, 900), (320, 640)


@pytest.fixture(scope="module")
def pages():
    with running_pages() as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    try:
        with running_chromium() as tab:
            yield tab
    except ProgramMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def page(browser, pages):
    browser.look_as(*WIDE)
    browser.complaints.clear()
    browser.open(pages.url)
    browser.wait_for("document.querySelectorAll('.replica').length === 2")
    return browser


class ChangedFleet:
    """The fleet behind the pages, with its snapshots changed on their way."""

    def __init__(self, fleet, change):
        self._fleet = fleet
        self._change = change

    def snapshot(self):
        seen = self._fleet.snapshot()
        return replace(seen, replicas=tuple(self._change(replica) for replica in seen.replicas))


@pytest.fixture
def changed(pages, monkeypatch):
    def change(function):
        monkeypatch.setattr(pages, "fleet", ChangedFleet(pages.fleet, function))

    return change


def text(page, selector):
    return page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def violations(page):
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text())
    found = page.evaluate("axe.run().then((result) => result.violations)")
    return [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        (None, "application/json"),
    ],
)
def test_browsers_get_the_page_and_programs_the_json(pages, accept, media_type):
    with httpx.Client() as client:
        del client.headers["accept"]
        answer = client.get(pages.url, headers={} if accept is None else {"accept": accept})
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, media_type)
    assert answer.headers["vary"] == "Accept"
    if media_type == "application/json":
        assert {"model", "replicas"} <= set(answer.json())


def test_the_page_brings_everything_along(page):
    document = fleet_page().decode()
    assert "fleet.css" not in document.replace("/* fleet.css */", "")
    assert re.findall(r"""(?:src|href)=["'](?!data:|#|metrics)""", document) == []
    loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => new URL(entry.name).pathname)")
    assert set(loaded) == {"/fleet"}
    assert page.complaints == []


def test_it_shows_the_fleet_live(page):
    assert text(page, "#subtitle") == "fake-model, 2 replicas"
    assert text(page, "#connection") == "live"
    before = int(text(page, "#compactions").replace(",", ""))
    page.wait_for(f"Number(document.querySelector('#compactions').textContent.replace(',', '')) > {before}")
    page.wait_for("document.querySelectorAll('#curve path.live')[0].getAttribute('d').includes('L')")
    page.wait_for("document.querySelector('.strip rect') !== null")
    assert re.search(r"[1-9]\d* compactions? in the last (\d+ seconds?|minute)", text(page, ".pace"))


def test_what_happened_while_nobody_looked_belongs_to_no_second(page):
    """After a pause, or in a tab that slept, a poll brings the compactions of all that time."""
    page.evaluate("document.querySelector('#pause').click()")
    before = page.evaluate("JSON.stringify([...cards.values()][0].replica)")
    shown = page.evaluate(f"""(() => {{
        const card = [...cards.values()][0], {{ engine, ...rest }} = {before}, now = card.events.at(-1).at;
        const at = (seconds, more) => card.update(
            {{ ...rest, engine: {{ ...engine, compactions: engine.compactions + more }} }}, now + seconds);
        at(600, 500);
        const first = card.part(".pace").textContent;
        at(601, 503);
        at(602, 503);
        const then = card.part(".pace").textContent;
        for (let second = 603; second <= 700; second += 1) at(second, 503 + second - 602);
        return [first, then, card.part(".pace").textContent, Math.max(...card.events.map((one) => one.compactions))];
    }})()""")
    assert [said.partition(";")[0] for said in shown[:3]] == [
        "0 compactions in the last 1 second",
        "3 compactions in the last 2 seconds",
        "60 compactions in the last minute",
    ]
    assert shown[3] < 500


def test_a_pool_is_drawn_in_proportion_and_said_in_words(page):
    said = page.evaluate("document.querySelector('canvas.pool').getAttribute('aria-label')")
    counts = [int(number) for number in re.findall(r"(\d+) (?:pinned|live|may|reserved|free)", said)]
    assert (len(counts), sum(counts)) == (5, 48)
    colours = page.evaluate("""(() => {
        const canvas = document.querySelector("canvas.pool");
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const seen = new Set();
        for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] === 255) seen.add(pixels.slice(i, i + 3).join());
        return [...seen];
    })()""")
    assert {"18,130,119", "76,74,168"} <= set(colours), "live and pinned blocks are in the colours of the legend"


def test_the_table_says_the_same_as_the_pictures(page):
    page.evaluate("document.querySelector('#pause').click()")
    headings = page.evaluate("[...document.querySelectorAll('#columns th')].map((cell) => cell.textContent)")
    first = page.evaluate("[...document.querySelector('#rows tr').children].map((cell) => cell.textContent)")
    row = dict(zip(headings, first, strict=True))
    assert int(row["Pinned prompt"]) + int(row["Live"]) + int(row["Free"]) == int(row["Blocks"]) == 48
    in_use = re.match(r"(\d+) of 48 blocks in use, headroom (-?\d+)", text(page, ".replica .blocks"))
    assert in_use.groups() == (str(int(row["Pinned prompt"]) + int(row["Live"])), row["Headroom"])


def test_a_pool_of_many_blocks_stays_a_small_picture(page, changed):
    def enlarge(replica):
        return replace(replica, engine=replace(replica.engine, total_blocks=100_000, free_blocks=99_000))

    changed(enlarge)
    page.wait_for("document.querySelector('#square').textContent === 'up to 224 KV blocks'")
    assert page.evaluate("document.querySelector('canvas.pool').clientHeight") < 200


COUNT_DRAWS = """(() => {
    const draw = Card.prototype.draw, request = requestAnimationFrame;
    let frame, drawn, animates = false;
    window.mostDraws = 0; // of one card in one animation frame
    window.requestAnimationFrame = (callback) => request((now) => {
        if (now !== frame) { frame = now; drawn = new Map(); }
        animates = true;
        callback(now);
        animates = false;
    });
    Card.prototype.draw = function () {
        if (animates) {
            drawn.set(this, (drawn.get(this) ?? 0) + 1);
            mostDraws = Math.max(mostDraws, drawn.get(this));
        }
        draw.call(this);
    };
})()"""


def test_rings_at_every_poll_are_drawn_once_a_frame(page, changed):
    freed = count()
    changed(lambda replica: replace(replica, engine=replace(replica.engine, freed_blocks=next(freed))))
    page.evaluate(COUNT_DRAWS)
    polls = page.evaluate("Math.max(...[...cards.values()].map((card) => card.events.length))")
    page.wait_for(f"[...cards.values()].every((card) => card.events.length >= {polls + 5})")
    assert page.evaluate("mostDraws") == 1


def test_a_silent_replica_is_shown_and_announced_once(page, changed):
    assert text(page, "#announcements") == ""
    changed(lambda replica: replace(replica, fresh=replica.replica != "fake-a", report_age_seconds=7.2))
    page.wait_for("document.querySelectorAll('.replica.silent').length === 1")
    assert text(page, ".replica.silent .state") == "silent for 7 s"
    assert text(page, "#announcements") == "Replica fake-a does not report."
    page.evaluate("document.querySelector('#announcements').textContent = 'heard'")
    time.sleep(2.2)
    assert text(page, "#announcements") == "heard", "numbers and old news are not read out every second"


def test_a_draining_replica_is_said_and_is_no_headroom(page, changed):
    changed(lambda replica: replace(replica, draining=replica.replica == "fake-a", headroom_blocks=12))
    page.wait_for("document.querySelector('#rows tr').children[1].textContent === 'drains'")
    states = page.evaluate("[...document.querySelectorAll('#rows tr')].map((row) => row.children[1].textContent)")
    assert states == ["drains", "reports"]
    assert text(page, "#headroom-note") == "12 of 96 blocks can be promised"
    assert re.fullmatch(r"drains, \d+ decode", text(page, ".replica .state"))


def test_a_fleet_that_does_not_answer_is_said_and_comes_back(page, pages, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(pages, "is_up", False)
        page.wait_for("document.querySelector('#connection').classList.contains('lost')")
        assert text(page, "#announcements") == "The fleet does not answer."
        assert page.evaluate("document.querySelectorAll('.replica').length") == 2, "what was last known stays"
    page.wait_for("document.querySelector('#connection').className === 'pill live'")
    assert text(page, "#announcements") == "The fleet answers again."


def test_an_idle_fleet_says_what_to_do(page, changed):
    changed(lambda replica: replace(replica, engine=replace(replica.engine, running=0, compactions=0)))
    page.wait_for("!document.querySelector('#try').hidden")
    command = text(page, "#curl")
    assert command.startswith("curl http://127.0.0.1:")
    assert json.loads(command.split("-d '")[1].rstrip("'"))["model"] == "fake-model"


def test_the_keyboard_reaches_everything(page):
    reached = []
    for _ in range(4):
        page.press("Tab", 9)
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
    assert reached == ["Skip to the replicas", "Pause", "The same as a table", "/metrics"]
    page.evaluate("document.querySelector('#pause').focus()")
    page.press("Enter", 13, "\r")
    page.wait_for("document.querySelector('#connection').textContent === 'paused'")
    assert page.evaluate("document.querySelector('#pause').getAttribute('aria-pressed')") == "true"
    still = text(page, "#compactions")
    time.sleep(1.5)
    assert text(page, "#compactions") == still
    page.press("Enter", 13, "\r")
    page.wait_for("document.querySelector('#connection').textContent === 'live'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_it_is_accessible_and_fits_the_screen(page, size, scheme, changed):
    changed(lambda replica: replace(replica, fresh=replica.replica != "fake-a", draining=True))
    page.look_as(*size, scheme, "reduce")
    page.wait_for("document.querySelectorAll('.replica.silent').length === 1")
    page.evaluate("document.querySelector('details').open = true")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_accessibility_check_would_find_something(page):
    page.evaluate("document.querySelector('#subtitle').style.color = '#ddd'")
    assert [name for name, _ in violations(page)] == ["color-contrast"]
