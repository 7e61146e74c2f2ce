"""`python -m tinygrad_impl.bench`: what it reports, that both sides do the same work, and what it refuses."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit
from tinygrad.engine import jit
from tinygrad.engine.realize import run_linear

from data.cli import InputError
from data.config import GPT2Config
from data.initialize import initial_weights
from data.testing import call, refused
from tinygrad_impl import bench
from torch_ref.bench import Peer

CONFIG = GPT2Config(vocab_size=1024, n_layer=1, n_head=2, n_embd=16, n_positions=32)  # a vocabulary without padding


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
        assert 0 < row["step_seconds_10th"] <= row["step_seconds"] <= row["step_seconds_90th"]
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


@pytest.mark.parametrize("padding", [0, 24])
def test_both_do_the_same_work(padding: int, tmp_path: Path) -> None:
    """The loss, but for what the padding of PyTorch's vocabulary adds to it, and without any the weights."""
    config = replace(CONFIG, vocab_size=CONFIG.vocab_size - padding)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (bench.BATCHES, 2, 17), np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    peer = Peer(asdict(config), bench.SEED, str(tmp_path / "tokens.npy"), "float32", "cpu", compile=False)
    peer.run(bench.WARM_UP)
    port = bench.Port(config, tokens, "float32", "CPU", None)
    added = math.log(CONFIG.vocab_size / config.vocab_size)  # logits are near 0 yet, as those of the padding
    assert port.first_loss == pytest.approx(peer.first_loss - added, abs=5e-4 if padding else 5e-6)
    ours, theirs = port.trainer.model.arrays(), peer.model.arrays()
    assert np.abs(ours["wte.weight"] - initial_weights(config, bench.SEED)["wte.weight"]).max() > bench.LR
    if padding:
        assert theirs["wte.weight"].shape == (1024, 16)
    else:
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=bench.LR / 10, err_msg=name)


def test_graphs_kernel_by_kernel() -> None:
    """Of a batch of kernels, as on CUDA, too; the device NULL has such, and computes nothing."""
    double = TinyJit(lambda x: (x.contiguous() @ x.transpose().contiguous()).sum().realize())
    for device in ("CPU", "NULL"):
        double.reset()
        for _ in range(3):
            plain = double(x := Tensor.full((8, 8), 2.0, device=device).contiguous().realize())
        expected = plain.numpy().copy() if device == "CPU" else None
        with bench.one_by_one(device) as kernels:
            result = double(x)
        assert jit.run_linear is run_linear
        assert double.captured
        batched = any(call.src[0].arg == "graph" for call in double.captured.linear.src)
        assert batched == (device == "NULL")
        assert len(kernels) >= 2
        assert all(flops >= 0 and moved > 0 and seconds > 0 for _, flops, moved, seconds in kernels)
        assert sum(flops for _, flops, _, _ in kernels) >= 2 * 8**3
        if expected is not None:
            np.testing.assert_array_equal(result.numpy(), expected)


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


def test_peers_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    refused(call(bench.main, "--preset", "tiny", "--device", "CPU", cwd=tmp_path), "PyTorch is not installed")
