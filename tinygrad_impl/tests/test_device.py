"""The choice of device and compiler."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.cli import InputError
from tinygrad_impl import device
from tinygrad_impl.device import card_name, open_device, peak_flops, provide_clang, share_context

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
    with pytest.raises(InputError, match=r"there is no device ABACUS; the devices tinygrad knows are .*CPU"):
        open_device("abacus")


def test_a_device_that_cannot_be_opened_is_refused() -> None:
    with pytest.raises(InputError, match=r"the device DSP cannot be opened \(.+\); leave --device out"):
        open_device("DSP")


def test_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "")
    with pytest.raises(InputError, match="needs clang and none was found"):
        open_device("CPU")


def test_peak_rates() -> None:
    assert peak_flops("NVIDIA H200", bfloat16=True) == 989e12
    assert peak_flops("NVIDIA H200", bfloat16=False) == 67e12
    assert peak_flops("NVIDIA H100 PCIe", bfloat16=True) == 756e12  # not that of the H100 in general
    assert peak_flops("NVIDIA L40S", bfloat16=True) == 362e12  # not that of the L4
    assert peak_flops("CPU with 2 cores", bfloat16=True) is None


def test_card_names() -> None:
    assert card_name("CPU") == f"CPU with {len(os.sched_getaffinity(0))} cores"
    assert card_name("METAL") == "METAL"


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
    device.provide_nvrtc()
    assert os.environ.get("CUDA_PATH") == (str(tmp_path / "nvidia" / "cu13") if chosen else None)
    expected = str(tmp_path / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13")
    assert os.environ.get("NVRTC_PATH") == (expected if chosen else None)


def test_the_context_is_the_one_that_pytorch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is asked for its primary context where tinygrad asks for one of its own."""
    from tinygrad.runtime.autogen import cuda

    asked: list[object] = []
    monkeypatch.setattr(cuda, "cuCtxCreate_v2", None)  # to be set back afterwards
    monkeypatch.setattr(cuda, "cuDevicePrimaryCtxRetain", lambda *arguments: asked.append(arguments))
    share_context()
    cuda.cuCtxCreate_v2("context", 0, "device")
    assert asked == [("context", "device")]


def test_a_program_ends_though_a_compiler_misses_the_request_to() -> None:
    """One that is about to wait for the queue's lock does, and would then wait for ever."""
    code = """
import signal, time
import tinygrad_impl
from tinygrad.engine.worker import get_worker_pool
pool = get_worker_pool()
pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, [signal.SIGTERM]))
pool.apply_async(time.sleep, (600,))
time.sleep(1)  # until it has begun
"""
    root = Path(device.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PARALLEL": "1"}, check=True, timeout=60)
