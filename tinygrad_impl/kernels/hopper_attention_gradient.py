"""The gradient of attention for Hopper, in Gluon: five products where attention.py's two kernels take seven.

A program goes through heads, through a head's keys in blocks of 128, the last first, and through the queries that see
them in tiles of 64. Two warpgroups have 64 keys each: they compute P and dS once, and from them dk and dv. A third
multiplies dS by k and adds that to dq, which grows in memory, in float32, in the order of the blocks. Two more warps
compute delta of the block's own queries, which no block before it has seen; one more has the copy engine fetch the
tiles. The letters are those of attention.py.

So that all programs have as much to do, a head's first blocks may be one program's and the rest the next one's. The
former computes them before all others, and passes on delta and dq as far as they are; the latter computes the rest
after all others, when they have long been there. It waits only for the program before it, which the GPU starts no later
than it, so that none waits for ever where other kernels (NCCL's) hold multiprocessors.
"""

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

from tinygrad_impl.kernels.hopper_attention import (
    BARRIERS,
    BLOCK,
    OPERAND,
    SCALE,
    SQUARE,
    SWIZZLED,
    TILE,
    D,
    product,
    wait_for_all,
)

MANY = gl.constexpr(192)  # registers of a thread of the two warpgroups,
SOME = gl.constexpr(88)  # of the third,
FEW = gl.constexpr(40)  # and of a warp that computes delta or fetches
LOAD = gl.constexpr("ld.acquire.gpu.global.s32 $0, [$1];")
STORE = gl.constexpr("st.release.gpu.global.s32 [$1], 1; mov.s32 $0, 0;")
WORKERS = 12  # warps besides the first warpgroup's, of which the last has nothing to do


@gluon.jit
def cut(program, B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, PROGRAMS: gl.constexpr):
    """Before which of all heads' blocks of keys, of each head the last first, a program begins, so that each has about
    as many tiles of queries: the first n blocks of a head have n * (n + 1).
    """
    blocks: gl.constexpr = T // BLOCK
    heads = program * (B * H) // PROGRAMS
    rest = (program * (B * H) - heads * PROGRAMS) * (blocks * (blocks + 1)) // PROGRAMS
    return heads * blocks + gl.minimum(gl.sqrt(rest.to(gl.float32)).to(gl.int32), blocks)


@gluon.jit
def share(B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, PROGRAMS: gl.constexpr):
    """The first block of this program and the first of the next."""
    return cut(gl.program_id(0), B, T, H, PROGRAMS), cut(gl.program_id(0) + 1, B, T, H, PROGRAMS)


@gluon.jit
def place(turn, first, end, T: gl.constexpr):
    """The head and the block of keys that a program computes at a turn: what it passes on comes first, and what was
    passed on to it last.
    """
    blocks: gl.constexpr = T // BLOCK
    last = end // blocks * blocks  # from here on it passes on
    at = (first + blocks - 1) // blocks * blocks + turn - (end - last)  # from the first head that it begins
    at = gl.where(at < last, at, first + at - last)
    at = gl.where(turn < end - last, last + turn, at)
    return at // blocks, blocks - 1 - at % blocks


@gluon.jit
def goes_on(head, block, first, T: gl.constexpr):
    """Whether the block is the first of a head that the program before this one has begun."""
    blocks: gl.constexpr = T // BLOCK
    return (first % blocks != 0) & (head * blocks + blocks - 1 - block == first)


@gluon.jit
def wait_for(passed):
    """Until the program that `passed` is of has passed on what it has. What it wrote before can then be read."""
    seen = gl.inline_asm_elementwise(LOAD, "=r,l", [passed], dtype=gl.int32, is_pure=False, pack=1)
    while seen == 0:
        seen = gl.inline_asm_elementwise(LOAD, "=r,l", [passed], dtype=gl.int32, is_pure=False, pack=1)
    wait_for_all()


@gluon.jit
def fetch(
    qkv_map, dy_map, y_map, k_ring, v_ring, q_ring, dy_ring, own_y, own_dy,
    kv_full, kv_empty, full, empty, own_full, own_empty,
    B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = H * D
    first, end = share(B, T, H, PROGRAMS)
    count = 0
    for turn in range(end - first):
        head, block = place(turn, first, end, T)
        row, column = head // H * T, head % H * D
        kv = turn % 2
        mbarrier.wait(kv_empty.index(kv), (turn // 2 & 1) ^ 1)
        mbarrier.expect(kv_full.index(kv), 2 * BLOCK * D * 2)
        for who in gl.static_range(2):
            key, tile = row + block * BLOCK + who * TILE, kv * 2 + who
            tma.async_copy_global_to_shared(qkv_map, [key, column + C], kv_full.index(kv), k_ring.index(tile))
            tma.async_copy_global_to_shared(qkv_map, [key, column + 2 * C], kv_full.index(kv), v_ring.index(tile))
        for half in gl.static_range(2):
            query = row + block * BLOCK + half * TILE
            mbarrier.wait(own_empty.index(half), (turn & 1) ^ 1)
            mbarrier.expect(own_full.index(half), 2 * TILE * D * 2)
            tma.async_copy_global_to_shared(y_map, [query, column], own_full.index(half), own_y.index(half))
            tma.async_copy_global_to_shared(dy_map, [query, column], own_full.index(half), own_dy.index(half))
        for query in range(row + block * BLOCK, row + T, TILE):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * TILE * D * 2)
            tma.async_copy_global_to_shared(qkv_map, [query, column], full.index(stage), q_ring.index(stage))
            tma.async_copy_global_to_shared(dy_map, [query, column], full.index(stage), dy_ring.index(stage))
            count += 1


@gluon.jit
def deltas(
    delta, passed, own_y, own_dy, own_full, own_empty, delta_full,
    B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """delta of each block's own queries, for two warps: 16 rows at a time, since they have few registers."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    rows = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    first, end = share(B, T, H, PROGRAMS)
    for turn in range(end - first):
        head, block = place(turn, first, end, T)
        for half in gl.static_range(2):
            mbarrier.wait(own_full.index(half), turn & 1)
            for row in gl.static_range(0, TILE, 16):
                y = own_y.index(half).slice(row, 16, 0).load(layout).to(gl.float32)
                dy = own_dy.index(half).slice(row, 16, 0).load(layout).to(gl.float32)
                gl.store(delta + head * T + block * BLOCK + half * TILE + row + rows, gl.sum(y * dy, 1))
            wait_for_all()
            mbarrier.arrive(own_empty.index(half))
        if goes_on(head, block, first, T):
            wait_for(passed + gl.program_id(0) - 1)  # for delta of the blocks before
        mbarrier.arrive(delta_full.index(turn % 2))


@gluon.jit
def add_queries(
    dk, dv, lse, delta, count, mine, k, v, q_ring, dy_ring, full, empty, ds_tiles, ds_full, ds_empty,
    DIAGONAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Adds to dk and dv what TILE queries give, whose lse and delta begin here. The warpgroup's `mine`-th dS goes into
    one of its two ds_tiles. Scores have a row for each key.
    """
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, SQUARE))
    stage = count % STAGES
    q, dy = q_ring.index(stage), dy_ring.index(stage)
    mbarrier.wait(full.index(stage), count // STAGES & 1)
    s = product(k, q, TILE)
    dp = product(v, dy, TILE)
    lse_row = gl.load(lse + columns)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
    p = gl.exp2(s * SCALE - lse_row[None, :])
    if DIAGONAL:
        rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, SQUARE))
        p = gl.where(columns[None, :] >= rows[:, None], p, 0.0)
    p_operand = gl.convert_layout(p.to(gl.bfloat16), OPERAND)
    dv = warpgroup_mma(p_operand, dy, warpgroup_mma_init(dv), is_async=True)
    delta_row = gl.load(delta + columns)
    dp = warpgroup_mma_wait(num_outstanding=1, deps=(dp,))
    ds = (p * (dp - delta_row[None, :])).to(gl.bfloat16)
    slot = mine % 2
    mbarrier.wait(ds_empty.index(slot), (mine // 2 & 1) ^ 1)
    ds_tiles.index(slot).store(ds)
    fence_async_shared()  # so that the third warpgroup's products see it
    ds_operand = gl.convert_layout(ds, OPERAND)
    dk = warpgroup_mma(ds_operand, q, warpgroup_mma_init(dk), is_async=True)
    wait_for_all()
    mbarrier.arrive(ds_full.index(slot))
    dk, dv, p_operand, ds_operand = warpgroup_mma_wait(num_outstanding=0, deps=(dk, dv, p_operand, ds_operand))
    wait_for_all()
    mbarrier.arrive(empty.index(stage))
    return dk, dv


@gluon.jit
def keys(
    WHO: gl.constexpr, dqkv_map, sums, lse, delta, k_ring, v_ring, q_ring, dy_ring, ds_tiles, out_tiles,
    kv_full, kv_empty, delta_full, full, empty, ds_full, ds_empty,
    B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """dk and dv of TILE keys of each block, for one of the two warpgroups, 0 or 1."""
    C: gl.constexpr = H * D
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, SQUARE))
    first, end = share(B, T, H, PROGRAMS)
    count = 0
    mine = 0
    for turn in range(end - first):
        head, block = place(turn, first, end, T)
        row, column = head // H * T + block * BLOCK + WHO * TILE, head % H * D
        kv = turn % 2
        mbarrier.wait(kv_full.index(kv), turn // 2 & 1)
        mbarrier.wait(delta_full.index(kv), turn // 2 & 1)
        k, v = k_ring.index(kv * 2 + WHO), v_ring.index(kv * 2 + WHO)
        if WHO == 1:  # the block's first queries come before all of these keys
            mbarrier.wait(full.index(count % STAGES), count // STAGES & 1)
            mbarrier.arrive(empty.index(count % STAGES))
            count += 1
        dk = gl.zeros((TILE, D), gl.float32, SQUARE)
        dv = gl.zeros((TILE, D), gl.float32, SQUARE)
        at = head * T + block * BLOCK + WHO * TILE
        dk, dv = add_queries(
            dk, dv, lse + at, delta + at, count, mine, k, v, q_ring, dy_ring, full, empty, ds_tiles, ds_full, ds_empty,
            True, STAGES,
        )  # fmt: skip
        for query in range(at + TILE, head * T + T, TILE):
            count += 1
            mine += 1
            dk, dv = add_queries(
                dk, dv, lse + query, delta + query, count, mine, k, v, q_ring, dy_ring, full, empty,
                ds_tiles, ds_full, ds_empty, False, STAGES,
            )  # fmt: skip
        count += 1
        mine += 1
        mbarrier.arrive(kv_empty.index(kv))
        dk *= 0.125
        tma.store_wait(0)  # until the tiles are free
        out_tiles.index(0).store(dk.to(gl.bfloat16))
        out_tiles.index(1).store(dv.to(gl.bfloat16))
        fence_async_shared()
        wait_for_all()
        tma.async_copy_shared_to_global(dqkv_map, [row, column + C], out_tiles.index(0))
        tma.async_copy_shared_to_global(dqkv_map, [row, column + 2 * C], out_tiles.index(1))
        sums_at = sums + row // TILE * (3 * C) + column + columns
        gl.store(sums_at + C, gl.sum(dk, 0))
        gl.store(sums_at + 2 * C, gl.sum(dv, 0))
    tma.store_wait(0)


@gluon.jit
def scattered():
    """Where a tile of dq keeps each of its numbers in memory: those that a warp stores at once lie side by side."""
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, SQUARE))[:, None]
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, SQUARE))[None, :]
    return columns // 8 * 512 + rows // 8 % 2 * 256 + rows // 16 * 64 + rows % 8 * 8 + columns % 8


@gluon.jit
def add_keys(
    block, query, count, dqkv_map, sums, kept, row, column, k_ring, kv, ds_0, ds_1, dq_tile,
    full_0, empty_0, full_1, empty_1,
    FIRST: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Adds to dq of TILE queries what a block of keys gives. `count`: how many dS each warpgroup gave before. To the
    FIRST queries of a block only the first warpgroup's keys give something. `kept` is that sum in float32, which the
    last block of keys ends.
    """
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, SQUARE))
    count_0, count_1 = count
    kept += query * (TILE * D) + scattered()
    if FIRST:
        dq = gl.zeros((TILE, D), gl.float32, SQUARE)
    else:  # of the block's own queries there is nothing yet; .cg: by way of the L2 cache alone
        dq = gl.load(kept, mask=query >= block * 2 + 2, other=0.0, cache_modifier=".cg")
    slot = count_0 % 2
    mbarrier.wait(full_0.index(slot), count_0 // 2 & 1)
    k = k_ring.index(kv * 2)
    more = warpgroup_mma(ds_0.index(slot).permute((1, 0)), k, warpgroup_mma_init(dq), is_async=True)
    if not FIRST:
        slot_1 = count_1 % 2
        mbarrier.wait(full_1.index(slot_1), count_1 // 2 & 1)
        k = k_ring.index(kv * 2 + 1)
        more = warpgroup_mma(ds_1.index(slot_1).permute((1, 0)), k, more, is_async=True)
    dq = warpgroup_mma_wait(num_outstanding=0, deps=(more,))
    wait_for_all()
    mbarrier.arrive(empty_0.index(slot))
    if not FIRST:
        mbarrier.arrive(empty_1.index(count_1 % 2))
    if block > 0:
        gl.store(kept, dq)
    else:
        dq *= 0.125
        tma.store_wait(0)  # until the tile is free
        wait_for_all()
        dq_tile.store(dq.to(gl.bfloat16))
        fence_async_shared()
        wait_for_all()
        tma.async_copy_shared_to_global(dqkv_map, [row + query * TILE, column], dq_tile)
        gl.store(sums + (row // TILE + query) * (3 * C) + column + columns, gl.sum(dq, 0))


@gluon.jit
def queries(
    dqkv_map, sums, kept, passed, k_ring, ds_0, ds_1, dq_tile, kv_full, kv_empty, full_0, empty_0, full_1, empty_1,
    B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """dq, for the third warpgroup. In the program's second T rows of `kept` grows what two programs have a share in."""
    C: gl.constexpr = H * D
    kept += gl.program_id(0) * (2 * T * D)
    first, end = share(B, T, H, PROGRAMS)
    count = 0
    for turn in range(end - first):
        head, block = place(turn, first, end, T)
        row, column = head // H * T, head % H * D
        grows = kept + gl.where(head == end // (T // BLOCK), T * D, 0)
        if head * (T // BLOCK) < first:  # where the program before has kept it
            grows = kept - T * D
        if goes_on(head, block, first, T):
            wait_for(passed + gl.program_id(0) - 1)
        kv = turn % 2
        mbarrier.wait(kv_full.index(kv), turn // 2 & 1)
        add_keys(
            block, block * 2, (count, count - turn), dqkv_map, sums, grows, row, column, k_ring, kv, ds_0, ds_1,
            dq_tile, full_0, empty_0, full_1, empty_1, True, C,
        )  # fmt: skip
        count += 1
        for query in range(block * 2 + 1, T // TILE):
            add_keys(
                block, query, (count, count - turn - 1), dqkv_map, sums, grows, row, column, k_ring, kv, ds_0, ds_1,
                dq_tile, full_0, empty_0, full_1, empty_1, False, C,
            )  # fmt: skip
            count += 1
        wait_for_all()
        mbarrier.arrive(kv_empty.index(kv))
        if turn == end % (T // BLOCK) - 1:  # the last that it passes on
            gl.inline_asm_elementwise(STORE, "=r,l", [passed + gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1)
        if goes_on(head, block, first, T):  # as it was, for the next gradient
            gl.store(passed + gl.program_id(0) - 1, 0)
    tma.store_wait(0)


@gluon.jit
def hopper_attention_gradient(
    dqkv, sums, delta, kept, passed, dy, qkv, y, lse,
    B: gl.constexpr, T: gl.constexpr, H: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """dqkv, its sums over TILE rows, and delta; kept (PROGRAMS, 2, T, D) is where dq grows; passed (PROGRAMS,), 0 at
    first and in the end, tells which programs have passed on a head.
    """
    C: gl.constexpr = H * D
    qkv_map = tma.make_tensor_descriptor(qkv, [B * T, 3 * C], [3 * C, 1], [TILE, D], SWIZZLED)
    dqkv_map = tma.make_tensor_descriptor(dqkv, [B * T, 3 * C], [3 * C, 1], [TILE, D], SWIZZLED)
    dy_map = tma.make_tensor_descriptor(dy, [B * T, C], [C, 1], [TILE, D], SWIZZLED)
    y_map = tma.make_tensor_descriptor(y, [B * T, C], [C, 1], [TILE, D], SWIZZLED)
    k_ring = gl.allocate_shared_memory(gl.bfloat16, [4, TILE, D], SWIZZLED)
    v_ring = gl.allocate_shared_memory(gl.bfloat16, [4, TILE, D], SWIZZLED)
    q_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, D], SWIZZLED)
    dy_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, D], SWIZZLED)
    own_y = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, D], SWIZZLED)
    own_dy = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, D], SWIZZLED)
    ds_0 = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, TILE], SWIZZLED)
    ds_1 = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, TILE], SWIZZLED)
    out_0 = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, D], SWIZZLED)
    out_1 = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, D], SWIZZLED)
    dq_tile = gl.allocate_shared_memory(gl.bfloat16, [TILE, D], SWIZZLED)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    own_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    own_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    delta_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    full_0 = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    empty_0 = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    full_1 = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    empty_1 = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIERS)
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=3)
        mbarrier.init(own_full.index(i), count=1)
        mbarrier.init(own_empty.index(i), count=1)
        mbarrier.init(delta_full.index(i), count=1)
        mbarrier.init(full_0.index(i), count=1)
        mbarrier.init(empty_0.index(i), count=1)
        mbarrier.init(full_1.index(i), count=1)
        mbarrier.init(empty_1.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (keys, (0, dqkv_map, sums, lse, delta, k_ring, v_ring, q_ring, dy_ring, ds_0, out_0,
                    kv_full, kv_empty, delta_full, full, empty, full_0, empty_0, B, T, H, STAGES, PROGRAMS)),
            (keys, (1, dqkv_map, sums, lse, delta, k_ring, v_ring, q_ring, dy_ring, ds_1, out_1,
                    kv_full, kv_empty, delta_full, full, empty, full_1, empty_1, B, T, H, STAGES, PROGRAMS)),
            (queries, (dqkv_map, sums, kept, passed, k_ring, ds_0, ds_1, dq_tile, kv_full, kv_empty,
                       full_0, empty_0, full_1, empty_1, B, T, H, PROGRAMS)),
            (deltas, (delta, passed, own_y, own_dy, own_full, own_empty, delta_full, B, T, H, PROGRAMS)),
            (fetch, (qkv_map, dy_map, y_map, k_ring, v_ring, q_ring, dy_ring, own_y, own_dy,
                     kv_full, kv_empty, full, empty, own_full, own_empty, B, T, H, STAGES, PROGRAMS)),
        ],
        [4, 4, 2, 1],
        [MANY, SOME, FEW, FEW],
    )  # fmt: skip
