"""The choice of device and compiler."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.cli import InputError
from data.ranks import Place
from tinygrad_impl import device
from tinygrad_impl.device import device_name, open_device, peak_flops, provide_clang

SHIM = "zig-clang"


def compiler(path: Path, version: str) -> str:
    """A program that says it is `version`."""
    path.write_text(f"#!/bin/sh\necho '{version}'\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets CC, ZIG and DEV back after each test, and puts no clang on the PATH."""
    for name in ("CC", "ZIG", "DEV"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_the_clang_that_cc_names_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = (compiler(tmp_path / name, "Debian clang version 14.0.6") for name in ("mine", "other"))
    monkeypatch.setenv("CC", mine)
    monkeypatch.setattr(shutil, "which", lambda name: other)
    provide_clang()
    assert os.environ["CC"] == mine


def test_a_gcc_in_cc_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clang = compiler(tmp_path / "clang-16", "clang version 16.0.0")
    monkeypatch.setenv("CC", compiler(tmp_path / "gcc", "gcc (Debian 12.2.0) 12.2.0"))
    monkeypatch.setattr(shutil, "which", lambda name: clang if name == "clang-16" else None)
    provide_clang()
    assert os.environ["CC"] == clang


@pytest.mark.parametrize("cc", [None, "", "/nowhere/clang"])
def test_without_a_clang_it_is_the_one_in_ziglang(cc: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if cc is None:
        monkeypatch.delenv("CC")
    else:
        monkeypatch.setenv("CC", cc)
    provide_clang()
    assert Path(os.environ["CC"]).name == SHIM
    assert os.access(os.environ["CC"], os.X_OK)
    assert Path(os.environ["ZIG"]).is_file()


def test_without_any_cc_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc-of-nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    provide_clang()
    assert os.environ["CC"] == ""


def test_the_clang_in_ziglang_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "")
    provide_clang()
    library = tmp_path / "six.so"
    arguments = ["-x", "c", "-shared", "-O2", "-fPIC", "-nostdlib", "-o", str(library), "-"]
    source = "int times_six(int x) { return 6 * x; }"
    subprocess.run([os.environ["CC"], *arguments], input=source, text=True, check=True)
    assert ctypes.CDLL(str(library)).times_six(7) == 42


def test_cpu_opens_by_name_in_any_case() -> None:
    assert open_device("cpu") == "CPU"
    assert os.environ["DEV"] == "CPU"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match=r"there is no device 'abacus'; the devices tinygrad knows are .*CPU"):
        open_device("abacus")


def test_a_device_that_cannot_be_opened_is_refused() -> None:
    with pytest.raises(InputError, match=r"the device DSP cannot be opened \(.+\); leave --device out"):
        open_device("DSP")


def test_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs clang and none was found"):
        open_device("CPU")


@pytest.mark.parametrize(
    ("card", "bfloat16", "float32"),  # dense, of NVIDIA's datasheets, in TFLOP/s
    [
        *(("NVIDIA H200", 989, 67), ("NVIDIA H100 80GB HBM3", 989, 67), ("NVIDIA H100 PCIe", 756, 51)),
        *(("NVIDIA A100-SXM4-80GB", 312, 19.5), ("NVIDIA L40S", 362, 91.6), ("NVIDIA L4", 121, 30.3)),
        *(("NVIDIA A10", 125, 31.2), ("NVIDIA GeForce RTX 4090", 165, 82.6), ("NVIDIA GeForce RTX 3090", 71, 35.6)),
        *(("NVIDIA A10G", None, None), ("NVIDIA L40", None, None), ("CPU with 2 cores", None, None)),
        *(("NVIDIA GeForce RTX 3090 Ti", 71, 35.6), ("GH200", None, None)),
    ],
)
def test_peak_rates(card: str, bfloat16: float | None, float32: float | None) -> None:
    found = [peak_flops(card, bfloat16=True), peak_flops(card, bfloat16=False)]
    assert found == [rate and pytest.approx(rate * 1e12) for rate in (bfloat16, float32)]


def test_card_names() -> None:
    assert device_name("CPU") == f"CPU with {len(os.sched_getaffinity(0))} cores"
    assert device_name("METAL") == "METAL"


def test_the_name_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver says of the first."""
    from tinygrad.runtime.autogen import cuda

    def get_name(buffer: ctypes.Array, size: int, number: int) -> None:
        assert size == len(buffer)
        buffer.value = f"NVIDIA H{number}00".encode()

    monkeypatch.setattr(cuda, "cuDeviceGetName", get_name)
    assert device_name("CUDA") == "NVIDIA H000"


class Devices:
    """tinygrad's, of which some can be opened."""

    def __init__(self, *there: str):
        self.there, self.asked = there, list[str]()

    def __getitem__(self, name: str) -> object:
        self.asked.append(name)
        if name not in self.there:
            raise RuntimeError(f"no {name} here\nat all" if name != "HIP" else "")
        return SimpleNamespace(runtime_t=None)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Opens a device where only some are there. Gives those that were tried, and last what was chosen or DEV."""

    def open_one(name: str | None, *there: str, dev: str = "") -> list[str]:
        devices = Devices(*there)
        monkeypatch.setattr(device, "Device", devices)
        monkeypatch.setattr(device, "DEV", SimpleNamespace(device=dev, value=None))
        monkeypatch.setattr(device, "share_context", lambda: devices.asked.append("context"))
        monkeypatch.setattr(device, "use_all_cores", lambda: devices.asked.append("cores"))
        monkeypatch.setattr(device, "provide_nvrtc", lambda: devices.asked.append("nvrtc"))
        monkeypatch.setattr(device, "provide_clang", lambda: devices.asked.append("clang") is None)  # type: ignore[func-returns-value]
        monkeypatch.setattr(device, "provide_triton_cache", lambda: None)
        monkeypatch.setattr(device, "shield_compilers", lambda: devices.asked.append("shield"))
        monkeypatch.setattr(device, "start_compilers", lambda most: devices.asked.append(f"{most} compilers"))
        chosen = open_device(name)
        assert device.DEV.value == os.environ["DEV"] == chosen
        return [*devices.asked, chosen]

    return open_one


def test_the_best_device_there_is(opened: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA comes first, then what tinygrad has in its order; DEV is asked before that, and --device before DEV."""
    monkeypatch.setattr(device, "ALL_DEVICES", ["METAL", "AMD", "NV", "CUDA", "CPU"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(40))
    at_once = ["shield", "clang", "nvrtc", "context", "CUDA", "16 compilers", "CUDA"]
    assert opened(None, "CUDA", "METAL", "CPU") == at_once
    monkeypatch.setattr(device, "place", lambda: Place(1, 16, 1, 8))
    assert opened(None, "CUDA")[-2] == "5 compilers"  # for each of a host's ranks
    monkeypatch.setattr(device, "place", lambda: None)
    assert opened(None, "NV", "CPU") == ["shield", "clang", "nvrtc", "context", "CUDA", "METAL", "AMD", "NV", "NV"]
    assert opened(None, "CPU")[-3:] == ["CPU", "cores", "CPU"]
    assert opened(None, "CUDA", "AMD", dev="AMD") == ["shield", "clang", "AMD", "AMD"]
    assert opened("metal", "CUDA", "METAL", "AMD", dev="AMD") == ["shield", "clang", "METAL", "METAL"]
    with pytest.raises(InputError, match=r"^the device amd cannot be opened \(no AMD here\); leave --device out for"):
        opened("amd", "CUDA", "CPU")
    with pytest.raises(InputError, match=r"^the device AMD cannot be opened \(no AMD here\); unset DEV for the best"):
        opened(None, "CUDA", "CPU", dev="AMD")
    monkeypatch.setattr(device, "ALL_DEVICES", ["CPU", "WEBGPU"])
    with pytest.raises(InputError, match=r"^no device can be opened, not even the CPU \(no CPU here\); mend that"):
        opened(None)
    monkeypatch.setattr(device, "ALL_DEVICES", ["HIP"])
    with pytest.raises(InputError, match=r"cannot be opened \(RuntimeError\)"):
        opened("hip")


@pytest.mark.parametrize(("name", "driver", "noted"), [(None, True, True), (None, False, False), ("cuda", True, False)])
def test_a_gpu_that_cannot_be_used_is_spoken_of(
    name: str | None,
    driver: bool,
    noted: bool,
    opened: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where there is one, and nobody asked for it."""
    exists = Path.exists
    version = Path("/proc/driver/nvidia/version")
    monkeypatch.setattr(Path, "exists", lambda path: driver if path == version else exists(path))
    if name:
        with pytest.raises(InputError, match="the device cuda cannot be opened"):
            opened(name, "CPU")
    else:
        assert opened(name, "CPU")[-1] == "CPU"
    expected = "note: this machine's NVIDIA GPU cannot be used (no CUDA here)\n"
    assert capsys.readouterr().err == (expected if noted else "")


@pytest.mark.parametrize("name", ["", "abacus", "cuda:", "cuda:x", "cuda:-1", "amd:1", "cpu:0"])
def test_what_is_no_device_is_refused_by_name(name: str, opened: Callable[..., list[str]]) -> None:
    with pytest.raises(InputError, match=f"^there is no device {name!r}; "):
        opened(name, "CUDA", "AMD", "CPU")


@pytest.mark.parametrize(("visible", "seen"), [(None, "1"), ("2,3", "3"), ("GPU-a,GPU-b,GPU-c", "GPU-b")])
def test_one_gpu_of_several(
    visible: str | None, seen: str, opened: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the only one that the process sees before CUDA is opened, and so the first."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert opened("cuda:1", "CUDA")[-1] == "CUDA"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_a_gpu_that_is_hidden_is_refused(opened: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(InputError, match=r"^there is no GPU 2, as CUDA_VISIBLE_DEVICES=2,3 leaves 2; "):
        opened("cuda:2", "CUDA")


def test_tritons_cache_goes_where_it_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    device.provide_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "mine")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
    device.provide_triton_cache()
    assert os.access(os.environ["TRITON_CACHE_DIR"], os.W_OK)
    assert capsys.readouterr().err.startswith("note: /dev/null/cache, Triton's cache of kernels, cannot be used (")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", "/dev/null")
    device.provide_triton_cache()
    assert os.access(os.environ["TRITON_CACHE_DIR"], os.W_OK)


def test_clangs_are_tried_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one without a number before all, then 30 to 13; what is not there or no clang is passed over."""
    monkeypatch.setenv("CC", "")
    asked: list[str] = []
    there = {"clang": compiler(tmp_path / "gcc", "gcc 12"), "clang-13": compiler(tmp_path / "clang-13", "clang 13")}

    def which(name: str) -> str | None:
        asked.append(name)
        return there.get(name)

    monkeypatch.setattr(shutil, "which", which)
    provide_clang()
    assert os.environ["CC"] == there["clang-13"]
    assert asked == ["clang", *(f"clang-{n}" for n in range(30, 12, -1))]
    there["clang-9"], there["clang-19"] = (compiler(tmp_path / f"clang-{n}", f"clang {n}") for n in (9, 19))
    monkeypatch.setenv("CC", "")
    provide_clang()
    assert os.environ["CC"] == there["clang-19"]


@pytest.mark.parametrize(("toolkit", "chosen"), [(False, True), (True, False)])
def test_cuda_compiler_of_pytorchs_packages(
    toolkit: bool, chosen: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is used where there is no CUDA toolkit, and only there."""
    for file in ("cu13/lib/libnvrtc.so.13", "cu13/lib/libnvrtc-builtins.so.13.0", "cu13/include/cuda_bf16.h"):
        (tmp_path / "nvidia" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / file).touch()
    if toolkit:
        (tmp_path / "toolkit" / "include").mkdir(parents=True)
        (tmp_path / "toolkit" / "include" / "cuda_bf16.h").touch()
    monkeypatch.setattr(device, "TOOLKIT", tmp_path / "toolkit")
    packages = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: packages)
    for name in ("CUDA_PATH", "NVRTC_PATH"):
        monkeypatch.setenv(name, "")  # so that what follows is undone
        monkeypatch.delenv(name)
    (tmp_path / "nvidia" / "aa" / "include").mkdir(parents=True)  # headers of something else, without a compiler
    (tmp_path / "nvidia" / "cu13" / "lib" / "libcublas.so.13").touch()
    device.provide_nvrtc()
    assert os.environ.get("CUDA_PATH") == (str(tmp_path / "nvidia" / "cu13") if chosen else None)
    expected = str(tmp_path / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13")
    assert os.environ.get("NVRTC_PATH") == (expected if chosen else None)


@pytest.mark.parametrize("missing", ["packages", "lib/libnvrtc.so.13", "include/cuda_bf16.h", "nothing"])
def test_without_a_cuda_compiler_nothing_is_set(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor where CUDA_PATH is set already."""
    for file in ("lib/libnvrtc.so.13", "include/cuda_bf16.h"):
        (tmp_path / "cu13" / file).parent.mkdir(parents=True)
        if file != missing:
            (tmp_path / "cu13" / file).touch()
    packages = None if missing == "packages" else SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: packages)
    monkeypatch.setattr(device, "TOOLKIT", tmp_path / "toolkit")
    for name in ("CUDA_PATH", "NVRTC_PATH"):
        monkeypatch.setenv(name, "mine")
        if name == "NVRTC_PATH" or missing != "nothing":
            monkeypatch.delenv(name)
    device.provide_nvrtc()
    assert os.environ.get("CUDA_PATH") == ("mine" if missing == "nothing" else None)
    assert "NVRTC_PATH" not in os.environ
