"""The page and its events by HTTP: the web application, on Starlette."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tinygrad_impl.live.guard import App, Guard
from tinygrad_impl.live.settings import MOST_BYTES, Refused, read
from tinygrad_impl.live.turns import Event, Turns, Visit

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def application(turns: Turns, facts: dict[str, Any], local: bool) -> App:
    """The application. `facts` are what the page says of the models, and what its form begins with; local: as in
    `Guard`. What is asked for goes to `turns`.
    """

    async def write(request: Request) -> Response:
        try:
            visit, events = visit_of(await body_of(request))
            turns.join(visit)
        except Refused as e:
            return JSONResponse({"errors": e.errors}, 422)
        except ClientDisconnect:  # in the middle of the body: nobody is there to be answered
            return Response(status_code=400)
        return EventStream(turns, visit, events)

    async def loaded(_: Request) -> Response:
        return JSONResponse(facts)

    routes = [Route(path, file(*named)) for path, named in FILES.items()]
    routes += [Route("/facts", loaded), Route("/write", write, methods=["POST"])]
    return Guard(Starlette(routes=routes), local)


def file(name: str, media_type: str) -> Any:
    """An endpoint with one of our files. It is read now: no path comes from a request."""
    content = Path(__file__).with_name(name).read_bytes()

    async def sent(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return sent


async def body_of(request: Request) -> bytes:
    """The body, or as much of it as tells that it is too long."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            break
    return body


def visit_of(body: bytes) -> tuple[Visit, "asyncio.Queue[Event | None]"]:
    """The visit that a request asks for, and the queue in this thread that its events come to."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

    def send(event: Event | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and the visitor with it
            loop.call_soon_threadsafe(events.put_nowait, event)

    return Visit(read(body), send), events


class EventStream(StreamingResponse):
    """A visit's events as server-sent events. Whichever way it ends, the visit ends with it."""

    def __init__(self, turns: Turns, visit: Visit, events: "asyncio.Queue[Event | None]"):
        self.turns, self.visit = turns, visit
        super().__init__(self.messages(events), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.turns.leave(self.visit)

    @staticmethod
    async def messages(events: "asyncio.Queue[Event | None]") -> AsyncIterator[str]:
        while event := await events.get():
            yield f"event: {event['event']}\ndata: {json.dumps(event, allow_nan=False)}\n\n"
