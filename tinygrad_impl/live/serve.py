"""`compare --serve`: loads models, listens, and writes what visitors of the page ask for."""

import errno
import ipaddress
import json
import socket
import sys
import threading
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from data.checkpoints.checkpoint import load, resolve
from data.checkpoints.config import parameter_count
from data.checkpoints.tensors import read_json
from data.cli import ArgumentParser, InputError, Progress, missing_extra
from data.text.tokenizer import of_folder
from tinygrad_impl.device import open_device
from tinygrad_impl.generate import COMPILING, Generator, backend_for, setup
from tinygrad_impl.live.settings import MOST_BYTES, Asked, Refused, fields, read
from tinygrad_impl.live.turns import Turns
from tinygrad_impl.live.writing import Model, write
from tinygrad_impl.model import GPT2

MEASURING = (  # compare's options that a page has no use for
    *("data", "valid", "field", "errors", "eval_tokens", "seq_len", "trained_on", "num_samples", "out", "html"),
)
SERVING = ("host", "port")
HOST, PORT = "127.0.0.1", 8000
PACKAGES = ("starlette", "uvicorn")


def add_serving_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a page to try the models on", "Its form begins with --prompt and the options of sampling that are given."
    )
    group.add_argument("--serve", action="store_true", help="serve it until Ctrl-C, instead of measuring anything")
    group.add_argument(
        "--host", metavar="ADDRESS", help=f"of this machine, to listen on ({HOST}, which no other machine reaches)"
    )
    group.add_argument("--port", type=port, metavar="N", help=f"to listen on ({PORT}); 0: any that is free")


def port(text: str) -> int:
    """An argparse type: the number of a port."""
    if not (text.isascii() and text.isdecimal() and int(text[:6]) < 1 << 16):
        raise ArgumentTypeError(f"{text} is not the number of a port, from 0 to 65535")
    return int(text)


def serving(parser: ArgumentParser, args: Namespace) -> bool:
    """Whether a page is to be served. Raises `InputError` for options that do not go with that, or only with that."""
    for name in MEASURING if args.serve else SERVING:
        if getattr(args, name, None) != parser.get_default(name):
            measures = "is for measuring, and --serve measures nothing; leave one of the two out"
            why = measures if args.serve else "is for --serve; give that too, or leave it out"
            raise InputError(f"--{name.replace('_', '-')} {why}")
    return bool(args.serve)


def serve(models: Sequence[tuple[str, str]], prompt: str, settings: dict[str, Any], args: Namespace) -> None:
    """Serves the page until Ctrl-C. `models`: what each is called, and where it is, as `resolve` takes it; `settings`:
    those of sampling that the form begins with, as `SAMPLING` has them. Bad input is refused before anything is loaded.
    """
    require_packages()
    form = fields(prompt, settings, args.special_tokens)
    first = beginning(form)
    device = open_device(args.device)
    with listening(HOST if args.host is None else args.host, PORT if args.port is None else args.port) as door:
        loaded = [opened(name, model, device, args.dtype) for name, model in models]
        few = replace(first, prompt="Once upon", settings=first.settings | {"max_new_tokens": 1})
        for model in Progress(iterable=loaded, desc="compiling", unit="model"):
            for _ in range(COMPILING):
                list(write([model], few))
        facts = {"models": [model.facts for model in loaded], "form": form}
        answer(loaded, facts, door)


def require_packages() -> None:
    for package in PACKAGES:
        try:
            import_module(package)
        except ImportError:
            raise missing_extra("--serve", package, "serve") from None


def beginning(form: dict[str, str]) -> Asked:
    """What the form asks for as it is at first. Raises `InputError` for what the page would refuse."""
    try:
        return read(json.dumps(form).encode())
    except Refused as e:
        [(name, said), *_] = e.errors.items()
        raise InputError(f"--{name.replace('_', '-')}: {said.removesuffix('.')}") from None


def opened(name: str, model: str, device: str, dtype: str | None) -> Model:
    folder = resolve(model)
    config, arrays = load(folder)
    backend = backend_for(dtype, config, device)
    tokenizer = of_folder(folder, config.vocab_size)
    made = GPT2(config, {name: array.astype(np.float32) for name, array in arrays.items()})
    computed = setup(name, config, device, backend)
    print(computed, file=sys.stderr)
    trainer = folder / "trainer.json"
    facts = {
        "name": name,
        "step": read_json(trainer).get("step") if trainer.is_file() else None,
        "parameters": parameter_count(config),
        "context": config.context,
        "vocabulary": config.vocab_size,
        "computes": computed.rpartition("; ")[2],
    }
    return Model(tokenizer, Generator(made, backend, tokenizer.vocab_size, tokenizer.eot, name), facts)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `InputError` where it cannot."""
    where = f"{host} and port {port}"
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise InputError(f"{host!r} is no address of this machine; leave --host out, or give 0.0.0.0 for all") from None
    door = socket.socket(family, kind, protocol)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
        door.listen()
    except OSError as e:
        door.close()
        if e.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is in use; give another --port, or --port 0 for any that is free") from None
        if e.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"{host} is no address of this machine; leave --host out, or give 0.0.0.0 for all that it has"
            ) from None
        if e.errno == errno.EACCES:
            raise InputError(f"only root can listen on port {port}; give a --port from 1024 on") from None
        raise InputError(f"cannot listen on {where} ({e.strerror}); give another --host or --port") from None
    return door


def answer(models: Sequence[Model], facts: dict[str, Any], door: socket.socket) -> None:
    """Serves the page on a socket that listens, and computes what is asked for, until Ctrl-C."""
    import uvicorn

    from tinygrad_impl.live.app import application

    address, number, *_ = door.getsockname()
    local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    turns = Turns()
    server = uvicorn.Server(
        uvicorn.Config(
            application(turns, facts, local),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=2 * MOST_BYTES,  # of an address with a prompt in it
        )
    )

    def listen() -> None:
        try:
            server.run(sockets=[door])
        finally:
            turns.close()

    web = threading.Thread(target=listen, name="web server", daemon=True)
    web.start()
    try:
        print(reached(address, number, local), flush=True)
        turns.answer(partial(write, models))
        raise RuntimeError("the web server has ended by itself; what it said stands above")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    finally:
        turns.close()
        server.should_exit = True
        web.join()


def reached(address: str, port: int, local: bool) -> str:
    """Where the page is, and who can reach it."""
    host = f"[{address}]" if ":" in address else address
    if local:
        return f"The page is at http://{host}:{port}/, for this machine only. Ctrl-C ends it."
    shown = socket.gethostname() if ipaddress.ip_address(address.partition("%")[0]).is_unspecified else host
    return (
        f"The page is at http://{shown}:{port}/. Everyone who can reach this machine on its network can use it: there "
        "is no password, and no encryption. Ctrl-C ends it."
    )
