"""The report in a real browser: nothing is fetched, nothing fails, and what moves moves rightly."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
from functools import partial

import pytest

from moekit.report.charts.heatmaps import cells, maximum, pack
from moekit.report.page import build
from moekit.report.theme import DARK, LIGHT
from tests.unit.report.example import example
from tests.unit.report.test_page import HOSTILE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("MOEKIT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed, and MOEKIT_BROWSER is not set"
)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # The page is our own, and containers rarely let a browser make its sandbox.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        made = driver.chromium.launch(executable_path=BROWSER, args=options, timeout=120_000)
        yield made
        made.close()


@pytest.fixture(scope="module")
def data():
    return example(layers=4, experts=16, documents=4, domains=HOSTILE, title=HOSTILE[0])


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
    return build(data, tmp_path_factory.mktemp("report"))


@pytest.fixture
def visit(browser, path):
    """Opens the page with given settings; at the end nothing may have gone wrong."""
    contexts, complaints, requests = [], [], []

    def go(**settings):
        settings = {"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"} | settings
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("console", lambda m: complaints.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} <= {path.as_uri()}


def test_served_over_http_it_asks_for_nothing_more(browser, path):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=path.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    try:
        page.goto(f"http://127.0.0.1:{server.server_port}/report.html")
        page.locator(".heatmaps input[type=range]").press("ArrowRight")
        page.wait_for_timeout(300)
    finally:
        page.close()
        server.shutdown()
        server.server_close()
    assert asked == ["/report.html"]


def test_hostile_names_run_nothing_and_are_shown(visit, data):
    page = visit()
    assert page.evaluate("window.hacked") is None
    assert page.title() == HOSTILE[0]
    shown = page.locator("tbody th").all_inner_texts()
    assert set(HOSTILE) <= set(shown)


def test_an_injected_script_would_not_run(browser, path):
    page = browser.new_page()
    try:
        page.goto(path.as_uri())
        page.evaluate(
            """() => { const s = document.createElement("script"); s.textContent = "window.hacked = 1";
            window.refused = 0; addEventListener("securitypolicyviolation", () => window.refused++);
            document.body.appendChild(s); }"""
        )
        page.wait_for_function("window.refused > 0")
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("fetch('data:,x').then(() => 'sent', () => 'refused')") == "refused"
    finally:
        page.close()


def test_the_first_thing_read_is_the_headline(visit, data):
    page = visit()
    assert page.locator("body").inner_text().startswith(data.headline.text)


def ground(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def rgb(colour):
    return "rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))


def test_it_follows_the_systems_colours_until_the_reader_chooses(visit):
    assert ground(visit(color_scheme="light")) == rgb(LIGHT["page"])
    page = visit(color_scheme="dark")
    button = page.locator("#theme")
    assert ground(page) == rgb(DARK["page"])
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert ground(page) == rgb(LIGHT["page"])
    assert button.get_attribute("aria-pressed") == "false"
    page.reload()
    assert ground(page) == rgb(LIGHT["page"]), "the choice is remembered"
    cell = page.evaluate("getComputedStyle(document.querySelector('.heat path.h15')).fill")
    button.click()
    assert page.evaluate("getComputedStyle(document.querySelector('.heat path.h15')).fill") != cell


def heatmaps(data):
    return next(s for s in data.sections if s.kind == "heatmaps")


def drawn(page, panel):
    return page.evaluate(
        """p => Object.fromEntries([...document.querySelectorAll(".heat > figure > svg")[p]
        .querySelectorAll(".cells path")].map(e => [e.getAttribute("class"), e.getAttribute("d")]))""",
        panel,
    )


def test_every_layer_is_drawn_from_its_own_numbers(visit, data):
    page, section = visit(), heatmaps(data)
    slider = page.locator(".heatmaps input[type=range]")
    for layer in (0, 1, 3, 0):
        slider.evaluate("(e, i) => { e.value = i; e.dispatchEvent(new Event('input', { bubbles: true })); }", layer)
        for number, panel in enumerate(section.panels):
            values = panel.layers[layer].values
            ways = cells(pack(values, maximum(section, layer)), len(values))
            assert drawn(page, number) == {f"h{i}": way for i, way in enumerate(ways) if way}
            captions = page.locator(".heat figcaption").all_inner_texts()
            assert captions[number] == panel.layers[layer].caption
    assert page.locator(".heatmaps .which").inner_text() == "Layer 0"


def test_sections_with_the_same_layers_move_together(visit, data):
    page = visit()
    page.locator(".heatmaps button[aria-label=next]").click()
    page.locator(".heatmaps button[aria-label=next]").click()
    assert page.locator(".barchart .which").inner_text() == "Layer 2"
    shown = page.locator(".barchart [data-group]:not(.hidden)")
    assert shown.get_attribute("data-group") == "2"
    bars = next(s for s in data.sections if s.kind == "bars")
    assert page.locator(".barchart > figcaption").inner_text() == bars.groups[2].caption
    page.locator(".barchart button[aria-label=previous]").click()
    assert page.locator(".heatmaps .which").inner_text() == "Layer 1"


def test_a_heat_maps_cell_tells_its_value(visit, data):
    page, section = visit(), heatmaps(data)
    svg = page.locator(".heat > figure > svg").nth(1)
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    matrix = section.panels[1].layers[0]
    size = len(matrix.values)
    for row, column in ((0, 1), (3, 2), (size - 1, 0)):
        page.mouse.move(box["x"] + (column + 0.5) / size * box["width"], box["y"] + (row + 0.5) / size * box["height"])
        said = page.locator("#tip").inner_text()
        assert said.startswith(f"of the tokens of expert {matrix.names[row]}, also chose {matrix.names[column]}: "), (
            said
        )
        value = float(said.rsplit(":", 1)[1].replace("%", ""))
        assert value == pytest.approx(100 * matrix.values[row][column], abs=0.06)
    page.mouse.move(5, 5)
    assert not page.locator("#tip").is_visible()


def test_the_keyboard_reaches_points_and_cells(visit, data):
    page, section = visit(), heatmaps(data)
    page.locator("g.point").first.focus()
    assert "rows per token" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.locator(".heat > figure > svg").first.focus()
    page.keyboard.press("ArrowRight")
    names = section.panels[0].layers[0].names
    assert f"of expert {names[0]}, also chose {names[1]}:" in page.locator("#tip").inner_text()


def test_a_bar_tells_its_values(visit, data):
    page = visit()
    svg = page.locator(".barchart .bars > svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    view = page.evaluate("document.querySelector('.bars > svg').viewBox.baseVal.width")
    left, right = (float(svg.get_attribute(name)) for name in ("data-left", "data-right"))
    section = next(s for s in data.sections if s.kind == "bars")
    at = left + (5 + 0.5) * (right - left) / len(section.categories)
    page.mouse.move(box["x"] + at / view * box["width"], box["y"] + box["height"] / 2)
    said = page.locator("#tip").inner_text().splitlines()
    assert said[0] == "expert 5"
    for line, series in zip(said[1:], section.groups[0].series, strict=True):
        name, value = line.rsplit(": ", 1)
        assert name == series.name
        assert float(value) == pytest.approx(series.values[5], rel=1e-3)


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_page_never_scrolls_sideways(visit, width):
    page = visit(viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_text_in_charts_stays_readable_on_a_phone(visit):
    page = visit(viewport={"width": 390, "height": 800})
    sizes = page.evaluate(
        """() => [...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height)
        .filter(h => h > 0)"""
    )
    assert len(sizes) > 20
    assert min(sizes) >= 12  # a line of 11 pixels


def test_tables_fit_a_laptop_and_keep_their_rows_names_on_a_phone(visit):
    widths = "() => [...document.querySelectorAll('.scroll')].map(s => [s.clientWidth, s.scrollWidth])"
    for shown, whole in visit(viewport={"width": 1200, "height": 800}).evaluate(widths):
        assert whole <= shown
    page = visit(viewport={"width": 390, "height": 800})
    assert page.evaluate("""() => { const s = [...document.querySelectorAll(".scroll")]
        .find(s => s.scrollWidth > s.clientWidth + 50 && s.querySelector("tbody th"));
        s.scrollLeft = 50; const box = s.querySelector("tbody th").getBoundingClientRect();
        return Math.abs(box.left - s.getBoundingClientRect().left) < 1; }""")


def test_heat_maps_name_their_axes(visit):
    page = visit()
    for where in ("down", "across"):
        assert page.locator(f".heat .{where}").first.inner_text()


def test_labels_of_a_chart_do_not_overlap(visit):
    page = visit()
    overlapping = page.evaluate(
        """() => [...document.querySelectorAll(".charts svg")].flatMap(svg => {
        const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
          p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
          .map(([b]) => a + " | " + b)); })"""
    )
    assert overlapping == []


def test_it_prints_light_and_without_controls(visit):
    page = visit(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert ground(page) == rgb(LIGHT["page"])
    for selector in ("#theme", "nav", ".pick input", "details"):
        assert not page.locator(selector).first.is_visible()
    assert page.locator(".heat > figure > svg").first.is_visible()
    assert page.pdf()[:5] == b"%PDF-"


def test_without_scripts_everything_but_the_choice_of_layer_is_there(visit, data):
    page = visit(java_script_enabled=False)
    assert page.locator("h1").inner_text() == data.headline.text
    assert not page.locator("#theme").is_visible()
    assert not page.locator(".pick").first.is_visible()
    assert page.locator(".heat .cells path").first.is_visible()
    assert page.locator("g.point title").first.text_content().startswith("C2R, device first")
