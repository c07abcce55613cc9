"""The report in Chromium without a network: charts, keys, colours, and what a screen reader finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import FAULTS, LOW_CONTRAST, Browser, needs_browser, opened
from conftest import needs
from made_run import make_run

from torchfedrpc.experiments.report.data import RunData
from torchfedrpc.experiments.report.page import make_page, write_report

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"quoted" & \'',
    "🤖 é",
]
CHARTS = {"metric-0", "metric-1", "scores", "classes", "busy", "calls", "stages", "seconds", "traffic"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    needs_browser()
    needs("vl_convert")
    with opened() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return the report of a run with these settings; each is made once."""
    made: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:

        def page(**settings: Any) -> Path:
            if repr(settings) not in made:
                folder = make_run(tmp_path_factory.mktemp("run") / "outputs", monkeypatch, **settings)
                made[repr(settings)] = write_report(folder)
            return made[repr(settings)]

        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_rounds": 1, "ended": False},
        {"client_ids": HOSTILE, "metrics": {"perplexity": 12.5, "bleu": float("nan")}},
        {"num_rounds": 200, "num_clients": 100, "num_workers": 8},
    ],
    ids=["usual", "one round", "hostile", "large"],
)
def test_a_report_is_drawn_without_errors_and_has_what_a_screen_reader_needs(
    browser: Browser, pages: Any, settings: dict[str, Any], scheme: str
) -> None:
    browser.show(pages(**settings), scheme=scheme)
    assert browser.messages() == []
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.run(FAULTS) == []
    for details in browser.driver.find_elements("css selector", "details"):
        browser.run("arguments[0].open = true", details)
    assert browser.run(LOW_CONTRAST) == []


def test_all_charts_have_marks(browser: Browser, pages: Any) -> None:
    browser.show(pages())
    marks = browser.run(
        """
        const charts = [...document.querySelectorAll("figure[data-chart]")];
        return charts.map((chart) => [chart.id, chart.querySelectorAll("svg [class*=mark-] path[d]").length]);
        """
    )
    assert {name for name, _ in marks} == CHARTS
    assert all(number > 1 for _, number in marks), marks


def test_strings_of_users_are_shown_as_they_are_and_run_nothing(browser: Browser, pages: Any) -> None:
    browser.show(pages(client_ids=HOSTILE, metrics={"perplexity": 12.5, "bleu": float("nan")}))
    assert browser.run("return window.hacked") is None
    cells = browser.driver.find_elements("css selector", "#classes tbody th")
    names = [cell.get_property("textContent") for cell in cells]
    assert names == HOSTILE
    assert browser.run("return document.images.length") == 0
    assert "Perplexity by round" in browser.run("return document.body.textContent")


def test_the_policy_of_the_page_stops_scripts_that_are_not_its_own(browser: Browser, pages: Any) -> None:
    browser.show(pages())
    browser.run(
        """
        const script = document.createElement("script");
        script.text = "window.hacked = 1";
        document.body.append(script);
        """
    )
    assert browser.run("return window.hacked") is None
    assert "Content Security Policy" in "".join(browser.messages())


def test_the_tab_key_reaches_all_controls_in_their_order(browser: Browser, pages: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.show(pages())
    expected = browser.run(
        """
        const reached = "a[href], summary, select, button:not(:disabled), [tabindex='0']";
        const isShown = (element) =>
          element.checkVisibility() && !element.closest("details:not([open]) > :not(summary)");
        return [...document.querySelectorAll(reached)].filter(isShown).map((element) => element.outerHTML);
        """
    )
    assert len(expected) > 20
    reached = []
    for _ in expected:
        browser.press(Keys.TAB)
        reached.append(browser.run("return document.activeElement.outerHTML"))
        assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == expected


def test_the_calls_of_another_round_are_chosen_by_keys_and_buttons(browser: Browser, pages: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    def shown() -> list[str]:
        rows = "[...document.querySelectorAll('#calls tbody tr')].filter((row) => !row.hidden)"
        found = browser.run(f"return [...new Set({rows}.map((row) => row.cells[0].textContent))]")
        assert isinstance(found, list)
        return found

    browser.show(pages())
    assert shown() == ["1"]
    chart = browser.run("return document.querySelector('#calls .chart').innerHTML")
    browser.run("document.querySelector('#calls select').focus()")
    browser.press(Keys.DOWN)
    assert shown() == ["2"]
    browser.driver.find_elements("css selector", "#calls button")[1].click()
    assert shown() == ["3"]
    assert browser.run("return document.querySelector('#calls .chart').innerHTML") != chart
    assert browser.messages() == []


def test_a_printed_report_is_light_and_has_no_controls(browser: Browser, pages: Any) -> None:
    browser.show(pages(), scheme="dark", media="print")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return document.querySelector('nav').checkVisibility()") is False
    assert browser.run(LOW_CONTRAST) == []


def test_a_narrow_window_needs_no_scrolling_sideways(browser: Browser, pages: Any) -> None:
    settings = {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", settings)
    browser.show(pages())
    width = browser.run("return document.documentElement.scrollWidth")
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 380


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_series_are_seen_on_the_page(browser: Browser, pages: Any, scheme: str) -> None:
    """Non-text contrast of WCAG's level AA: at least 3."""
    browser.show(pages(), scheme=scheme)
    browser.run(
        """
        document.body.innerHTML = "";
        for (const name of ["series-1", "series-2", "series-3", "series-4", "series-5", "alert", "good"]) {
          const text = document.createElement("p");
          text.textContent = name;
          text.style = `color: var(--${name}); background: var(--surface); font: bold 24px sans-serif`;
          document.body.append(text);
        }
        """
    )
    assert browser.run(LOW_CONTRAST) == []


def test_a_report_without_charts_has_its_tables_open(browser: Browser, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = make_run(tmp_path / "outputs", monkeypatch)
    page = tmp_path / "tables.html"
    page.write_text(make_page(RunData.read(folder), None), encoding="utf-8")
    browser.show(page)
    assert browser.run(FAULTS) == []
    assert browser.run("return document.scripts.length") == 0
    assert all(table.is_displayed() for table in browser.driver.find_elements("css selector", "table"))
    assert "pip install" in browser.run("return document.body.innerText")
