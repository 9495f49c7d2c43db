# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium for tests of the web page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver


@contextmanager
def chromium(width: int = 1280, height: int = 1150) -> Iterator[webdriver.Chrome]:
    """Context with a browser; skips the test, with the reason, when there is none."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def keep(browser: webdriver.Chrome, name: str) -> None:
    """Save the whole page in the folder that ``DYNAMO_MIGRATE_SCREENSHOTS`` names, if it does."""
    if folder := os.environ.get("DYNAMO_MIGRATE_SCREENSHOTS"):
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(1280, height + 140)  # The window's own bars take some.
        browser.save_screenshot(str(Path(folder) / name))
