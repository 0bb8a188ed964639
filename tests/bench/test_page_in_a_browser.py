"""The page of a report as people use it, in a real browser: by pointer and by keyboard, on wide screens and phones."""

import shutil

import pytest
from suites import run_local, write_suite

from flowverify.bench.report import write_report
from flowverify.bench.suite import read_suite

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright (pip install playwright) and a Chromium on the path"
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path: chromium or google-chrome")

SUITE = """
name: looked at
chunk: 6
data: {name: digits, index: "0:60"}
models: digits-fc3
runs:
  - {methods: fine-tuned, bounds: [ibp, crown]}
  - {methods: fine-tuned, bounds: ibp, radii: [0.005, 0.01]}
"""
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    run_local(read_suite(write_suite(folder, SUITE)), folder / "out")
    return write_report(folder / "out")[0]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def look(browser, written):
    """Opens the page; at the end nothing was logged, no error was thrown, and nothing but the page was asked for."""
    pages, heard = [], []

    def opened(size=WIDE, scheme="light"):
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(written.as_uri())
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert heard == [written.as_uri()] * len(pages)


def column(page, number):
    return page.locator(f"#rows tr > :nth-child({number})").all_inner_texts()


PICTURE, IMAGE, TASK, STATUS, RADIUS, MARGIN = 1, 2, 5, 6, 7, 9


def test_sorts_by_every_heading(look):
    page = look()
    assert page.locator("#rows tr").count() == 50 and "240 of 240 results; 50 shown" in page.inner_text("#count")
    page.get_by_role("button", name="radius (pixels)").click()
    radii = [float(text) for text in column(page, RADIUS)]
    assert radii == sorted(radii) and len(set(radii)) > 2
    page.get_by_role("button", name="radius (pixels)").click()
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    falling = [float(text) for text in column(page, RADIUS)]
    assert falling == sorted(falling, reverse=True) and falling[0] > radii[-1] * 0.99
    page.get_by_role("button", name="margin", exact=True).click()
    page.get_by_role("button", name="Show all 240").click()
    margins = [float(text) if text else None for text in column(page, MARGIN)]
    known = [margin for margin in margins if margin is not None]
    assert known == sorted(known) and margins[: len(known)] == known and None in margins  # of misclassified images


def test_filters_by_task_status_margin_radius_and_time(look):
    page = look()
    page.select_option("select[name=status]", "misclassified")
    assert set(column(page, STATUS)) == {"misclassified"}
    page.get_by_role("button", name="Show all again").click()
    page.locator("#count", has_text="240 of 240 results").wait_for()
    page.select_option("select[name=task]", label="digits-fc3: fine-tuned, ibp (W1, l1), radius 0.01")
    assert set(column(page, TASK)) == {"digits-fc3: fine-tuned, ibp (W1, l1), radius 0.01"}
    page.fill("input[name=margin-from]", "0")
    assert set(column(page, STATUS)) == {"certified"}
    page.fill("input[name=margin-from]", "")
    page.select_option("select[name=task]", "")
    page.fill("input[name=radius-from]", "0.02")
    page.fill("input[name=radius-to]", "0.05")
    found = [float(text) for text in column(page, RADIUS)]
    assert found and all(0.02 <= radius <= 0.05 for radius in found)
    page.fill("input[name=time-to]", "0")
    assert "0 of 240" in page.inner_text("#count")


def test_an_image_is_two_clicks_away_with_its_worst_case_and_the_flow(look):
    page = look()
    page.locator("#tasks a[data-task]").nth(1).click()  # one: the images of a task
    assert set(column(page, TASK)) == {"digits-fc3: fine-tuned, crown (W1, l1), largest radius"}
    page.locator("#rows tr").nth(4).click()  # two: one of them
    dialog = page.locator("dialog[open]")
    assert "Image 4 of digits test" in dialog.inner_text()
    assert dialog.locator("figure").count() == 3 and dialog.locator("svg polygon").count() > 0
    assert "proven of the whole ball: at least" in dialog.inner_text()
    assert "First-order worst case within" in dialog.inner_text()
    sizes = page.evaluate("[...document.querySelectorAll('dialog img')].map((one) => one.naturalWidth)")
    assert sizes == [8, 8, 8]
    page.locator("#share").fill("30")
    assert page.locator("#other").evaluate("(one) => one.style.opacity") == "0.3"
    page.get_by_role("button", name="Next").click()
    assert "Image 5 of digits test" in dialog.inner_text()
    assert dialog.locator("#same tr").count() == 4
    dialog.locator("#same button").nth(2).click()
    assert "radius 0.005" in dialog.locator("#facts").inner_text()


def test_the_last_image_is_not_further_away_than_the_first(look):
    page = look()
    page.get_by_role("button", name="Show all 240").click()
    page.locator("#rows tr").last.click()
    assert "Image 59 of digits test" in page.locator("dialog[open]").inner_text()


def test_curves_are_switched_off_and_read_out(look):
    page = look()
    chart = page.locator("svg[data-chart]").first
    curve = chart.locator("g[data-curve='0']")
    assert curve.is_visible()
    page.locator("#curve-0-0").uncheck()
    assert not curve.is_visible() and chart.locator("g[data-curve='1']").is_visible()
    page.locator("#curve-0-0").check()
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.105, box["y"] + box["height"] / 2)
    text = page.locator("output[data-curve='0']").first.inner_text()
    assert text.endswith("of 60)") and text.startswith("9")  # near radius 0, those classified right
    assert "At radius" in page.locator(".read").first.inner_text()


def test_everything_is_reached_by_the_keyboard(look):
    page = look()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#rows .open").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog[open]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert page.evaluate("document.activeElement.className") == "open"
    page.locator("thead button").first.focus()
    page.keyboard.press("Space")
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.locator("svg[data-chart]").first.focus()
    page.keyboard.press("ArrowRight")
    first = page.locator(".read").first.inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator(".read").first.inner_text() != first


CONTRAST = """() => {
  const part = (value) => { value /= 255; return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; };
  const light = (colour) => { const [r, g, b] = colour.match(/[0-9.]+/g).map(Number);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b); };
  const ground = (one) => { while (one) { const colour = getComputedStyle(one).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour; one = one.parentElement; } return "rgb(255, 255, 255)"; };
  const names = "h1, h2, h3, p, a, li, td, th, caption, label, legend, figcaption, button, input, select, span, pre";
  const wanted = [...document.querySelectorAll(names)];
  const low = [];
  for (const one of wanted) {
    if (!one.checkVisibility() || one.className === "skip") continue;
    const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${one.tagName} ${one.className} ${one.textContent.slice(0, 20)}`);
  }
  for (let k = 0; k < 8; k += 1) {
    const line = document.querySelector(`.line.c${k}`);
    if (!line) continue;
    const [a, b] = [light(getComputedStyle(line).stroke), light(ground(document.body))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 3) low.push(`curve ${k}`);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(look, scheme):
    page = look(scheme=scheme)
    bright = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert bright == (scheme == "light")
    assert page.evaluate(CONTRAST) == []
    page.locator("#rows tr").first.click()
    assert page.evaluate(CONTRAST) == []


def test_a_phone_shows_it_without_scrolling_sideways(look):
    page = look(size=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#rows .open").first.click()
    dialog = page.locator("dialog[open]")
    assert dialog.bounding_box()["width"] <= 390 and dialog.locator("figure").count() == 3
    assert page.evaluate("document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth")
    page.get_by_role("button", name="Close").click()
    assert dialog.count() == 0
