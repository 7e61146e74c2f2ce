"""`tinygrad_impl.bench` on several ranks: what each of them does, and what is made of all their figures."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.checkpoints.config import GPT2Config
from data.cli import InputError, Lost
from data.ranks import ALONE, Place, Ranks
from data.testing import call, refused
from data.tests.ranks import in_ranks
from tinygrad_impl import bench, bench_peers, bench_ranks
from tinygrad_impl.backend import Plain

CONFIG = GPT2Config(vocab_size=1024, n_layer=1, n_head=2, n_embd=16, n_positions=32)
OPTIONS = argparse.Namespace(batch_size=3, seq_len=20, steps=2, dtype="float32", profile=False, against=["torch-eager"])
SECONDS = {"tinygrad": ([1.0, 5.0], [2.0, 4.0]), "torch-eager": ([3.0, 12.0], [1.0, 16.0])}  # of steps, on two ranks


class Contender:
    """Of a rank, with figures that are written down."""

    device = "CPU"

    def __init__(self, name: str, rank: int, log: list[Any], *given: Any):
        self.name, self.rank, self.log, self.given = name, rank, log, given
        self.steps = iter(SECONDS[name][rank])
        self.figures = self.said([7.0 + rank, 0.5, 0.5])

    def said(self, seconds: list[float]) -> dict[str, Any]:
        held = (5 - self.rank) * 10**9
        return {
            **{"seconds": seconds, "first_loss": 6.0 + self.rank, "compiled": 4},
            **{"allocated_bytes": (1 + self.rank) * 10**9, "held_bytes": held, "versions": {"torch": "2.13.0"}},
        }

    def run(self, steps: int) -> dict[str, Any]:
        self.log.append((self.name, steps))
        return self.said([99.0, *(next(self.steps) for _ in range(steps - 1))])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.log.append((self.name, do, arguments))
        if do == "ceilings":
            return {"n": 768, "flops": (1 + self.rank) * 1e9, "bytes": 2e9}
        return self.figures


def compared(ranks: Ranks, *peers: str) -> tuple[dict[str, Any], list[Any], str | None]:
    """What `bench.compare` finds on a rank, what the contenders there were given and asked, and the ranks' own port."""
    log: list[Any] = []

    @contextmanager
    def worker(name: str, meeting: dict[str, str] | None = None) -> Iterator[Contender]:
        log.append((name, meeting))
        yield Contender(name, ranks.rank, log)

    class Port:
        def __new__(cls, *given: Any) -> Contender:  # type: ignore[misc]
            log.append(("Port", *given[1:]))
            return Contender("tinygrad", ranks.rank, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "worker", worker)
        patch.setattr(bench, "Port", Port)
        args = argparse.Namespace(**{**vars(OPTIONS), "against": list(peers)})
        found = bench.compare(args, CONFIG, "CPU", Plain(), ranks)
    log = [tuple("ranks" if given is ranks else given for given in entry) for entry in log]
    return found, log, os.environ.get("MASTER_PORT")


def test_two_ranks() -> None:
    """Each has its own tokens and its own worker, which meets the other; a step takes as long as on the slower one."""
    (first, log, _), (second, other, _) = found = in_ranks(2, compared, "torch-eager")
    places = [own for *_, own in found]
    assert first["contenders"].keys() == {"tinygrad", "torch-eager"}
    rates = {"tinygrad": 2 * 60 / 3.5, "torch-eager": 2 * 60 / 9.5}  # the medians of 2 and 5, and of 3 and 16
    for found, own in ((first, 1e9), (second, 2e9)):
        for name, row in found["contenders"].items():
            assert row["tokens_per_second"] == pytest.approx(rates[name])
            assert row["flops"] == pytest.approx(found["flops_a_step"] / row["step_seconds"])
            assert row["first_step_seconds"] == 8.0
            assert row["first_loss"] == 6.5
            assert (row["allocated_bytes"], row["allocated_bytes_largest"]) == (own, 2e9)
            assert row["held_bytes_largest"] == 5e9
        assert found["flops_a_step"] == 2 * bench.flops_a_token(CONFIG, 20) * 60
        assert found["ceiling"] == {"n": 768, "flops": 3e9, "bytes": 4e9, "dtype": "float32"}
    ports = {entries[0][1].pop("MASTER_PORT") for entries in (log, other)}
    assert len(ports) == 1  # at which the ranks themselves are not
    assert ports.isdisjoint({"0", *places})
    for rank, entries in enumerate((log, other)):
        where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        assert entries[0] == ("torch-eager", {name: str(value) for name, value in where.items()})
        build = next(entry[2] for entry in entries if entry[1] == "build")
        assert build["ranks"] is True
        assert build["config"] == asdict(CONFIG)
        _, tokens, device, backend, ranks = next(entry for entry in entries if entry[0] == "Port")
        assert (device, backend, ranks) == ("CPU", Plain(), "ranks")
        np.testing.assert_array_equal(tokens, np.random.default_rng(1337 + rank).integers(0, 1024, (4, 3, 21)))
    turns = [("tinygrad", 2), ("torch-eager", 2), ("torch-eager", 2), ("tinygrad", 2)]
    assert [entry for entry in log if isinstance(entry[-1], int) and entry[1] == 2] == turns


def test_alone_nothing_is_exchanged() -> None:
    """As without ranks: no port, no mention of ranks, and no more figures."""
    found, log, _ = compared(ALONE, "torch-eager")
    assert log[0] == ("torch-eager", {})
    assert "ranks" not in log[1][2]
    assert not [key for key in found["contenders"]["tinygrad"] if "largest" in key]


class Two(Ranks):
    """Rank 0 or 1 of two, of which the other has a quarter more of everything."""

    size, local_size = 2, 1

    def __init__(self, rank: int):
        self.rank = rank

    def numbers(self, *values: float) -> np.ndarray:
        return np.array([values, [1.25 * value for value in values]])

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


ONE = {
    "contenders": {
        "tinygrad": {"tokens_per_second": 20.0, "step_seconds": 3.0, "allocated_bytes": 4 * 10**9},
        "torch-eager": {"tokens_per_second": 10.0, "step_seconds": 6.0},
    },
    "ratios": {"torch-eager": 2.0},
}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Makes this process a rank of two on hosts of their own. Returns what happened: measuring one GPU, and joining."""
    log: list[Any] = []

    @contextmanager
    def joined(device: str, timeout: float) -> Iterator[Ranks]:
        log.append(("joined", device))
        yield Two(bench.place().rank)  # type: ignore[union-attr]
        log.append(("left",))

    def one_gpu(args: argparse.Namespace, device: str) -> dict[str, Any]:
        log.append(("one", device, args.batch_size, args.against))
        return ONE

    def compare(args: argparse.Namespace, config: GPT2Config, device: str, backend: Any, ranks: Ranks) -> Any:
        log.append(("all", ranks.size))
        row: dict[str, Any] = {
            "tokens_per_second": 36.0,
            "step_seconds": 3.5,
            "step_seconds_10th": 3.0,
            "step_seconds_90th": 4.0,
        }
        row |= {"flops": 1e9, "share_of_ceiling": None, "first_step_seconds": 1.0, "first_steps_seconds": 2.0}
        row |= {"compiled": 1, "first_loss": 6.5}
        memory = {"allocated_bytes": 2 * 10**9, "allocated_bytes_largest": 3 * 10**9}
        rows = {"tinygrad": row | memory, "torch-eager": row | {"tokens_per_second": 15.0}}
        ratios = {"torch-eager": 36 / 15}
        return {"versions": {}, "ceiling": None, "contenders": rows, "ratios": ratios, "profile": None}

    monkeypatch.setattr(bench, "joined", joined)
    monkeypatch.setattr(bench, "one_gpu", one_gpu)
    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setitem(bench.PRESETS, "tiny", CONFIG)
    return log


TINY = ["--preset", "tiny", "--device", "CPU"]


def test_the_first_rank_reports(job: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU while the others wait for it to join them, then all; the shares against what can be worked out."""
    monkeypatch.setattr(bench, "place", lambda: Place(0, 2, 0, 1))
    result = call(bench.main, *TINY, "--batch-size", 3, "--json", "found.json", cwd=tmp_path)
    assert result.code == 0, result
    assert job == [("one", "CPU", 3, ["torch-eager"]), ("joined", "CPU"), ("all", 2), ("left",)]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (found["ranks"], found["hosts"], found["one"]) == (2, 2, ONE)
    assert found["scaling"] == {
        "tinygrad": {"rate": pytest.approx(36 / 40), "memory": pytest.approx(3 / 4)},
        "torch-eager": {"rate": pytest.approx(15 / 20)},
    }
    lines = result.out.splitlines()
    assert lines[0].endswith("cores, each of 2 ranks")
    cells = [re.split(r"  +", line.strip()) for line in lines[-3:]]
    heads = ["tok/s on 2 processes", "on 1", "of 2 x 1", "tinygrad is", "on 1 it is", "GB allocated on rank 0"]
    assert cells[0] == [*heads, "at most", "on 1", "of that"]
    assert cells[1] == ["tinygrad", "36", "20", "0.900", "1.000 x", "1.000 x", "2.00", "3.00", "4.00", "0.75"]
    assert cells[2] == ["torch-eager", "15", "10", "0.750", "2.400 x", "2.000 x", "-", "-", "-", "-"]


def test_other_ranks_are_silent(job: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "place", lambda: Place(1, 2, 0, 1))
    result = call(bench.main, *TINY, "--json", "found.json", cwd=tmp_path)
    assert (result.code, result.out, result.err) == (0, "", "")
    assert job == [("joined", "CPU"), ("all", 2), ("left",)]
    assert not list(tmp_path.iterdir())


def test_each_rank_has_its_device(job: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is known before one is opened."""
    asked: list[Any] = []

    def rank_device(wanted: str | None, here: Place) -> str:
        asked.append((wanted, here.local_rank))
        return "CUDA"

    def open_device(name: str | None) -> str:
        asked.append(name)
        return "CPU"

    monkeypatch.setattr(bench, "rank_device", rank_device)
    monkeypatch.setattr(bench, "open_device", open_device)
    monkeypatch.setattr(bench, "place", lambda: Place(3, 4, 1, 2))
    assert call(bench.main, *TINY, cwd=tmp_path).code == 0
    assert asked == [("CPU", 1), "CUDA"]


def test_gpus(job: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--gpus` starts the same command on each of them, and this process ends with that."""
    asked: list[Any] = []

    def launch(*given: Any) -> None:
        asked.append(given)
        raise SystemExit(0)

    monkeypatch.setattr(bench, "launch", launch)
    assert call(bench.main, *TINY, "--gpus", 4, cwd=tmp_path).code == 0
    assert asked == [("tinygrad_impl.bench", [*TINY, "--gpus", "4"], "4", "CPU", bench.ENDING)]
    assert job == []


def test_the_kernels_of_ranks_are_not_profiled(job: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "place", lambda: Place(0, 2, 0, 2))
    refused(call(bench.main, *TINY, "--profile", cwd=tmp_path), "--profile is of one GPU")
    assert job == []


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": "1", "MASTER_ADDR": "host"}


def test_one_gpu_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same program with the same options, which does not know of the others."""
    started: list[Any] = []
    code = 0

    def start(command: list[str], env: dict[str, str], **_: Any) -> Any:
        started.append((command, env))
        Path(command[-1]).write_text('{"found": 1}')
        return argparse.Namespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", start)
    for name, value in (TORCHRUN | MEETING | {"DEV": "CPU", "CUDA_VISIBLE_DEVICES": "5"}).items():
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(**vars(OPTIONS), preset="gpt2", kernels="fused")
    assert bench_ranks.one_gpu(args, "CUDA") == {"found": 1}
    command, environment = started[0]
    options = "--preset gpt2 --batch-size 3 --seq-len 20 --dtype float32 --steps 2 --kernels fused --device CUDA"
    assert command[1:-1] == ["-m", "tinygrad_impl.bench", *options.split(), "--against", "torch-eager", "--json"]
    assert not environment.keys() & {*TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE", "DEV"}
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    args.against = []
    bench_ranks.one_gpu(args, "CUDA")
    assert started[1][0][-4:-2] == ["--against", "none"]
    code = 2
    with pytest.raises(SystemExit, match="2"):
        bench_ranks.one_gpu(args, "CUDA")
    code = -9
    with pytest.raises(InputError, match="measuring one process by itself ended with exit code -9; try `"):
        bench_ranks.one_gpu(args, "CUDA")


def test_a_worker_ends_with_its_rank() -> None:
    """Killed, the rank cannot end it; and it may be waiting for other ranks, rather than for what its rank asks."""
    code = "import sys; from tinygrad_impl.bench_peers import worker\n"
    code += "with worker('torch-eager') as peer: print(peer.process.pid, flush=True); sys.stdin.read()"
    rank = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert rank.stdout
    pid = int(rank.stdout.readline())
    os.kill(pid, signal.SIGSTOP)  # it would see that nobody asks any more
    rank.kill()
    rank.communicate()
    until = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_rank_that_is_ended_says_so() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def end() -> None:
        with bench_ranks.told_of_its_end():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(Lost, match="another rank is gone"):
        end()
    assert signal.getsignal(signal.SIGTERM) == before


def test_workers_meet_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at torchrun's port, where the ranks themselves are."""
    for name, value in (TORCHRUN | MEETING).items():
        monkeypatch.setenv(name, value)
    for meeting in ({"MASTER_PORT": "4321", "RANK": "1"}, None):
        with bench_peers.worker("torch-eager", meeting) as peer:
            said = Path(f"/proc/{peer.process.pid}/environ").read_bytes().split(b"\0")
        environment = dict(entry.decode().split("=", 1) for entry in said if entry)
        assert {name: environment.get(name) for name in TORCHRUN} == dict.fromkeys(TORCHRUN) | (
            {"RANK": "1"} if meeting else {}
        )
        assert "TORCHELASTIC_USE_AGENT_STORE" not in environment
        assert environment["MASTER_PORT"] == ("4321" if meeting else "1")
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
