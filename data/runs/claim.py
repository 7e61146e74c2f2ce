"""The folder of a run belongs to one process at a time: made by it alone, and locked while it writes there."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from data.cli import InputError
from data.files import Held, locked
from data.runs.run_folder import LOCK, refuse_occupied


@contextmanager
def claimed(path: Path, *, empty: bool, find_lr: bool = False) -> Iterator[None]:
    """Has the folder `path`, made where it is missing, for this process alone while this lasts.

    One that was made here, and that nothing was written to, is removed in the end: it would hinder the next run.
    empty: refuse a folder that holds something, as `refuse_occupied` does, for --find-lr if `find_lr`.

    Raises `InputError` for such a folder, and for one that another process has.
    """
    with ExitStack() as held:
        while True:
            if empty:
                refuse_occupied(path, find_lr)
            if _make(path):
                held.callback(_remove_empty, path)
            elif os.path.lexists(path) and not path.is_dir():
                raise InputError(f"{path} is no folder; name another")
            with suppress(FileNotFoundError):  # whoever made the folder has just removed it
                held.enter_context(_locked(path))
                break
        if empty:
            refuse_occupied(path, find_lr)  # again: until the lock was ours, another run could begin and end here
        yield


@contextmanager
def claimed_new(path: Path) -> Iterator[Path]:
    """Makes the folder `path`, or `path-2`, `path-3`, ... where it is there, and has it as `claimed` does."""
    names = chain([path.name], (f"{path.name}-{number}" for number in count(2)))
    path = next(folder for folder in map(path.with_name, names) if _make(folder))
    with ExitStack() as held:
        held.callback(_remove_empty, path)
        held.enter_context(_locked(path))
        yield path


def _make(path: Path) -> bool:
    """Whether this made the folder; False where it is there."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _remove_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(locked(path / LOCK))
        except Held as e:
            raise InputError(f"{path} is in use by {e}; wait until that has ended, or name another folder") from None
        yield
