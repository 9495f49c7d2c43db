# SPDX-License-Identifier: Apache-2.0
"""Access to the web page, and the secrets that it hides."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from components.dashboard.access import VARIABLE, token_for, url_of
from components.dashboard.sample import Sampler
from components.dashboard.server import Page, serve
from components.status import Status, WorkerReport

TOKEN = "5e" * 32
PLACES = ["/", "/api/state", "/api/stream", "/targets", "/static/app.js", "/nothing"]


class Source:
    """Status of a system."""

    async def refresh(self, patience_s: float, decisions: bool = False) -> None:
        """It never changes."""

    def status(self) -> Status:
        return Status((WorkerReport("1", "decode"),))


async def page(token: str) -> AsyncIterator[str]:
    sampler = Sampler(Source())
    await sampler.once()
    runner = await serve(Page(sampler, "", token), "127.0.0.1", 0)
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def guarded() -> AsyncIterator[str]:
    async for address in page(TOKEN):
        yield address


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    # The default jar takes no cookies of addresses.
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        yield session


GIVEN: dict[str, dict[str, str]] = {
    "nothing": {},
    "another token": {"Authorization": "Bearer " + "00" * 32},
    "a part of it": {"Authorization": f"Bearer {TOKEN[:-1]}"},
    "no token": {"Authorization": "Bearer "},
    "another scheme": {"Authorization": "Basic dXNlcjo="},
    "letters beyond ASCII": {"Authorization": "Bearer \xe9"},
}


@pytest.mark.parametrize("given", list(GIVEN))
@pytest.mark.parametrize("place", PLACES)
async def test_without_the_token_there_is_nothing_to_see(
    guarded: str, client: aiohttp.ClientSession, place: str, given: str
) -> None:
    for query in ("", "?token=", f"?token={TOKEN[:-1]}x"):
        async with client.get(guarded + place + query, headers=GIVEN[given]) as reply:
            assert reply.status == 401
            text = await reply.text()
            assert "needs its token" in text and TOKEN not in text and "decode" not in text
    assert not list(client.cookie_jar)


async def test_programs_send_the_token_in_a_header(guarded: str, client: aiohttp.ClientSession) -> None:
    for place in ("/", "/api/state", "/targets", "/static/app.js"):
        async with client.get(guarded + place, headers={"Authorization": f"Bearer {TOKEN}"}) as reply:
            assert reply.status == 200


async def test_the_url_with_the_token_opens_the_page_for_a_browser_and_is_not_kept(
    guarded: str, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with client.get(f"{guarded}/?token={TOKEN}", allow_redirects=False) as reply:
        assert reply.status == 303 and reply.headers["Location"] == "/"
        cookie = reply.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    for place in ("/", "/api/state", "/static/app.js"):
        async with client.get(guarded + place) as reply:
            assert reply.status == 200 and reply.headers["Referrer-Policy"] == "no-referrer"
            assert TOKEN not in await reply.text()
    assert TOKEN not in caplog.text
    # Only the page itself takes it from a URL, which would end up in logs of proxies.
    client.cookie_jar.clear()
    async with client.get(f"{guarded}/api/state?token={TOKEN}") as reply:
        assert reply.status == 401


async def test_on_loopback_no_token_is_needed(client: aiohttp.ClientSession) -> None:
    async for address in page(token_for("127.0.0.1")):
        async with client.get(f"{address}/api/state") as reply:
            assert reply.status == 200


def test_a_page_that_others_can_reach_always_has_a_token(
    tmp_path: Path, use_secret: Callable[[Path | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    use_secret(None)
    for host in ("0.0.0.0", "::", "10.0.0.7", "some.host", ""):
        assert len(token_for(host)) == 64 and token_for(host) != token_for(host)
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert token_for(host) == "" and "token" not in url_of(host, 8001, "")
    path = tmp_path / "secret"
    path.write_text("open sesame, please")
    use_secret(path)
    found = token_for("0.0.0.0")
    assert found == token_for("0.0.0.0") and "sesame" not in found and len(found) == 64
    monkeypatch.setenv(VARIABLE, "mine")
    assert token_for("0.0.0.0") == "mine"
    assert url_of("::", 8001, "mine") == "http://[::]:8001/?token=mine"
