"""Pages in a real browser: nothing in the console, nothing that axe objects to, none wider than its screen.

Skips without Chromium, selenium and axe (``pip install -e '.[browser]'``).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_reports import compress_report, full_analysis, full_report, sweep_report, validate_report

from hap_onnx.report import FrozenNode
from hap_onnx.report.html import render_html

selenium = pytest.importorskip("selenium")
axe_package = pytest.importorskip("axe_selenium_python")

from selenium import webdriver  # noqa: E402 - what follows needs it
from selenium.webdriver.chrome.service import Service  # noqa: E402

PATIENCE = 600
"""Seconds for axe on the longest page; alone it takes a few, on a busy machine minutes."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="no Chromium with chromedriver"),
]

LONG = "/a/very/long/path/" + "x" * 300
PAGES = {
    "plain": lambda: compress_report(),
    "full": lambda: full_report(8, 12),
    "deep": lambda: full_report(120, 240),
    "long names": lambda: full_report(
        2,
        3,
        model=LONG,
        output=LONG,
        versions={LONG: LONG},
        seconds={LONG: 1.0},
        frozen=(FrozenNode(LONG, LONG),),
    ),
    "analyze": lambda: full_analysis(8, 12),
    "sweep": lambda: sweep_report(),
    "validate": lambda: validate_report(),
}
# Charts are hidden from readers of the page, which get their frame; rows of a table are all alike, and many.
RUN_AXE = """
const done = arguments[0];
const many = ["svg", "tbody tr:nth-child(n+4)", "li:nth-child(n+20)"];
axe.run({exclude: many}, {resultTypes: ["violations"]}).then(
  found => done(found.violations.map(one => one.id + ": " + one.nodes.map(node => node.html).slice(0, 3))),
  error => done([String(error)]));
"""
# Whether text of the chart that is shown leaves the chart: [the text, ...].
CUT_OFF = """
return [...document.querySelectorAll("svg")].filter(svg => svg.checkVisibility()).flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map(text => text.textContent);
});
"""
SMALLEST_LETTERS = """
return Math.min(...[...document.querySelectorAll("svg")].filter(svg => svg.checkVisibility()).flatMap(svg => {
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return [...svg.querySelectorAll("text")].map(text => parseFloat(getComputedStyle(text).fontSize) * scale);
}), 99);
"""


# Options of commands that a narrow screen breaks at their hyphens: [the word, ...].
BROKEN_WORDS = """
return [...document.querySelectorAll("pre span")].filter(word => word.textContent.length < 30
  && word.offsetHeight > 1.5 * parseFloat(getComputedStyle(word).lineHeight)).map(word => word.textContent);
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(PATIENCE)
    driver.command_executor.client_config.timeout = PATIENCE + 30  # the client would give up after 120
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def axe() -> str:
    folder = Path(axe_package.__file__).parent
    return next(folder.rglob("axe.min.js")).read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "page.html"
    path.write_text(render_html(PAGES[request.param]()), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_a_page_can_be_read(browser: webdriver.Chrome, axe: str, page: Path, width: int, scheme: str) -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(CUT_OFF) == []
    assert browser.execute_script(BROKEN_WORDS) == []
    assert browser.execute_script(SMALLEST_LETTERS) >= 10.5
    color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert color == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
    browser.execute_script("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_script(axe)
    assert browser.execute_async_script(RUN_AXE) == []
    assert browser.get_log("browser") == []


def test_the_page_policy_stops_scripts(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Were a name ever to get through as a tag, it would still do nothing."""
    path = tmp_path / "page.html"
    text = render_html(validate_report())
    path.write_text(
        text.replace("</body>", "<script>document.title = 'ran'</script></body>"), encoding="utf-8"
    )
    browser.get(path.as_uri())
    assert browser.title == "Validation report: b.onnx"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
