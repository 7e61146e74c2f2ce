"""What is answered, and to whom."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from tinygrad_impl.live.guard import HEADERS, Guard, Receive, Scope, Send


async def page(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": b"page"})


def ask(headers: list[tuple[str, str]], local: bool = True) -> tuple[int, str, dict[str, str]]:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    scope = {"type": "http", "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers]}
    asyncio.run(Guard(page, local)(scope, receive, send))
    start, body = sent
    return start["status"], body["body"].decode(), {k.decode(): v.decode() for k, v in start["headers"]}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:9", "LOCALHOST", "[::1]:8000"])
def test_the_names_of_this_machine(host: str) -> None:
    assert ask([("host", host), ("origin", f"http://{host}")])[:2] == (200, "page")
    assert ask([("host", host)])[:2] == (200, "page")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "x127.0.0.1", "localhost:", "", "127.0.0.1:8\n"],
)
def test_other_names_are_refused(host: str) -> None:
    """As where a name of somebody else's points to 127.0.0.1."""
    status, said, headers = ask([("host", host)])
    assert status == 403
    assert "127.0.0.1 and localhost only" in said
    assert headers.items() >= HEADERS.items()
    assert ask([("host", host)], local=False)[0] == 200


@pytest.mark.parametrize("headers", [[], [("host", "localhost"), ("host", "localhost")]])
def test_one_name_has_to_be_given(headers: list[tuple[str, str]]) -> None:
    assert ask(headers)[0] == 403


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8001", "", "http://[::1"])
def test_other_pages_are_refused(origin: str, local: bool) -> None:
    status, said, _ = ask([("host", "127.0.0.1:8000"), ("origin", origin)], local)
    assert status == 403
    assert "from another page" in said


def test_every_answer_has_the_headers() -> None:
    _, _, headers = ask([("host", "localhost")])
    assert headers == {"content-type": "text/html"} | HEADERS
    policy = dict(part.split(" ", 1) for part in HEADERS["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
    assert policy["require-trusted-types-for"] == "'script'"
