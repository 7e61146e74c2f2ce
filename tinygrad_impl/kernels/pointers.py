"""The GEMM of GPUs without Hopper's copy engine and its products of four warps: each thread copies by addresses of its
own (cp.async), and each warp multiplies by itself (mma.sync).

A program computes one tile. A multiprocessor has room for several, so that one multiplies while another is in its
epilogue; tensor descriptors would be addresses here too, but worked out anew in each step.
"""

import triton
import triton.language as tl

from tinygrad_impl.kernels.epilogue import described, finish, place


@triton.jit
def load(at, inside, RAGGED: tl.constexpr):
    """What is there; if RAGGED, 0 for what is not inside of the matrix."""
    return tl.load(at, mask=inside, other=0.0) if RAGGED else tl.load(at)


@triton.jit
def matmul_pointers_kernel(
    outs,
    ins,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    A_FIRST: tl.constexpr,
    B_FIRST: tl.constexpr,
    OUT_FIRST: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    """The parameters are those of `matmul_kernel`."""
    a, b, out = ins[0] + A_FIRST, ins[1] + B_FIRST, outs[0] + OUT_FIRST
    tiles: tl.constexpr = ((M + BM - 1) // BM) * ((N + BN - 1) // BN)
    steps: tl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS)
    tl.static_assert(SPLITS == 1 or M % BM == 0, "what is past one part's last row would be in the next part")
    m, n = place(tl.program_id(0) % tiles, M, N, BM, BN, GROUP)
    part = tl.program_id(0) // tiles

    row: tl.constexpr = 1 if A_TRANSPOSED else K  # elements from one row of a to the next
    a_step: tl.constexpr = M if A_TRANSPOSED else 1  # and in the direction of the sum
    column: tl.constexpr = K if B_TRANSPOSED else 1
    b_step: tl.constexpr = 1 if B_TRANSPOSED else N
    DEEP_RAGGED: tl.constexpr = K % (BK * SPLITS) != 0
    first = part * steps * BK
    k = tl.arange(0, BK)
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    a_at = a + (m.to(tl.int64) * row + first.to(tl.int64) * a_step) + (rows[:, None] * row + k[None, :] * a_step)
    b_at = (
        b + (n.to(tl.int64) * column + first.to(tl.int64) * b_step) + (k[:, None] * b_step + columns[None, :] * column)
    )
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(steps):
        deep = first + step * BK + k < K
        a_tile = load(a_at, (m + rows < M)[:, None] & deep[None, :], DEEP_RAGGED or M % BM != 0)
        b_tile = load(b_at, deep[:, None] & (n + columns < N)[None, :], DEEP_RAGGED or N % BN != 0)
        total = tl.dot(a_tile, b_tile, total)
        a_at += BK * a_step
        b_at += BK * b_step

    out_tiles, y_tiles, x_tiles = described(outs, ins, out, M, N, OUT_ROWS, EPILOGUE, BM, BN // SLICES)
    finish(total, outs, ins, out_tiles, y_tiles, x_tiles, part, m, n, M, N, EPILOGUE, BM, BN, SLICES)
