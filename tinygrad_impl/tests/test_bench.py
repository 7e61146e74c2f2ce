"""`python -m tinygrad_impl.bench`: what it reports, that both sides do the same work, and what it refuses."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from tinygrad import Tensor

import tinygrad_impl.bench_port as bench_port
import torch_ref.bench_worker
import torch_ref.model
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights, shared_weights
from data.cli import InputError
from data.ranks import ALONE
from data.testing import call, refused
from tinygrad_impl import bench
from tinygrad_impl.backend import Plain
from tinygrad_impl.kernels import GPU
from torch_ref.bench_worker import Peer

CONFIG = GPT2Config(vocab_size=1024, n_layer=1, n_head=2, n_embd=16, n_positions=32)  # a vocabulary without padding


@pytest.fixture(scope="module")
def weights() -> Iterator[str]:
    with shared_weights(CONFIG, bench.SEED) as file:
        yield file


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes preset tiny a model that is quick to measure."""
    monkeypatch.setitem(bench.PRESETS, "tiny", CONFIG)


@pytest.mark.usefixtures("small")
def test_report(tmp_path: Path) -> None:
    options = ["--preset", "tiny", "--device", "CPU", "--batch-size", "2", "--seq-len", "16", "--steps", "2"]
    result = call(bench.main, *options, "--json", "found.json", "--profile", cwd=tmp_path)
    assert result.code == 0, result
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    sizes = {"preset": "tiny", "batch_size": 2, "seq_len": 16, "dtype": "float32", "device": "CPU", "kernels": "plain"}
    assert {name: found[name] for name in sizes} == sizes
    # what is multiplied, all but positions, and the products of attention
    parameters = 1024 * 16 + 32 * 16 + 12 * 16**2 + 13 * 16 + 2 * 16
    assert found["parameters"] == parameters
    assert found["flops_a_step"] == (6 * (parameters - 32 * 16) + 12 * 16 * 16) * 2 * 16
    ours, theirs = found["contenders"]["tinygrad"], found["contenders"]["torch-eager"]
    assert list(found["contenders"]) == ["tinygrad", "torch-eager"]
    for row in (ours, theirs):
        assert row["steps"] == 2
        assert 0 < row["step_seconds_10th"] <= row["step_seconds_50th"] <= row["step_seconds_90th"]
        assert row["step_seconds_10th"] <= row["step_seconds"]
        assert row["tokens_per_second"] == pytest.approx(32 / row["step_seconds"])
        assert row["flops"] == pytest.approx(found["flops_a_step"] / row["step_seconds"])
        assert row["share_of_ceiling"] == pytest.approx(row["flops"] / found["ceiling"]["flops"])
        assert 0 < row["first_step_seconds"] < row["first_steps_seconds"]
        assert row["held_bytes"] > 50e6  # of the process
        assert f"{row['tokens_per_second']:,.0f}" in result.out
    assert ours["allocated_bytes"] >= 4 * 4 * parameters  # float32 weights, gradients and two moments
    assert found["ratios"] == {"torch-eager": pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])}
    assert f"{found['ratios']['torch-eager']:.3f} x the rate of torch-eager" in result.out
    assert found["ceiling"]["dtype"] == "float32"
    assert found["versions"].keys() == {"tinygrad", "torch"}

    kernels = found["profile"]
    assert [row["seconds"] for row in kernels] == sorted((row["seconds"] for row in kernels), reverse=True)
    assert sum(row["share"] for row in kernels) == pytest.approx(1)
    # kernels do at least what the model needs, and not so much more that they were counted twice
    assert found["flops_a_step"] < sum(row["flops"] for row in kernels) < 10 * found["flops_a_step"]
    assert kernels[0]["name"] in result.out
    assert "others" in result.out


def test_both_do_the_same_work(tmp_path: Path, weights: str) -> None:
    """The losses and the weights after some steps."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (bench.BATCHES, 2, 17), np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    peer = Peer(asdict(CONFIG), weights, str(tmp_path / "tokens.npy"), "float32", "cpu", compile=False)
    peer.run(bench.WARM_UP - 1)
    assert peer.ready() == {}
    port = bench.Port(CONFIG, weights, tokens, "CPU", Plain())
    assert port.first_loss == pytest.approx(peer.first_loss, abs=5e-6)
    ours, theirs = port.trainer.model.arrays(), peer.model.arrays()
    assert np.abs(ours["wte.weight"] - initial_weights(CONFIG, bench.SEED)["wte.weight"]).max() > bench_port.LR
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=bench_port.LR / 10, err_msg=name)


def test_the_peers_vocabulary_is_padded(tmp_path: Path) -> None:
    """To 128 of its tokens, as its users do; the padding is in the loss, and nothing else is other than the model's."""
    config = replace(CONFIG, vocab_size=1000)
    tokens = np.random.default_rng(0).integers(0, 1000, (2, 2, 17), np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    with shared_weights(config, 5) as file:
        peer = Peer(asdict(config), file, str(tmp_path / "tokens.npy"), "float32", "cpu", compile=False)
    wte = peer.model.arrays()["wte.weight"]
    assert wte.shape == (1024, 16)
    assert (wte[1000:] == 0).all()
    arrays = initial_weights(config, 5)
    np.testing.assert_array_equal(wte[:1000], arrays["wte.weight"])
    x, y = torch.tensor(tokens[0, :, :-1]), torch.tensor(tokens[0, :, 1:])
    loss = torch_ref.model.GPT2(config, arrays)(x, y)[1]
    assert loss is not None
    peer.run(1)
    assert peer.first_loss == pytest.approx(loss.item() + math.log(1024 / 1000), abs=5e-4)  # logits are near 0 yet
    peer.run(1)
    assert peer.first_loss == pytest.approx(loss.item() + math.log(1024 / 1000), abs=5e-4)  # of the first step for ever


class Clock:
    """Time that passes only as it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


TOKENS = np.arange(4 * 2 * 6).reshape(4, 2, 6)


def scripted_trainer(clock: Clock, losses: list[float], norms: list[float], taken: list[Any]) -> type:
    class Scripted:
        steps = 0

        def __init__(self, config: GPT2Config, arrays: Any, **options: Any):
            taken.append((config, arrays["wte.weight"], options))
            clock.now += 7

        def step(self, batches: list[tuple[np.ndarray, np.ndarray]], lr: float) -> tuple[float, float]:
            taken.append((batches, lr))
            clock.now += 2**self.steps
            self.steps += 1
            return losses[self.steps - 1], norms[self.steps - 1]

    return Scripted


def test_steps_of_the_port(weights: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by a clock that stands still between steps: the first has the building in it; batches by turns."""
    taken: list[Any] = []
    trainer = scripted_trainer(clock, [5.0, 4.0, 3.0, 2.0, 1.0], [1.0] * 5, taken)
    counts = iter((10, 13))
    monkeypatch.setattr(bench_port, "Trainer", trainer)
    monkeypatch.setattr(bench_port, "compiled", lambda: next(counts))
    backend = Plain()
    port = bench.Port(CONFIG, weights, TOKENS, "CPU", backend)
    assert taken[0][0] is CONFIG
    np.testing.assert_array_equal(taken[0][1], initial_weights(CONFIG, 1337)["wte.weight"])
    assert taken[0][2] == {"backend": backend, "ranks": ALONE}
    assert port.figures["seconds"] == [7 + 1, 2, 4]
    assert port.figures["wall_seconds"] == 7
    assert (port.figures["compiled"], port.figures["first_loss"]) == (3, 5.0)
    assert port.ready() == {}
    assert port.run(1)["seconds"] == [16]
    assert port.run(0)["first_loss"] == 5.0
    for i, ([(x, y)], lr) in enumerate(taken[1:]):
        np.testing.assert_array_equal(x, TOKENS[i % 4, :, :5])
        np.testing.assert_array_equal(y, TOKENS[i % 4, :, 1:])
        assert lr == 1e-4


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (3.0, math.inf)])
def test_a_step_that_is_left_out_is_not_measured(
    loss: float, norm: float, weights: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_port, "Trainer", scripted_trainer(clock, [4.0, loss], [2.0, norm], []))
    with pytest.raises(InputError, match=f"loss became {loss} and the gradient's norm {norm}; this measures nothing"):
        bench.Port(CONFIG, weights, TOKENS, "CPU", Plain())


def test_compiled_kernels_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tinygrad's, and Triton's, of which each is in a folder of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = bench_port.compiled()
    for name in ("a/one.cubin", "b/two.cubin", "b/two.ptx", "three.cubin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert bench_port.compiled() == before + 2
    Tensor.full((before % 89 + 3, 7), 2.0).contiguous().mul(before).exp().realize()  # a kernel that is new
    assert bench_port.compiled() > before + 2


@pytest.mark.parametrize("compile", [False, True])
def test_steps_of_the_peer(
    compile: bool, weights: str, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)  # type: ignore[func-returns-value]
    monkeypatch.setitem(torch._dynamo.utils.counters["inductor"], "fxgraph_cache_miss", 6)
    np.save(tmp_path / "tokens.npy", TOKENS)
    init, adamw, taken = Peer.__init__, torch.optim.AdamW.step, list[Any]()
    loss_of = Peer.loss_of

    def slow_init(*arguments: Any, **options: Any) -> None:
        init(*arguments, **options)
        clock.now += 7

    def slow_step(self: torch.optim.AdamW) -> None:
        adamw(self)
        clock.now += 2 ** (len(taken) - 1)

    def watched(self: Peer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        taken.append((x.numpy(), y.numpy(), torch.is_autocast_enabled("cpu")))
        return loss_of(self, x, y)

    monkeypatch.setattr(Peer, "__init__", slow_init)
    monkeypatch.setattr(Peer, "loss_of", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", slow_step)
    arguments: dict[str, Any] = {
        "config": asdict(CONFIG),
        "weights": weights,
        "tokens": str(tmp_path / "tokens.npy"),
        "device": "cpu",
    }
    peer, figures = torch_ref.bench_worker.build(3, **arguments, dtype="float32", compile=compile)
    assert figures["seconds"] == [7 + 1, 2, 4]
    assert (figures["compiled"], len(compiled)) == ((6, 1) if compile else (0, 0))
    assert figures["versions"] == {"torch": torch.__version__}
    turn = peer.run(2)
    assert (turn["seconds"], turn["wall_seconds"]) == ([8, 16], 24)
    for i, (x, y, autocast) in enumerate(taken):
        np.testing.assert_array_equal(x, TOKENS[i % 4, :, :5])
        np.testing.assert_array_equal(y, TOKENS[i % 4, :, 1:])
        assert not autocast
    groups = peer.optimizer.param_groups
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in groups] == [(1e-4, (0.9, 0.95), d) for d in (0.1, 0.0)]
    assert [{p.ndim for p in g["params"]} for g in groups] == [{2}, {1}]
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    taken.clear()
    Peer(**arguments, dtype="bfloat16", compile=compile).step()
    assert taken[0][2]


def test_ceilings(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten calls at a time, the median but for the first; operations of a product, and bytes read and written."""
    spent = iter([500.0] * 10 + [0.1] * 10 + [0.4] * 10 + [0.2] * 10 + [9.0] * 10)

    def call() -> None:
        clock.now += next(spent)

    assert torch_ref.bench_worker.rate(call, "cpu") == pytest.approx(1 / 0.3)
    rates = iter((5.0, 3.0))
    monkeypatch.setattr(torch_ref.bench_worker, "rate", lambda function, device: function() is None or next(rates))
    assert torch_ref.bench_worker.ceilings("cpu", "float32") == {"n": 768, "flops": 10 * 768**3, "bytes": 6 * 2**26}


FLOPS = (6 * (1024 * 16 + 12 * 16**2 + 13 * 16 + 2 * 16) + 12 * 16 * 20) * 3 * 20  # of a step of 3 x 20 tokens


class Figures:
    """A contender whose figures are written down: seconds, of which the first of each turn is not to count."""

    def __init__(self, name: str, counted: list[float], memory: list[int], log: list[Any]):
        self.name, self.counted, self.memory, self.log = name, iter(counted), cycle(memory), log
        self.device, self.steps = "CPU", 0
        self.figures = {"seconds": [5.0, 0.25, 0.5], "first_loss": 6.9375, "compiled": 4, "held_bytes": 1_500_000_000}
        if name == "tinygrad":
            self.figures["allocated_bytes"] = 2_345_000_000

    def ready(self) -> None:
        self.log.append((self.name, "ready"))

    def run(self, steps: int) -> dict[str, Any]:
        self.log.append((self.name, steps))
        held = next(self.memory)
        figures: dict[str, Any] = {"seconds": [next(self.counted) for _ in range(steps)], "held_bytes": held}
        figures["wall_seconds"] = sum(figures["seconds"]) * 2  # as if there were something between the steps
        return figures | ({"allocated_bytes": held // 2} if self.name == "tinygrad" else {})

    def step(self) -> float:
        self.steps += 1
        return 1.0

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.log.append((self.name, do, arguments))
        if do == "ceilings":
            return {"n": 768, "flops": next(self.ceilings) * 1e9, "bytes": 2e9}
        return self.figures | {"versions": {"torch": "2.13.0"}}

    ceilings = iter(())


@pytest.fixture
def scripted(small: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What contenders were asked, whose figures differ in mean and median, first and last, least and most."""
    log: list[Any] = []
    seconds = {
        "tinygrad": [0.010, 0.020, 0.040, 0.011, 0.013, 0.012, 0.5],
        "torch-eager": [0.040, 0.041, 0.042, 0.030, 0.900, 0.010, 0.010],
        "torch-compile": [0.026, 0.020, 0.025, 0.026, 0.027, 0.028, 0.029],
    }
    memory = {"tinygrad": [1, 2, 7, 3, 4], "torch-eager": [9, 8, 1, 1, 1], "torch-compile": [1, 1, 1, 1, 1]}
    contenders = {n: Figures(n, seconds[n] * 40, [m * 10**9 for m in memory[n]], log) for n in seconds}
    monkeypatch.setattr(Figures, "ceilings", iter([1.0, 2.0, 9.0, 4.0, 3.0]))

    class Port:
        def __new__(cls, *given: Any) -> Figures:  # type: ignore[misc]
            log.append(("Port", *given))
            return contenders["tinygrad"]

    monkeypatch.setattr(bench, "Port", Port)

    @contextmanager
    def worker(name: str, meeting: dict[str, str] | None = None) -> Iterator[Figures]:
        yield contenders.get(name, Figures(name, [], [], log))

    @contextmanager
    def one_by_one(device: str) -> Iterator[list[tuple[str, int, int, float]]]:
        """Of each step 28 kernels; the first is there twice, and once more in another size."""
        i = contenders["tinygrad"].steps
        spread = [9.0, 1.0, 2.0, 4.0, 3.0][i]  # of which the median is 3, and the mean 3.8
        kernels = [("matmul", 6_000_000, 1000, spread * 1e-3)] * 2 + [("matmul", 2_000_000, 8_000_000, spread * 3e-3)]
        yield kernels + [(f"small_{n}", 0, 2000, 1e-6 * n) for n in range(2, 27)]

    monkeypatch.setattr(bench, "worker", worker)
    monkeypatch.setattr(bench, "one_by_one", one_by_one)
    return log


def test_figures(scripted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each against what can be worked out from the script."""
    options = "--preset tiny --device CPU --batch-size 3 --seq-len 20 --steps 7 --dtype bfloat16 --kernels plain"
    options += " --against torch-compile,torch-eager --json found.json --profile"
    monkeypatch.setattr(bench, "revision", lambda: {"commit": "ab" * 20, "clean": False})
    result = call(bench.main, *options.split(), cwd=tmp_path)
    assert result.code == 0, result
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert list(found["contenders"]) == ["tinygrad", "torch-compile", "torch-eager"]
    assert found["source"] == {"commit": "ab" * 20, "clean": False}
    assert found["command"] == ["python", "-m", "tinygrad_impl.bench", *options.split()]
    assert found["flops_a_step"] == FLOPS == 7_320_960
    assert found["ceiling"] == {"n": 768, "flops": 3e9, "bytes": 2e9, "dtype": "float32"}
    ours = found["contenders"]["tinygrad"]
    assert ours == {
        **{"tokens_per_second": pytest.approx(60 / 0.03), "step_seconds": pytest.approx(0.03), "steps": 7, "turns": 5},
        **{"step_seconds_10th": pytest.approx(0.0106), "step_seconds_90th": pytest.approx(0.224)},
        **{"step_seconds_50th": 0.013, "flops": pytest.approx(FLOPS / 0.03)},
        **{"share_of_ceiling": pytest.approx(FLOPS / 0.03 / 3e9)},
        **{"first_step_seconds": 5.0, "first_steps_seconds": 5.75, "compiled": 4, "first_loss": 6.9375},
        **{"allocated_bytes": 3_500_000_000, "held_bytes": 7_000_000_000},
    }
    assert found["ratios"] == {
        "torch-compile": pytest.approx(0.054 / 0.03),
        "torch-eager": pytest.approx(0.072 / 0.03),
    }
    assert [found["contenders"][n]["held_bytes"] for n in found["ratios"]] == [1_500_000_000, 9_000_000_000]
    assert "allocated_bytes" not in found["contenders"]["torch-eager"]

    lines = result.out.splitlines()
    assert lines[0].startswith("tiny, 0.0M parameters, steps of 3 x 20 tokens, bfloat16, plain kernels; CPU with ")
    ceilings = "768^3 float32 product 0.003 TFLOP/s, copy 0.002 TB/s"
    assert lines[1] == f"tinygrad {version('tinygrad')}, torch 2.13.0; ceilings: {ceilings}"
    assert lines[3] == "one process by itself"
    shown = [re.split(r"  +", line) for line in lines[4:17]]
    assert shown[0] == ["", "tinygrad", "torch-compile", "torch-eager"]
    assert shown[1:] == [
        ["tokens/s", "2,000", "1,111", "833"],
        ["ms a step", "30.00", "54.00", "72.00"],
        ["single steps, 10-90 %", "10.60-224.00", "23.00-28.40", "10.00-385.20"],
        ["TFLOP/s", "0.000244", "0.000136", "0.000102"],
        ["of ceiling", "8.1%", "4.5%", "3.4%"],
        ["GB allocated", "3.50", "-", "-"],
        ["GB held", "7.00", "1.50", "9.00"],
        ["s to step 1", "5.0", "5.0", "5.0"],
        ["s to step 3", "5.8", "5.8", "5.8"],
        ["kernels compiled", "4", "4", "4"],
        ["loss of step 1", "6.9375", "6.9375", "6.9375"],
        ["tinygrad is", "1.800 x", "2.400 x"],
    ]
    assert lines[18] == "tinygrad trains at 1.800 x the rate of torch-compile, the fastest peer"
    assert max(map(len, lines[3:19])) <= 100
    assert found["finished"]

    # the median of the large kernels is 3 times 1 and 3 ms; 25 small ones are of 2 to 26 us
    total = 2 * 0.003 + 0.009 + 350e-6
    first, second = found["profile"][:2]
    assert first == {
        **{"name": "matmul", "count": 1, "seconds": pytest.approx(0.009), "flops": 2_000_000, "bytes": 8_000_000},
        **{
            "share": pytest.approx(0.009 / total),
            "share_of_roofline": pytest.approx(0.004 / 0.009),
        },  # it moves too much
    }
    assert second == {
        **{"name": "matmul", "count": 2, "seconds": pytest.approx(0.006), "flops": 12_000_000, "bytes": 2000},
        **{"share": pytest.approx(0.006 / total), "share_of_roofline": pytest.approx(0.004 / 0.006)},
    }
    assert [row["name"] for row in found["profile"][2:]] == [f"small_{n}" for n in range(26, 1, -1)]
    rows = [re.split(r"  +", line.strip()) for line in lines[20:]]
    assert rows[0] == ["kernel", "count", "ms", "share", "TFLOP/s", "GB/s", "of roofline"]
    assert rows[1] == ["matmul", "1", "9.000", "58.6%", "0.000222", "1", "44.4%"]
    assert rows[2] == ["matmul", "2", "6.000", "39.1%", "0.002", "0", "66.7%"]
    assert rows[3][:4] == ["small_26", "1", "0.026", "0.2%"]
    assert rows[25][0] == "small_4"
    assert rows[26] == ["2 others", "2", "0.005", "0.0%"]
    assert lines[-1] == "28 kernels, 15.35 ms one by one; a whole step takes 30.00 ms"


def test_turns(scripted: list[Any], tmp_path: Path) -> None:
    """Peers begin first, then all take turns, in one order and then in the other; one step more each than counts."""
    options = "--preset tiny --device CPU --steps 7 --against torch-eager,torch-compile,torch-eager"
    assert call(bench.main, *options.split(), cwd=tmp_path).code == 0
    asked = [entry[:2] for entry in scripted]
    assert asked[:2] == [("torch-eager", "build"), ("torch-compile", "build")]
    assert asked[2][0] == "Port"
    forth = ["tinygrad", "torch-eager", "torch-compile"]
    expected: list[Any] = []
    for i, steps in enumerate((2, 2, 1, 1, 1)):
        for name in forth[::-1] if i % 2 else forth:
            expected += [(name, "ready"), (name, steps)]
        expected += [("torch-eager", "ceilings")]
    assert asked[3:] == expected
    _, config, _, tokens, device, backend, ranks = scripted[2]
    assert (config, device, backend, ranks) == (CONFIG, "CPU", Plain(), ALONE)
    assert tokens.shape == (4, 8, 33)  # as tiny is trained
    np.testing.assert_array_equal(tokens, np.random.default_rng(1337).integers(0, 1024, (4, 8, 33), np.int32))
    for (_, _, build), compile in zip(scripted[:2], (False, True), strict=True):
        assert build.pop("tokens").endswith("tokens.npy")
        assert build.pop("weights") == scripted[2][2]
        common = {"warm_up": 3, "config": asdict(CONFIG), "dtype": "float32", "device": "cpu"}
        assert build == common | {"compile": compile}
    assert scripted[9][2] == {"device": "cpu", "dtype": "float32"}


def test_cut_off(scripted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGTERM in a turn: what is known is in the file, not as finished, and is shown, with its turns."""

    def run(self: Figures, steps: int) -> dict[str, Any]:
        if [entry[0] for entry in self.log].count("tinygrad") == 3:  # ready and run, and ready
            os.kill(os.getpid(), signal.SIGTERM)
        return ran(self, steps)

    ran = Figures.run
    monkeypatch.setattr(Figures, "run", run)
    options = "--preset tiny --device CPU --batch-size 3 --seq-len 20 --steps 7 --json found.json"
    result = call(bench.main, *options.split(), cwd=tmp_path)
    assert (result.code, len(result.errors)) == (1, 1)
    assert "cut off by SIGTERM" in result.errors[0]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert not found["finished"]
    assert {name: row["turns"] for name, row in found["contenders"].items()} == {"tinygrad": 1, "torch-eager": 2}
    told = "one process by itself: cut off after 1 turns of tinygrad, 2 turns of torch-eager, of 5 each"
    assert told in result.out.splitlines()
    assert "2,000" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_defaults(scripted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device: what is measured, against whom, how often, in which dtype."""
    chosen: list[Any] = []
    names: list[str | None] = []

    def choose(wanted: str, config: GPT2Config, device: str, bfloat16: bool, arch: str | None) -> Plain:
        assert arch is None
        chosen.append((wanted, config, device, bfloat16))
        return Plain(name="fused" if device == "CUDA" else "plain")

    monkeypatch.setattr(bench, "choose", choose)
    monkeypatch.setattr(bench, "device_name", lambda device: f"card of {device}")
    monkeypatch.setitem(bench.PRESETS, "gpt2", CONFIG)
    expected = {"CPU": ("torch-eager", 10, "float32"), "CUDA": ("torch-compile", 100, "bfloat16")}
    expected["METAL"] = ("", 100, "float32")
    for device, (against, steps, dtype) in expected.items():

        def opened(name: str | None, device: str = device) -> str:
            names.append(name)
            return device

        monkeypatch.setattr(bench, "open_device", opened)
        monkeypatch.setattr(Figures, "ceilings", iter([1.0] * 5))
        scripted.clear()
        scripted.clear()
        result = call(bench.main, "--json", "found.json", cwd=tmp_path)
        if device == "CUDA":
            assert scripted[0][2]["device"] == "cuda"
        found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
        assert found["contenders"].keys() == {"tinygrad", against} - {""}, result
        assert [found[key] for key in ("preset", "dtype", "device", "card")] == [
            "gpt2",
            dtype,
            device,
            f"card of {device}",
        ]
        assert found["kernels"] == ("fused" if device == "CUDA" else "plain")
        assert found["contenders"]["tinygrad"]["steps"] == steps
        assert (found["batch_size"], found["seq_len"]) == (8, 32)  # as train, as far as the context goes
        assert (found["ceiling"] or {}).get("dtype") == {"CPU": "float32", "CUDA": "bfloat16", "METAL": None}[device]
        assert found["profile"] is None
    assert names == [None] * 3
    assert chosen == [("auto", CONFIG, device, device == "CUDA") for device in expected]


def test_as_another_gpu(scripted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are chosen for it, here and in a process of their own; the ceiling is that of their own GEMM."""
    asked: list[Any] = []

    def choose(*given: Any, bfloat16: bool, arch: str | None) -> Plain:
        asked.append(arch)
        return Plain(name="fused", gpu=GPU(80, 108))

    def product_ceiling(*given: Any) -> dict[str, float]:
        asked.append(given)
        return {"n": 512, "flops": 3e9}

    for module in (bench, bench_port):
        monkeypatch.setattr(module, "choose", choose)
        monkeypatch.setattr(module, "open_device", lambda name: "CUDA")
    monkeypatch.setattr(bench, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(bench, "product_ceiling", product_ceiling)
    options = "--preset tiny --arch sm_80:108 --steps 2 --against torch-eager --json found.json"
    result = call(bench.main, *options.split(), cwd=tmp_path)
    assert asked == ["sm_80:108", *[(GPU(80, 108), "CUDA")] * 2]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (found["arch"], found["multiprocessors"]) == ("sm_80", 108)
    assert found["ceiling"] == {"n": 512, "flops": 3e9, "bytes": 2e9, "dtype": "bfloat16", "arch": "sm_80"}
    assert "bfloat16, fused kernels for sm_80 with 108 multiprocessors; NVIDIA H200\n" in result.out
    assert "ceilings: 512^3 bfloat16 product 0.003 TFLOP/s (our GEMM for sm_80), copy 0.002 TB/s\n" in result.out

    scripted.clear()
    options = "--preset tiny --batch-size 1 --seq-len 2 --steps 1 --dtype bfloat16 --arch sm_80:108"
    args = bench.command().parse_args(options.split())
    args.against = []
    bench.compare(args, CONFIG, "CUDA", Plain(name="fused", gpu=GPU(80, 108)), "weights", apart=True)
    assert scripted[0][:2] == ("tinygrad", "build")
    assert scripted[0][2]["arch"] == "sm_80:108"

    np.save(tmp_path / "tokens.npy", np.zeros((1, 1, 2), np.int32))
    monkeypatch.setattr(bench_port, "Port", lambda *given, **more: given)
    given: dict[str, Any] = {
        "config": asdict(CONFIG),
        "weights": "",
        "tokens": str(tmp_path / "tokens.npy"),
        "dtype": "bfloat16",
    }
    built: Any = bench_port.build(**given, device="CUDA", kernels="fused", warm_up=1, arch="sm_89")
    assert (asked[-1], built[4].gpu) == ("sm_89", GPU(80, 108))


def test_a_worker_that_dies() -> None:
    with bench.worker("torch-eager") as peer:
        peer.process.kill()
        peer.process.wait()
        with pytest.raises(
            InputError, match=r"^the process of torch-eager ended with SIGKILL \(without a word\); leave"
        ):
            peer.run(1)


def test_a_worker_that_breaks() -> None:
    """It is quoted where it ended by itself, and goes on where it could only not do as asked."""
    with bench.worker("torch-eager") as peer:
        for _ in range(2):
            with pytest.raises(InputError, match=r"^torch-eager cannot be measured here \(RuntimeError: .*abacus"):
                peer.ask("ceilings", device="abacus", dtype="float32")
        print("no JSON", file=peer.requests, flush=True)
        with pytest.raises(InputError, match=r"ended with exit code 1 \(json.decoder.JSONDecodeError: "):
            peer.run(1)


def test_a_worker_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(command: list[str], **options: Any) -> "subprocess.Popen[str]":
        return popen([sys.executable, "-c", 'input(); print(\'{"error": "out of memory"}\')'], **options)

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    with (
        bench.worker("torch-compile") as peer,
        pytest.raises(InputError, match=r"\(out of memory\); use a smaller --batch-size, or leave it out of --against"),
    ):
        peer.run(1)


def test_bad_options(tmp_path: Path) -> None:
    def refuse(options: str, *words: str) -> None:
        refused(call(bench.main, "--preset", "tiny", "--device", "CPU", *options.split(), cwd=tmp_path), *words)

    refuse("--against jax", "there is no 'jax'; name some of torch-eager, torch-compile, or none")
    refuse("--against torch-eager,", "there is no ''")
    refuse("--seq-len 33", "--seq-len 33 is over the model's context of 32 tokens; give fewer")
    refuse("--json nowhere/x.json", "there is no folder nowhere")
    refuse("--kernels fused", "they are for NVIDIA GPUs")
    refuse("--steps 0", "--steps")
    refuse("--arch sm_80", "--arch is of NVIDIA GPUs, and the device is CPU; leave it out")


def test_peers_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    refused(call(bench.main, "--preset", "tiny", "--device", "CPU", cwd=tmp_path), "PyTorch is not installed")


def test_the_peers_process_answers_line_by_line() -> None:
    """What it cannot do too; and nothing else is on its stdout."""
    asked: list[dict[str, Any]] = [{"do": "ceilings", "device": "nowhere", "dtype": "float32"}]
    asked += [{"do": "ceilings", "device": "cpu", "dtype": "float33"}, {"do": "run", "steps": 1}]
    answered = subprocess.run(
        [sys.executable, "-m", "torch_ref.bench_worker"],
        input="".join(json.dumps(request) + "\n" for request in asked),
        cwd=Path(torch_ref.bench_worker.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    replies = [json.loads(line)["error"] for line in answered.stdout.splitlines()]
    assert [words in reply for words, reply in zip(("nowhere", "float33", "IndexError"), replies, strict=True)] == [
        True
    ] * 3
