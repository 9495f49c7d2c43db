# SPDX-License-Identifier: Apache-2.0
"""Access to the web page: open on loopback, otherwise with its token.

The token is derived from the secret (``components.credentials``) and then equal at every start; without a secret each
start makes a random one. The printed URL contains it: the page answers with a cookie and redirects to a URL without
it. Programs send ``Authorization: Bearer <token>``. All other requests get 401.
No state but the token; nothing is logged.
"""

from __future__ import annotations

import hmac
import secrets

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from components import credentials, env
from components.address import Address, is_loopback

VARIABLE = env.PAGE_TOKEN.name
"""A user's token. The launcher also passes the printed one to the page's process in it."""
_WHY = (
    "This page needs its token: open the URL that was printed when it started, or send 'Authorization: Bearer TOKEN'.\n"
)


def token_for(host: str) -> str:
    """The token of a page that listens on ``host``; empty on loopback, where none is needed."""
    if is_loopback(host):
        return ""
    if given := env.PAGE_TOKEN.read():
        return given
    return credentials.token("page") if credentials.secret() else secrets.token_hex(32)


def url_of(host: str, port: int, token: str) -> str:
    """The URL for a browser."""
    return f"http://{Address(host, port)}/" + (f"?token={token}" if token else "")


def guard(token: str) -> Middleware:
    """A middleware that requires the token."""

    def fits(given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        # Browsers share cookies between all ports of a host.
        cookie = f"dynamo-page-{request.url.port}"
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token or fits(bearer) or fits(request.cookies.get(cookie, "")):
            return await handler(request)
        if request.path == "/" and fits(request.query.get("token", "")):
            # Removes the token from address bar and history.
            entered = web.HTTPSeeOther("/")
            entered.set_cookie(cookie, token, httponly=True, samesite="Strict")
            raise entered
        return web.Response(status=401, text=_WHY, headers={"WWW-Authenticate": "Bearer"})

    return check
