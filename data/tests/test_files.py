import contextlib
import errno
import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from data.files import Held, atomic_write, locked, sync_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("mode", "content"), [("wb", b"\x00\xff"), ("w", "größer\n")])
def test_the_file_is_there_when_it_is_whole(mode: str, content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path, mode) as f:
        f.write(content)
        assert not path.exists()
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode("utf-8"))
    assert names(tmp_path) == ["file"]


def test_the_old_file_stays_until_then(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as f:
            f.write(b"new" * 100_000)
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_an_error_while_syncing_does_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError("no space")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"), atomic_write(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content is synced, whole, then it is renamed, then the new name is synced: a power cut leaves old or new."""
    events: list[str] = []
    replace = os.replace

    def synced(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        events.append(f"{path.name} of {path.stat().st_size}" if path.is_file() else path.name)

    def replaced(old: Path, new: Path) -> None:
        events.append(f"{old.name} -> {new.name}")
        replace(old, new)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", replaced)
    with atomic_write(tmp_path / "file") as f:
        f.write(b"content")
    assert events == ["file.tmp of 7", "file.tmp -> file", tmp_path.name]


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    """Each leaves a whole file, whatever a killed one has left."""
    path = tmp_path / "file"
    path.with_name("file.tmp").write_bytes(b"half of a file that somebody wanted to write" * 9999)
    children = []
    for letter in (b"a", b"b"):
        if not (child := os.fork()):
            try:
                for _ in range(30):
                    with atomic_write(path) as f:
                        f.write(letter * 5000)
                        f.flush()
                        f.write(letter * 5000)
                    assert {*path.read_bytes()} in ({97}, {98})
                    assert path.stat().st_size == 10_000
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [None, OSError("no space")])
def test_a_folder_that_is_synced_is_closed(
    error: OSError | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that fails: a run syncs thousands of times."""
    closed: list[int] = []
    synced: list[int] = []
    close = os.close

    def sync(fd: int) -> None:
        synced.append(fd)
        if error:
            raise error

    def noted(fd: int) -> None:
        closed.append(fd)
        close(fd)

    monkeypatch.setattr("os.fsync", sync)
    monkeypatch.setattr("os.close", noted)
    with pytest.raises(OSError, match="no space") if error else contextlib.nullcontext():
        sync_folder(tmp_path)
    assert closed == synced != []


def test_a_lock_is_of_one_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock):
        with pytest.raises(Held, match=rf"^process {os.getpid()} on {socket.gethostname()}$"), locked(lock):
            pass
        with pytest.raises(Held), locked(lock):  # the refusal took nothing from whoever has it
            pass
    assert names(tmp_path) == []
    with locked(lock):
        pass


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    """Whoever had it has removed it: the next one has another file, which holds off the one after that."""
    lock = tmp_path / "lock"
    first = locked(lock)
    first.__enter__()
    told: list[str] = []

    def waiting(holder: str) -> None:
        told.append(holder)
        first.__exit__(None, None, None)

    with locked(lock, waiting):
        assert told == [f"process {os.getpid()} on {socket.gethostname()}"]
        assert lock.read_text() == told[0] + "\n"
        with pytest.raises(Held), locked(lock):
            pass


def test_a_process_that_is_killed_has_no_lock(tmp_path: Path) -> None:
    """It leaves the file, which is locked by nobody."""
    lock = tmp_path / "lock"
    child = os.fork()
    if not child:
        with locked(lock):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert lock.read_text().startswith(f"process {child} on ")
    with locked(lock):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock"), locked(tmp_path / "lock"):
        pass
    assert names(tmp_path) == []
