"""A captured graph of the CPU device as one call."""

import ctypes
import time

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit
from tinygrad.engine.realize import graph_cache
from tinygrad.helpers import Context

from tinygrad_impl import cpu
from tinygrad_impl.cpu_graph import ARGUMENTS, FIELDS, PHASE, CPUGraph, Given, caller
from tinygrad_impl.internals import called_after, contents, in_parallel, one_by_one

RANDOM = np.random.default_rng(0)


def graphs() -> int:
    return sum(isinstance(graph, CPUGraph) for graph in graph_cache.values())


def captured(function: "TinyJit[Tensor]", *arrays: np.ndarray) -> np.ndarray:
    """The third call's result: the first runs kernel by kernel, and the second is captured."""
    for array in (arrays[0], arrays[0], *arrays):
        found = contents(function(Tensor(array).realize()))
    return found


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_a_graph_computes_what_its_kernels_do(cores: int) -> None:
    """Each after the one before, of new inputs in every call, in parts that are all computed once."""
    first, second = (RANDOM.standard_normal((300, 300)).astype(np.float32) for _ in range(2))

    def chain(x: Tensor) -> Tensor:
        for _ in range(4):
            x = (cpu.gemm(x, x) / 20).contiguous()
        return x.realize()

    expected = contents(chain(Tensor(second).realize()))
    before, graph = graphs(), TinyJit(chain)
    with Context(NUM_CPU_THREADS=cores):
        np.testing.assert_array_equal(captured(graph, first, second), expected)
    assert graphs() == before + 1


def test_a_kernel_waits_for_what_others_have_begun() -> None:
    """Of two parts one takes longer; whoever has computed the other does not go on to the next kernel."""
    ended = list[str]()
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_long)

    @kernel
    def first(part: int) -> None:
        if part == 0:
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline and "second" not in ended:
                time.sleep(0.01)
        ended.append("first")

    @kernel
    def second(part: int) -> None:
        ended.append("second")

    table, phases = np.zeros((2, FIELDS + ARGUMENTS), np.int64), np.zeros((2, PHASE), np.int64)
    for row, (function, parts) in zip(table, ((first, 2), (second, 1)), strict=True):
        row[:FIELDS] = ctypes.cast(function, ctypes.c_void_p).value or 0, parts, 0
    given = Given(table.ctypes.data, phases.ctypes.data, count=2)
    given.sched_yield = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)
    with Context(NUM_CPU_THREADS=2):
        in_parallel(caller(), ctypes.addressof(given))
    assert ended == ["first", "first", "second"]


def test_a_call_of_the_host_is_between_graphs() -> None:
    seen = list[float]()
    memory = Tensor.zeros(4).contiguous().realize()

    def count(x: Tensor) -> Tensor:
        for _ in range(2):
            memory.assign(memory + x.sum()).realize()
            [after] = called_after([memory], "look", lambda: seen.append(float(contents(memory)[0])))
            after.realize()
        return memory

    captured(TinyJit(count), np.ones(3, np.float32), np.full(3, 2, np.float32))
    assert seen[-2:] == [seen[-3] + 6, seen[-3] + 12]


def test_a_kernel_of_many_arguments_is_by_itself() -> None:
    """More than graph.c has. The others are in a graph."""
    many = [Tensor(np.full(8, i, np.float32)).realize() for i in range(ARGUMENTS + 4)]

    def add(x: Tensor) -> Tensor:
        x = (x * 2).contiguous() + 1
        return sum(many, x).contiguous().realize()

    np.testing.assert_array_equal(captured(TinyJit(add), np.ones(8, np.float32)), np.full(8, 3 + sum(range(20))))


def test_a_graph_can_be_measured_kernel_by_kernel() -> None:
    graph = TinyJit(lambda x: cpu.gemm(cpu.gemm(x, x), x).realize())
    array = RANDOM.standard_normal((4, 4)).astype(np.float32)
    captured(graph, array)
    with one_by_one("CPU") as kernels:
        graph(Tensor(array).realize())
    assert [name for name, *_ in kernels] == ["gemm_NN_4_4_4"] * 2
