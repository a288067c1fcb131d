"""The page in a real browser: Debian's Chromium, driven by Playwright without a window.

Skipped where there is no Chromium, unless CONDU_REQUIRE_BROWSER=1 says that there has to be one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from written_run import results, write_run

from condu.report.page import write_page
from condu.tasks.mtil import ORDERS

ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
EVIL = "<script>window.ran = true</script>"
LONG = "a task whose name is much longer than a phone is wide, " * 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("CONDU_REQUIRE_BROWSER") == "1":
            pytest.fail("CONDU_REQUIRE_BROWSER=1, but there is no chromium")
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three seeds, names that are a nuisance, everything that a page can show."""
    folder = tmp_path_factory.mktemp("report")
    tasks = ("hues", EVIL, LONG, "strokes")
    runs = [
        write_run(folder / f"seed {seed}", results(tasks=tasks, seed=seed)) for seed in (1, 2, 3)
    ]
    write_page(runs, folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def mtil(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two configurations over MTIL, so with published rows."""
    folder = tmp_path_factory.mktemp("mtil")
    runs = [
        write_run(
            folder / kind,
            results(benchmark="mtil", tasks=ORDERS["I"], fusion={"rescale": kind}),
            features=None,
        )
        for kind in ("global", "tensor_mean")
    ]
    write_page(runs, folder / "report.html")
    return (folder / "report.html").as_uri()


Show = Callable[..., Page]


class Watched:
    """A page, and what went wrong or was asked for on it."""

    def __init__(self, browser: Browser, address: str, *, width: int, scheme: str) -> None:
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_default_timeout(10_000)
        self.page.goto(address)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Show]:
    opened: list[Watched] = []

    def show(address: str, *, width: int = 1280, scheme: str = "light") -> Page:
        opened.append(Watched(browser, address, width=width, scheme=scheme))
        return opened[-1].page

    yield show
    for watched in opened:
        address = watched.page.url.partition("#")[0]
        watched.page.close()
        assert watched.said == []
        assert watched.requests == [address]


def tip(page: Page) -> str:
    return page.locator("#tip.shown").inner_text()


def test_it_renders_every_section_and_names_stay_text(open_page: Show, report: str) -> None:
    page = open_page(report)
    headings = page.locator("section > h2").all_inner_texts()
    assert len(headings) == 9
    assert page.evaluate("window.ran") is None
    assert page.locator(".heat thead th", has_text=EVIL).count() > 0
    for svg in page.locator("svg:visible").all():
        box = svg.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 20


def test_tables_sort_in_themselves(open_page: Show, mtil: str) -> None:
    page = open_page(mtil)
    table = page.locator("table.list", has=page.locator(".measured")).first

    def column(body: str, name: str) -> list[str]:
        names = [text.strip() for text in table.locator("thead th").all_inner_texts()]
        place = names.index(name)
        rows = table.locator(f"tbody.{body} tr:not(.divider)").all()
        return [row.locator("th, td").nth(place).inner_text() for row in rows]

    def numbers(body: str) -> list[float]:
        cells = [cell for cell in column(body, "Transfer") if cell != "–"]
        return [float(cell.replace("−", "-")) for cell in cells]

    before = {body: sorted(column(body, "method")) for body in ("measured", "published")}
    header = table.locator("thead th", has_text="Transfer")
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    for body in before:
        assert numbers(body) == sorted(numbers(body), reverse=True)
    assert column("published", "Transfer")[-1] == "–"  # what was not published comes last
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    for body in before:
        assert numbers(body) == sorted(numbers(body))
    assert column("published", "Transfer")[-1] == "–"
    table.locator("thead th", has_text="method").locator("button").click()
    assert header.get_attribute("aria-sort") is None
    assert column("measured", "method") == sorted(column("measured", "method"))
    for body, methods in before.items():
        assert sorted(column(body, "method")) == methods
    assert table.locator("tbody.published tr").first.get_attribute("class") == "divider"


def test_tips_under_the_pointer(open_page: Show, report: str) -> None:
    page = open_page(report)
    cell = page.locator("#matrices .heat td.unseen").first
    cell.hover()
    text = tip(page)
    assert text.startswith(f"{cell.inner_text()} % on {EVIL} after learning hues, (")
    assert text.endswith("not learnt yet")
    page.locator("#forgetting [data-tip]").first.hover()
    assert "after 1 task:" in tip(page)
    page.locator("#features .prototype").first.hover()
    assert "(hues)" in tip(page)
    page.locator("h1").hover()
    assert page.locator("#tip.shown").count() == 0
    box = page.locator("#matrices .heat td:visible").last
    box.hover()
    shown = page.locator("#tip").bounding_box()
    assert shown is not None
    assert shown["x"] >= 0
    assert shown["x"] + shown["width"] <= 1280


def test_figures_are_read_out_by_keys(open_page: Show, report: str) -> None:
    page = open_page(report)
    table = page.locator("#matrices .heat").first
    table.focus()
    page.keyboard.press("ArrowRight")
    assert "on hues after learning hues" in tip(page)
    page.keyboard.press("ArrowDown")
    assert f"on hues after learning {EVIL}" in tip(page)
    page.keyboard.press("ArrowRight")
    assert f"on {EVIL} after learning {EVIL}" in tip(page)
    assert table.locator("td.at").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#tip.shown, .at").count() == 0
    page.locator("#fusion svg").first.focus()
    page.keyboard.press("ArrowRight")
    assert "hues, after 1 task" in tip(page)
    page.keyboard.press("Tab")
    assert page.locator("#tip.shown, .at").count() == 0


COLOUR = "e => getComputedStyle(e).color"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_task_has_one_colour_in_legends_curves_and_map(
    open_page: Show, report: str, scheme: str
) -> None:
    page = open_page(report, scheme=scheme)
    legends = page.locator(".legend.tasks").all()
    assert len(legends) == 3  # of the curves, of the map and of what fusion keeps
    colours = [[key.evaluate(COLOUR) for key in each.locator("li").all()] for each in legends]
    assert len(set(colours[0])) == 4
    assert colours[0] == colours[1] == colours[2]
    for section in ("#forgetting", "#fusion"):
        lines = page.locator(f"{section} svg").first.locator("g").all()
        assert [line.evaluate(COLOUR) for line in lines] == colours[0]
    clouds = page.locator(".map g").all()
    fills = "e => getComputedStyle(e.firstElementChild).fill"
    assert [cloud.evaluate(fills) for cloud in clouds] == colours[0] * 2  # images, then prototypes


def test_a_phone_shows_names_on_the_map_that_can_be_read(open_page: Show, report: str) -> None:
    page = open_page(report, width=360)
    names = page.locator(".map text").all()
    assert len(names) == 4
    for name in names:
        box = name.bounding_box()
        assert box is not None
        assert box["height"] >= 12
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


def test_dark_and_light(open_page: Show, report: str) -> None:
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    for scheme, bright in (("light", True), ("dark", False)):
        page = open_page(report, scheme=scheme)
        assert (page.evaluate(brightness) > 128) == bright
        button = page.locator("#theme")
        assert button.inner_text() == ("Dark" if bright else "Light")
        button.click()
        assert (page.evaluate(brightness) > 128) != bright
        assert button.inner_text() == ("Light" if bright else "Dark")


@pytest.mark.parametrize("which", ["report", "mtil"])
def test_a_phone_never_scrolls_sideways(
    open_page: Show, request: pytest.FixtureRequest, which: str
) -> None:
    page = open_page(request.getfixturevalue(which), width=360)
    for details in page.locator("summary").all():
        if details.locator("..").get_attribute("open") is None:
            details.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    # what is wider scrolls within itself
    assert page.locator("#matrices .scroll").first.evaluate("e => e.clientWidth") < 360


@pytest.mark.parametrize("which", ["report", "mtil"])
def test_a_phone_shows_transfer_average_and_last(
    open_page: Show, request: pytest.FixtureRequest, which: str
) -> None:
    page = open_page(request.getfixturevalue(which), width=360)
    table = page.locator("table.list", has=page.locator(".measured")).first
    cell = "td:nth-child(4)"  # after the name, Transfer and Average
    for place in ("thead th:nth-child(4)", f".measured tr:last-child {cell}"):
        box = table.locator(place).bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 360
    around = table.locator("..")
    assert around.evaluate("e => e.scrollWidth > e.clientWidth")  # so there is more to see
    assert "gradient" in around.evaluate("e => getComputedStyle(e).backgroundImage")
    names = table.locator(".measured th").first
    before = names.bounding_box()
    around.evaluate("e => e.scrollLeft = 1000")
    assert names.bounding_box() == before


def test_a_phone_shows_what_the_divider_says(open_page: Show, mtil: str) -> None:
    page = open_page(mtil, width=360)
    words = page.locator("#results .divider span").first
    around = words.locator("xpath=ancestor::div[1]")
    for left in (0, 1000):
        around.evaluate(f"e => e.scrollLeft = {left}")
        box = words.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    assert "not measured here" in words.inner_text()


def test_paper_shows_everything(open_page: Show, report: str) -> None:
    page = open_page(report, scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert not page.locator("nav").is_visible()
    paper = page.evaluate("getComputedStyle(document.body).getPropertyValue('--paper')")
    assert paper == "#fbfaf7"  # light, whatever the screen is
