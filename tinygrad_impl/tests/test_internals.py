"""What internals.py relies on in tinygrad 0.14.0. A test that fails says what another version of tinygrad breaks."""

import ctypes
import importlib.metadata
import os
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_uint64
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tinygrad.device
from tinygrad import Device, Tensor, TinyJit, dtypes, helpers
from tinygrad.engine import jit, worker
from tinygrad.engine.realize import run_linear, runtime_cache
from tinygrad.helpers import Context, GlobalCounters
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import ProgramInfo, UOp

import tinygrad_impl
from data.cli import InputError
from tinygrad_impl import compilers, internals
from tinygrad_impl.compilers import KernelCache, begin_compiler, in_a_compiler, start_compilers
from tinygrad_impl.internals import (
    CUDAMemory,
    HighWater,
    ParallelProgram,
    captured_at_once,
    compiled_kernels,
    contents,
    free_memory,
    give_runtime,
    memory_of,
    on_host,
    one_by_one,
    overwrite,
    program,
    share_context,
)

pytestmark = pytest.mark.tuned


def test_the_version() -> None:
    assert importlib.metadata.version("tinygrad") == "0.14.0", "read internals.py again: it is for tinygrad 0.14.0"


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_memory_is_overwritten_in_place(dtype: type) -> None:
    """Of a tensor that a captured graph reads: the graph sees it, without a kernel that copies."""
    values: np.ndarray = np.arange(12).reshape(3, 4).astype(dtype)
    tensor = Tensor(np.zeros((3, 4), dtype)).realize()
    doubled = TinyJit(lambda: (tensor * 2).realize())
    for _ in range(3):
        doubled()
    GlobalCounters.reset()
    overwrite(tensor, values)
    assert GlobalCounters.kernel_count == 0
    np.testing.assert_array_equal(contents(doubled()), 2 * values, err_msg="graphs no longer see what is overwritten")
    np.testing.assert_array_equal(contents(tensor.reshape(2, 6)), values.reshape(2, 6))
    kept = contents(tensor)
    overwrite(tensor, values[::-1])
    np.testing.assert_array_equal(kept, values, err_msg="contents no longer gives a copy")
    for wrong in (values[:2], values.astype(np.int8)):
        with pytest.raises(AssertionError):
            overwrite(tensor, wrong)
    assert memory_of(tensor).shape == (3, 4)
    memory_of(tensor)[0] = 7
    np.testing.assert_array_equal(contents(tensor)[0], 7, err_msg="memory_of no longer gives the memory itself")


def test_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is copied there, without the host; it may not have gaps. The host can have a copy."""
    told: list[object] = []

    def copy_out(to: int, address: int, size: int) -> int:
        ctypes.memset(to, 1, size)
        told.append(("out", address, size))
        return 0

    def copy_on(to: object, address: int, size: int, stream: object) -> int:
        told.append(("on", address, size, stream))
        return 0

    driver = SimpleNamespace(cuMemcpyDtoDAsync_v2=copy_on, cuMemcpyDtoH_v2=copy_out)
    monkeypatch.setattr(internals, "driver", lambda: driver)
    tensor, there = Tensor.zeros(2, 3).contiguous().realize(), CUDAMemory(4096, (2, 3), "<i4")
    with pytest.raises(AssertionError):
        overwrite(tensor, there)
    there = CUDAMemory(4096, (2, 3), "<f4")
    overwrite(tensor, there)
    np.testing.assert_array_equal(on_host(there).view(np.int32), np.full((2, 3), 0x01010101))
    assert told == [("on", 4096, 24, None), ("out", 4096, 24)]
    there.__cuda_array_interface__["strides"] = (4, 8)
    for use in (lambda: overwrite(tensor, there), lambda: on_host(there)):
        with pytest.raises(AssertionError, match="contiguous"):
            use()
    assert on_host(array := np.ones(3)) is array


def test_the_first_call_is_captured() -> None:
    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return (x + 1).realize()

    graph = captured_at_once(function)
    found = [contents(graph(Tensor(np.full(3, i, np.float32)).realize())).tolist() for i in range(3)]
    assert found == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert len(calls) == 1, "TinyJit counts its calls otherwise: the first one is not captured"


def test_a_program_of_our_own_runs_in_a_graph() -> None:
    """As a node of it, with what it writes told from what it reads; another runtime may stand in for its binary."""
    called: list[list[int]] = []

    def kernel(out: UOp, x: UOp) -> UOp:
        info = ProgramInfo("ours", (1, 1, 1), (1, 1, 1), globals=(0, 1), outs=(0,), ins=(1,))
        made = program("ours", (out, x), info, Estimates(5, 6, 7), "source", binary=b"")
        give_runtime(made, "CPU", lambda *buffers, **_: called.append([b.size for b in buffers]))
        assert runtime_cache[made.key, "CPU"], "runtimes are no longer found by a program's key and device"
        return made

    def compute(x: Tensor) -> Tensor:
        return Tensor.invalids(2, dtype=dtypes.float32).custom_kernel(x, fxn=kernel)[0].realize()

    graph = captured_at_once(compute)
    for _ in range(3):
        graph(Tensor(np.zeros(5, np.float32)).realize())
    assert called == [[8, 20]] * 3, "a program with a runtime of ours is not called as a node of a graph"


def test_parts_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two waits until both are there, and is given its number."""
    both, found = threading.Barrier(2), []

    def compiled(*arguments: c_uint64) -> None:
        both.wait(timeout=10)
        found.append([a.value for a in arguments])

    clock = iter((2.0, 5.5))
    monkeypatch.setattr("tinygrad_impl.internals.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("tinygrad_impl.internals.threads", ThreadPoolExecutor(2))  # on one core too
    program = object.__new__(ParallelProgram)
    program.runtimevars, program.fxn = {"core_id": 1}, compiled
    assert program(SimpleNamespace(va_addr=7), global_size=(2, 1, 1), vals=(None, 5)) == 3.5
    assert sorted(found) == [[7, 0, 5], [7, 1, 5]]


def test_device_runs_such_programs() -> None:
    assert Device["CPU"].runtime_t is ParallelProgram, "the CPU device makes its programs otherwise: one core computes"


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
from tinygrad_impl.compilers import shield_compilers
shield_compilers()
from tinygrad.engine.worker import get_worker_pool
pool = get_worker_pool()
pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, [signal.SIGTERM]))
pool.apply_async(time.sleep, (600,))
time.sleep(1)  # until it has begun
"""
    root = Path(tinygrad_impl.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PARALLEL": "1"}, check=True, timeout=60)


def test_compilers_are_given_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are any. They are started before they are needed, and no more of them than asked for."""
    pools: list[ThreadPool | None] = []
    monkeypatch.setattr(worker, "get_worker_pool", lambda: pools[-1])
    with ThreadPool(1) as pool, Context(PARALLEL=7):
        pools.append(pool)
        assert in_a_compiler(threading.get_ident) != threading.get_ident()
        assert in_a_compiler(pow, 2, 3) == 8
        monkeypatch.setattr(compilers, "PATIENCE", 0.01)
        with pytest.raises(InputError, match="not compiled within 0 s"):
            in_a_compiler(time.sleep, 1)
        pools.append(None)
        assert in_a_compiler(threading.get_ident) == threading.get_ident()
        start_compilers(9)
        assert helpers.PARALLEL.value == 7
        start_compilers(3)
        assert helpers.PARALLEL.value == 3


def test_a_compiler_says_nothing_once_the_process_that_started_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here that is gone already. What it has to say would be tracebacks."""
    gone, silent = SimpleNamespace(join=lambda: None), threading.Event()
    with monkeypatch.context() as patch:  # not any longer: pytest needs os.dup2 too
        patch.setattr("tinygrad_impl.compilers.multiprocessing.parent_process", lambda: gone)
        patch.setattr(os, "dup2", lambda nowhere, number: silent.set() if number == 2 else None)
        patch.setattr("tinygrad_impl.compilers.signal.signal", lambda number, handler: None)
        patch.setattr(KernelCache, "install", lambda cache: None)
        begin_compiler(begin=lambda: None)
        assert silent.wait(5)


def test_a_compiler_begins_though_triton_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it ended, tinygrad's pool would start another in its place, without end."""
    asked = []

    def broken(module: str) -> None:
        asked.append(module)
        raise ImportError(module)

    with monkeypatch.context() as patch:
        patch.setenv("DEV", "CUDA")
        patch.setattr("tinygrad_impl.compilers.importlib.util.find_spec", lambda name: object())
        patch.setattr("tinygrad_impl.compilers.threading.Thread", lambda **settings: SimpleNamespace(start=int))
        patch.setattr("tinygrad_impl.compilers.signal.signal", lambda number, handler: None)
        patch.setattr(KernelCache, "install", lambda cache: None)
        patch.setattr("tinygrad_impl.compilers.importlib.import_module", broken)  # last: the others need it
        begin_compiler(begin=lambda: None)
    assert asked == ["tinygrad_impl.kernels.fused"]


def test_memory_is_the_most_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its device; what was there before counts, what went away in between does too."""
    monkeypatch.setattr(GlobalCounters, "mem_used_per_device", {"CPU": 5, "NULL": 900})
    memory = HighWater()
    assert memory.highest["CPU"] == 5
    for count in (30, 20, 25):
        memory["CPU"] = count
    memory["NEW"] += 4
    assert (memory["CPU"], memory.highest) == (25, {"CPU": 30, "NULL": 900, "NEW": 4})
    assert free_memory("CPU") == 0


def test_compiled_kernels_are_counted() -> None:
    before = compiled_kernels()
    Tensor.full((before % 83 + 3, 5), 3.0).contiguous().mul(before).exp2().realize()  # a kernel that is new
    assert compiled_kernels() > before, "tinygrad's cache of compiled kernels has other tables"


@pytest.mark.parametrize("fault", ["no folder", "a full disk", "no database", "a truncated database", "damaged values"])
def test_an_unusable_cache_of_kernels(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tinygrad goes on without it, and says so once."""
    path = tmp_path / "cache.db"
    with sqlite3.connect(path) as database:
        database.execute(f"CREATE TABLE compile_{helpers.VERSION} (key text PRIMARY KEY, val blob)")
        rows = [(f"key {i}", b"no pickle" * 100) for i in range(100)]
        database.executemany(f"INSERT INTO compile_{helpers.VERSION} VALUES (?, ?)", rows)
    database.close()
    if fault == "no database":
        path.write_bytes(b"these are no bytes of a database" * 100)
    elif fault == "a truncated database":
        path.write_bytes(path.read_bytes()[:9000])
    places = {"no folder": "/dev/null/cache.db", "a full disk": "/dev/full"}
    monkeypatch.setattr(helpers, "CACHEDB", place := places.get(fault, str(path)))
    monkeypatch.setattr(helpers, "_db_connection", None)
    monkeypatch.setattr(helpers, "_db_tables", set())
    cache = KernelCache()
    for key in ("key 7", "key 8"):
        assert cache.get("compile", key) is None
        assert cache.put("compile", key, b"kernel") == b"kernel"
    note = capsys.readouterr().err
    assert note.startswith(f"note: {place}, tinygrad's cache of kernels, cannot be used (")
    assert note.count("\n") == 1
    silent = KernelCache(warn=False)
    silent.put("compile", "key 9", b"kernel")
    assert silent.get("compile", "key 7") is None
    assert capsys.readouterr().err == ""


def test_a_cache_of_kernels_that_cannot_be_written_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(helpers, "CACHEDB", str(tmp_path / "cache.db"))
    monkeypatch.setattr(helpers, "_db_connection", None)
    monkeypatch.setattr(helpers, "_db_tables", set())
    cache = KernelCache()
    cache.put("compile", "one", b"kernel")
    helpers.db_connection().execute("PRAGMA query_only = 1")
    assert cache.put("compile", "two", b"kernel") == b"kernel"
    assert (cache.get("compile", "one"), cache.get("compile", "two")) == (b"kernel", None)
    assert "readonly database" in capsys.readouterr().err


def test_compilers_use_the_cache_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("diskcache_get", "diskcache_put"):
        monkeypatch.setattr(tinygrad.device, name, None)
    cache = KernelCache()
    asked: list[str] = []
    monkeypatch.setattr(cache, "get", lambda table, key: asked.append(key))
    monkeypatch.setattr(cache, "put", lambda table, key, value: asked.append(key))
    cache.install()
    assert tinygrad.device.Compiler("test").compile_cached("source") == b"source"
    assert asked == ["source", "source"], "tinygrad's compilers keep what they compiled elsewhere"


def test_graphs_kernel_by_kernel() -> None:
    """Of a batch of kernels, which all devices here have; NULL computes nothing."""
    double = TinyJit(lambda x: (x.contiguous() @ x.transpose().contiguous()).sum().realize())
    for device in ("CPU", "NULL"):
        double.reset()
        for _ in range(3):
            plain = double(x := Tensor.full((8, 8), 2.0, device=device).contiguous().realize())
        expected = plain.numpy().copy() if device == "CPU" else None
        with one_by_one(device) as kernels:
            result = double(x)
        assert jit.run_linear is run_linear
        assert double.captured
        assert any(call.src[0].arg == "graph" for call in double.captured.linear.src)
        assert len(kernels) >= 2
        assert all(flops >= 0 and moved > 0 and seconds > 0 for _, flops, moved, seconds in kernels)
        assert sum(flops for _, flops, _, _ in kernels) >= 2 * 8**3
        if expected is not None:
            np.testing.assert_array_equal(result.numpy(), expected)
