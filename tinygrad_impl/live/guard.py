"""What is answered, and to whom. Other web pages in a visitor's browser can send requests here, too."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# A page of another name, which its owner lets point to 127.0.0.1, is not let in (DNS rebinding).
LOCAL = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
HEADERS = {
    # no script and no style but our files, nothing from elsewhere, no HTML made of text, and in no other page's frame
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # the address has the prompt in it
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application in front of `app`: refuses what other pages send, and adds `HEADERS` to every answer.

    local: answer only to the names of this machine.
    """

    def __init__(self, app: App, local: bool):
        self.app, self.local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answered(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        if said := refusal(scope, self.local):
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await answered({"type": "http.response.start", "status": 403, "headers": headers})
            await answered({"type": "http.response.body", "body": said.encode()})
        else:
            await self.app(scope, receive, answered)


def refusal(scope: Scope, local: bool) -> str:
    """Why a request is not answered, in a sentence; empty where it is."""
    named, origins = (
        [value.decode("latin-1") for name, value in scope["headers"] if name == header]
        for header in (b"host", b"origin")
    )
    if local and not (len(named) == 1 and LOCAL.fullmatch(named[0])):
        return "This page answers to the names 127.0.0.1 and localhost only; --host lets others in."
    if any(place(origin) != (named or [""])[0] for origin in origins):
        return "This request comes from another page; it is answered to its own page only."
    return ""


def place(origin: str) -> str | None:
    """The host and port of an origin; None where it is not written as one."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
