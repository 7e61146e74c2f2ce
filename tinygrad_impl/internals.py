"""What this project changes in tinygrad, or uses of its private parts: for tinygrad 0.14.0, and for no other version.

What only CUDA has is in kernels/graph.py and kernels/launch.py, which build on this. Each function says why it is
needed; tests/test_internals.py says of each what is broken if another version fails it.
"""

import ctypes
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, helpers
from tinygrad.device import Buffer, TinyELF
from tinygrad.dtype import dtypes
from tinygrad.engine import jit
from tinygrad.engine.realize import ExecContext, estimate_uop, pm_exec, run_linear, runtime_cache
from tinygrad.helpers import NUM_CPU_THREADS, GlobalCounters, ansistrip
from tinygrad.renderer import Estimates
from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.schedule.memory import memory_plan_rewrite
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo, UOp, buffers, sym_infer

from tinygrad_impl.arena import Life, Span, places

# --- memory of tensors ------------------------------------------------------------------------------------------------

# Bytes of an array that goes to a GPU straight from where it lies. By way of pinned memory the host need not wait, as
# for a step's tokens, but allocating it takes a second for a gigabyte.
LARGE = 1 << 19


def overwrite(tensor: Tensor, array: Any) -> None:
    """Copies array, of tensor's shape and dtype, into the memory that tensor has and compiled graphs know. `assign`
    would schedule and compile a kernel, which takes a hundred times as long.

    array: of numpy's, or contiguous memory of the tensor's GPU (a tensor of PyTorch's, `CUDAMemory`).
    """
    buffer = tensor.uop.base.buffer
    there = getattr(array, "__cuda_array_interface__", None)
    array = array if there else np.asarray(array, order="C")
    dtype = np.dtype(there["typestr"]) if there else array.dtype
    assert tuple(array.shape) == tensor.shape, (array.shape, tensor.shape)
    assert dtype == np.dtype(tensor.dtype.fmt), (dtype, tensor.dtype)
    if there:
        assert there.get("strides") is None, "it has to be contiguous"
        check(driver().cuMemcpyDtoDAsync_v2(buffer._buf, there["data"][0], buffer.nbytes, None))
    elif array.nbytes >= LARGE and str(tensor.device).startswith("CUDA"):
        check(driver().cuMemcpyHtoD_v2(buffer._buf, array.ctypes.data, buffer.nbytes))  # it waits for the GPU
    else:
        buffer.allocator._copyin(buffer._buf, memoryview(bytearray(array.reshape(-1).data.cast("B"))))


def contents(tensor: Tensor) -> np.ndarray:
    """A copy of the memory of a tensor that is realized. `Tensor.numpy` would schedule a copy first."""
    buffer, array = tensor.uop.base.buffer, np.empty(tensor.shape, tensor.dtype.fmt)
    buffer.allocator._copyout(memoryview(array.reshape(-1).data).cast("B"), buffer._buf)
    return array


def part_of(memory: Tensor, start: int, size: int) -> Tensor:
    """`size` elements of a realized tensor (elements,) from `start`, as a tensor (size,) of its own in the same memory.

    A slice would be a view in the graph, which kernels get as a copy. tinygrad orders kernels by the tensors that they
    name: in one graph, either the whole is used or its parts.
    """
    buffer = memory.uop.base.buffer
    part = buffer.view(size, memory.dtype, start * memory.dtype.itemsize)
    return Tensor(UOp.from_buffer(part.ensure_allocated()))


def on_host(array: Any) -> np.ndarray:
    """The array as one of numpy's: itself, or a copy of what is on a GPU, as `overwrite` takes it."""
    if (there := getattr(array, "__cuda_array_interface__", None)) is None:
        return np.asarray(array)
    assert there.get("strides") is None, "it has to be contiguous"
    found = np.empty(there["shape"], there["typestr"])
    check(driver().cuMemcpyDtoH_v2(found.ctypes.data, there["data"][0], found.nbytes))
    return found


class CUDAMemory:
    """Bytes of a GPU as other libraries take them, PyTorch among them, which then use the same memory."""

    def __init__(self, address: int, shape: tuple[int, ...], kind: str):
        self.shape = shape
        self.__cuda_array_interface__ = {"shape": shape, "typestr": kind, "data": (address, False), "version": 3}


def memory_of(tensor: Tensor) -> Any:
    """The memory of a realized tensor, not copied: an array of numpy's, or `CUDAMemory` on a GPU. Its shape and dtype
    are the tensor's; of bfloat16, which numpy lacks, it is bytes (any,). Whoever uses it keeps the tensor.
    """
    buffer = tensor.uop.base.buffer.ensure_allocated()
    as_bytes = tensor.dtype == dtypes.bfloat16
    dtype = np.dtype(np.uint8 if as_bytes else tensor.dtype.fmt)
    shape = (buffer.nbytes,) if as_bytes else tuple(map(int, tensor.shape))
    if str(tensor.device).startswith("CUDA"):
        address = getattr(buffer._buf, "va_addr", None) or getattr(buffer._buf, "value", None) or buffer._buf
        return CUDAMemory(int(address), shape, dtype.str)
    raw = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer._buf.va_addr)
    return np.frombuffer(raw, dtype).reshape(shape)


# --- compiled graphs --------------------------------------------------------------------------------------------------


def captured_at_once(function: Any, arena: list[Buffer] | None = None, lent: Sequence[Tensor] = ()) -> Any:
    """A TinyJit whose first call is captured. tinygrad would run that call as it is, in far more memory and time.

    What is needed only while the graph runs lies in `arena`, to which the graph adds what is missing. Graphs that never
    run at the same time may share it. All are of one device.

    Some of it lies in the memory of `lent` instead, each until the graph's first kernel that names it: realized
    tensors, parts of one piece of memory. The graph has to write all of those that it names.
    """
    return Captured(function, [] if arena is None else arena, lent)


class Captured(jit._TinyJit[Any]):
    """What `captured_at_once` gives. tinygrad would give each graph an arena of its own."""

    def __init__(self, function: Any, arena: list[Buffer], lent: Sequence[Tensor]):
        super().__init__(function)
        self.cnt, self.arena, self.lent = 1, arena, lent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.cnt != 1:  # which it is until a first run, that of the capture, has ended
            return super().__call__(*args, **kwargs)
        jit.memory_plan_rewrite = self._planned
        try:
            return super().__call__(*args, **kwargs)
        finally:
            jit.memory_plan_rewrite = memory_plan_rewrite

    def _planned(self, linear: UOp, held: set[UOp]) -> UOp:
        """The graph's calls, with places in memory for what is not held. What none is left for, tinygrad plans."""
        if self.lent:
            linear = moved(linear, held, self.lent[0].uop.base.buffer.base, lent_spans(linear, self.lent))
        for memory in self.arena:
            linear = moved(linear, held, memory, [Span(0, memory.nbytes, len(linear.src))])
        planned = memory_plan_rewrite(linear, held | set(buffers))
        before = {uop for call in linear.src for uop in buffers_of(call)}
        new = dict.fromkeys(uop for call in planned.src for uop in buffers_of(call) if uop not in before)
        self.arena += [uop.buffer for uop in new]
        return planned


def lent_spans(linear: UOp, lent: Sequence[Tensor]) -> list[Span]:
    """Where lent tensors lie, and until which call: the first that names any of it. Without those that none names."""
    parts = sorted((tensor.uop.base.buffer for tensor in lent), key=lambda part: part.offset)
    [memory] = {part.base for part in parts}
    first: dict[Buffer, int] = {}
    for i, call in enumerate(linear.src):
        for uop in buffers_of(call):
            if uop in buffers and buffers[uop].base is memory:
                first.setdefault(buffers[uop], i)
    spans = []
    for part in parts:
        start, stop = part.offset, part.offset + part.nbytes
        named = [i for b, i in first.items() if b.offset < stop and start < b.offset + b.nbytes]
        spans += [Span(start, stop, min(named))] if named else []
    return spans


def moved(linear: UOp, held: set[UOp], memory: Buffer, spans: Sequence[Span]) -> UOp:
    """The graph's calls, with what finds room in these spans of the memory there."""
    first: dict[UOp, int] = {}
    last: dict[UOp, int] = {}
    for i, call in enumerate(linear.src):
        for uop in buffers_of(call):
            if uop not in held and uop not in buffers:
                first.setdefault(uop, i)
                last[uop] = i
    own = list(first)
    sizes = [int(uop.max_numel()) for uop in own]
    lives = [Life(size * u.dtype.itemsize, first[u], last[u]) for u, size in zip(own, sizes, strict=True)]
    views = {own[i]: memory.view(sizes[i], own[i].dtype, start) for i, start in places(lives, spans).items()}
    return linear.substitute({uop: UOp.from_buffer(view) for uop, view in views.items()}, walk=True)


def buffers_of(call: UOp) -> list[UOp]:
    """What a call names, but for the graph's inputs."""
    return [uop for source in call.src[1:] for uop in source.toposort() if uop.op is Ops.BUFFER]


def program(
    name: str,
    tensors: Sequence[UOp],
    info: ProgramInfo,
    estimates: Estimates,
    source: str,
    binary: bytes | None = None,
    variables: Sequence[UOp] = (),
) -> UOp:
    """What tinygrad's code generation would give for a kernel, from a source that is not its own. Without `binary` its
    compiler is yet to compile it.
    """
    sink = UOp.sink(*(t.base for t in tensors), *variables, arg=KernelInfo(name=name, estimates=estimates))
    made = [UOp(Ops.LINEAR, src=(*sink.src, sink)), UOp(Ops.SOURCE, arg=source)]
    made += [] if binary is None else [UOp(Ops.BINARY, arg=binary)]
    return UOp(Ops.PROGRAM, src=(sink, *made), arg=info)


def give_runtime(program: UOp, device: str, runtime: Any) -> None:
    """Has `runtime` called for the program, instead of what tinygrad would load from its binary."""
    runtime_cache[program.key, device] = runtime


class HostCall:
    """Stands for a kernel in a graph: a function that the host calls between those before it and those after it."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def __call__(self, *buffers: Any, **options: Any) -> None:
        self.function()

    @staticmethod
    def is_in(call: UOp) -> bool:
        """Whether a call of a captured graph is one of these, which a CUDA graph cannot have."""
        return isinstance(runtime_of(call), HostCall)


def runtime_of(call: UOp) -> Any:
    """What computes a call of a captured graph; None if it is yet to be compiled."""
    return runtime_cache.get((call.src[0].key, str(call.src[1].device)))


def called_after(tensors: Sequence[Tensor], name: str, function: Callable[[], None]) -> list[Tensor]:
    """The tensors, after the host has called `function`, which it does once the kernels that compute them have been
    started (on a CPU: have ended). `name` is for profiles.
    """
    host = HostCall(function)

    def kernel(*args: UOp) -> UOp:
        everything = tuple(range(len(args)))
        info = ProgramInfo(
            name=name, global_size=(1, 1, 1), local_size=(1, 1, 1), globals=everything, outs=everything, ins=everything
        )
        found = program(name, args, info, Estimates(), f"{name} {id(host)}", binary=b"")
        give_runtime(found, str(tensors[0].device), host)  # which keeps it, so that no other has its id
        return found

    return tensors[0].custom_kernel(*tensors[1:], fxn=kernel)


# --- the CPU device ---------------------------------------------------------------------------------------------------

threads = ThreadPoolExecutor(NUM_CPU_THREADS.value)


class ParallelProgram(CPUProgram):
    """A compiled kernel. tinygrad splits large ones into parts, one for each core, but runs these in turn itself."""

    def __call__(self, *bufs: Any, global_size: tuple[int, ...] = (1, 1, 1), **options: Any) -> float | None:
        if global_size[0] == 1:
            return super().__call__(*bufs, global_size=global_size, **options)
        started = time.perf_counter()
        arguments = [*(b.va_addr for b in bufs), *options["vals"]]
        core = self.runtimevars["core_id"]

        def run(part: int) -> None:
            self.fxn(*map(ctypes.c_uint64, [*arguments[:core], part, *arguments[core + 1 :]]))  # without Python's lock

        others = [threads.submit(run, part) for part in range(1, global_size[0])]
        run(0)  # here, which spares one thread's waking up
        for part in others:
            part.result()
        return time.perf_counter() - started


def c_function(name: str, source: str) -> CPUProgram:
    """The first function of a C source, compiled as a kernel is."""
    device = Device["CPU"]
    binary = device.compiler.compile_cached(source)
    return CPUProgram(device, TinyELF(binary, name, device.renderer.target, ()))


def in_parallel(function: CPUProgram, address: int) -> None:
    """Calls function(address) on every thread at once, and returns when all have."""
    others = [threads.submit(function.fxn, ctypes.c_uint64(address)) for _ in range(1, NUM_CPU_THREADS.value)]
    function.fxn(ctypes.c_uint64(address))  # here, which spares one thread's waking up
    for other in others:
        other.result()


def use_all_cores() -> None:
    """Has tinygrad's CPU device run the parts of a kernel at once."""
    Device["CPU"].runtime_t = ParallelProgram


# --- CUDA -------------------------------------------------------------------------------------------------------------


def driver() -> Any:
    """The functions of CUDA's driver. It can be imported only where there is one."""
    from tinygrad.runtime.autogen import cuda

    return cuda


def share_context() -> None:
    """Has tinygrad compute in the GPU's primary context, which PyTorch uses, instead of making one of its own.

    Which context is current belongs to the thread: with two of them, PyTorch's calls would end up in tinygrad's.
    """
    cuda = driver()
    cuda.cuCtxCreate_v2 = lambda context, flags, device: cuda.cuDevicePrimaryCtxRetain(context, device)


def gpu_name() -> str:
    cuda, buffer = driver(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(buffer, len(buffer), 0)
    return buffer.value.decode()


def gpu_attribute(device: str, name: str) -> int:
    """CUDA's CU_DEVICE_ATTRIBUTE_`name`."""
    cuda, value = driver(), ctypes.c_int()
    attribute = getattr(cuda, f"CU_DEVICE_ATTRIBUTE_{name}")
    check(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, Device[device].cu_device))
    return value.value


def free_memory(device: str) -> int:
    """Bytes that a CUDA device could still give to anyone; of others 0."""
    if device != "CUDA":
        return 0
    Device[device].synchronize()  # makes its context the current one
    check(driver().cuMemGetInfo_v2(ctypes.byref(free := ctypes.c_size_t()), ctypes.byref(ctypes.c_size_t())))
    return free.value


def check(status: int) -> None:
    """Raises `RuntimeError` on a CUDA error."""
    from tinygrad.runtime.ops_cuda import check

    check(status)


def use_graphs(device: str, kind: type) -> None:
    """Has captured graphs of the device be of this kind instead of tinygrad's."""
    Device[device].graph = kind


# --- measuring --------------------------------------------------------------------------------------------------------


class HighWater(defaultdict[str, int]):
    """Takes the place of tinygrad's counts of allocated bytes, by device, and remembers the highest."""

    def __init__(self) -> None:
        super().__init__(int, GlobalCounters.mem_used_per_device)
        self.highest: dict[str, int] = dict(self)
        GlobalCounters.mem_used_per_device = self

    def __setitem__(self, device: str, count: int) -> None:
        super().__setitem__(device, count)
        self.highest[device] = max(count, self.highest.get(device, 0))


def compiled_kernels() -> int:
    """How many are in the cache of tinygrad's compilers; 0 where it cannot be used."""
    try:
        database = helpers.db_connection()
        tables = database.execute("SELECT name FROM sqlite_master WHERE name LIKE 'compile%'").fetchall()
        return sum(database.execute(f"SELECT COUNT(*) FROM '{name}'").fetchone()[0] for (name,) in tables)
    except (sqlite3.Error, OSError):  # `KernelCache` has said so
        return 0


@contextmanager
def one_by_one(device: str) -> Iterator[list[tuple[str, int, int, float]]]:
    """Inside, captured graphs run kernel by kernel, each waited for. Gives a list that becomes that of their names,
    operations, bytes to move at least, and seconds.
    """
    kernels: list[tuple[str, int, int, float]] = []

    def run_one_by_one(
        linear: UOp, var_vals: dict[str, int] | None = None, input_uops: Sequence[UOp] = (), **options: Any
    ) -> None:
        if not options.get("jit"):
            return run_linear(linear, var_vals, input_uops, **options)
        values = var_vals or {}
        context = ExecContext(values, tuple(input_uops), update_stats=False, jit=True, wait=True)
        for call in linear.src:
            batch = call.src[0].op is Ops.CUSTOM_FUNCTION and call.src[0].arg == "graph"  # such as a CUDA graph
            for kernel in call.src[0].src[0].src if batch else [call]:
                Device[device].synchronize()
                started = time.perf_counter()
                measured = [seconds for seconds in pm_exec.rewrite(kernel, context) if seconds is not None]
                Device[device].synchronize()
                seconds = sum(measured) if measured else time.perf_counter() - started
                program, estimates = kernel.src[0], estimate_uop(kernel)
                name = ansistrip(program.arg.name) if program.op is Ops.PROGRAM else program.op.name.lower()
                flops, moved = (int(sym_infer(n, values)) for n in (estimates.ops, estimates.mem))
                kernels.append((name, flops, moved, seconds))

    jit.run_linear = run_one_by_one
    try:
        yield kernels
    finally:
        jit.run_linear = run_linear
