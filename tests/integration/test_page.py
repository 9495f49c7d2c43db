# SPDX-License-Identifier: Apache-2.0
"""The web page in a browser, over workers without engines: on a phone, in the dark, and when its server is gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from components.client import Workers
from components.dashboard.sample import Sampler
from components.dashboard.server import Page, serve
from components.migration.messages import Mode, MoveRecord
from components.serve.servers import free_port
from tests import fake_workers
from tests.fake_workers import info_of
from tests.integration.browser import chromium, keep

pytestmark = pytest.mark.integration
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}


class Server:
    """The page's server on one port, in a thread, which can be stopped and started."""

    def __init__(self, interval_s: float = 0.2) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self._interval_s = interval_s
        self.start()

    def start(self) -> None:
        self._up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()), daemon=True)
        self._thread.start()
        assert self._up.wait(20)

    async def _run(self) -> None:
        cluster = fake_workers.Workers(2)
        cluster.engines[1].table = [info_of("a-request-with-a-long-name"), info_of("b")]
        for engine in range(6):
            cluster.add(10 + engine).table = [info_of(f"r{engine}")]
        cluster.lost = {2}
        record = MoveRecord("r0", "00000001", "0000000a", Mode.LIVE, ok=False, reason="the target has no room " * 6)
        cluster.states[1].note(record, Mode.LIVE)
        sampler = Sampler(Workers(cluster), self._interval_s)
        await sampler.once()
        sampling = asyncio.ensure_future(sampler.run())
        runner = await serve(Page(sampler), "127.0.0.1", self.port)
        self._end = asyncio.Event()
        self._up.set()
        await self._end.wait()
        sampling.cancel()
        await runner.cleanup()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as browser:
        yield browser


def wait(browser: webdriver.Chrome) -> WebDriverWait[webdriver.Chrome]:
    return WebDriverWait(browser, 30)


def rows(browser: webdriver.Chrome) -> int:
    return len(browser.find_elements(By.CSS_SELECTOR, "#workers tr"))


def said(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "error").text


def test_a_phone_shows_everything_without_scrolling_to_the_side(browser: webdriver.Chrome, server: Server) -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        browser.get(server.url)
        wait(browser).until(lambda b: rows(b) == 9 and b.find_elements(By.CSS_SELECTOR, "#timeline rect"))
        shown = "return document.querySelector(arguments[0]).checkVisibility()"
        wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert inner == PHONE["width"] and wide <= inner
        for part in ("#summary", "#tokens canvas", "#workers", "#timeline svg", "#moves"):
            # In one step: the next sample replaces the elements.
            assert browser.execute_script(shown, part), part
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_has_the_colours_that_the_user_prefers(browser: webdriver.Chrome, server: Server, scheme: str) -> None:
    def light(of: str) -> float:
        colour = f"return getComputedStyle(document.querySelector('section')).{of}.match(/\\d+/g).slice(0, 3)"
        return sum(int(part) for part in browser.execute_script(colour)) / (3 * 255)

    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(server.url)
    wait(browser).until(lambda b: rows(b) == 9)
    paper, ink = light("backgroundColor"), light("color")
    assert (ink - paper > 0.5) if scheme == "dark" else (paper - ink > 0.5)
    keep(browser, f"page-{scheme}.png")


def test_the_last_state_is_there_before_the_next_sample(browser: webdriver.Chrome) -> None:
    server = Server(interval_s=3600)
    browser.get(server.url)
    wait(browser).until(lambda b: rows(b) == 9)
    assert "worker 00000002 is missing" in said(browser)
    server.stop()


def test_a_lost_connection_is_said_and_what_was_seen_stays(browser: webdriver.Chrome, server: Server) -> None:
    browser.get(server.url)
    wait(browser).until(lambda b: rows(b) == 9)
    server.stop()
    wait(browser).until(lambda b: "connection lost" in said(b))
    assert "this is how it was at" in said(browser)
    assert rows(browser) == 9
    server.start()
    wait(browser).until(lambda b: "connection lost" not in said(b))
    assert "lost" not in browser.find_element(By.TAG_NAME, "body").get_attribute("class")
