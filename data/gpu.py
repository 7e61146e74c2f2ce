"""Which GPUs there are, and which of them a process uses, whichever library computes on it."""

import ctypes
import os
import re

from data.cli import InputError


def numbered(device: str) -> tuple[str, int | None]:
    """A device and the number in its name: "cuda:1" -> ("CUDA", 1), "CPU" -> ("CPU", None).

    Raises `InputError` for a number that is none, and for one of a device of which only the first can be used.
    """
    name, colon, number = device.upper().partition(":")
    if not colon:
        return name, None
    if name != "CUDA" or not re.fullmatch("[0-9]{1,4}", number):
        raise InputError(f"there is no device {device!r}; a number goes with CUDA alone: CUDA:1 is the second GPU")
    return name, int(number)


def gpus() -> list[str]:
    """NVIDIA's GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them. Nothing opens CUDA, which would read
    that variable for good.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(installed())]
    names = [name.strip() for name in visible.split(",")]
    hidden = [name in ("", "-1") for name in names]  # CUDA takes none from the first of these on
    return names[: hidden.index(True)] if True in hidden else names


def installed() -> int:
    """How many GPUs NVIDIA's driver has on this host; 0 without it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() == 0:
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        nvml.nvmlShutdown()
    return count.value


def show_one_gpu(number: int) -> None:
    """Makes GPU `number` (from 0, of those that CUDA_VISIBLE_DEVICES leaves) the only one that this process sees.

    So it is the first, and nothing else in the program has to know. It has to come before anything opens CUDA.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else None
    if names is not None and number >= len(names):
        raise InputError(
            f"there is no GPU {number}, as CUDA_VISIBLE_DEVICES={visible} leaves {len(names)}; give a lower number"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number] if names else str(number)
