"""The report in Chromium: it loads nothing, nothing overlaps, legends hide runs, and tooltips show values."""

import json
import shutil
from itertools import combinations

import pytest

from gpt2_jax import report
from gpt2_jax.run.layer_statistics import STATISTICS

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BOXES = """() => [...document.querySelectorAll('main > :is(h1, h2, div, details, p)')].map(element => {
    const box = element.getBoundingClientRect();
    return [element.tagName, box.left, box.top, box.right, box.bottom];
})"""
LABELS = """() => [...document.querySelectorAll('.plotly-graph-div')].map(plot =>
    [...plot.querySelectorAll(
        '.gtitle, .xtitle, .ytitle, .legendtext, .updatemenu-button, .annotation-text, .cbaxis text'
    )].map(label => {
        const box = label.getBoundingClientRect();
        return [label.textContent, box.left, box.top, box.right, box.bottom];
    }))"""


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("needs apt-get install chromium")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def add_details(run):
    """Adds statistics of layers and noise scales to a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:]:
        if "loss" in row:
            row |= {"micro_grad_norm": 3.0, "sequences": 4, "micro_sequences": 2}
            layers = {f"h_{number}": 1.0 / (row["step"] + number) for number in range(12)}
            rows.append({"step": row["step"], "tokens": row["tokens"], "layers": dict.fromkeys(STATISTICS, layers)})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(params=[(1280, 900, 2), (480, 800, 2), (420, 800, 1)], ids=["wide", "narrow", "one run"])
def page(request, browser, runs, tmp_path):
    """The report about one or two runs in a window, with what it logs and asks for."""
    out = tmp_path / "report.html"
    add_details(runs[0])
    width, height, count = request.param
    assert report.main([*map(str, runs[:count]), "--out", str(out)]) == 0
    page = browser.new_page(viewport={"width": width, "height": height})
    page.messages, page.requests = [], []
    page.on("console", lambda message: page.messages.append(message.text))
    page.on("pageerror", lambda error: page.messages.append(str(error)))
    page.on("request", lambda sent: page.requests.append(sent.url))
    page.goto(out.as_uri())
    page.wait_for_selector(".plotly-graph-div .main-svg")
    page.wait_for_timeout(500)
    yield page
    page.close()


def overlaps(a, b):
    return a[1] < b[3] - 1 and b[1] < a[3] - 1 and a[2] < b[4] - 1 and b[2] < a[4] - 1


def test_nothing_is_loaded_and_nothing_overlaps(page):
    assert page.messages == []
    assert len(page.requests) == 1
    assert page.requests[0].startswith("file://")
    width = page.viewport_size["width"]
    boxes = page.evaluate(BOXES)
    assert len(boxes) > 10
    assert max(box[3] for box in boxes) <= width
    assert [pair for pair in combinations(boxes, 2) if overlaps(*pair)] == []
    for labels in page.evaluate(LABELS):
        assert [label for label in labels if label[1] < 0 or label[3] > width] == []
        assert [pair for pair in combinations(labels, 2) if overlaps(*pair)] == []


def test_the_legend_hides_a_curve(page):
    def visible():
        return page.evaluate("() => document.querySelector('.plotly-graph-div').data.map(trace => trace.visible)")

    assert set(visible()) <= {None, True}
    page.locator(".plotly-graph-div").first.locator(".legendtoggle").nth(1).click()
    page.wait_for_timeout(800)  # Plotly waits for a double click
    assert visible()[1] == "legendonly"


def test_tooltips_show_values(page):
    plot = page.locator(".plotly-graph-div").first
    plot.scroll_into_view_if_needed()
    area = plot.locator(".nsewdrag").first.bounding_box()
    step, x, y = page.evaluate("""() => {
        const {calcdata, _fullLayout: {xaxis, yaxis}} = document.querySelector('.plotly-graph-div');
        return [2, xaxis.c2p(calcdata[0][1].x), yaxis.c2p(calcdata[0][1].y)];
    }""")
    page.mouse.move(area["x"] + x + 3, area["y"] + y + 3)
    page.mouse.move(area["x"] + x, area["y"] + y, steps=5)
    page.wait_for_selector(".hoverlayer .hovertext", timeout=5000)
    assert f"{8.0 / step + 1:.4f} at " in plot.locator(".hoverlayer .hovertext").first.text_content()


def test_buttons_change_the_axes(page):
    plot = page.locator(".plotly-graph-div").first
    for label, path, value in (
        ("log", "yaxis.type", "log"), ("log", "yaxis.type", "linear"), ("Updates", "xaxis.title.text", "Updates")
    ):  # fmt: skip
        plot.locator(".updatemenu-button", has_text=label).click()
        page.wait_for_timeout(300)
        layout = "document.querySelector('.plotly-graph-div').layout"
        assert page.evaluate(f"() => {layout}.{path}") == value
    x = page.evaluate("() => [...document.querySelector('.plotly-graph-div').data[0].x].slice(-1)[0]")
    assert x == 40
