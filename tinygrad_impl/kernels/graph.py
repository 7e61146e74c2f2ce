"""tinygrad's CUDA graphs, with kernels that begin while the ones before them end (programmatic dependent launch).

Otherwise a microsecond passes from a kernel's end to the next one's first instruction, and about another until it has
what it reads. From Hopper on, a kernel may be started before: it reads what does not depend on other kernels, and then
waits, by an instruction of its own. See "Programmatic Dependent Launch" in NVIDIA's CUDA C++ programming guide.
"""

import ctypes
from functools import reduce
from operator import or_
from typing import Any

from tinygrad.runtime.autogen import cuda
from tinygrad.runtime.graph.cuda import CUDAGraph
from tinygrad.runtime.ops_cuda import check
from tinygrad.runtime.support.c import init_c_var
from tinygrad.uop.ops import UOp

from tinygrad_impl.internals import HostCall
from tinygrad_impl.kernels.launch import Compiled

# CUgraphEdgeData: from_port CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, to_port, type CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
EDGE = bytes([1, 0, 1, 0, 0, 0, 0, 0])
add_dependencies: Any = getattr(cuda.dll, "cuGraphAddDependencies_v2", None)  # drivers have it from CUDA 12.3 on


class Graph(CUDAGraph):
    """A graph that starts a kernel early if the kernel waits by itself (`Launch.waits`) and depends on one kernel only.

    A node counts as a dependency only if no other dependency already waits for it.
    """

    instance: Any  # what is launched

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        self.numbers: dict[int, int] = {}  # a node's number, by the identity of tinygrad's object
        self.before: list[set[int]] = []  # for each node, the nodes that it depends on directly
        self.ended: list[int] = []  # and all nodes that have ended when it begins, as the bits of a number
        super().__init__(linear, input_uops)
        waits = [isinstance(runtime, Compiled) and runtime.kernel.waits for runtime in self.runtimes]
        pairs = [(*before, i) for i, before in enumerate(self.before) if waits[i] and len(before) == 1]
        early = [pair for pair in pairs if add_dependencies and self.runtimes[pair[0]]]  # not after a copy
        for pair in early:
            first, second = ((cuda.CUgraphNode * 1)(self.nodes[i][0]) for i in pair)
            check(cuda.cuGraphRemoveDependencies(self.graph, first, second, 1))
            check(add_dependencies(self.graph, first, second, EDGE, ctypes.c_size_t(1)))
        if early:  # it was made with the edges as they were
            check(cuda.cuGraphExecDestroy(self.instance))
            make = cuda.cuGraphInstantiate_v2
            self.instance = init_c_var(
                cuda.CUgraphExec, lambda x: check(make(ctypes.byref(x), self.graph, None, None, 0))
            )

    @staticmethod
    def supports_uop(batch_devs: list[Any], new_call: UOp) -> bool:
        return CUDAGraph.supports_uop(batch_devs, new_call) and not HostCall.is_in(new_call)

    def new_node(self, bufs: list[Any], write: list[int]) -> tuple[Any, Any]:
        node = cuda.CUgraphNode()
        found = {self.numbers[id(n)]: n for n in self._access_resources(bufs, write, new_dependency=node)}
        ended = reduce(or_, (self.ended[i] for i in found), 0)
        before = {i for i in found if not ended >> i & 1}
        self.numbers[id(node)] = len(self.before)
        self.before.append(before)
        self.ended.append(reduce(or_, (1 << i for i in before), ended))
        nodes = [found[i] for i in before]
        return (cuda.CUgraphNode * len(nodes))(*nodes) if nodes else None, node
