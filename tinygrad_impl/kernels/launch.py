"""A kernel with everything that it is compiled for, and how it becomes a node of tinygrad's graphs."""

import importlib
import math
import os
import shlex
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import chain, islice, zip_longest
from typing import Any

from tinygrad import Device, Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.helpers import argsort
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import Ops, ProgramInfo, UOp

from data.cli import InputError
from tinygrad_impl import compilers, internals
from tinygrad_impl.functional import name_of
from tinygrad_impl.kernels import GPU

TYPES = {  # of pointers
    dtypes.float64: "*fp64",
    dtypes.float32: "*fp32",
    dtypes.bfloat16: "*bf16",
    dtypes.int64: "*i64",
    dtypes.int32: "*i32",
}
SCRATCH = 2  # pointers that Triton adds to a kernel's parameters: where it keeps tensor descriptors, and a profiler's
DESCRIPTOR = 128  # bytes
waiting = ThreadPoolExecutor(os.cpu_count())  # threads that wait for the processes that compile


@dataclass(frozen=True)
class Launch:
    """A call of a Triton kernel without its tensors. They come first, those that are written before those that are
    only read; `constants` are the rest of its parameters, all of them `tl.constexpr`.
    """

    kernel: Any  # what triton.jit or gluon.jit made
    grid: tuple[int, ...]
    constants: dict[str, Any] = field(hash=False)
    warps: int = 4
    stages: int = 2
    flops: int = 0  # for reports: what it computes
    bytes: int = 0  # and the fewest bytes that it must move
    descriptors: int = 0  # tensor descriptors that a program makes, at most
    groups: tuple[int, ...] = ()  # of tensors that a parameter takes as a tuple, how many; 0: it takes one tensor
    registers: int | None = None  # that a thread has at most, so that as many programs fit as the grid is made for
    workers: int = 0  # warps beside the first, to which a kernel in Gluon gives work of their own

    @property
    def name(self) -> str:
        """The kernel's name in profiles."""
        sizes = [str(self.constants[size]) for size in "BTHDMNKRCV" if size in self.constants]
        return "_".join([self.kernel.__name__.removesuffix("_kernel"), *sizes])

    @property
    def waits(self) -> bool:
        """Whether it waits by itself for the kernels before it, so that it may begin before they have ended."""
        return self.constants.get("EARLY", False)

    def arguments(self, tensors: Sequence[Any]) -> list[Any]:
        """The kernel's first arguments: its tensors, or what stands for them, in tuples as `groups` says."""
        rest = iter(tensors)
        return [tuple(islice(rest, size)) if size else next(rest) for size in self.groups or [0] * len(tensors)]


def launch(gpu: GPU, kernel: Launch, outs: Sequence[Tensor], *ins: Tensor) -> list[Tensor]:
    """The outputs after the kernel, compiled for such a GPU, has written them. An output may be a tensor that it reads
    and changes in place.
    """
    first, *rest = outs
    ins = tuple(map(stored, ins))
    size = DESCRIPTOR * kernel.descriptors * math.prod(kernel.grid)
    scratch = [Tensor.invalids(max(1, bytes), dtype=dtypes.uint8, device=first.device) for bytes in (size, 0)]
    fxn = partial(program, gpu, kernel, len(outs), first.device)
    return first.custom_kernel(*rest, *ins, *scratch, fxn=fxn)[: len(outs)]


def new(like: Tensor, *shape: int, dtype: DType = dtypes.bfloat16) -> Tensor:
    """A tensor for a kernel to write."""
    return Tensor.invalids(*shape, dtype=dtype, device=like.device)


def stored(x: Tensor) -> Tensor:
    """x as it lies in memory, whatever its shape. What is not in memory yet is computed into a new tensor. A node's
    output, which kernels are yet to write, is left to them.
    """
    uop = x.uop
    while uop.src:
        if uop.op in (Ops.RESHAPE, Ops.DETACH):
            uop = uop.src[0]
        elif uop.op is uop.src[0].op is Ops.PERMUTE and uop.marg == argsort(uop.src[0].marg):  # there and back again
            uop = uop.src[0].src[0]
        elif uop.op is Ops.GETTUPLE and name_of(uop.src[0]):
            return Tensor(uop)
        elif (
            uop.op is Ops.GETTUPLE and uop.src[0].src[0].src[uop.arg].op is Ops.PARAM
        ):  # a call that returns what it got
            call, index = uop.src[0], uop.src[0].src[0].src[uop.arg].arg.slot
            uop = call.src[1 + index]
        else:
            break
    return Tensor(uop) if uop.op in (Ops.AFTER, Ops.BUFFER, Ops.CONTIGUOUS) else x.contiguous()


@cache
def program(gpu: GPU, kernel: Launch, outs: int, device: str, *args: UOp) -> UOp:
    """The kernel as a program of tinygrad's; args are the placeholders of its tensors. It is compiled in the
    background, by other processes, so that many are at once and none takes Python's time here.
    """
    types = tuple(a.dtype for a in args[:-SCRATCH])
    binary = waiting.submit(compilers.in_a_compiler, compile_named, *named(kernel), types, gpu.arch)
    uop = wrap(gpu, kernel, outs, args)
    internals.give_runtime(uop, device, Compiled(kernel, binary, device, uop))
    return uop


class Compiled:
    """Stands for tinygrad's `CUDAProgram` of a kernel, which is loaded when it is first used."""

    def __init__(self, kernel: Launch, binary: "Future[Binary]", device: str, uop: UOp):
        self.kernel, self.binary, self.device, self.uop = kernel, binary, device, uop

    @cached_property
    def loaded(self) -> Any:
        from tinygrad.runtime.ops_cuda import check, cuda  # only where there is CUDA can it be imported

        binary = self.binary.result()
        lib = code(binary, Device[self.device].renderer.target.arch)
        obj = replace(self.uop.to_elf(), name=binary.name, lib=lib)
        assert binary.warps == self.kernel.warps + self.kernel.workers
        assert binary.scratch <= DESCRIPTOR * self.kernel.descriptors
        try:
            loaded = Device[self.device].runtime(obj)
        except RuntimeError as e:
            if "INVALID_IMAGE" not in str(e):
                raise
            raise InputError(damaged(obj.name)) from e
        loaded.smem = binary.shared_memory
        limit = cuda.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(cuda.cuFuncSetAttribute(loaded.prg, limit, loaded.smem))
        return loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loaded, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.loaded(*args, **options)


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: for which architecture, its machine code and its assembly (PTX), its warps, and the bytes that
    a program needs of shared memory and of memory for tensor descriptors.
    """

    name: str
    arch: str
    cubin: bytes
    ptx: str
    warps: int
    shared_memory: int
    scratch: int


def named(kernel: Launch) -> tuple[Launch, str, str]:
    """The launch without its kernel, and that by its module and name: what can be sent to another process."""
    return replace(kernel, kernel=None), kernel.kernel.__module__, kernel.kernel.__name__


def compile_named(kernel: Launch, module: str, name: str, types: tuple[DType, ...], arch: str) -> Binary:
    """The kernel that `named` has given, compiled. Raises `RuntimeError`, whatever Triton raises."""
    found = getattr(importlib.import_module(module), name)
    try:
        made = compile_kernel(replace(kernel, kernel=found), types, arch)
    except Exception as e:  # some of Triton's cannot be unpickled in another process
        raise RuntimeError(f"{name} of {kernel.constants}: {type(e).__name__}: {e}") from None
    return binary_of(made, arch)


def binary_of(made: Any, arch: str) -> Binary:
    """What `compile_kernel` has made for this architecture, as another process can have it."""
    about = made.metadata
    return Binary(
        about.name, arch, made.asm["cubin"], made.asm["ptx"], about.num_warps, about.shared, about.global_scratch_size
    )


def compile_kernel(kernel: Launch, types: tuple[Any, ...], arch: str) -> Any:
    """Triton's compiled kernel for tensors of these dtypes on an NVIDIA GPU of this architecture, such as "sm_90"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.kernel.arg_names
    pointers = kernel.arguments([TYPES[dtype] for dtype in types])
    paths = [[(i,)] if isinstance(p, str) else [(i, j) for j in range(len(p))] for i, p in enumerate(pointers)]
    source = (GluonASTSource if kernel.kernel.is_gluon() else ASTSource)(
        kernel.kernel,
        dict(zip_longest(names, pointers, fillvalue="constexpr")),
        {(names.index(name),): value for name, value in kernel.constants.items()},
        {path: [["tt.divisibility", 16]] for path in chain(*paths)},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "maxnreg": kernel.registers}
    return triton.compile(source, target=target, options=options)


def code(binary: Binary, arch: str) -> bytes:
    """What the driver loads on a GPU of this architecture: machine code, or of a kernel that was compiled for an older
    one its assembly (PTX), which the driver translates.
    """
    return binary.cubin if binary.arch == arch else bytes(binary.ptx, "ascii") + b"\0"


def damaged(name: str) -> str:
    """What to do about a file of Triton's that is not what it wrote."""
    from triton import knobs

    return (
        f"the file of the compiled kernel {name} is damaged; empty Triton's cache: rm -r {shlex.quote(knobs.cache.dir)}"
    )


def wrap(gpu: GPU, kernel: Launch, outs: int, args: tuple[UOp, ...]) -> UOp:
    """What tinygrad's own compiler would give for such a kernel, but without the binary."""
    name = kernel.name
    estimates = Estimates(ops=kernel.flops, lds=kernel.bytes, mem=kernel.bytes)
    info = ProgramInfo(
        name=name,
        global_size=(*kernel.grid, 1, 1)[:3],
        local_size=(32 * (kernel.warps + kernel.workers), 1, 1),
        globals=tuple(range(len(args))),
        outs=(*range(outs), len(args) - SCRATCH),
        ins=tuple(range(len(args))),  # what is written may be read too
    )
    limits = kernel.warps, kernel.stages, kernel.registers
    source = repr((gpu.arch, kernel.kernel.__name__, kernel.grid, kernel.constants, *limits))
    return internals.program(name, args, info, estimates, source, binary=b"")
