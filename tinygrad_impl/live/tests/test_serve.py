"""The program around the page: its options, where it listens, and whom it lets in."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.cli import InputError
from data.testing import Result, call, refused
from tinygrad_impl import compare
from tinygrad_impl.live import serve

GIVEN: tuple[Any, ...] = ("./nowhere", "./nowhere-either", "--device", "CPU")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The program, whether the packages that it needs are installed or not."""
    for package in serve.PACKAGES:
        monkeypatch.setitem(sys.modules, package, sys)
    return lambda *options: call(compare.main, *GIVEN, "--serve", *options, cwd=tmp_path)


@pytest.mark.parametrize("package", serve.PACKAGES)
def test_a_missing_package_is_named(
    package: str, started: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(started(), f"--serve needs {package}; run `")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "65536"], "65536 is not the number of a port, from 0 to 65535"),
        (["--port", "-1"], "-1 is not the number of a port"),
        (["--port", "x"], "x is not the number of a port"),
        (["--out", "a.md"], "--out is for measuring, and --serve measures nothing"),
        (["--eval-tokens", 3], "--eval-tokens is for measuring"),
        (["--errors", "replace"], "--errors is for measuring"),
        (["--max-new-tokens", 2001], "--max-new-tokens: 2001 is more than this page writes; give at most 2,000"),
        (["--top-p", "2"], "--top-p: 2 is not a number above 0 and at most 1"),
        (["--host", "203.0.113.7", "--port", 0], "203.0.113.7 is no address of this machine; leave --host out"),
        (["--host", "a..b"], "'a..b' is no address of this machine"),
        (["--host", ""], "no address of this machine"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--port", 0], "there is no folder ./nowhere"),
    ],
)
def test_bad_options(options: list[object], said: str, started: Callable[..., Result]) -> None:
    refused(started(*options), said)


@pytest.mark.parametrize("options", [["--port", 8000], ["--host", "0.0.0.0"]])
def test_options_of_the_page_without_it(options: list[object], tmp_path: Path) -> None:
    refused(call(compare.main, *GIVEN, *options, cwd=tmp_path), f"{options[0]} is for --serve; give that too")


def test_a_port_in_use(started: Callable[..., Result]) -> None:
    with serve.listening("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        said = f"port {port} is in use; give another --port, or --port 0 for any that is free"
        refused(started("--port", port), said)
    serve.listening("127.0.0.1", port).close()  # and free again at once


def test_by_default_no_other_machine_reaches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def listening(*where: Any) -> socket.socket:
        asked.append(where)
        raise InputError("enough")

    monkeypatch.setattr(serve, "listening", listening)
    monkeypatch.setattr(serve, "require_packages", int)
    for options in ([], ["--host", "::1", "--port", 0]):
        refused(call(compare.main, *GIVEN, "--serve", *options, cwd=tmp_path), "enough")
    assert asked == [("127.0.0.1", 8000), ("::1", 0)]


def test_who_can_reach_it_is_said() -> None:
    local = serve.reached("127.0.0.1", 8000, True)
    assert local == "The page is at http://127.0.0.1:8000/, for this machine only. Ctrl-C ends it."
    assert "http://[::1]:9/, for" in serve.reached("::1", 9, True)
    open_to_all = serve.reached("0.0.0.0", 9, False)
    assert f"The page is at http://{socket.gethostname()}:9/. Everyone who can reach this machine" in open_to_all
    assert "no password" in open_to_all
