"""`tinygrad_impl.bench` on several ranks: what each of them does, and what is made of all their figures."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import shared_weights
from data.cli import InputError, Lost
from data.ranks import ALONE, Place, Ranks
from data.testing import call, refused
from data.tests.ranks import in_ranks
from tinygrad_impl import bench, bench_peers, bench_port, bench_ranks
from tinygrad_impl.backend import Plain

CONFIG = GPT2Config(vocab_size=1024, n_layer=1, n_head=2, n_embd=16, n_positions=32)
OPTIONS = argparse.Namespace(
    batch_size=3, seq_len=20, steps=2, dtype="float32", profile=False, against=["torch-eager"], arch=None
)
SECONDS = {"tinygrad": ([1.0, 5.0], [2.0, 4.0]), "torch-eager": ([3.0, 12.0], [1.0, 16.0])}  # of steps, on two ranks
WALL = {"tinygrad": ([1.5, 3.0], [1.0, 3.5]), "torch-eager": ([2.0, 9.0], [2.0, 20.0])}  # of turns, of a step each


class Contender:
    """Of a rank, with figures that are written down."""

    device = "CPU"

    def __init__(self, name: str, rank: int, log: list[Any], *given: Any):
        self.name, self.rank, self.log, self.given = name, rank, log, given
        self.steps, self.wall = iter(SECONDS[name][rank]), iter(WALL[name][rank])
        self.figures = self.said([7.0 + rank, 0.5, 0.5])

    def said(self, seconds: list[float]) -> dict[str, Any]:
        held = (5 - self.rank) * 10**9
        return {
            **{"seconds": seconds, "first_loss": 6.0 + self.rank, "compiled": 4},
            **{"allocated_bytes": (1 + self.rank) * 10**9, "held_bytes": held, "versions": {"torch": "2.13.0"}},
        }

    def ready(self) -> None:
        self.log.append((self.name, "ready"))

    def run(self, steps: int) -> dict[str, Any]:
        self.log.append((self.name, steps))
        return self.said([next(self.steps) for _ in range(steps)]) | {"wall_seconds": next(self.wall)}

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.log.append((self.name, do, arguments))
        if do == "ceilings":
            return {"n": 768, "flops": (1 + self.rank) * 1e9, "bytes": 2e9}
        return self.figures


def compared(ranks: Ranks, apart: bool, *peers: str) -> tuple[dict[str, Any], list[Any], str | None]:
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
        kept = list[Any]()
        found = bench.compare(args, CONFIG, "CPU", Plain(), "weights", ranks, apart, keep=kept.append)
        assert found == kept[-1]
        assert len(kept) == len(["tinygrad", *args.against]) * 2 + 1
    log = [tuple("ranks" if given is ranks else given for given in entry) for entry in log]
    return found, log, os.environ.get("MASTER_PORT")


def test_two_ranks() -> None:
    """Each has its own tokens and its own worker, which meets the other; the rate is that of turns on the clock."""
    (first, log, _), (second, other, _) = found = in_ranks(2, compared, False, "torch-eager")
    places = [own for *_, own in found]
    assert first["contenders"].keys() == {"tinygrad", "torch-eager"}
    rates = {"tinygrad": 2 * 60 / 2.5, "torch-eager": 2 * 60 / 11}  # by the medians of two turns
    single = {"tinygrad": 3.0, "torch-eager": 7.5}  # the medians of the steps of both, by their own clocks
    for found, own in ((first, 1e9), (second, 2e9)):
        for name, row in found["contenders"].items():
            assert row["tokens_per_second"] == pytest.approx(rates[name])
            assert row["flops"] == pytest.approx(found["flops_a_step"] / row["step_seconds"])
            assert row["first_step_seconds"] == 8.0
            assert row["first_steps_seconds"] == 8.5
            assert (row["step_seconds_50th"], row["steps"], row["turns"]) == (single[name], 2, 2)
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
        _, _, tokens, device, backend, ranks = next(entry for entry in entries if entry[0] == "Port")
        assert (device, backend, ranks) == ("CPU", Plain(), "ranks")
        np.testing.assert_array_equal(tokens, np.random.default_rng(1337 + rank).integers(0, 1024, (4, 3, 21)))
    turns = [("tinygrad", 1), ("torch-eager", 1), ("torch-eager", 1), ("tinygrad", 1)]
    assert [entry for entry in log if entry[1] == 1] == turns
    assert log[log.index(turns[0]) - 1] == ("tinygrad", "ready")


def test_each_by_itself_at_once() -> None:
    """None meets another, tinygrad is in a process of its own, and the rate is of both on one clock."""
    for found, log, _ in in_ranks(2, compared, True, "torch-eager"):
        assert log[0] == ("torch-eager", {})
        assert log[1][2]["warm_up"] == 1
        assert "ranks" not in log[1][2]
        assert log[2] == ("tinygrad", None)
        build = log[3][2]
        assert {name: build[name] for name in ("kernels", "device", "weights")} == {
            **{"kernels": "plain", "device": "CPU", "weights": "weights"}
        }
        assert not [entry for entry in log if "Port" in entry or "ceilings" in entry]
        assert found["contenders"]["tinygrad"]["tokens_per_second"] == pytest.approx(2 * 60 / 2.5)
        assert found["ceiling"] is None


def test_alone_nothing_is_exchanged() -> None:
    """As without ranks: no port, no mention of ranks, and no more figures."""
    found, log, _ = compared(ALONE, False, "torch-eager")
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


FAILING: dict[str, Any] = {}  # in which of its parts the job of `job` fails


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Makes this process a rank of two on hosts of their own. Returns what happened: measuring one GPU, and joining."""
    log: list[Any] = []

    @contextmanager
    def joined(device: str, timeout: float) -> Iterator[Ranks]:
        log.append(("joined", device))
        yield Two(bench.place().rank)  # type: ignore[union-attr]
        log.append(("left",))

    def compare(*given: Any, apart: bool = False, keep: Any) -> Any:
        args, _, device, _, weights, *more = given
        size = more[0].size if more else 1
        log.append(("apart" if apart else "together", device, args.batch_size, args.against, size))
        if (size, apart) == FAILING.get("at"):
            raise InputError("it is gone")
        assert Path(weights).stat().st_size == 4 * bench.parameter_count(CONFIG)
        rate, other = {(1, True): (20.0, 10.0), (2, True): (38.0, 19.0), (2, False): (36.0, 15.0)}[size, apart]
        row: dict[str, Any] = {
            "tokens_per_second": rate,
            "step_seconds": 3.5,
            "step_seconds_10th": 3.0,
            "step_seconds_90th": 4.0,
        }
        row |= {"flops": 1e9, "share_of_ceiling": None, "first_step_seconds": 1.0, "first_steps_seconds": 2.0}
        row |= {"compiled": 1, "first_loss": 6.5, "turns": 5}
        memory = {"allocated_bytes": (4 if size == 1 else 2) * 10**9, "allocated_bytes_largest": 3 * 10**9}
        rows = {"tinygrad": row | memory, "torch-eager": row | {"tokens_per_second": other}}
        found = {"versions": {}, "ceiling": None, "contenders": rows, "ratios": {"torch-eager": rate / other}}
        keep(found | {"profile": None, "turns": 5})
        return found

    monkeypatch.setattr(bench, "joined", joined)
    made = tmp_path.with_name(f"{tmp_path.name}-weights")  # by the other rank
    made.write_bytes(bytes(4 * bench.parameter_count(CONFIG)))
    monkeypatch.setattr(bench, "of_this_host", lambda file, ranks: file or str(made))
    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setitem(bench.PRESETS, "tiny", CONFIG)
    return log


TINY = ["--preset", "tiny", "--device", "CPU"]


def test_the_first_rank_reports(job: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU while the others wait for it to join them, then all; the shares against what can be worked out."""
    monkeypatch.setattr(bench, "place", lambda: Place(0, 2, 0, 1))
    result = call(bench.main, *TINY, "--batch-size", 3, "--json", "found.json", cwd=tmp_path)
    assert result.code == 0, result
    what = "CPU", 3, ["torch-eager"]
    joined = [("joined", "CPU"), ("apart", *what, 2), ("together", *what, 2), ("left",)]
    assert job == [("apart", *what, 1), *joined]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (found["ranks"], found["hosts"], found["finished"]) == (2, 2, True)
    rates = [found[key]["contenders"]["tinygrad"]["tokens_per_second"] for key in ("one", "at_once")]
    assert [*rates, found["contenders"]["tinygrad"]["tokens_per_second"]] == [20, 38, 36]
    assert found["scaling"] == {
        "tinygrad": {
            **{"rate": pytest.approx(36 / 40), "at_once": pytest.approx(38 / 40)},
            **{"of_at_once": pytest.approx(36 / 38), "memory": pytest.approx(3 / 4)},
        },
        "torch-eager": {
            **{"rate": pytest.approx(15 / 20), "at_once": pytest.approx(19 / 20)},
            "of_at_once": pytest.approx(15 / 19),
        },
    }
    lines = result.out.splitlines()
    assert lines[0].endswith("cores, each of 2 ranks")
    assert "one process by itself: tinygrad 20 tokens/s, torch-eager 10 tokens/s" in lines
    assert "2 processes by themselves, all at once: tinygrad 38 tokens/s, torch-eager 19 tokens/s" in lines
    assert [re.split(r"  +", line.strip()) for line in lines[-10:]] == [
        ["tokens/s", "tinygrad", "torch-eager"],
        ["one process by itself", "20", "10"],
        ["2 processes by themselves, all at once", "38", "19"],
        ["of 2 x one", "0.950", "0.950"],
        ["2 processes together", "36", "15"],
        ["of 2 x one", "0.900", "0.750"],
        ["of by themselves", "0.947", "0.789"],
        ["GB allocated by one", "4.00", "-"],
        ["together, at most", "3.00", "-"],
        ["of one's", "0.750", "-"],
    ]
    assert max(map(len, lines[2:])) <= 100


@pytest.mark.parametrize("apart", [True, False])
def test_what_was_measured_before_a_failure(
    apart: bool, job: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is in the file and is shown: of one GPU, and of all by themselves where they were measured."""
    monkeypatch.setattr(bench, "place", lambda: Place(0, 2, 0, 1))
    monkeypatch.setitem(FAILING, "at", (2, apart))
    result = call(bench.main, *TINY, "--json", "found.json", cwd=tmp_path)
    refused(result, "it is gone")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert not found["finished"]
    assert found["one"]["contenders"]["tinygrad"]["tokens_per_second"] == 20
    assert found["scaling"]["tinygrad"] == ({} if apart else {"at_once": pytest.approx(38 / 40)})
    rows = [re.split(r"  +", line.strip()) for line in result.out.splitlines()]
    assert ["one process by itself", "20", "10"] in rows
    assert ["2 processes together", "-", "-"] in rows
    assert ["2 processes by themselves, all at once", *(["-", "-"] if apart else ["38", "19"])] in rows


def test_other_ranks_are_silent(job: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "place", lambda: Place(1, 2, 0, 1))
    result = call(bench.main, *TINY, "--json", "found.json", cwd=tmp_path)
    assert (result.code, result.out, result.err) == (0, "", "")
    what = "CPU", 8, ["torch-eager"], 2
    assert job == [("joined", "CPU"), ("apart", *what), ("together", *what), ("left",)]
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


def test_weights_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are read from the rank of the same host that has made them."""
    ranks = Two(1)
    told = [("other", "a"), ("here", "b"), ("here", None), ("other", None)]
    monkeypatch.setattr(ranks, "gather", lambda value: told if value == ("here", None) else None)
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    assert bench_ranks.of_this_host(None, ranks) == "b"


def test_a_port_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process of one builds from what it is asked for, which trains by itself."""
    tokens, built = np.arange(4 * 2 * 17).reshape(4, 2, 17), list[Any]()
    np.save(tmp_path / "tokens.npy", tokens)
    monkeypatch.setattr(bench_port, "Port", lambda *given, **more: built.append((given, more)))
    given: dict[str, Any] = {"config": asdict(CONFIG), "weights": "weights", "tokens": str(tmp_path / "tokens.npy")}
    bench_port.build(**given, dtype="float32", device="CPU", kernels="plain", warm_up=1)
    [((config, weights, of_file, *place), more)] = built
    assert (config, weights, place, more) == (CONFIG, "weights", ["CPU", Plain()], {"warm_up": 1})
    np.testing.assert_array_equal(of_file, tokens)


@pytest.mark.slow  # of a process that compiles; quicker, the same without it is seen above
def test_ports_process() -> None:
    """It answers as PyTorch's does, and trains as a port in this process."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 2, 9), np.int32)
    with shared_weights(CONFIG, 1) as weights, tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/tokens.npy"
        np.save(file, tokens)
        with bench_peers.worker("tinygrad") as port:
            given = {"config": asdict(CONFIG), "weights": weights, "tokens": file, "dtype": "float32", "warm_up": 1}
            begun = port.ask("build", **given, device="CPU", kernels="plain")
            port.ready()
            figures = port.run(2)
            with pytest.raises(InputError, match=r"tinygrad cannot be measured here \(TypeError: .*; see whether"):
                port.ask("run", times=3)
        own = bench.Port(CONFIG, weights, tokens, "CPU", Plain(), warm_up=1)
    assert (len(begun["seconds"]), len(figures["seconds"])) == (1, 2)
    assert begun["first_loss"] == figures["first_loss"] == own.first_loss
    assert figures["allocated_bytes"] > 0


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
    try:
        while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
    except AssertionError:
        os.kill(pid, signal.SIGKILL)  # stopped, it would never end
        raise


def test_a_rank_that_is_ended_says_so() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def end() -> None:
        with bench_ranks.told_of_its_end():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(Lost, match="another one is gone"):
        end()
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_ranks_end_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the first comes out of what they do together, and shows what it has."""
    monkeypatch.setattr(bench_ranks, "GRACE", 0.05)
    ended: list[float] = []

    def end() -> None:
        with bench_ranks.told_of_its_end(rank=1):
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(time.monotonic())
            time.sleep(5)

    with pytest.raises(Lost):
        end()
    assert 0.04 < time.monotonic() - ended[0] < 4


def test_workers_meet_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at torchrun's port, where the ranks themselves are."""
    for name, value in (TORCHRUN | MEETING).items():
        monkeypatch.setenv(name, value)
    for meeting in ({"MASTER_PORT": "4321", "RANK": "1"}, None):
        with bench_peers.worker("torch-eager", meeting) as peer:
            assert os.getpgid(peer.process.pid) == peer.process.pid  # what is sent to the rank's group is not for it
            said = Path(f"/proc/{peer.process.pid}/environ").read_bytes().split(b"\0")
        environment = dict(entry.decode().split("=", 1) for entry in said if entry)
        assert {name: environment.get(name) for name in TORCHRUN} == dict.fromkeys(TORCHRUN) | (
            {"RANK": "1"} if meeting else {}
        )
        assert "TORCHELASTIC_USE_AGENT_STORE" not in environment
        assert environment["MASTER_PORT"] == ("4321" if meeting else "1")
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
