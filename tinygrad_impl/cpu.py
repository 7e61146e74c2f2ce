"""What makes tinygrad's CPU device fast: kernels in C, in parts that all cores compute. This one is for GEMMs."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from tinygrad import Tensor, dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.helpers import NUM_CPU_THREADS, ceildiv, round_up
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import ProgramInfo, UOp

from tinygrad_impl.internals import program

TYPES = {dtypes.float32: "float", dtypes.float64: "double"}
OPERATIONS = 1 << 18  # of a part: fewer are done before another thread has begun


def c_source(file: str, words: Mapping[str, str | int]) -> str:
    """A file of C with these words defined, after what such files have in common."""
    given = {key: f"{value}L" if isinstance(value, int) else value for key, value in words.items()}
    defined = "".join(f"#define {key} {value}\n" for key, value in given.items())
    return defined + "".join(Path(__file__).with_name(name).read_text() for name in ("vectors.h", "phases.h", file))


def c_kernel(
    file: str, name: str, words: Mapping[str, str | int], buffers: Sequence[UOp], outs: int, parts: int, operations: int
) -> UOp:
    """What tinygrad has of a kernel once it is written in C and not yet compiled.

    Its function `name` takes the buffers, of which it writes the first `outs`, and which of its `parts` it is to
    compute. `operations` is what all of them compute, for profiles.
    """
    dtype, count = buffers[0].dtype, len(buffers)
    source = c_source(file, {"T": TYPES[dtype], "NAME": name, **words})
    core = UOp.param(count, dtypes.int, (), vmin_vmax=(0, parts - 1), name="core_id", addrspace=AddrSpace.ALU)
    moved = sum(int(b.numel()) for b in buffers) * dtype.itemsize
    places = tuple(range(count))
    info = ProgramInfo(
        name, (parts, 1, 1), (1, 1, 1), vars=(core,), globals=places, outs=places[:outs], ins=places[outs:]
    )
    return program(name, buffers, info, Estimates(operations, moved, moved), source, variables=(core,))


def gemm(a: Tensor, b: Tensor, layout: str = "NN") -> Tensor:
    """a (M, K) @ b (K, N): (M, N), all in float32 or all in float64.

    Where the layout has a T, as BLAS has it, the first (TN) or the second (NT) is given transposed: (K, M) or (N, K).
    """
    return _product(a, b, layout, a.shape[layout[0] == "T"], b.shape[layout[1] == "N"])


def head(x: Tensor, table: Tensor, columns: int) -> Tensor:
    """x (M, K) @ table (N, K).T and then columns of -inf, up to so many: (M, columns), in float32 or float64."""
    return _product(x, table, "NT", x.shape[0], columns)


def _product(a: Tensor, b: Tensor, layout: str, rows: int, columns: int) -> Tensor:
    c = Tensor.invalids(rows, columns, dtype=a.dtype, device=a.device)
    return c.custom_kernel(a, b, fxn=partial(kernel, layout), grad_fxn=_gradient_of(layout))[0]


@cache
def _gradient_of(layout: str) -> Callable[..., Any]:
    """Always the same function: tinygrad plans a graph anew where it finds another one, of whatever content, in it."""
    return partial(_gemm_gradient, layout)


def _gemm_gradient(layout: str, gradient: UOp, call: UOp) -> tuple[None, UOp, UOp]:
    """gradient (M, N) -> those of a and b, as they are given. Columns past b's are left out."""
    dc, a, b = map(Tensor, (gradient, *call.src[2:]))
    if layout == "NN":
        da, db = gemm(dc, b, "NT"), gemm(a, dc, "TN")
    else:
        assert layout == "NT"
        da, db = gemm(dc, b, "NN"), _product(dc, a, "TN", *b.shape)
    return None, da.uop, db.uop


def kernel(layout: str, c: UOp, a: UOp, b: UOp) -> UOp:
    """gemm.c for such c, a and b. Columns of c past b's are filled with -inf; of a those past c's or b's are not read,
    which are rows of what is multiplied where a is given transposed.
    """
    M, N, K = c.shape[0], b.shape[layout[1] == "N"], b.shape[layout[1] == "T"]
    longer, operations = max(M, N), 2 * M * N * K
    parts = max(1, min(NUM_CPU_THREADS.value, operations // OPERATIONS))
    part = round_up(ceildiv(longer, parts), 6 if M > N else 64)  # without half a tile of gemm.c's inside
    parts = ceildiv(longer, part)
    AM, AK = (a.shape[1], 1) if layout[0] == "N" else (1, a.shape[1])
    BK, BN = (N, 1) if layout[1] == "N" else (1, K)
    sizes = {"M": M, "N": N, "K": K, "PART": part, "CM": c.shape[1], "AM": AM, "AK": AK, "BK": BK, "BN": BN}
    return c_kernel("gemm.c", f"gemm_{layout}_{M}_{N}_{K}", sizes, (c, a, b), 1, parts, operations)


def column_sums(x: Tensor) -> Tensor:
    """x (R, M) -> its sum over R: (M,), in float32 or float64."""
    sums = Tensor.invalids(x.shape[1], dtype=x.dtype, device=x.device)
    return sums.custom_kernel(x.contiguous(), fxn=_column_sums)[0]


def _column_sums(sums: UOp, x: UOp) -> UOp:
    R, M = x.shape
    part = round_up(ceildiv(M, max(1, min(NUM_CPU_THREADS.value, R * M // OPERATIONS))), 64)
    sizes = {"R": R, "M": M, "PART": part}
    return c_kernel("sums.c", f"column_sums_{R}_{M}", sizes, (sums, x), 1, ceildiv(M, part), R * M)
