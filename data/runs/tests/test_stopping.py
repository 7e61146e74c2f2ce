"""What is said and done when several ranks are asked to stop."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from threading import Event

import pytest

import data.runs.stopping
from data.cli import Stopped
from data.ranks import ALONE, Ranks
from data.runs.stopping import AGAIN, STOPPING, BeforeTraining, stop_requests


class Several(Ranks):
    """Rank 0 of two, which live, or not; `looked` is set once that has been asked."""

    size = 2

    def __init__(self, live: bool = True):
        self.live, self.looked = live, Event()

    def all_live(self) -> bool:
        self.looked.set()
        return self.live


@pytest.fixture(autouse=True)
def repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.runs.stopping, "REPEATED", 0.1)
    monkeypatch.delenv("RANK", raising=False)


def test_once_more_is_said_when_it_is_true(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> None:
    """A signal that comes twice within a moment is one request; one that comes after the sentence is another."""
    said = ""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(partial(signal.signal, signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), stop_requests(Several()) as requests:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.caught == [signal.SIGINT]
        while not said:
            said = capfd.readouterr().err
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert said == f"\n{AGAIN}\n"


def test_nothing_is_said_of_a_request_that_comes_because_a_rank_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Several(live=False)
    with stop_requests(ranks) as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert ranks.looked.wait(10)
        requests.told.wait(0.2)
    assert capfd.readouterr().err == ""


def test_ranks_that_agree_say_so_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_requests(Several()) as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        requests.agreed()
        time.sleep(0.15)
    assert capfd.readouterr().err == f"\n{STOPPING}\n"


def test_a_process_that_torchrun_started_alone_may_be_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with stop_requests(ALONE) as requests:
        signal.raise_signal(signal.SIGINT)  # which its handler follows at once: two that wait would be one
        signal.raise_signal(signal.SIGINT)
    assert requests.caught == [signal.SIGINT]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_before_the_first_step(
    number: signal.Signals, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is said at once, though the program computes; then it ends, unless training had begun."""
    own = signal.signal(number, signal.default_int_handler)
    request.addfinalizer(partial(signal.signal, number, own))
    before = BeforeTraining()
    with pytest.raises(Stopped) as stopped, before.stops(ALONE):
        signal.raise_signal(number)
    assert stopped.value.number == number
    assert capfd.readouterr().err == "\nstopping\nstopped before training began; nothing was changed\n"
    for when in (BeforeTraining(), before):
        with pytest.raises(KeyboardInterrupt) as interrupted, when.stops(ALONE):  # noqa: PT012
            when.over()
            signal.raise_signal(number)
        assert not isinstance(interrupted.value, Stopped)
    assert capfd.readouterr().err == ""
    assert signal.getsignal(number) == signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_stop_before_the_first_step(number: signal.Signals) -> None:
    """It does not wait for what is being computed."""
    script = f"""
        import hashlib, os, signal, threading, time
        from data.ranks import ALONE
        from data.runs.stopping import BeforeTraining

        def ask():
            for _ in range(2):
                time.sleep(0.2)
                os.kill(os.getpid(), {int(number)})

        signal.signal({int(number)}, signal.default_int_handler)  # where tests run in the background, it is ignored
        with BeforeTraining().stops(ALONE):
            threading.Thread(target=ask, daemon=True).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (128 + number, "\nstopping\ninterrupted\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_python_discards() -> None:
    """As it does with all that is raised in a `__del__`. Training does not begin then."""

    class Stopping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    before = BeforeTraining()
    with pytest.raises(Stopped), before.stops(ALONE):  # noqa: PT012
        Stopping()
        before.over()
        raise AssertionError("training would begin")


def test_what_a_launcher_says_of_a_stop_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 leaves that to it, and nothing once training has begun."""
    monkeypatch.setenv("GPT2_LAST_WORDS", str(tmp_path / "words"))
    before = BeforeTraining()
    with pytest.raises(KeyboardInterrupt), before.stops(Several()):  # noqa: PT012
        before.say("go on with it")
        raise KeyboardInterrupt
    assert capfd.readouterr().err == ""
    assert (tmp_path / "words").read_text() == "go on with it\n"
    before.over()
    assert (tmp_path / "words").read_text() == ""
