"""Kernels that begin while the ones before them end: those that wait read what was written, and others do not."""

import ctypes
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.device import DepsTracker
from tinygrad.uop.ops import UOp

from tinygrad_impl.internals import contents, overwrite, use_graphs
from tinygrad_impl.kernels.tests.support import DEVICE, THIS_GPU

from tinygrad_impl.kernels import early, graph, launch  # isort: skip: after the support

N = 4096


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    no_gpu = pytest.mark.skipif(DEVICE != "cuda" or not THIS_GPU.starts_early, reason="there is no GPU from Hopper on")
    return pytest.mark.gpu(no_gpu(pytest.mark.usefixtures("device")(test)))


@triton.jit
def slow_kernel(out, a, b, EARLY: tl.constexpr, WAITS: tl.constexpr, TURNS: tl.constexpr, SIZE: tl.constexpr):
    """a + b + 1, which is read at once and written after some ten microseconds."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    early.begin_next(EARLY)
    if WAITS:
        early.wait(EARLY)
    total = tl.load(a + i) + tl.load(b + i) + 1
    turned = total
    for _ in range(TURNS):
        turned = turned * 0.5 + 0.1
    tl.store(out + i, tl.where(turned < 1e9, total, 0.0))


def slow(early: bool, waits: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    constants = {"EARLY": early, "WAITS": waits, "TURNS": 5000, "SIZE": 128}
    kernel = launch.Launch(slow_kernel, (N // 128,), constants)
    return lambda a, b: launch.launch(THIS_GPU, kernel, [Tensor.invalids(N, dtype=dtypes.float32)], a, b)[0]


def results(compute: Callable[[Tensor], Tensor]) -> list[float]:
    """What a graph makes of 10, 20, ..., 100."""
    use_graphs("CUDA", graph.Graph)
    given, found = Tensor.zeros(N).contiguous().realize(), []
    computed = TinyJit(lambda: compute(given).realize())
    for i in range(10):
        overwrite(given, np.full(N, 10.0 * (i + 1), np.float32))
        values = set(contents(computed()).tolist())
        found.append(values.pop() if len(values) == 1 else np.nan)
    return found[2:]  # the first two calls are no graph yet


@on_gpu
@pytest.mark.parametrize("waits", [True, False])
def test_a_chain(waits: bool) -> None:
    zeros, add = Tensor.zeros(N).contiguous().realize(), slow(True, waits)

    def chain(x: Tensor) -> Tensor:
        for _ in range(5):
            x = add(x, zeros)
        return x

    assert (results(chain) == [10.0 * (i + 1) + 5 for i in range(2, 10)]) == waits


@on_gpu
def test_after_two_kernels_none_begins_early() -> None:
    """One that does not wait gets what both wrote."""
    zeros, plain, add = Tensor.zeros(N).contiguous().realize(), slow(False), slow(True, waits=False)
    found = results(lambda x: add(plain(x, zeros), plain(plain(x, zeros), zeros)))
    assert found == [20.0 * (i + 1) + 4 for i in range(2, 10)]


@on_gpu
def test_after_one_and_what_was_before_that() -> None:
    """What is past when the one kernel ends is no second one to come after."""
    zeros, plain, add = Tensor.zeros(N).contiguous().realize(), slow(False), slow(True, waits=False)

    def chain(x: Tensor) -> Tensor:
        first = plain(x, zeros)
        return add(first, plain(first, zeros))

    assert results(chain) != [20.0 * (i + 1) + 3 for i in range(2, 10)]


class Driver:
    """Stands for CUDA's: nodes are numbers, edges pairs of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.edges, self.early, self.instances = set[tuple[int, int]](), set[tuple[int, int]](), 0
        for name in ("cuGraphExecDestroy", "cuGraphDestroy"):
            monkeypatch.setattr(graph.cuda, name, lambda *given: 0)
        monkeypatch.setattr(graph.cuda, "cuGraphInstantiate_v2", self.instantiate)
        monkeypatch.setattr(graph.cuda, "cuGraphRemoveDependencies", self.remove)
        monkeypatch.setattr(graph, "add_dependencies", self.add)
        monkeypatch.setattr(graph.CUDAGraph, "__init__", lambda made, calls, _: self.build(made, calls))

    def runtime(self, kind: str) -> launch.Compiled | None:
        kernel = launch.Launch(None, (1,), {"EARLY": kind == "waits"})
        return None if kind == "copy" else launch.Compiled(kernel, Future(), "", UOp.sink())

    def build(self, made: Any, calls: list[tuple[str, list[int], list[int]]]) -> None:
        """What tinygrad's does with calls: kinds, the buffers that they write and those that they read."""
        buffers = [SimpleNamespace(offset=0, nbytes=4) for _ in range(10)]
        for buffer in buffers:
            buffer.base = buffer
        made.deps, made.nodes, made.graph, made.instance = DepsTracker(), [], graph.cuda.CUgraph(), 0
        made.runtimes = [self.runtime(kind) for kind, _, _ in calls]
        for i, (_, writes, reads) in enumerate(calls):
            before, node = made.new_node([buffers[b] for b in (*writes, *reads)], list(range(len(writes))))
            self.edges |= {(number(n), i) for n in before or ()}
            ctypes.memmove(ctypes.addressof(node), ctypes.byref(ctypes.c_size_t(i + 1)), ctypes.sizeof(node))
            made.nodes.append((node,))
        self.instances += 1

    def instantiate(self, *given: Any) -> int:
        self.instances += 1
        return 0

    def remove(self, made: Any, first: Any, second: Any, count: int) -> int:
        self.edges.remove((number(first[0]), number(second[0])))
        return 0

    def add(self, made: Any, first: Any, second: Any, edge: bytes, count: ctypes.c_size_t) -> int:
        assert (count.value, edge) == (1, graph.EDGE)
        self.early.add((number(first[0]), number(second[0])))
        return 0


def number(node: Any) -> int:
    return (ctypes.cast(node, ctypes.c_void_p).value or 0) - 1


@pytest.mark.parametrize(
    ("calls", "edges", "early"),
    [
        (
            [("plain", [0], [9]), ("waits", [1], [0]), ("waits", [2], [1]), ("plain", [3], [2])],
            {(2, 3)},
            {(0, 1), (1, 2)},
        ),
        # what the one before comes after itself is no second
        (
            [("plain", [0], [9]), ("plain", [1], [0]), ("waits", [2], [0, 1]), ("waits", [0], [9])],
            {(0, 1)},
            {(1, 2), (2, 3)},
        ),
        # nor is what came before that
        (
            [("plain", [0], [9]), ("plain", [1], [0]), ("plain", [2], [1]), ("waits", [3], [0, 2])],
            {(0, 1), (1, 2)},
            {(2, 3)},
        ),
        # two that do not come after one another
        ([("plain", [0], [9]), ("plain", [1], [9]), ("waits", [2], [0, 1])], {(0, 2), (1, 2)}, set()),
        # the first, and one after a copy
        ([("waits", [0], [9]), ("copy", [1], [0]), ("waits", [2], [1])], {(0, 1), (1, 2)}, set()),
    ],
)
def test_edges(
    calls: Any, edges: set[tuple[int, int]], early: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(monkeypatch)
    graph.Graph(calls, ())
    assert (driver.edges, driver.early) == (edges, early)
    assert driver.instances == (2 if early else 1)  # the first had other edges
