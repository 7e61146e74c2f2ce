"""Which device tinygrad computes on, the compiler that its CPU device needs, and how fast the GPU could be."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tinygrad import Device
from tinygrad.device import ALL_DEVICES
from tinygrad.helpers import DEV

from data.cli import InputError
from tinygrad_impl.internals import gpu_name, share_context, shield_compilers, use_all_cores

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


def open_device(name: str | None) -> str:
    """Makes `name` (CPU, CUDA, METAL, AMD, ...) tinygrad's device, or else what DEV names, or else the best there is.

    Returns its name. Raises `InputError` where it does not exist or has no compiler. It comes before anything is
    computed: tinygrad reads once which compilers there are.
    """
    shield_compilers()
    has_compiler = provide_clang()  # for CUDA too: what is of no device, such as a constant, is computed on the CPU
    name = name or DEV.device
    # NV, tinygrad's own driver, comes after CUDA: it does not know every GPU
    candidates = [name.upper()] if name else ["CUDA", *(d for d in ALL_DEVICES if d != "CUDA")]
    reason = ""
    for candidate in candidates:
        if candidate == "CPU" and not has_compiler:
            raise InputError(
                "tinygrad's CPU device needs clang and none was found; `pip install ziglang`, or install clang"
            )
        if candidate not in ALL_DEVICES:
            raise InputError(f"there is no device {candidate}; the devices tinygrad knows are {', '.join(ALL_DEVICES)}")
        try:
            if candidate == "CUDA":
                provide_nvrtc()
                share_context()
            Device[candidate]
            if candidate == "CPU":
                use_all_cores()
        except Exception as e:  # whatever a missing driver raises
            reason = str(e).strip().partition("\n")[0] or type(e).__name__
            if candidate == "CUDA" and not name and Path("/proc/driver/nvidia/version").exists():
                print(f"note: this machine's NVIDIA GPU cannot be used ({reason})", file=sys.stderr)
            continue
        DEV.value = candidate
        os.environ["DEV"] = candidate  # for the processes that compile
        return candidate
    raise InputError(
        f"the device {' or '.join(candidates)} cannot be opened ({reason}); leave --device out for the best there is"
    )


def device_name(device: str) -> str:
    """What the GPU or processor calls itself."""
    if device == "CUDA":
        return gpu_name()
    return f"{device} with {len(os.sched_getaffinity(0))} cores" if device == "CPU" else device


def peak_flops(name: str, bfloat16: bool) -> float | None:
    """The peak rate in FLOP/s of the GPU of this name, where it is known."""
    return next((rates[not bfloat16] for gpu, rates in PEAKS.items() if re.search(rf"\b{gpu}\b", name)), None)
