"""The page by HTTP: through Starlette's client, and the program as it is started."""

import asyncio
import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data.checkpoints.config import GPT2Config
from data.testing import own_tokenizer, save_model, write_files
from tinygrad_impl.live.guard import HEADERS
from tinygrad_impl.live.settings import MOST_BYTES, Asked
from tinygrad_impl.live.tests.support import form
from tinygrad_impl.live.turns import Events, Turns

pytestmark = pytest.mark.slow
EXTRA = "needs the extra `serve`: run `make extras`"
pytest.importorskip("starlette", reason=EXTRA)
pytest.importorskip("uvicorn", reason=EXTRA)
try:
    from starlette.testclient import TestClient
except (ImportError, RuntimeError):
    pytest.skip("Starlette's test client needs httpx2: run `make extras`", allow_module_level=True)

FACTS = {"models": [], "form": form()}


def events(asked: Asked) -> Events:
    for piece in asked.prompt.split("|"):
        yield {"event": "piece", "text": piece}
    yield {"event": "done"}


@contextmanager
def client(local: bool = True, base_url: str = "http://127.0.0.1:8000") -> Iterator[TestClient]:
    from tinygrad_impl.live.app import application

    turns = Turns()
    computing = threading.Thread(target=turns.answer, args=(events,))
    computing.start()
    try:
        yield TestClient(application(turns, FACTS, local), base_url=base_url)
    finally:
        turns.close()
        computing.join()


def test_the_page_and_its_files() -> None:
    with client() as browser:
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            answer = browser.get(path)
            assert (answer.status_code, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
            assert answer.text == (Path(__file__).parents[1] / (path[1:] or "page.html")).read_text(encoding="utf-8")
            assert answer.headers.items() >= HEADERS.items()
        assert browser.get("/?" + "prompt=x" * 1000).status_code == 200
        assert browser.get("/facts").json() == FACTS


@pytest.mark.parametrize("path", ["/settings.py", "/../serve.py", "/%2e%2e/serve.py", "/page.html", "/etc/passwd"])
def test_no_other_file_is_sent(path: str) -> None:
    with client() as browser:
        answer = browser.get(path)
        assert answer.status_code == 404
        assert answer.headers.items() >= HEADERS.items()


def test_words_are_server_sent_events() -> None:
    with client() as browser:
        answer = browser.post("/write", json=form(prompt="<b>|\n\n|日"))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        found = [message.split("\n") for message in answer.text.removesuffix("\n\n").split("\n\n")]
        assert [kind for kind, _ in found] == ["event: piece"] * 3 + ["event: done"]
        assert [json.loads(data.removeprefix("data: ")).get("text") for _, data in found] == ["<b>", "\n\n", "日", None]
        assert browser.get("/write").status_code == 405


def test_bad_values_are_said() -> None:
    with client() as browser:
        answer = browser.post("/write", json=form(seed="x", top_p="2"))
        assert (answer.status_code, answer.json()["errors"].keys()) == (422, {"seed", "top_p"})
        answer = browser.post("/write", content=b"x" * (MOST_BYTES + 1))
        assert (answer.status_code, answer.json()["errors"].keys()) == (422, {"prompt"})
        assert browser.post("/write", content=b"{").json()["errors"].keys() == {""}


def test_whoever_leaves_in_the_middle_of_the_body_ends_nothing() -> None:
    """And no error is let out, which the server would print."""
    from tinygrad_impl.live.app import application

    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/write", "headers": [(b"host", b"localhost")]}

    async def asked() -> None:
        await application(Turns(), FACTS, True)(scope | {"query_string": b"", "root_path": ""}, receive, send)

    asyncio.run(asked())
    assert not messages
    assert sent[0]["status"] == 400


def test_who_is_answered() -> None:
    with client(base_url="http://evil.example") as browser:
        assert browser.get("/").status_code == 403
    with client(local=False, base_url="http://evil.example") as browser:
        assert browser.get("/").status_code == 200
        other = {"Origin": "http://another.example"}
        assert browser.post("/write", json=form(), headers=other).status_code == 403


class Program:
    """`compare --serve` on a port of its own, with two models."""

    def __init__(self, folder: Path):
        config = GPT2Config(vocab_size=303, n_layer=1, n_head=2, n_embd=16, n_positions=24)
        models = [write_files(save_model(folder / name, config, len(name)), own_tokenizer()) for name in ("a", "bb")]
        command = [sys.executable, "-m", "tinygrad_impl.compare", "--serve", "--port", "0", "--device", "CPU"]
        command += map(str, models)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.endswith("/, for this machine only. Ctrl-C ends it.\n"), self.process.stderr
        self.port = int(line.split("/, for")[0].rpartition(":")[2])

    def ask(self, **changes: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps(form(**changes))
        connection.request("POST", "/write", body, {"Content-Type": "application/json"})
        return connection.getresponse()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    program = Program(tmp_path_factory.mktemp("served"))
    yield program
    program.process.kill()
    program.process.communicate()


def messages(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


LONG = {"max_new_tokens": "2000", "temperature": "1", "top_k": "0"}


def test_whoever_closes_the_page_is_written_for_no_longer(program: Program) -> None:
    """Nor waited for; and who waits knows for how many others."""
    first = program.ask(**LONG)
    kinds = [event["event"] for event, _ in zip(messages(first), range(4), strict=False)]
    assert kinds == ["start", "piece", "piece", "piece"]
    second, third = program.ask(**LONG), program.ask(max_new_tokens="2")
    assert next(messages(second)) == {"event": "waiting", "before": 1}
    waiting = messages(third)
    assert next(waiting) == {"event": "waiting", "before": 2}
    second.close()
    assert next(waiting) == {"event": "waiting", "before": 1}
    first.close()
    rest = [event["event"] for event in waiting]
    assert (rest[0], rest[-1]) == ("start", "done")


def test_ctrl_c_ends_it(program: Program) -> None:
    writing = messages(program.ask(**LONG))
    assert "start" in (event["event"] for event in writing)  # perhaps after a visit that is just ending
    program.process.send_signal(signal.SIGINT)
    *_, last = writing
    assert last == {"event": "failed", "says": "The server was stopped."}
    out, err = program.process.communicate(timeout=30)
    assert (program.process.returncode, out) == (0, "")
    assert err.endswith("\nstopped\n")
    assert "Traceback" not in err
    with pytest.raises(ConnectionRefusedError):
        program.ask()
