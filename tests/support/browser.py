"""Chromium without a window, by selenium: console, colour scheme, keys, and checks of a page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import needs

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
DRIVER = shutil.which("chromedriver") or "/usr/bin/chromedriver"


def needs_browser() -> None:
    """Skip a test without Chromium; in continuous integration fail it, as `needs` does."""
    needs("selenium")
    if not (Path(CHROMIUM).exists() and Path(DRIVER).exists()):
        if os.environ.get("CI"):
            pytest.fail("chromium and chromium-driver are not installed: apt-get install chromium chromium-driver")
        pytest.skip("needs chromium and chromium-driver")


@contextmanager
def opened(*, width: int = 1200, height: int = 900) -> Iterator[Browser]:
    """Yield a browser that cannot reach the network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Chromium leaves files here, and listens at a path of up to 107 characters, which a test's own folder may exceed.
    with TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        driver = webdriver.Chrome(options=options, service=Service(DRIVER, env={**os.environ, "TMPDIR": folder}))
        try:
            yield _offline(driver)
        finally:
            driver.quit()


def _offline(driver: Any) -> Browser:
    driver.set_script_timeout(30)
    driver.execute_cdp_cmd("Network.enable", {})
    conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)
    return Browser(driver)


class Browser:
    """An open browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def show(self, page: Path, *, scheme: str = "light", media: str = "screen") -> None:
        """Open a page, and wait until its charts are drawn."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self.driver.get(page.as_uri())
        self.driver.execute_async_script(
            """
            const done = arguments[0];
            const isDrawn = () => !window.vegaEmbed || "drawn" in document.documentElement.dataset;
            const check = () => isDrawn() ? done() : setTimeout(check, 20);
            check();
            """
        )

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(script, *arguments)

    def messages(self) -> list[str]:
        """Return the messages on the console since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def press(self, *keys: str) -> None:
        """Press keys, one after another."""
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.driver)
        for key in keys:
            actions.send_keys(key)
        actions.perform()


_HERE = Path(__file__).parent
LOW_CONTRAST = (_HERE / "low_contrast.js").read_text(encoding="utf-8")
FAULTS = (_HERE / "page_faults.js").read_text(encoding="utf-8")
