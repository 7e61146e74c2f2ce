"""What becomes of a job when one of its ranks fails: one sentence, from one rank, and the end of all."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from data.cli import InputError
from data.ranks import Place, Ranks
from data.tests.ranks import PATIENCE, Ended, ended, environment, free_port
from data.watch import Watch

RESUMING = "torchrun -m it --resume 'a run'"
REMEDY = f"what is saved is not lost: go on with `{RESUMING}`"


def two(**more: str) -> list[Mapping[str, str]]:
    """The environments of two ranks of a job."""
    port = free_port()
    return [environment(rank, 2, port) | more for rank in range(2)]


def one_voice(ends: list[Ended], *words: str) -> None:
    """Asserts that no process succeeded, and that all have said one sentence, with these words."""
    assert all(end.code for end in ends), ends
    said = "".join(end.err for end in ends)
    assert said.startswith("error: "), ends
    assert said.count("\n") == 1, ends
    for word in words:
        assert word in said


def killed(ranks: Ranks) -> None:
    ranks.resume_with(RESUMING)
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    ends = ended(tmp_path, two(), killed)
    one_voice(ends, "rank 1 (process ", " was killed", REMEDY)
    assert [end.code for end in ends] == [1, -signal.SIGKILL]


def first_killed(ranks: Ranks) -> None:
    ranks.resume_with(RESUMING)
    ranks.barrier()
    if ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def test_rank_0_is_killed_and_what_they_share_with_it(tmp_path: Path) -> None:
    one_voice(ended(tmp_path, two(), first_killed), "rank 0 or its torchrun was killed", REMEDY)


def stopped(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.barrier()


def test_a_rank_that_is_stopped_is_named_after_the_time_limit(tmp_path: Path) -> None:
    """And killed: whatever has started it would wait for it."""
    began = time.monotonic()
    ends = ended(tmp_path, two(), stopped, timeout=1)
    assert [end.code for end in ends] == [1, -signal.SIGKILL]
    one_voice(ends, "rank 1 (process ", " or stopped; start the job again\n")
    assert time.monotonic() - began > 1


def late(ranks: Ranks) -> None:
    if ranks.rank == 1:
        time.sleep(PATIENCE)
    ranks.barrier()


def test_a_rank_that_lives_and_does_not_come_is_named(tmp_path: Path) -> None:
    one_voice(ended(tmp_path, two(), late, timeout=1), "rank 1 (process ", "did not come", "--timeout of 1 second;")


def blocked(ranks: Any) -> None:
    """Rank 0 waits for ever for what it has sent, as for NCCL, and only a thread can tell."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

    class Never:
        def is_completed(self) -> bool:
            return False

    ranks._send(Never(), None, None)
    threading.Event().wait()


def test_a_rank_that_waits_for_one_that_is_gone_heeds_a_request_to_end(tmp_path: Path) -> None:
    one_voice(ended(tmp_path, two(), blocked, terminated=0), "rank 1 (process ", " was killed")


def slow(ranks: Ranks) -> None:
    """Rank 0 has something to do that the others wait for, as when it saves."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.kill(os.getpid(), signal.SIGTERM)
    if ranks.rank == 0:
        time.sleep(2)
    ranks.barrier()


def test_a_rank_that_is_busy_is_waited_for(tmp_path: Path) -> None:
    assert ended(tmp_path, two(), slow) == [Ended(0, "")] * 2


def bad(ranks: Ranks) -> None:
    raise InputError("it is bad; mend it")


def test_an_error_of_all_is_told_once(tmp_path: Path) -> None:
    ends = ended(tmp_path, two(), bad)
    one_voice(ends, "it is bad; mend it")
    assert {end.code for end in ends} == {2}


def full(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise MemoryError
    ranks.barrier()


def test_memory_runs_out_on_one(tmp_path: Path) -> None:
    one_voice(ended(tmp_path, two(), full), "out of memory on rank 1 (process ", "--batch-size")


def faulty(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("a fault")
    ranks.barrier()


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path: Path) -> None:
    first, second = ended(tmp_path, two(), faulty)
    assert (first.code, second.code, first.err) == (1, 1, "")
    assert second.err.startswith("Traceback")
    assert second.err.endswith("ValueError: a fault\n")


def parted(ranks: Any) -> None:
    if ranks.rank == 1:
        ranks._watch.parent = -1
    ranks.barrier()
    threading.Event().wait()


def test_a_rank_whose_torchrun_is_gone_ends(tmp_path: Path) -> None:
    one_voice(ended(tmp_path, two(TORCHELASTIC_RUN_ID="7"), parted), "torchrun, which started this job", "is gone")


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    one_voice(ended(tmp_path, two()[:1], bad, timeout=1), "rank 1 of 2 did not come within 1 second;")


def test_a_rank_0_that_never_comes(tmp_path: Path) -> None:
    """PyTorch's C++ would say so as well."""
    one_voice(ended(tmp_path, two()[1:], bad, timeout=1), "rank 0 did not answer at 127.0.0.1:", "within 1 second;")


def test_something_else_listens_where_rank_0_should(tmp_path: Path) -> None:
    """And never answers: PyTorch's own time limit does not end that."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        point = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        ends = ended(tmp_path, [{**two()[1], **point}], bad, timeout=1)
    one_voice(ends, "rank 0 did not answer at 127.0.0.1:", "within 1 second;")


def living(ranks: Ranks) -> None:
    assert ranks.all_live()
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    assert not ranks.all_live()
    raise InputError("rank 1 does not live")


def test_whether_all_ranks_live(tmp_path: Path) -> None:
    one_voice(ended(tmp_path, two(), living), "rank 1 does not live")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = environment(0, 2, taken.getsockname()[1])
        one_voice(ended(tmp_path, [values], bad, timeout=1), f"port {values['MASTER_PORT']}", "in use", "MASTER_PORT")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"TORCHELASTIC_RUN_ID": "b"}, "of job b"),
        ({"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "two processes are rank 0"),
    ],
)
def test_ranks_of_different_jobs(tmp_path: Path, changed: dict[str, str], words: str) -> None:
    first, second = two(TORCHELASTIC_RUN_ID="a")
    ends = ended(tmp_path, [first, {**second, **changed}], bad, timeout=1)
    assert all(end.code == 2 for end in ends)
    assert any(words in end.err for end in ends), ends


class Gone:
    """A store that goes away, as rank 0 does at its end, while a rank asks who gives signs of life."""

    def __init__(self) -> None:
        self.meanwhile: Callable[[], object] = int

    def set(self, key: str, value: str) -> None:
        pass

    def get(self, key: str) -> bytes:
        self.meanwhile()
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("meanwhile", ["nothing", "leaves", "waits no longer"])
def test_who_ends_while_others_look_for_it_is_not_lost(meanwhile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once this rank leaves too, or the others have come to where it waited."""
    store, since, said = Gone(), [0.0], list[str]()
    watch = Watch(Place(1, 2, 1, 2), store, False, 600, lambda: since[-1], int)
    monkeypatch.setattr(watch, "end", said.append)
    changes: dict[str, Callable[[], object]] = {"leaves": watch.leave, "waits no longer": lambda: since.append(1.0)}
    store.meanwhile = changes.get(meanwhile, int)
    try:
        for asked, timeout in ((None, 0), (-1e6, 1e12)):
            watch.timeout = timeout
            since[:] = [-1e6]
            watch._judge(asked, None)
    finally:
        signal.set_wakeup_fd(-1)
    assert said == ([watch.gone] * 2 if meanwhile == "nothing" else [])
