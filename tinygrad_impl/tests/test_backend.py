"""Which backend computes, what is said where the kernels cannot, and what a graph computes that has met no backend."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from data.checkpoints.config import PRESETS, GPT2Config
from data.cli import InputError
from parity_tests.weights import random_weights
from tinygrad_impl import backend, internals, kernels
from tinygrad_impl.backend import Plain
from tinygrad_impl.kernels import GPU, graph
from tinygrad_impl.kernels.fused import Fused
from tinygrad_impl.model import GPT2

SMALLEST = GPT2Config(n_embd=64, n_head=4)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU of compute capability 8.6 with 46 multiprocessors, or what a test makes of it."""
    gpu = SimpleNamespace(renderer=SimpleNamespace(target=SimpleNamespace(arch="sm_86")), graph="tinygrad's")
    gpu.cu_device, gpu.multiprocessors = "the device", 46

    def attribute(place: Any, which: int, device: str) -> int:
        assert (which, device) == (graph.cuda.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, "the device")
        place._obj.value = gpu.multiprocessors
        return 0

    for module in (kernels, internals):
        monkeypatch.setattr(module, "Device", {"CUDA": gpu})
    monkeypatch.setattr(graph.cuda, "cuDeviceGetAttribute", attribute)
    return gpu


@pytest.mark.parametrize("wanted", ["auto", "fused"])
@pytest.mark.parametrize(("arch", "capability"), [("sm_80", 80), ("sm_90", 90), ("sm_120", 120)])
@pytest.mark.parametrize("config", [PRESETS["gpt2"], SMALLEST, GPT2Config(n_embd=64, n_head=2)])
def test_kernels_are_used(
    gpu: Any, wanted: str, arch: str, capability: int, config: GPT2Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """For that GPU, and silently. Whoever insists on them is told of rules that do not fire by an error."""
    gpu.renderer.target.arch = arch
    assert backend.choose(wanted, config, "CUDA", bfloat16=True) == Fused(GPU(capability, 46), wanted == "fused")
    assert gpu.graph is graph.Graph
    assert capsys.readouterr() == ("", "")


def test_another_gpu_in_its_stead(gpu: Any) -> None:
    """The kernels are for that one; who has none, or cannot run them, is refused in a sentence."""
    for wanted in ("auto", "fused"):
        chosen = backend.choose(wanted, SMALLEST, "CUDA", bfloat16=True, arch="sm_80:108")
        assert chosen == Fused(GPU(80, 108), wanted == "fused")
    refusals: list[tuple[tuple[str, str, bool], str]] = [
        (("auto", "CPU", True), "--arch is of NVIDIA GPUs, and the device is CPU; leave it out"),
        (("plain", "CUDA", True), "--arch is of the fused kernels; leave it out, or pass --kernels fused"),
        (("auto", "CUDA", False), "--arch, which is of the fused kernels, cannot be: they compute in bfloat16, and"),
    ]
    for (wanted, device, bfloat16), words in refusals:
        with pytest.raises(InputError) as refused:
            backend.choose(wanted, SMALLEST, device, bfloat16, arch="sm_80")
        assert str(refused.value).startswith(words)
    with pytest.raises(InputError, match=r"^--arch sm_89 is none that the GPU at hand \(sm_86\) can run"):
        backend.choose("auto", SMALLEST, "CUDA", bfloat16=True, arch="sm_89")


@pytest.mark.parametrize(("bfloat16", "dtype"), [(True, dtypes.bfloat16), (False, None)])
def test_plain(gpu: Any, bfloat16: bool, dtype: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert backend.choose("plain", SMALLEST, "CUDA", bfloat16) == Plain(dtype)
    assert gpu.graph is graph.Graph  # which may have calls of the host in it
    assert capsys.readouterr() == ("", "")


WIDTHS = "they take widths that 64 divides and heads of 16, 32 or 64, not "
OBSTACLES: list[tuple[dict[str, Any], str]] = [
    ({"device": "CPU"}, "they are for NVIDIA GPUs, and the device is CPU"),
    ({"device": "METAL"}, "they are for NVIDIA GPUs, and the device is METAL"),
    ({"arch": "sm_79"}, "this GPU (sm_79) is older than sm_80"),
    ({"triton": None}, "Triton is not installed (`pip install triton`)"),
    ({"bfloat16": False}, "they compute in bfloat16, and the dtype is float32"),
    ({"config": GPT2Config(n_embd=96, n_head=3)}, f"{WIDTHS}96 and 32"),
    ({"config": GPT2Config(n_embd=64, n_head=8)}, f"{WIDTHS}64 and 8"),
    ({"config": GPT2Config(n_embd=128, n_head=1)}, f"{WIDTHS}128 and 128"),
    ({"config": GPT2Config(n_embd=64, n_head=1, n_inner=96)}, "they take an n_inner that 64 divides, not 96"),
]


@pytest.mark.parametrize(("given", "reason"), OBSTACLES)
def test_obstacles(
    gpu: Any, given: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stops whoever insists, in a sentence; others hear of it where there is a GPU."""
    gpu.renderer.target.arch = given.get("arch", "sm_86")
    config, device = given.get("config", PRESETS["gpt2"]), given.get("device", "CUDA")
    bfloat16 = given.get("bfloat16", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: given.get("triton", name))
    with pytest.raises(InputError) as refused:
        backend.choose("fused", config, device, bfloat16)
    assert str(refused.value) == f"--kernels fused cannot be: {reason}; leave it out"
    assert capsys.readouterr() == ("", "")

    dtype = dtypes.bfloat16 if bfloat16 else None
    assert backend.choose("auto", config, device, bfloat16) == Plain(dtype)
    note = f"note: tinygrad's own kernels compute this, which are slower: {reason}\n"
    assert capsys.readouterr() == ("", note if device == "CUDA" else "")
    assert backend.choose("plain", config, device, bfloat16) == Plain(dtype)


def test_a_graph_that_no_backend_has_seen() -> None:
    """It computes the formulas, in the dtype of the parameters. It refuses to give gradients."""
    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = GPT2(config, random_weights(config, 0, 0.2))
    x, y = np.array([[1, 2, 3, 1]], np.int32), np.array([[2, 3, -100, 4]], np.int32)
    logits, loss = model(Tensor(x), Tensor(y))
    assert loss is not None
    with pytest.raises(RuntimeError, match="only of a graph that a backend has lowered"):
        loss.gradient(model.wte.weight)
    lowered = Plain().lower(logits, loss)
    Tensor.realize(logits, loss, *lowered)
    for unseen, plain in zip((logits, loss), lowered, strict=True):
        np.testing.assert_allclose(unseen.numpy(), plain.numpy(), rtol=1e-6, atol=1e-6)
