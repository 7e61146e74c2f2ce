"""Attention of heads of 64 for Hopper, in Gluon: warps with work of their own, as in pingpong.py.

A program goes through blocks of 128 queries, of one head after another, and through the keys that they see, the last
first. Two warpgroups have 64 queries each; one more warp has the copy engine fetch the tiles. The letters are those of
attention.py; hopper_attention_gradient.py is the gradient.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

D = gl.constexpr(64)  # of a head
TILE = gl.constexpr(64)  # rows of a tile: one warpgroup's products
BLOCK = gl.constexpr(128)  # rows of two warpgroups; it divides T
SCALE = gl.constexpr(math.log2(math.e) / 8)  # of scores, for powers of 2
FEW = gl.constexpr(24)  # registers of a thread that fetches
WORKERS = 8  # warps besides the first warpgroup's; of the last four, one fetches
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
BARRIERS = gl.constexpr(mbarrier.MBarrierLayout())
SQUARE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
WIDE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
OPERAND = gl.constexpr(gl.DotOperandLayout(0, SQUARE, 2))
wait_for_all = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6, and 3.7


@gluon.jit
def product(a, b, N: gl.constexpr):
    """a @ b.T of (TILE, D) and (N, D) in shared memory, on its way."""
    layout: gl.constexpr = SQUARE if N == TILE else WIDE
    nothing = warpgroup_mma_init(gl.zeros((TILE, N), gl.float32, layout))
    return warpgroup_mma(a, b.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def cut(program, B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, PROGRAMS: gl.constexpr):
    """Before which of all heads' blocks of queries a program of the forward pass begins, so that each has about as many
    tiles of keys: n blocks of a head have n * (n + 1) / 2.
    """
    blocks: gl.constexpr = T // BLOCK
    heads = program * (B * H) // PROGRAMS
    rest = (program * (B * H) - heads * PROGRAMS) * (blocks * (blocks + 1) // 2) // PROGRAMS
    return heads * blocks + gl.minimum(gl.sqrt(2.0 * rest.to(gl.float32)).to(gl.int32), blocks)


@gluon.jit
def share(B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, PROGRAMS: gl.constexpr):
    """The first block of this program and the first of the next."""
    return cut(gl.program_id(0), B, T, H, PROGRAMS), cut(gl.program_id(0) + 1, B, T, H, PROGRAMS)


@gluon.jit
def fetch_forward(
    q_map, kv_map, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = H * D
    first, end = share(B, T, H, PROGRAMS)
    count = 0
    for turn in range(end - first):
        head, block = (first + turn) // (T // BLOCK), (first + turn) % (T // BLOCK)
        row, column = head // H * T, head % H * D
        slot = turn % 2
        mbarrier.wait(q_empty.index(slot), (turn // 2 & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), BLOCK * D * 2)
        for who in gl.static_range(2):
            place = [row + block * BLOCK + who * TILE, column]
            tma.async_copy_global_to_shared(q_map, place, q_full.index(slot), q_ring.index(slot * 2 + who))
        for i in range(block + 1):
            key = (block - i) * BLOCK
            stage, phase = count % STAGES, count // STAGES & 1
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), BLOCK * D * 2)
            tma.async_copy_global_to_shared(kv_map, [row + key, column + C], k_full.index(stage), k_ring.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), BLOCK * D * 2)
            place = [row + key, column + 2 * C]
            tma.async_copy_global_to_shared(kv_map, place, v_full.index(stage), v_ring.index(stage))
            count += 1


@gluon.jit
def attend(
    WHO: gl.constexpr, y_map, lse, q_ring, k_ring, v_ring, y_tiles,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """TILE queries of each block, for one of the two warpgroups, 0 or 1. While the tensor cores add P @ v of some keys,
    it computes P of the keys before those.
    """
    first, end = share(B, T, H, PROGRAMS)
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, WIDE))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, WIDE))
    count = 0
    for turn in range(end - first):
        head, block = (first + turn) // (T // BLOCK), (first + turn) % (T // BLOCK)
        row, column = block * BLOCK + WHO * TILE, head % H * D
        slot = turn % 2
        stage = count % STAGES
        mbarrier.wait(q_full.index(slot), turn // 2 & 1)
        q = q_ring.index(slot * 2 + WHO)
        mbarrier.wait(k_full.index(stage), count // STAGES & 1)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(product(q, k_ring.index(stage), BLOCK),))
        wait_for_all()
        mbarrier.arrive(k_empty.index(stage))
        s = gl.where(columns[None, :] <= (rows + WHO * TILE)[:, None], s, float("-inf"))
        top = gl.max(s, 1) * SCALE  # the highest score so far
        p = gl.exp2(s * SCALE - top[:, None])
        total = gl.sum(p, 1)
        operand = gl.convert_layout(p.to(gl.bfloat16), OPERAND)
        y = gl.zeros((TILE, D), gl.float32, SQUARE)
        for _ in range(block):
            before, phase = count % STAGES, count // STAGES & 1
            count += 1
            stage = count % STAGES
            mbarrier.wait(k_full.index(stage), count // STAGES & 1)
            s = product(q, k_ring.index(stage), BLOCK)
            mbarrier.wait(v_full.index(before), phase)
            more = warpgroup_mma(operand, v_ring.index(before), warpgroup_mma_init(y), is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
            wait_for_all()
            mbarrier.arrive(k_empty.index(stage))
            higher = gl.maximum(top, gl.max(s, 1) * SCALE)
            p = gl.exp2(s * SCALE - higher[:, None])
            shrink = gl.exp2(top - higher)
            top = higher
            total = total * shrink + gl.sum(p, 1)
            y, operand = warpgroup_mma_wait(num_outstanding=0, deps=(more, operand))
            wait_for_all()
            mbarrier.arrive(v_empty.index(before))
            y = y * gl.convert_layout(shrink, gl.SliceLayout(1, SQUARE))[:, None]
            operand = gl.convert_layout(p.to(gl.bfloat16), OPERAND)
        mbarrier.arrive(q_empty.index(slot))
        stage = count % STAGES
        mbarrier.wait(v_full.index(stage), count // STAGES & 1)
        more = warpgroup_mma(operand, v_ring.index(stage), warpgroup_mma_init(y), is_async=True)
        y, operand = warpgroup_mma_wait(num_outstanding=0, deps=(more, operand))
        wait_for_all()
        mbarrier.arrive(v_empty.index(stage))
        count += 1
        y = y * gl.convert_layout(1 / total, gl.SliceLayout(1, SQUARE))[:, None]
        tma.store_wait(0)  # until the tile is free
        y_tiles.index(WHO).store(y.to(gl.bfloat16))
        fence_async_shared()  # so that the copy engine sees it
        wait_for_all()
        tma.async_copy_shared_to_global(y_map, [head // H * T + row, column], y_tiles.index(WHO))
        gl.store(lse + head * T + row + rows, top + gl.log2(total))
    tma.store_wait(0)


@gluon.jit
def hopper_attention_forward(
    y, lse, passed, qkv,
    B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Computes y and lse from qkv, and makes `passed` (PROGRAMS,) 0, for the gradient."""
    C: gl.constexpr = H * D
    gl.store(passed + gl.program_id(0), 0)
    q_map = tma.make_tensor_descriptor(qkv, [B * T, 3 * C], [3 * C, 1], [TILE, D], SWIZZLED)
    kv_map = tma.make_tensor_descriptor(qkv, [B * T, 3 * C], [3 * C, 1], [BLOCK, D], SWIZZLED)
    y_map = tma.make_tensor_descriptor(y, [B * T, C], [C, 1], [TILE, D], SWIZZLED)
    q_ring = gl.allocate_shared_memory(gl.bfloat16, [4, TILE, D], SWIZZLED)
    k_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, D], SWIZZLED)
    v_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, D], SWIZZLED)
    y_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, D], SWIZZLED)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (attend, (0, y_map, lse, q_ring, k_ring, v_ring, y_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                      B, T, H, STAGES, PROGRAMS)),
            (attend, (1, y_map, lse, q_ring, k_ring, v_ring, y_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                      B, T, H, STAGES, PROGRAMS)),
            (fetch_forward, (q_map, kv_map, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                             B, T, H, STAGES, PROGRAMS)),
        ],
        [4, 1],
        [240, FEW],
    )  # fmt: skip
