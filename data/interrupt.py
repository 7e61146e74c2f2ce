"""Ctrl-C where Python would print a traceback: while a program imports its modules, and while it ends."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def leave(number: int, frame: FrameType | None) -> None:
    """A signal's handler: the program ends at once. Of several ranks the launcher tells it."""
    if "LOCAL_RANK" not in os.environ:
        with suppress(OSError):
            os.write(2, b"interrupted\n")
    os._exit(128 + number)


def expect_interrupts() -> None:
    """Has Ctrl-C end a program until it comes to `data.cli.run`. Packages call this first of all; where they are not
    imported for `python -m` one of their modules, nothing changes. Neither does it where Ctrl-C is ignored.
    """
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def interrupts_expected() -> bool:
    """Whether that is so. From now on Ctrl-C raises `KeyboardInterrupt`."""
    expected = signal.getsignal(signal.SIGINT) is leave
    if expected:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return expected
