"""Files that are either whole or not there, and locks against other processes."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable (a rename is lost in a power cut until its folder is synced)."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path`; on success it is fsynced and renamed to `path`, on any error removed.

    Of processes that write the same file at the same time one waits for the other: the temporary file is locked, and
    its name is always the same, so that whatever a killed process left of it goes with the next writing.
    """
    temporary = path.with_name(path.name + ".tmp")
    lock = _lock(temporary, waiting=lambda _: None)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        if _is_at(lock, temporary):  # else it is renamed, and another process may have begun the next
            temporary.unlink()
        raise
    finally:
        lock.close()


class Held(Exception):
    """Another process has the lock. The message names it."""


@contextmanager
def locked(file: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Has the lock `file`, which no other process has meanwhile, and removes it in the end.

    However this process ends, the kernel releases the lock. Where another one has it, this raises `Held`; or, if there
    is a `waiting`, calls that with the name of the other and waits. A file system without locks does not stop anybody.
    """
    lock = _lock(file, waiting)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is ours: whoever waits for it sees that it is gone, and makes another
        lock.close()


def _lock(file: Path, waiting: Callable[[str], None] | None) -> IO[bytes]:
    while True:
        lock = open(file, "a+b", buffering=0)  # noqa: SIM115 (whoever gets it closes it)
        try:
            if not _flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                lock.seek(0)
                holder = lock.read(200).decode(errors="replace").strip() or "another process"
                if not waiting:
                    raise Held(holder)
                waiting(holder)
                _flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, file):
                with suppress(OSError):  # on a full disk others learn no name
                    lock.truncate(0)
                    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()  # another process had it, and has removed it


def _is_at(lock: IO[bytes], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(file))
    except FileNotFoundError:
        return False


def _flock(lock: IO[bytes], operation: int) -> bool:
    """Whether the lock is ours now; also where the file system has none."""
    try:
        fcntl.flock(lock, operation)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
