"""A text that two want prepared at once: one does it, the other waits and takes what it made."""

import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import pytest

from data.cli import InputError
from data.files import locked
from data.text import prepare
from data.text.formats import Chunk, Chunks, Piece, Place
from data.text.prepare import prepared
from data.text.shards import read_meta, verify_folder
from data.text.sources import File, Stream

GROUPS = 20
OURS = f"waiting for process {os.getpid()} on {socket.gethostname()}, which is preparing it already"


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The groups of a text that are read by this process, in the order of time; each is worth a checkpoint."""
    monkeypatch.chdir(tmp_path)
    read: list[int] = []
    text = Stream("lessons", (File(GROUPS * 1000, "a text", lambda start: groups(start, read.append)),))
    held_out = Stream("a test", (File(1000, "another", lambda start: iter([Chunk([Piece("?")], Place(), Counter())])),))
    monkeypatch.setattr(prepare, "stream", lambda source, split, how: text if split == "train" else held_out)
    monkeypatch.setattr(prepare, "BATCH", 1)
    monkeypatch.setattr(prepare, "CHECKPOINT_EVERY", 1)
    return read


def groups(start: Place, tell: Callable[[int], None]) -> Chunks:
    for i in range(start.offset // 1000, GROUPS):
        tell(i)
        end = (i + 1) * 1000
        yield Chunk(
            [Piece(f"Lesson {i}, {n}: nothing waits.") for n in range(20)], Place(0, end, False, end), Counter()
        )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For whom somebody has said to wait. (Output that is read meanwhile could lose what is printed meanwhile.)"""
    others: list[str] = []
    say = prepare._say_waiting

    def say_waiting(folder: Path, other: str) -> None:
        say(folder, other)
        others.append(other)

    monkeypatch.setattr(prepare, "_say_waiting", say_waiting)
    return others


def wait_for(told: list[str], times: int, by: list[Future[Path]]) -> None:
    """Until so many wait; none of them, and of those for whom they wait, has ended before."""
    while len(told) < times:
        assert not any(future.done() for future in by)
        sleep(0.001)


def test_three_at_once(
    reads: list[int], told: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others say at once for whom they wait, and read nothing of the text."""
    go_on = Event()

    @contextmanager
    def held_up(out: Path) -> Iterator[Path]:
        with partial_folder(out) as folder:
            held.set()
            assert go_on.wait(30)
            yield folder

    partial_folder, held = prepare._partial_folder, Event()
    monkeypatch.setattr(prepare, "_partial_folder", held_up)
    with ThreadPoolExecutor(3) as pool:
        first: Future[Path] = pool.submit(prepared, "text.txt")
        assert held.wait(30)
        others = [pool.submit(prepared, "text.txt") for _ in range(2)]
        try:
            wait_for(told, 2, [first, *others])
        finally:
            go_on.set()
        folders = {future.result(30) for future in (first, *others)}
    assert len(folders) == 1
    (folder,) = folders
    verify_folder(folder)
    out = capfd.readouterr().out
    assert out.splitlines()[0] == f"preparing text.txt in {folder}"
    assert out.count(OURS) == 2  # without the ends of lines, which threads print by themselves
    assert sorted(reads) == list(range(GROUPS))
    assert os.listdir("runs/data") == [folder.name]


def test_a_folder_that_is_there_is_not_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of several who waited for it, each has the lock for a moment."""
    prepare._say_waiting(tmp_path / "not yet", "process 1 on a host")
    prepare._say_waiting(tmp_path, "process 2 on a host")
    assert capfd.readouterr().out == "waiting for process 1 on a host, which is preparing it already\n"


def test_where_the_first_is_killed_the_second_goes_on(
    reads: list[int], told: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        write = prepare.json.dump
        saved: list[int] = []

        def dump(state: dict[str, object], file: Any) -> None:
            write(state, file)
            saved.append(1)

        def wait_to_be_killed(seconds: object) -> None:
            os.write(writing, b"there")
            signal.pause()

        sync = prepare.ShardWriter.sync
        monkeypatch.setattr(prepare.json, "dump", dump)
        monkeypatch.setattr(
            prepare.ShardWriter, "sync", lambda self: wait_to_be_killed(0) if len(saved) == 8 else sync(self)
        )
        prepared("text.txt")
        os._exit(1)
    assert os.read(reading, 5) == b"there"
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(prepared, "text.txt")
        try:
            wait_for(told, 1, [second])
            assert told[0].startswith(f"process {child} on ")
            assert reads == []
        finally:
            os.kill(child, signal.SIGKILL)
        folder = second.result(30)
    os.waitpid(child, 0)
    assert reads == list(range(8, GROUPS))
    assert "going on from " in capfd.readouterr().err
    verify_folder(folder)
    assert sum(split["documents"] for split in read_meta(folder)["splits"].values()) == 20 * GROUPS + 1
    assert os.listdir("runs/data") == [folder.name]


def test_bad_text_is_refused_to_all(reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken for a folder that another process has."""

    def refuse(*args: object) -> None:
        raise InputError("the text is bad")

    monkeypatch.setattr(prepare, "_write_splits", refuse)
    with pytest.raises(InputError, match="the text is bad"):
        prepared("text.txt")
    assert os.listdir("runs/data") == []


def test_a_folder_that_appears_before_the_lock_is_ours(
    reads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name it is refused and stays as it is; of a source, it is what was wanted."""

    @contextmanager
    def locked_late(file: Path, *waiting: Callable[[str], None]) -> Iterator[None]:
        monkeypatch.setattr(prepare, "locked", locked)
        prepare.prepare("text.txt", file.with_suffix(""))
        reads.clear()
        with locked(file, *waiting):
            yield

    monkeypatch.setattr(prepare, "locked", locked_late)
    with pytest.raises(InputError, match="out is there already, and is never overwritten"):
        prepare.prepare("text.txt", "out")
    monkeypatch.setattr(prepare, "locked", locked_late)
    verify_folder(prepared("text.txt"))
    assert reads == []
    assert sorted(os.listdir(tmp_path)) == ["out", "runs"]
