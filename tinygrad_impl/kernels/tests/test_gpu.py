"""What kernels are tuned by: the GPU that there is."""

from types import SimpleNamespace
from typing import Any

import pytest

from data.cli import InputError
from tinygrad_impl import internals, kernels
from tinygrad_impl.kernels import GPU
from tinygrad_impl.kernels.tests.support import AT_HAND, DEVICE, THIS_GPU

from tinygrad_impl.kernels import graph  # isort: skip: after the support


@pytest.mark.parametrize(
    ("capability", "memory", "early"),
    [
        (80, 163, False),
        (86, 99, False),
        (87, 163, False),
        (89, 99, False),
        (90, 227, True),
        (100, 227, True),
        (119, 227, True),
        (120, 99, True),
    ],
)
def test_what_a_gpu_has(capability: int, memory: int, early: bool) -> None:
    gpu = GPU(capability, 1)
    assert (gpu.shared_memory, gpu.starts_early, gpu.has_copy_engine) == (memory, early, early)
    assert gpu.arch == f"sm_{capability}"


def test_another_in_its_stead() -> None:
    """An older one, with as many multiprocessors unless others are named; others are refused."""
    gpu = GPU(90, 114)
    assert gpu.as_arch(None) is gpu
    for arch, other in (("sm_80", GPU(80, 114)), ("sm_89:46", GPU(89, 46)), ("sm_90", gpu), ("sm_90:7", GPU(90, 7))):
        assert gpu.as_arch(arch) == other
    assert GPU(86, 46).as_arch("sm_80") == GPU(80, 46)
    for arch in ("sm_100", "sm_75", "90", "sm_80:", "sm_80:0", "sm_80:x", "sm_80:-1", ""):
        with pytest.raises(InputError) as refused:
            gpu.as_arch(arch)
        assert str(refused.value) == (
            f"--arch {arch} is none that the GPU at hand (sm_90) can run; name sm_80 or sm_86 or sm_89 or sm_90, with "
            "a number of multiprocessors if you like (sm_80:108)"
        )
    with pytest.raises(InputError, match=r"\(sm_86\) can run; name sm_80 or sm_86, with"):
        GPU(86, 46).as_arch("sm_89")


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
    assert kernels.gpu_of("CUDA", "sm_86") == GPU(86, count)


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no NVIDIA GPU")
@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_this_gpu() -> None:
    assert kernels.gpu_of("CUDA") == AT_HAND
    assert THIS_GPU.capability >= kernels.OLDEST
