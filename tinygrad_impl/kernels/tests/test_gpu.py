"""What kernels are tuned by: the GPU that there is."""

from types import SimpleNamespace
from typing import Any

import pytest

from tinygrad_impl import internals, kernels
from tinygrad_impl.kernels import GPU
from tinygrad_impl.kernels.tests.support import DEVICE, THIS_GPU

from tinygrad_impl.kernels import graph  # isort: skip: after the support


@pytest.mark.parametrize(
    ("capability", "large", "early"),
    [
        (80, False, False),
        (89, False, False),
        (90, True, True),
        (100, True, True),
        (119, True, True),
        (120, False, True),
    ],
)
def test_what_a_gpu_has(capability: int, large: bool, early: bool) -> None:
    gpu = GPU(capability, 1)
    assert (gpu.has_large_shared_memory, gpu.starts_early) == (large, early)


@pytest.mark.parametrize(("arch", "count"), [("sm_90", 114), ("sm_120", 170)])
def test_it_is_asked_of_the_driver(arch: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(renderer=SimpleNamespace(target=SimpleNamespace(arch=arch)), cu_device=3)

    def attribute(place: Any, which: int, number: int) -> int:
        place._obj.value = count if which == graph.cuda.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT else -1
        return 0 if number == 3 else 1

    for module in (kernels, internals):
        monkeypatch.setattr(module, "Device", {"CUDA": device})
    monkeypatch.setattr(graph.cuda, "cuDeviceGetAttribute", attribute)
    assert kernels.gpu_of("CUDA") == GPU(int(arch.removeprefix("sm_")), count)


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no NVIDIA GPU")
@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_this_gpu() -> None:
    assert kernels.gpu_of("CUDA") == THIS_GPU
    assert THIS_GPU.capability >= kernels.OLDEST
