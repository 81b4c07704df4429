"""The report in a real browser, without a network, as somebody looks at it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from analysis import evidence, report
from tests import kinds
from tests.browser import chromium, keep

WIDTHS = {"phone": (400, 800), "desk": (1280, 900), "4K": (3840, 2160)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    found = report.make(evidence.gather(kinds.every(folder)), paper=True)
    return report.write(found, folder / "report", ())[0]


def opened(browser: Browser, file: Path, errors: list[str], **options: object) -> Page:
    """Offline; whatever the console or a request complains of goes to `errors`."""
    context = browser.new_context(offline=True, **options)  # type: ignore[arg-type]
    page = context.new_page()
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.goto(file.as_uri())
    return page


def draw_all(page: Page) -> int:
    """As they are scrolled to; how many there are."""
    plots = page.locator(".plot")
    for i in range(plots.count()):
        plots.nth(i).scroll_into_view_if_needed()
        plots.nth(i).locator(".main-svg").first.wait_for()
    return plots.count()


@pytest.mark.parametrize(
    ("width", "scheme"), [("phone", "light"), ("desk", "light"), ("desk", "dark"), ("4K", "dark")]
)
def test_every_figure_is_there_at_every_width(
    browser: Browser, made: Path, width: str, scheme: str
) -> None:
    errors: list[str] = []
    across, up = WIDTHS[width]
    size = {"width": across, "height": up}
    page = opened(browser, made, errors, viewport=size, color_scheme=scheme)
    assert draw_all(page) == 25  # panels: 1, 2, 1, 2, 8 + 2, 1, 4, 1, 2, 1
    assert page.locator("section figure").count() == 10
    for figure in page.locator("section figure").all():
        marks = ".scatterlayer .trace, .heatmaplayer .hm"
        assert figure.locator(marks).count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= across
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    ink = page.locator(".plot .xtitle").first.evaluate(
        "e => e.style.fill || e.getAttribute('style')"
    )
    assert ("rgb(232" in ink) == dark
    assert errors == []
    at = "header" if scheme == "light" else "#spectrum_heatmap"
    page.locator(at).evaluate("e => e.scrollIntoView({behavior: 'instant'})")
    keep(page, f"report_{width}_{scheme}")
    page.context.close()


def test_hover_keys_and_names_tell_the_numbers(browser: Browser, made: Path) -> None:
    errors: list[str] = []
    page = opened(browser, made, errors, viewport={"width": 1280, "height": 900})
    plot = page.locator("#pretrain_loss_vs_rank .plot")
    plot.scroll_into_view_if_needed()
    plot.locator(".main-svg").first.wait_for()
    label = plot.get_attribute("aria-label")
    assert label and "held-out loss (nats per token) against head rank r" in label
    # A hand on the mouse.
    point = plot.locator(".scatterlayer .trace .points path").first
    box = point.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    plot.locator(".hoverlayer .hovertext").wait_for()
    # A hand on the keyboard: read out, and shown.
    plot.focus()
    plot.press("ArrowDown")
    plot.press("ArrowRight")
    said = page.locator("#said").inner_text()
    assert said.startswith("nano-16: ")
    value = float(said.split(": ")[1].split(" at ")[0])
    expected = kinds.loss(16, int(float(said.split(" at ")[1].split(",")[0])), kinds.STEPS[-1])
    assert value == pytest.approx(expected, abs=0.01)
    # Names hide their series in all panels.
    name = page.locator("#pretrain_loss_vs_rank .legend button").first
    before = plot.locator(".scatterlayer .trace").count()
    name.click()
    assert name.get_attribute("aria-pressed") == "false"
    assert plot.locator(".scatterlayer .trace").count() == before - 1
    name.click()
    assert plot.locator(".scatterlayer .trace").count() == before
    # What is reached with the keyboard alone has a name for who does not see it.
    for element in page.locator("button, a[href], [tabindex='0']").all():
        assert element.get_attribute("aria-label") or element.inner_text().strip()
    assert errors == []
    page.context.close()


def test_on_paper_all_figures_are_drawn_and_light(
    browser: Browser, made: Path, tmp_path: Path
) -> None:
    errors: list[str] = []
    page = opened(browser, made, errors, color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(
        "[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))"
    )
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    pdf = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert pdf.startswith(b"%PDF") and len(pdf) > 100_000
    assert errors == []
    page.context.close()


def test_numbers_are_saved_from_the_page_alone(browser: Browser, made: Path) -> None:
    page = opened(browser, made, [])
    with page.expect_download() as download:
        page.locator("#dimension_w_error button.csv").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0] == "panel,series,x,y" and "0,c t paper,500,0.5" in lines
    page.context.close()
