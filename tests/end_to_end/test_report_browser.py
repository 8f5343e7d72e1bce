"""The report in a browser: mouse, keyboard, search, permalinks, colours, and no complaints.

Skipped where Chromium, its driver or selenium is missing. Set REPORT_SCREENSHOTS to a folder to
keep the pictures that the last tests take.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from precision_compiler.report.html import write_report
from tests.made_plans import HOSTILE, big_plan, with_names
from tests.models import planned

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
Service = pytest.importorskip("selenium.webdriver.chrome.service").Service

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="there is no chromium with its chromedriver"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --window-size=1280,800 "
    "--disable-background-networking --disable-component-update --disable-sync"
)
SITE = "blocks.1.fc.wgrad"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(with_names(planned("gpt"), HOSTILE), path, "plan.json")
    return path.as_uri()


@pytest.fixture
def page(driver: Any, address: str) -> Iterator[Any]:
    """The report, freshly opened; at the end the console must be empty."""
    driver.get("about:blank")
    driver.get(address)
    yield driver
    assert driver.get_log("browser") == []


def cell(page: Any, site: str) -> Any:
    return page.find_element("css selector", f"#grid button[title='{site}']")


def panel(page: Any) -> str:
    return str(page.find_element("id", "panel").text)


def shown(page: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#grid button')].filter(b => b.checkVisibility())"
    )
    return [str(button.get_attribute("title")) for button in page.execute_script(script)]


def focused(page: Any) -> Any:
    return page.switch_to.active_element


def press(page: Any, *keys: str) -> None:
    focused(page).send_keys(*keys)


def test_click_on_a_cell_explains_it(page: Any) -> None:
    cell(page, SITE).click()
    choice = planned("gpt").sites[SITE]
    text = panel(page)
    assert SITE in text
    assert choice.reason in text
    assert all(name in text for name in choice.options)
    assert "chosen" in text
    assert page.current_url.endswith(f"#site={SITE}")


def test_keyboard_reaches_explains_and_returns(page: Any) -> None:
    for _ in range(40):
        press(page, Keys.TAB)
        if focused(page).get_attribute("data-site"):
            break
    first = focused(page)
    assert first.tag_name == "button"
    press(page, Keys.ARROW_RIGHT)
    second = focused(page)
    assert second != first
    press(page, Keys.ENTER)
    assert second.get_attribute("title") in panel(page)
    assert focused(page).get_attribute("id") == "panel-title"
    press(page, Keys.ESCAPE)
    assert focused(page) == second
    assert "No site selected" in panel(page)
    assert "#" not in page.current_url


def test_points_are_reached_by_keyboard(page: Any) -> None:
    point = page.find_element("css selector", "#plot path[tabindex='0']")
    page.execute_script("arguments[0].focus()", point)
    press(page, Keys.ARROW_RIGHT)
    name = focused(page).get_attribute("aria-label")
    site, _, shares = name.rpartition(": ")
    lines = page.find_elements("css selector", "#plot .label tspan")
    assert [line.text for line in lines] == [site, shares]
    press(page, Keys.ENTER)
    assert site in panel(page)


def test_search_narrows_grid_and_chart(page: Any) -> None:
    search = page.find_element("id", "glob")
    points = len(page.find_elements("css selector", "#plot path[data-site]"))
    search.send_keys("blocks.*.fc.wgrad")
    assert shown(page) == ["blocks.0.fc.wgrad", "blocks.1.fc.wgrad"]
    sites = len(planned("gpt").sites) + 1
    assert page.find_element("id", "matches").text == f"2 of {sites} sites"
    assert len(page.find_elements("css selector", "#plot path[data-site]")) <= 2 < points
    search.clear()
    search.send_keys("no such site")
    assert shown(page) == []
    assert page.find_element("id", "matches").text == f"0 of {sites} sites"


def test_permalink_opens_a_site_and_back_returns(page: Any, address: str) -> None:
    page.get(f"{address}#site={SITE}")
    page.refresh()
    assert SITE in panel(page)
    assert cell(page, SITE).get_attribute("aria-current") == "true"
    page.execute_script("location.hash = '#site=blocks.0.fc.wgrad'")
    assert "blocks.0.fc.wgrad" in panel(page)
    page.back()
    assert SITE in panel(page)
    page.execute_script("location.hash = '#site=gone%'")
    assert "no site gone%" in panel(page)


def test_flag_leads_to_its_site(page: Any) -> None:
    page.find_element("css selector", "details[data-flag] summary").click()
    link = page.find_element("css selector", "details .flags a")
    assert link.text.startswith("</script>")
    link.click()
    assert "<img src=x onerror=alert(1)>" in panel(page)
    assert page.find_elements("css selector", "img") == []


def test_dark_and_light(page: Any) -> None:
    color = "return getComputedStyle(document.body).backgroundColor"
    for scheme in ("dark", "light"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        page.refresh()
        before = page.execute_script(color)
        assert (before == "rgb(255, 255, 255)") == (scheme == "light")
        page.find_element("id", "theme").click()
        assert page.execute_script(color) != before


def test_nothing_is_requested(page: Any) -> None:
    page.get_log("performance")
    page.refresh()
    log = "".join(entry["message"] for entry in page.get_log("performance"))
    assert "requestWillBeSent" in log  # the page itself
    assert "http://" not in log.replace("http://www.w3.org", "")
    assert "https://" not in log


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_page_fits_the_screen(page: Any, tmp_path: Path, width: int, height: int) -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.refresh()
    sites = planned("gpt").sites
    vetoed = [
        name
        for name, choice in sites.items()
        if any(option.veto for option in choice.options.values())
    ]
    cell(page, (vetoed or [SITE])[0]).click()
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    chips = page.find_elements("css selector", "#panel .chip")
    assert all(chip.size["height"] < 30 for chip in chips)  # on one line
    picture = Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path)) / f"report_{width}.png"
    assert page.save_screenshot(str(picture))
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("names", [(), ("", "__proto__", "2", "1", "constructor", "a.0.fprop")])
def test_awkward_names_have_cells(driver: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    plan = big_plan(sites=12, nodes=0)
    choices = plan.sites.values()
    path = tmp_path / "report.html"
    write_report(replace(plan, sites=dict(zip(names, choices, strict=False))), path)
    driver.get(path.as_uri())
    for name, button in zip(
        names, driver.find_elements("css selector", "#grid button"), strict=True
    ):
        button.click()
        assert panel(driver).startswith(name)
        assert "variance share" in panel(driver)
    assert driver.get_log("browser") == []


def test_large_plan_is_complete_soon(driver: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(big_plan(sites=4000, nodes=10_000), path)
    driver.get(path.as_uri())
    script = "return performance.timing.loadEventEnd - performance.timing.navigationStart"
    took = driver.execute_script(script)
    print(f"loaded in {took} ms")
    assert 0 < took < 10_000  # 2 s on an idle machine; tests share theirs
    assert driver.execute_script("return document.readyState") == "complete"
    assert len(driver.find_elements("css selector", "#grid button")) == 4000
    assert driver.get_log("browser") == []


def test_ranges_of_a_site_are_drawn_against_its_formats(page: Any) -> None:
    plan = with_names(planned("gpt"), HOSTILE)
    choice = plan.sites[SITE]
    assert len(choice.ranges) == 2
    cell(page, SITE).click()
    figures = page.find_elements("css selector", "#panel figure.range")
    assert len(figures) == len(choice.ranges)
    for figure, shown_range in zip(figures, choice.ranges, strict=True):
        assert shown_range.tensor in figure.text
        bars = figure.find_elements("css selector", ".bars rect")
        assert len(bars) == len(shown_range.shares)
        tallest = max(bars, key=lambda bar: float(bar.get_attribute("height")))
        most = shown_range.shares.index(max(shown_range.shares))
        assert bars.index(tallest) == most
        lines = figure.find_elements("css selector", ".reach line")
        assert len(lines) == len(choice.options)
        (chosen,) = figure.find_elements("css selector", ".reach line.ours")
        assert chosen == lines[list(choice.options).index(choice.format)]
        ends = {
            format: (float(line.get_attribute("x1")), float(line.get_attribute("x2")))
            for format, line in zip(choice.options, lines, strict=True)
        }
        assert ends["fp32"][0] <= ends["bf16"][0] <= ends["fp16"][0]
        first = float(bars[0].get_attribute("x"))
        assert ends["fp32"][0] <= first  # float32 holds all of it
