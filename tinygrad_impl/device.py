"""Which device tinygrad computes on, the compiler that its CPU device needs, and how fast the GPU could be."""

import atexit
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tinygrad import Device
from tinygrad.device import ALL_DEVICES
from tinygrad.helpers import DEV, NUM_CPU_THREADS

from data.cli import InputError, counted
from data.gpu import numbered, show_one_gpu
from data.ranks import place
from tinygrad_impl.compilers import KernelCache, shield_compilers, start_compilers
from tinygrad_impl.cpu_graph import CPUGraph
from tinygrad_impl.internals import gpu_name, share_context, use_all_cores, use_graphs

# Dense peak rates in FLOP/s by what the GPU's name contains, of bfloat16 with float32 sums and of float32 without
# tensor cores: NVIDIA's datasheets. The first match counts.
PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}

COMPILERS = 16  # processes that compile, at most: training has some forty kernels
NO_CLANG = "tinygrad's CPU device needs clang and none was found; `pip install ziglang`, or install clang"
TOOLKIT = Path("/usr/local/cuda")  # where tinygrad looks for CUDA's headers by itself


def is_clang(command: str) -> bool:
    try:
        return "clang" in subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return False


def provide_clang() -> bool:
    """Points CC at a clang: the one CC names already, one on the PATH, or the one inside PyPI's ziglang. Returns
    whether there is one. tinygrad's CPU device compiles with $CC and clang's flags, which gcc does not take.
    """
    names = ["clang", *(f"clang-{version}" for version in range(30, 12, -1))]
    for command in [os.environ.get("CC"), *map(shutil.which, names)]:
        if command and is_clang(command):
            os.environ["CC"] = command
            return True
    ziglang = importlib.util.find_spec("ziglang")
    if ziglang and ziglang.origin:
        os.environ["ZIG"] = str(Path(ziglang.origin).with_name("zig"))
        os.environ["CC"] = str(Path(__file__).with_name("zig-clang"))
    else:
        os.environ["CC"] = ""
    return os.environ["CC"] != ""


def provide_nvrtc() -> None:
    """Points tinygrad at the CUDA compiler and headers in PyTorch's packages, where no CUDA toolkit is installed."""
    packages = importlib.util.find_spec("nvidia")
    if packages is None or "CUDA_PATH" in os.environ or (TOOLKIT / "include" / "cuda_bf16.h").exists():
        return
    for folder in map(Path, packages.submodule_search_locations or []):
        libraries, headers = sorted(folder.glob("*/lib/libnvrtc.so.*")), sorted(folder.glob("*/include/cuda_bf16.h"))
        if libraries and headers:
            os.environ["NVRTC_PATH"] = str(libraries[-1])
            os.environ["CUDA_PATH"] = str(headers[-1].parent.parent)


def provide_triton_cache() -> None:
    """Has Triton keep compiled kernels in a temporary folder where its own cannot be written."""
    own = Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or own)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        temporary = tempfile.mkdtemp(prefix="triton-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        os.environ["TRITON_CACHE_DIR"] = temporary
        print(
            f"note: {folder}, Triton's cache of kernels, cannot be used ({e.strerror}); going on without it, so every "
            "run compiles anew. Set TRITON_CACHE_DIR to a folder that can be written",
            file=sys.stderr,
        )


def open_device(name: str | None) -> str:
    """Makes `name` (CPU, CUDA, CUDA:1, METAL, AMD, ...) tinygrad's device, or else what DEV names, or else the best.

    Returns its name, which is CUDA for whichever GPU of NVIDIA's. Raises `InputError` where it does not exist or has no
    compiler. It comes before anything is computed: tinygrad reads once which compilers there are.
    """
    shield_compilers()
    KernelCache().install()
    has_compiler = provide_clang()  # for CUDA too: what is of no device, such as a constant, is computed on the CPU
    wanted = DEV.device if name is None else name
    if wanted or name is not None:
        candidate, number = numbered(wanted)
        if candidate not in ALL_DEVICES:
            raise InputError(f"there is no device {wanted!r}; the devices tinygrad knows are {', '.join(ALL_DEVICES)}")
        if candidate == "CPU" and not has_compiler:
            raise InputError(NO_CLANG)
        if number is not None:
            show_one_gpu(number)
        if reason := fault(candidate):
            remedy = "unset DEV" if name is None else "leave --device out"
            raise InputError(f"the device {wanted} cannot be opened ({reason}); {remedy} for the best there is")
        return candidate
    faults = {}
    # NV, tinygrad's own driver, comes after CUDA: it does not know every GPU
    for candidate in ["CUDA", *(d for d in ALL_DEVICES if d != "CUDA")]:
        if candidate == "CPU" and not has_compiler:
            raise InputError(NO_CLANG)
        if (reason := fault(candidate)) is None:
            return candidate
        faults[candidate] = reason
        if candidate == "CUDA" and Path("/proc/driver/nvidia/version").exists():
            print(f"note: this machine's NVIDIA GPU cannot be used ({reason})", file=sys.stderr)
    raise InputError(f"no device can be opened, not even the CPU ({faults['CPU']}); mend that, or name a --device")


def fault(device: str) -> str | None:
    """Opens a device and makes it tinygrad's. Returns in words why that cannot be, None where it can."""
    try:
        if device == "CUDA":
            provide_nvrtc()
            provide_triton_cache()
            share_context()
        Device[device]
        if device == "CPU":
            use_all_cores()
            use_graphs(device, CPUGraph)
            if place():  # of several ranks each has a share
                NUM_CPU_THREADS.value = min(NUM_CPU_THREADS.value, len(os.sched_getaffinity(0)))
    except Exception as e:  # whatever a missing driver raises
        return str(e).strip().partition("\n")[0] or type(e).__name__
    DEV.value = device
    os.environ["DEV"] = device  # for the processes that compile
    if device == "CUDA":
        here, cores = place(), len(os.sched_getaffinity(0))
        start_compilers(max(1, min(COMPILERS, cores // (here.local_size if here else 1))))
    return None


def device_name(device: str) -> str:
    """What the GPU or processor calls itself."""
    if device == "CUDA":
        return gpu_name()
    return f"{device} with {counted(len(os.sched_getaffinity(0)), 'core')}" if device == "CPU" else device


def peak_flops(name: str, bfloat16: bool) -> float | None:
    """The peak rate in FLOP/s of the GPU of this name, where it is known."""
    return next((rates[not bfloat16] for gpu, rates in PEAKS.items() if re.search(rf"\b{gpu}\b", name)), None)
