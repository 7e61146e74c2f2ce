"""Which of several GPUs a process uses, whichever library computes on it."""

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


def show_one_gpu(number: int) -> None:
    """Makes GPU `number` (from 0, of those that CUDA_VISIBLE_DEVICES leaves) the only one that this process sees.

    So it is the first, and nothing else in the program has to know. It has to come before anything opens CUDA.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else None
    if gpus is not None and number >= len(gpus):
        raise InputError(
            f"there is no GPU {number}, as CUDA_VISIBLE_DEVICES={visible} leaves {len(gpus)}; give a lower number"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number] if gpus else str(number)
