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
    """Has Ctrl-C end a program at once until `data.cli.run` calls `catch_interrupts`. Packages call this before they
    import anything else. It changes nothing but for `python -m` one of their modules, and nothing where Ctrl-C is
    ignored.
    """
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def catch_interrupts() -> bool:
    """Has Ctrl-C raise `KeyboardInterrupt` again, if `expect_interrupts` has changed that. Returns whether it had."""
    changed = signal.getsignal(signal.SIGINT) is leave
    if changed:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return changed
