"""Kernels for NVIDIA GPUs, written in Triton, and how they become nodes of tinygrad's graphs."""

import importlib.util
from dataclasses import dataclass

from tinygrad import Device

from data.checkpoints.config import GPT2Config
from data.cli import InputError
from tinygrad_impl.internals import gpu_attribute, use_graphs

OLDEST = 80  # compute capability: Ampere, the first with bfloat16 GEMMs
PORTABLE = ("sm_80", "sm_86", "sm_89")  # whose code newer GPUs run too, once their driver has translated it


@dataclass(frozen=True)
class GPU:
    """What kernels are compiled for and tuned by: 10 times the compute capability, and how many multiprocessors there
    are. The GPU at hand may be a newer one.
    """

    capability: int
    multiprocessors: int

    @property
    def arch(self) -> str:
        return f"sm_{self.capability}"

    def as_arch(self, arch: str | None) -> "GPU":
        """In its stead a GPU of another architecture, such as "sm_80", or "sm_80:108" with 108 multiprocessors, whose
        code this one can run; None: itself. Raises `InputError` where it cannot.
        """
        if arch is None:
            return self
        name, colon, count = arch.partition(":")
        known = [*(a for a in PORTABLE if int(a.removeprefix("sm_")) < self.capability), self.arch]
        if name not in known or (colon and not (count.isdecimal() and int(count))):
            raise InputError(
                f"--arch {arch} is none that the GPU at hand ({self.arch}) can run; name {' or '.join(known)}, with "
                "a number of multiprocessors if you like (sm_80:108)"
            )
        return GPU(int(name.removeprefix("sm_")), int(count or self.multiprocessors))

    @property
    def family(self) -> str:
        """The first architecture that is like this one in what tiles depend on: Hopper and the Blackwell of data
        centres; Blackwell's other GPUs; the A100; the other GPUs before Hopper.
        """
        if self.capability >= 90:
            return "sm_90" if self.capability < 120 else "sm_120"
        return "sm_80" if self.capability in (80, 87) else "sm_86"

    @property
    def shared_memory(self) -> int:
        """KB that a program can have."""
        return {"sm_90": 227, "sm_80": 163}.get(self.family, 99)

    @property
    def has_copy_engine(self) -> bool:
        """Whether it moves whole tiles (TMA), where on others each thread copies by addresses."""
        return self.capability >= 90

    @property
    def pairs_warpgroups(self) -> bool:
        """Whether it has Hopper's instructions for products of warpgroups (pingpong.py)."""
        return 90 <= self.capability < 100

    @property
    def starts_early(self) -> bool:
        """Whether a kernel can begin while the one before it ends (graph.py)."""
        return self.capability >= 90


def capability(device: str) -> int:
    return int(Device[device].renderer.target.arch.removeprefix("sm_"))


def gpu_of(device: str, arch: str | None = None) -> GPU:
    """The GPU at hand, or with `arch` another in its stead (`GPU.as_arch`)."""
    return GPU(capability(device), gpu_attribute(device, "MULTIPROCESSOR_COUNT")).as_arch(arch)


def own_graphs(device: str) -> None:
    """Has graphs on CUDA be those of graph.py."""
    from tinygrad_impl.kernels.graph import Graph  # here, because only CUDA has such graphs

    use_graphs(device, Graph)


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
    if config.inner % 64:
        return f"they take an n_inner that 64 divides, not {config.inner}"
    return None
