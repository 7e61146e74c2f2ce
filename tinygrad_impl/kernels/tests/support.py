"""Triton's kernels called with torch's tensors: on a GPU compiled, elsewhere in Triton's interpreter."""

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from tinygrad import dtypes
from tinygrad.engine.realize import runtime_cache
from tinygrad.uop.ops import UOp

from tinygrad_impl.kernels import GPU
from tinygrad_impl.kernels.launch import SCRATCH, Launch, binary_of, code, compile_kernel, wrap

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # as conftest.py found it
if DEVICE == "cuda":
    found = torch.cuda.get_device_properties(0)
    AT_HAND = GPU(10 * found.major + found.minor, found.multi_processor_count)
else:
    AT_HAND = GPU(100, 132)  # a B200: the interpreter does not know Gluon, in which there are kernels for the H100
THIS_GPU = AT_HAND.as_arch(os.environ.get("TESTED_ARCH"))  # as conftest.py was told
# Whose kernels a test can have: in the interpreter those with the copy engine and those of the GPUs before it
GPUS = [THIS_GPU, GPU(80, 132)] if DEVICE == "cpu" and THIS_GPU == AT_HAND else [THIS_GPU]
slow_without_gpu = pytest.mark.slow if DEVICE == "cpu" else lambda test: test
DTYPES = {
    dtypes.float64: torch.float64,
    dtypes.float32: torch.float32,
    dtypes.bfloat16: torch.bfloat16,
    dtypes.int64: torch.int64,
    dtypes.int32: torch.int32,
}


class Early:
    """Calls kernels as if each began early: where those before it write, from the graph's first on (they may all run
    still, because one may let the next begin before it waits itself), are zeros until its programs wait.
    """

    def __init__(self) -> None:
        self.written: set[Any] = set()  # where the kernels before wrote
        self.late: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # memory that this one reads of them, and the other state
        self.shown = True

    def show(self, shown: bool) -> None:
        if shown != self.shown:
            for memory, other in self.late:
                kept = memory.clone()
                memory.copy_(other)
                other.copy_(kept)
        self.shown = shown

    def run(self, call: Callable[..., None], tensors: list[torch.Tensor], outs: int, first: bool) -> None:
        """Calls a kernel, the first of its graph or not, that reads tensors and writes the first of them."""
        if first:
            self.written = set()
        read = {(t.data_ptr(), t.dtype, t.shape): t for t in tensors}
        self.late = [(read[place], torch.zeros_like(read[place])) for place in read if place in self.written]
        self.shown = True
        call()
        self.show(True)
        self.written |= set(list(read)[:outs])
        self.late = []


early = Early()

if DEVICE == "cuda":
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
else:
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(
        self: InterpreterBuilder, a: Any, b: Any, *more: Any, dot: Any = InterpreterBuilder.create_dot
    ) -> Any:
        """The interpreter's product, which would take the bits of bfloat16 for whole numbers."""

        def widened(x: Any) -> Any:
            if x.data.dtype != np.uint16:
                return x
            return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return dot(self, widened(a), widened(b), *more)

    def cast_impl(self: InterpreterBuilder, x: Any, dtype: Any, cast: Any = InterpreterBuilder.cast_impl) -> Any:
        """The interpreter's conversion, which would cut bfloat16 off instead of rounding to it, as GPUs do."""
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16).numpy()
            return TensorHandle(rounded.view(np.uint16).reshape(x.data.shape), tl.bfloat16)
        return cast(self, x, dtype)

    def create_descriptor_reduce(self: InterpreterBuilder, kind: Any, tiles: Any, value: Any, indices: Any) -> None:
        """A tile added to what is there, which the interpreter does not know."""
        assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD
        pointers, mask = tiles.materialize_pointers(indices)
        before = self.create_masked_load(pointers, mask, None, None, None, False)
        total = TensorHandle(before.data + value.data, value.dtype)
        self.create_masked_store(pointers, total, mask, None, None)

    def sort(x: Any, descending: bool = False) -> Any:
        """Of a vector, by numpy: the interpreter would go from number to number, for minutes."""
        ordered = np.sort(x.handle.data)
        return tl.tensor(TensorHandle(ordered[::-1].copy() if descending else ordered, x.dtype), x.type)

    def patch_lang(fn: Any, patch: Any = interpreter._patch_lang) -> Any:
        """Makes Triton's language the interpreter's, which would do so anew in every call, and undo it."""
        if id(fn) not in patched:
            patched[id(fn)] = fn
            patch(fn)
        return SimpleNamespace(restore=lambda: None)

    def get_np_dtype(kind: Any, get: Any = interpreter._get_np_dtype) -> Any:
        """numpy's dtype for one of Triton's, which the interpreter would look up in a new table every time."""
        if kind.name not in np_dtypes:
            np_dtypes[kind.name] = get(kind)
        return np_dtypes[kind.name]

    def init_block_type(self: Any, element_ty: Any, shape: Any, init: Any = tl.block_type.__init__) -> None:
        """What a block's shape says, once for each: with `init_tensor` a quarter of the interpreter's time."""
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in block_types:
            init(self, element_ty, shape)
            block_types[key] = {name: vars(self)[name] for name in ("shape", "numel", "name")}
        vars(self).update(block_types[key], element_ty=element_ty)

    def init_tensor(self: Any, handle: Any, type: Any, init: Any = tl.tensor.__init__) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in tensors:
            init(self, handle, type)
            tensors[key] = {name: vars(self)[name] for name in ("shape", "numel")}
        vars(self).update(tensors[key], handle=handle, type=type, dtype=type.scalar)

    def set_grid_idx(self: InterpreterBuilder, *place: int, set_idx: Any = InterpreterBuilder.set_grid_idx) -> None:
        """Where a program begins."""
        early.show(False)
        set_idx(self, *place)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce
    InterpreterBuilder.set_grid_idx = set_grid_idx
    patched: dict[int, Any] = {}
    interpreter._patch_lang = patch_lang
    np_dtypes: dict[str, Any] = {}
    block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
    tensors: dict[tuple[int, ...], dict[str, Any]] = {}
    interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__ = get_np_dtype, init_block_type, init_tensor
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )  # a second computation in 64 bits beside each one
    tl.sort = sort
    tl.extra.cuda.gdc_wait, tl.extra.cuda.gdc_launch_dependents = partial(early.show, True), lambda: None


def run_launch(launch: Launch, outs: list[torch.Tensor], *ins: torch.Tensor) -> None:
    """Fills outs with what the kernel writes there; before, they are poisoned."""
    for out in outs:
        out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)
    call(launch, [*outs, *ins])


def call(launch: Launch, tensors: list[torch.Tensor]) -> None:
    """Calls the kernel, compiled for THIS_GPU, as launch.py would have it."""
    given = launch.arguments(tensors)
    if DEVICE == "cpu" or THIS_GPU.arch == AT_HAND.arch:
        options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
        launch.kernel[launch.grid](*given, **launch.constants, **options)
        return
    types = {torchs: ours for ours, torchs in DTYPES.items()}
    compiled = compile_kernel(launch, tuple(types[t.dtype] for t in tensors), THIS_GPU.arch)
    compiled.kernel = code(binary_of(compiled, THIS_GPU.arch), AT_HAND.arch)
    rest = [launch.constants[name] for name in launch.kernel.arg_names[len(given) :]]
    compiled[(*launch.grid, 1, 1)[:3]](*given, *rest)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||, computed in float64."""
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def check(got: torch.Tensor, truth: torch.Tensor, torchs: torch.Tensor, least: float = 0.0) -> None:
    """As a whole, and in each row and column, the error is at most 1.5 and 2 times PyTorch's, and `least` of what the
    numbers are in the mean, which is what rounding may cost where PyTorch was lucky.
    """
    assert got.isfinite().all()
    errors = [(x.detach().double() - truth.double()).reshape(-1, x.shape[-1]) for x in (got, torchs)]
    typical = truth.double().square().mean().sqrt()
    for most, dim in ((1.5, None), (2, 0), (2, 1)):
        ours, theirs = (error.square().mean(dim).sqrt().max() / typical for error in errors)
        assert ours <= most * theirs + least, (dim, ours, theirs)


def check_rounding(got: torch.Tensor, truth: torch.Tensor) -> None:
    """bfloat16 numbers are the truth, rounded: but for a few that lie between two, of which the other is taken."""
    rounded, spacing = truth.bfloat16(), torch.finfo(torch.bfloat16).eps
    assert ((got.double() - truth.double()).abs() <= spacing * truth.double().abs() + 1e-3 * spacing).all()
    assert (got != rounded).double().mean() < 0.02


class Interpreted:
    """Stands for a compiled program on tinygrad's CPU device: calls the kernel in Triton's interpreter."""

    def __init__(self, kernel: Launch, outs: int, args: tuple[UOp, ...]):
        self.kernel, self.outs, self.args = kernel, outs, args[:-SCRATCH]

    def __call__(self, *buffers: Any, **options: Any) -> None:
        tensors = []
        for buffer, arg in zip(buffers, self.args, strict=False):
            memory = (ctypes.c_char * buffer.size).from_address(int(buffer.va_addr))
            tensors.append(torch.frombuffer(memory, dtype=DTYPES[arg.dtype]))
        call = partial(self.kernel.kernel[self.kernel.grid], *self.kernel.arguments(tensors), **self.kernel.constants)
        if self.kernel.waits:
            early.run(call, tensors, self.outs, first=self.kernel.name.startswith("embed"))
        else:
            call()


def interpreted_program(gpu: GPU, kernel: Launch, outs: int, device: str, *args: UOp) -> UOp:
    """In the place of `launch.program`, for tinygrad's CPU device."""
    uop = wrap(gpu, kernel, outs, args)
    runtime_cache.setdefault((uop.key, device), Interpreted(kernel, outs, args))
    return uop


def names(graph: Any) -> list[str]:
    """Of the kernels of a captured `TinyJit`, in order."""
    calls = graph.captured.linear.src
    inner = [c for call in calls for c in (call.src[0].src[0].src if call.src[0].arg == "graph" else [call])]
    return [call.src[0].arg.name for call in inner if hasattr(call.src[0].arg, "name")]
