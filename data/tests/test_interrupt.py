"""Ctrl-C while a program imports its modules, and while it ends."""

import subprocess
import sys
import textwrap

import pytest


def ended(script: str) -> tuple[int, str]:
    """The exit code of a program that `python -m` would start, and what it says on stderr."""
    begin = 'import os, signal, sys\nsys.argv[0] = "-m"\n'
    begin += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run in the background
    command = [sys.executable, "-c", begin + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("package", ["data", "tinygrad_impl", "torch_ref", "parity_tests"])
def test_while_modules_are_imported(package: str) -> None:
    assert ended(f"import {package}\nos.kill(os.getpid(), signal.SIGINT)") == (130, "interrupted\n")


def test_nothing_changes_for_others() -> None:
    """Those that import the packages, and those for which Ctrl-C is ignored, as in the background."""
    unchanged = """
        import data
        assert signal.getsignal(signal.SIGINT) is before, signal.getsignal(signal.SIGINT)
    """
    for first in ('sys.argv[0] = "program"', "signal.signal(signal.SIGINT, signal.SIG_IGN)"):
        assert ended(f"{first}\nbefore = signal.getsignal(signal.SIGINT){textwrap.dedent(unchanged)}") == (0, "")


def test_while_a_command_runs_and_while_it_ends() -> None:
    """It can be caught; and once it has ended the command, threads that are waited for do not keep it from ending."""
    script = """
        import threading, time
        from data.cli import run

        def main():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                print("caught", file=sys.stderr)
            threading.Thread(target=interrupt).start()
            raise KeyboardInterrupt

        def interrupt():
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(50)

        run(main)
    """
    assert ended(script) == (130, "caught\ninterrupted\ninterrupted\n")
