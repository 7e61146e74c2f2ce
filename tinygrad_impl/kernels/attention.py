"""Causal self-attention that reads q, k and v where c_attn left them, and its gradient (Dao 2023, FlashAttention-2).

A row of qkv (B, T, 3 * H * D) holds the q of all heads, then their k, then their v; one of y (B, T, H * D) the heads'
outputs side by side. The T x T scores exist only as tiles: S = q @ k.T, P = softmax(S / sqrt(D)), y = P @ v. Of the
forward pass lse (B, H, T) is kept, the logarithm of the sum of a row's exponentials: to base 2, of S * log2(e) /
sqrt(D), so that a single exp2 gives P from S again. Then, with dP = dy @ v.T,

    delta = rowsum(dy * y),  dS = P * (dP - delta),  dq = dS @ k / sqrt(D),  dk = dS.T @ q / sqrt(D),  dv = P.T @ dy

The backward pass computes S and dP twice, in a kernel that sums over keys and in one that sums over queries: so each
sum is one program's, the same in every run. P and dS are rounded to bfloat16 for their products. On Hopper, one kernel
computes them once (hopper_attention_gradient.py).
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from tinygrad_impl.kernels import GPU
from tinygrad_impl.kernels.launch import Launch

LOG2E = tl.constexpr(math.log2(math.e))
TILE = 64  # queries and keys: the unit of tiles


@triton.jit
def place(HEADS: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """This program's head and block. In their order programs take a group of heads after another, and in a group the
    first block of each head before the second.
    """
    program = tl.program_id(0)
    group = program // (GROUP * BLOCKS)
    heads = min(GROUP, HEADS - group * GROUP)  # fewer in the last
    index = program - group * GROUP * BLOCKS
    return group * GROUP + index % heads, index // heads


@triton.jit
def load(x, first, T: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Loads ROWS rows of x, beginning with `first`: (ROWS, D). If MASKED, rows past the last are 0."""
    rows = first + tl.arange(0, ROWS)
    at = x + rows[:, None] * STRIDE + tl.arange(0, D)[None, :]
    return tl.load(at, mask=rows[:, None] < T, other=0.0) if MASKED else tl.load(at)


@triton.jit
def load_row(x, first, T: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Loads SIZE values of x, beginning with `first`. If MASKED, values past the last are 0."""
    at = first + tl.arange(0, SIZE)
    return tl.load(x + at, mask=at < T, other=0.0) if MASKED else tl.load(x + at)


@triton.jit
def store(x, first, value, T: tl.constexpr, STRIDE: tl.constexpr):
    """Stores value (ROWS, D) as rows of x from `first` on, rounded to bfloat16. Rows past the last are left out."""
    rows = first + tl.arange(0, value.shape[0])
    at = x + rows[:, None] * STRIDE + tl.arange(0, value.shape[1])[None, :]
    tl.store(at, value.to(tl.bfloat16), mask=rows[:, None] < T)


@triton.jit
def attention_forward(
    y, lse, qkv,
    B: tl.constexpr, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Computes y and lse from qkv. A program computes QUERIES queries of one head."""
    C: tl.constexpr = H * D
    BLOCKS: tl.constexpr = (T + QUERIES - 1) // QUERIES
    RAGGED: tl.constexpr = T % QUERIES != 0 or T % KEYS != 0  # tiles may reach past the last row
    head, block = place(B * H, BLOCKS, GROUP)
    query = (BLOCKS - 1 - block) * QUERIES  # the longest sums start first
    batch, column = (head // H).to(tl.int64), head % H * D
    q_of = qkv + batch * (T * 3 * C) + column
    rows = query + tl.arange(0, QUERIES)
    scale: tl.constexpr = LOG2E / D**0.5

    q = load(q_of, query, T, 3 * C, QUERIES, D, RAGGED)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)  # the highest score so far
    total = tl.zeros((QUERIES,), tl.float32)  # sum of exp2(score - top)
    acc = tl.zeros((QUERIES, D), tl.float32)  # and of that times v
    whole = query // KEYS * KEYS  # every query sees every key before this one
    for DIAGONAL in tl.static_range(2):
        for key in range(whole if DIAGONAL else 0, query + QUERIES if DIAGONAL else whole, KEYS):
            k = load(q_of + C, key, T, 3 * C, KEYS, D, RAGGED and DIAGONAL)
            v = load(q_of + 2 * C, key, T, 3 * C, KEYS, D, RAGGED and DIAGONAL)
            s = tl.dot(q, k.T)  # (QUERIES, KEYS)
            if DIAGONAL:
                s = tl.where(rows[:, None] >= key + tl.arange(0, KEYS)[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - higher[:, None])
            shrink = tl.exp2(top - higher)
            top = higher
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(tl.bfloat16), v, acc * shrink[:, None])
    store(y + batch * (T * C) + column, query, acc / total[:, None], T, C)
    tl.store(lse + head * T + rows, top + tl.log2(total), mask=rows < T)


@triton.jit
def attention_query_gradient(
    dqkv, sums, delta, dy, qkv, y, lse,
    B: tl.constexpr, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """delta (B, H, T), and the columns of dqkv, and of its sums over QUERIES rows, that are q's. A program has QUERIES
    queries of a head.
    """
    C: tl.constexpr = H * D
    BLOCKS: tl.constexpr = (T + QUERIES - 1) // QUERIES
    RAGGED: tl.constexpr = T % QUERIES != 0 or T % KEYS != 0
    head, block = place(B * H, BLOCKS, GROUP)
    query = (BLOCKS - 1 - block) * QUERIES  # the longest sums start first
    batch, column = (head // H).to(tl.int64), head % H * D
    q_of = qkv + batch * (T * 3 * C) + column
    y_at = batch * (T * C) + column
    rows = query + tl.arange(0, QUERIES)
    scale: tl.constexpr = LOG2E / D**0.5

    dy_tile = load(dy + y_at, query, T, C, QUERIES, D, RAGGED)
    y_tile = load(y + y_at, query, T, C, QUERIES, D, RAGGED)
    delta_row = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(delta + head * T + rows, delta_row, mask=rows < T)
    lse_row = tl.load(lse + head * T + rows, mask=rows < T, other=0.0)
    q = load(q_of, query, T, 3 * C, QUERIES, D, RAGGED)
    dq = tl.zeros((QUERIES, D), tl.float32)
    whole = query // KEYS * KEYS
    for DIAGONAL in tl.static_range(2):
        for key in range(whole if DIAGONAL else 0, query + QUERIES if DIAGONAL else whole, KEYS):
            k = load(q_of + C, key, T, 3 * C, KEYS, D, RAGGED and DIAGONAL)
            v = load(q_of + 2 * C, key, T, 3 * C, KEYS, D, RAGGED and DIAGONAL)
            p = tl.exp2(tl.dot(q, k.T) * scale - lse_row[:, None])  # (QUERIES, KEYS)
            if DIAGONAL:
                p = tl.where(rows[:, None] >= key + tl.arange(0, KEYS)[None, :], p, 0.0)
            ds = p * (tl.dot(dy_tile, v.T) - delta_row[:, None])
            dq = tl.dot(ds.to(tl.bfloat16), k, dq)
    dq /= D**0.5
    store(dqkv + batch * (T * 3 * C) + column, query, dq, T, 3 * C)
    tl.store(sums + (batch * BLOCKS + BLOCKS - 1 - block) * (3 * C) + column + tl.arange(0, D), tl.sum(dq, 0))


@triton.jit
def attention_key_gradient(
    dqkv, sums, dy, qkv, lse, delta,
    B: tl.constexpr, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The columns of dqkv, and of its sums over KEYS rows, that are k's and v's. A program has KEYS keys of a head."""
    C: tl.constexpr = H * D
    BLOCKS: tl.constexpr = (T + KEYS - 1) // KEYS
    RAGGED: tl.constexpr = T % QUERIES != 0 or T % KEYS != 0
    head, block = place(B * H, BLOCKS, GROUP)
    key = block * KEYS  # the longest sums start first
    batch, column = (head // H).to(tl.int64), head % H * D
    q_at = batch * (T * 3 * C) + column
    y_at = batch * (T * C) + column
    scale: tl.constexpr = LOG2E / D**0.5

    k = load(qkv + q_at + C, key, T, 3 * C, KEYS, D, RAGGED)
    v = load(qkv + q_at + 2 * C, key, T, 3 * C, KEYS, D, RAGGED)
    dk = tl.zeros((KEYS, D), tl.float32)
    dv = tl.zeros((KEYS, D), tl.float32)
    whole = min((key + KEYS + QUERIES - 1) // QUERIES * QUERIES, T)  # from here on every query sees every key
    for DIAGONAL in tl.static_range(1, -1, -1):
        for query in range(key // QUERIES * QUERIES if DIAGONAL else whole, whole if DIAGONAL else T, QUERIES):
            q = load(qkv + q_at, query, T, 3 * C, QUERIES, D, RAGGED)
            dy_tile = load(dy + y_at, query, T, C, QUERIES, D, RAGGED)
            rows = query + tl.arange(0, QUERIES)
            lse_row = load_row(lse + head * T, query, T, QUERIES, RAGGED)
            delta_row = load_row(delta + head * T, query, T, QUERIES, RAGGED)
            p = tl.exp2(tl.dot(k, q.T) * scale - lse_row[None, :])  # (KEYS, QUERIES)
            if DIAGONAL:
                p = tl.where(rows[None, :] >= key + tl.arange(0, KEYS)[:, None], p, 0.0)
            dv = tl.dot(p.to(tl.bfloat16), dy_tile, dv)
            ds = p * (tl.dot(v, dy_tile.T) - delta_row[None, :])
            dk = tl.dot(ds.to(tl.bfloat16), q, dk)
    dk /= D**0.5
    store(dqkv + q_at + C, key, dk, T, 3 * C)
    store(dqkv + q_at + 2 * C, key, dv, T, 3 * C)
    sums += (batch * BLOCKS + block) * (3 * C) + column + tl.arange(0, D)
    tl.store(sums + C, tl.sum(dk, 0))
    tl.store(sums + 2 * C, tl.sum(dv, 0))


class Tiles(NamedTuple):
    """Of a kernel: queries and keys of a tile, in units of TILE; warps and stages; and how many heads are computed at a
    time, whose k and v should fit in the L2 cache.
    """

    queries: float
    keys: float
    warps: int
    stages: int
    group: int


HOPPER = {
    attention_forward: Tiles(1, 1, 4, 3, 48),
    attention_query_gradient: Tiles(1, 1, 4, 2, 24),
    attention_key_gradient: Tiles(2, 1, 4, 2, 48),
}
AMPERE = {  # 32 rows for a warp where Hopper has 64 for all four
    attention_forward: Tiles(2, 1, 4, 3, 48),
    attention_query_gradient: Tiles(2, 0.5, 4, 3, 24),
    attention_key_gradient: Tiles(0.5, 2, 4, 2, 48),
}
TILES = {"sm_80": AMPERE, "sm_86": AMPERE, "sm_90": HOPPER, "sm_120": HOPPER}  # by the GPU's family


def launch_of(gpu: GPU, kernel: Any, B: int, T: int, H: int, D: int) -> Launch:
    """FLOPs are those of the products that a causal mask leaves."""
    tiles = TILES[gpu.family][kernel]
    most = max(16, triton.next_power_of_2(T))
    queries, keys = (min(max(16, int(size * TILE)), most) for size in (tiles.queries, tiles.keys))
    products = {attention_forward: 2, attention_query_gradient: 3, attention_key_gradient: 4}[kernel]
    moved = {attention_forward: 4, attention_query_gradient: 6, attention_key_gradient: 6}[kernel]
    blocks = triton.cdiv(T, keys if kernel is attention_key_gradient else queries)
    constants = {"B": B, "T": T, "H": H, "D": D, "QUERIES": queries, "KEYS": keys, "GROUP": min(tiles.group, B * H)}
    return Launch(
        kernel,
        (B * H * blocks,),
        constants,
        tiles.warps,
        tiles.stages,
        flops=products * B * H * T * T * D,
        bytes=2 * moved * B * T * H * D,
    )


def fits_hopper(gpu: GPU, T: int, D: int) -> bool:
    """Whether the kernels of hopper_attention.py and hopper_attention_gradient.py take this."""
    return gpu.pairs_warpgroups and D == 64 and T % 128 == 0


def forward(gpu: GPU, B: int, T: int, H: int, D: int) -> Launch:
    """Writes y (B, T, H * D) bfloat16 and lse (B, H, T) float32, and where it `fits_hopper` for the gradient there a 0
    for each program, int32; reads qkv (B, T, 3 * H * D) bfloat16.
    """
    if fits_hopper(gpu, T, D):
        return hopper_forward(gpu, B, T, H)
    return launch_of(gpu, attention_forward, B, T, H, D)


def hopper_forward(gpu: GPU, B: int, T: int, H: int) -> Launch:
    from tinygrad_impl.kernels import hopper_attention  # here, because Triton's interpreter does not know Gluon

    programs = min(gpu.multiprocessors, B * H * T // 128)
    return Launch(
        hopper_attention.hopper_attention_forward,
        (programs,),
        {"B": B, "T": T, "H": H, "STAGES": 2, "PROGRAMS": programs},
        workers=hopper_attention.WORKERS,
        flops=2 * B * H * T * T * 64,
        bytes=2 * 4 * B * T * H * 64,
        descriptors=3,
    )


def hopper_gradient(gpu: GPU, B: int, T: int, H: int) -> Launch:
    """In the place of `query_gradient` and `key_gradient`, where `fits_hopper`. Writes dqkv (B, T, 3 * H * 64)
    bfloat16, its sums over 64 rows (B, T / 64, 3 * H * 64) float32, delta (B, H, T) float32, memory of its own
    (programs, 2, T, 64) float32, and what `hopper_forward` made 0, which it leaves so; reads dy, qkv, y and lse.
    """
    from tinygrad_impl.kernels import hopper_attention_gradient

    programs = min(gpu.multiprocessors, B * H)
    return Launch(
        hopper_attention_gradient.hopper_attention_gradient,
        (programs,),
        {"B": B, "T": T, "H": H, "STAGES": 3, "PROGRAMS": programs},
        workers=hopper_attention_gradient.WORKERS,
        flops=5 * B * H * T * T * 64,
        bytes=2 * 8 * B * T * H * 64,
        descriptors=4,
    )


def query_gradient(gpu: GPU, B: int, T: int, H: int, D: int) -> Launch:
    """Writes dqkv (B, T, 3 * H * D) bfloat16 and its sums over QUERIES rows (B, T / QUERIES rounded up, 3 * H * D)
    float32, of both the columns of q only, and delta (B, H, T) float32; reads dy and, of the forward pass, qkv, y and
    lse. It comes before `key_gradient`.
    """
    return launch_of(gpu, attention_query_gradient, B, T, H, D)


def key_gradient(gpu: GPU, B: int, T: int, H: int, D: int) -> Launch:
    """Writes dqkv and its sums over KEYS rows, as many as those, the columns of k and v only; reads dy, qkv, lse and
    delta.
    """
    return launch_of(gpu, attention_key_gradient, B, T, H, D)
