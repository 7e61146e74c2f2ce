"""Captured graphs of tinygrad's CPU device: one call of a function in C (graph.c) for all kernels, on every thread.

tinygrad would call them from Python one by one, which takes longer than most kernels of a small model.
"""

import ctypes
from typing import Any

import numpy as np
from tinygrad.engine.jit import GraphRunner
from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.uop.ops import Ops, UOp

from tinygrad_impl.cpu import c_source
from tinygrad_impl.internals import c_function, in_parallel, runtime_of

ARGUMENTS = 16  # of a kernel, at most
FIELDS = 3  # of graph.c's struct `call`, before the arguments
PHASE = 16  # integers of a phase


class Given(ctypes.Structure):
    """What graph.c is given."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("calls", "phases", "sched_yield")] + [("count", ctypes.c_long)]


def caller() -> CPUProgram:
    """graph.c, which takes the address of a `Given`."""
    return c_function("graph", c_source("graph.c", {"T": "float", "NAME": "graph", "ARGUMENTS": ARGUMENTS}))


class CPUGraph(GraphRunner):
    """Kernels with up to 16 arguments, which are buffers and which part of the kernel it is."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        self.table = np.zeros((len(self.calls), FIELDS + ARGUMENTS), np.int64)
        self.inputs = list[tuple[int, int, int]]()  # rows, columns, and which input's address comes there
        for i, ((_, kernel, buffers, _), runtime) in enumerate(zip(self.calls, self.runtimes, strict=True)):
            info, of_inputs = kernel.arg, dict(self.uop_replace[i])
            self.table[i, :FIELDS] = runtime.addr, info.global_size[0], runtime.runtimevars.get("core_id", -1)
            for column, place in enumerate(info.globals, FIELDS):
                self.table[i, column] = buffers[place].get_buf(buffers[place].device).va_addr
                if place in of_inputs:
                    self.inputs.append((i, column, of_inputs[place]))
        self.phases = np.zeros((len(self.calls), PHASE), np.int64)
        self.given = Given(self.table.ctypes.data, self.phases.ctypes.data, count=len(self.calls))
        self.given.sched_yield = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)
        self.function = caller()

    @staticmethod
    def supports_uop(batch_devs: list[Any], new_call: UOp) -> bool:
        if not GraphRunner.supports_uop(batch_devs, new_call):
            return False
        if not isinstance(runtime_of(new_call), CPUProgram | None):  # but a function of Python's
            return False
        info = new_call.src[0].arg
        constant = all(isinstance(size, int) for size in info.global_size)
        few = len(info.globals) + len(info.vars) <= ARGUMENTS
        return constant and few and all(v.expr == "core_id" for v in info.vars) and new_call.op is Ops.CALL

    def __call__(self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False) -> None:
        for row, column, slot in self.inputs:
            buffer = input_uops[slot].buffer.ensure_allocated()
            self.table[row, column] = buffer.get_buf(buffer.device).va_addr
        self.phases[:] = 0
        in_parallel(self.function, ctypes.addressof(self.given))
