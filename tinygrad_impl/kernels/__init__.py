"""Kernels for NVIDIA GPUs, written in Triton, and how they become nodes of tinygrad's graphs."""

import importlib.util
import sys
from types import ModuleType

from tinygrad import Device

from data.checkpoints.config import GPT2Config
from data.cli import InputError

CHOICES = ("auto", "fused", "plain")
OLDEST = 80  # compute capability: Ampere, the first with bfloat16 products


def choose(wanted: str, config: GPT2Config, device: str, bfloat16: bool) -> ModuleType | None:
    """What computes a model's operations: the module `fused`, or None for tinygrad's own kernels ("plain").

    "auto" takes the former where it can, and says why where an NVIDIA GPU cannot. Raises `InputError` where "fused" is
    wanted and cannot be.
    """
    if wanted == "plain":
        return None
    reason = obstacle(config, device, bfloat16)
    if reason and wanted == "fused":
        raise InputError(f"--kernels fused cannot be: {reason}; leave it out")
    if reason and device == "CUDA":
        print(f"note: tinygrad's own kernels compute this, which are slower: {reason}", file=sys.stderr)
    if reason:
        return None
    from tinygrad_impl.kernels import fused, matmul  # here, because they import Triton

    matmul.capability = capability(device)
    overlap(device)
    return fused


def overlap(device: str) -> None:
    """Has kernels that can (`Launch.waits`) begin while the ones before them end, if the driver knows how."""
    from tinygrad_impl.kernels import graph  # here, because only CUDA has such graphs

    if graph.add_dependencies:
        Device[device].graph = graph.Graph


def capability(device: str) -> int:
    """10 times the compute capability of an NVIDIA GPU."""
    return int(Device[device].renderer.target.arch.removeprefix("sm_"))


def obstacle(config: GPT2Config, device: str, bfloat16: bool) -> str | None:
    """Why the kernels cannot compute this model there, if so."""
    if device != "CUDA":
        return f"they are for NVIDIA GPUs, and the device is {device}"
    if capability(device) < OLDEST:
        return f"this GPU (sm_{capability(device)}) is older than sm_{OLDEST}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if not bfloat16:
        return "they compute in bfloat16, and the dtype is float32"
    head = config.n_embd // config.n_head
    if config.n_embd % 64 or head not in (16, 32, 64):
        return f"they take widths that 64 divides and heads of 16, 32 or 64, not {config.n_embd} and {head}"
    return None
