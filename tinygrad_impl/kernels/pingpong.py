"""GEMMs for Hopper in Gluon, with GELU or not: warps with work of their own (a "ping-pong" schedule).

A program has four groups of warps. One has the copy engine fetch tiles of a and b, as far ahead as there is room in a
ring; one has it fetch tiles of what GELU was given. Two warpgroups take turns with tiles of the result: while one gives
its products to the tensor cores, the other is in its epilogue. They pass what is free and what is there to each other
through barriers in shared memory, whose phases are counted from 0: `wait(barrier, phase & 1)` waits until that phase
has ended, and a new barrier counts as one whose phase before the first has ended.
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

WORKERS = 8  # warps besides the first warpgroup's: the second's, and four of which two fetch
REGISTERS = gl.constexpr(232)  # of a thread that multiplies
FEW = gl.constexpr(40)  # of one that fetches
WIDTH = gl.constexpr(64)  # columns that the copy engine moves at a time: 128 bytes


@gluon.jit
def place(tile, M: gl.constexpr, N: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """The first row and column of a tile, in groups of GROUP rows of tiles, so that programs that run at the same time
    share what they read.
    """
    tiles_m: gl.constexpr = (M + BM - 1) // BM
    tiles_n: gl.constexpr = (N + BN - 1) // BN
    group = tile // (GROUP * tiles_n)
    rows = gl.minimum(tiles_m - group * GROUP, GROUP)
    return (group * GROUP + tile % (GROUP * tiles_n) % rows) * BM, tile % (GROUP * tiles_n) // rows * BN


@gluon.jit
def fetch_operands(
    a_map, b_map, a_ring, b_ring, full, empty,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, B_TRANSPOSED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    tiles: gl.constexpr = ((M + BM - 1) // BM) * ((N + BN - 1) // BN)
    count = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        m, n = place(tile, M, N, BM, BN, GROUP)
        for k in range(0, K, BK):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BM + BN) * BK * 2)
            tma.async_copy_global_to_shared(a_map, [m, k], full.index(stage), a_ring.index(stage))
            b_place = [n, k] if B_TRANSPOSED else [k, n]
            tma.async_copy_global_to_shared(b_map, b_place, full.index(stage), b_ring.index(stage))
            count += 1


@gluon.jit
def fetch_inputs(
    x_map, tiles_of_x, x_full, x_empty, M: gl.constexpr, N: gl.constexpr, EPILOGUE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """What GELU was given, a tile at a time for each of the two warpgroups in turn."""
    tiles: gl.constexpr = ((M + BM - 1) // BM) * ((N + BN - 1) // BN) if EPILOGUE == "gelu gradient" else 0
    slices: gl.constexpr = BN // WIDTH
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        m, n = place(tile, M, N, BM, BN, GROUP)
        turn = tile // PROGRAMS
        who = turn & 1
        mbarrier.wait(x_empty.index(who), (turn >> 1 & 1) ^ 1)
        mbarrier.expect(x_full.index(who), BM * BN * 2)
        for i in gl.static_range(slices):
            tma.async_copy_global_to_shared(
                x_map, [m, n + i * WIDTH], x_full.index(who), tiles_of_x.index(who * slices + i)
            )


@gluon.jit
def gelu_and_slope(x):
    """As in epilogue.py, whose functions are Triton's and cannot be called from Gluon."""
    square = x * x
    root = gl.rsqrt(1 + gl.exp2(x * (-2.302208198 - 0.1029432397 * square)))
    sigmoid = root * root
    y = x * sigmoid
    return y, sigmoid + (y - y * sigmoid) * (1.5957691216 + 0.2140644488 * square)


@gluon.jit
def finish(
    values, m, n, out_map, y_map, vector, out_tile, y_tile,
    M: gl.constexpr, N: gl.constexpr, EPILOGUE: gl.constexpr, GELU: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """Stores WIDTH columns of a tile, and GELU. `vector`: the bias that is read or the sums that are written."""
    columns = n + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, values.type.layout))
    if EPILOGUE == "bias" or EPILOGUE == "gelu":
        values += gl.load(vector + columns, mask=columns < N, other=0.0)[None, :]
    if EPILOGUE == "gelu":
        scaled = gl.fma(values, gl.full_like(values, 65536.0), values)  # rounded, as in epilogue.py
        values = scaled - (scaled - values)
        y, slope = gelu_and_slope(values)
    if EPILOGUE == "gelu gradient":
        y, slope = gelu_and_slope(out_tile.load(values.type.layout).to(gl.float32))
        values *= slope
        gl.store(vector + m // BM * N + columns, gl.sum(values, 0), mask=columns < N)
    out_tile.store(values.to(gl.bfloat16))
    if GELU:
        tma.store_wait(0)  # until y_tile is free
        y_tile.store(y.to(gl.bfloat16))
    fence_async_shared()  # so that the copy engine sees them
    tma.async_copy_shared_to_global(out_map, [m, n], out_tile)
    if GELU:
        tma.async_copy_shared_to_global(y_map, [m, n], y_tile)


@gluon.jit
def multiply(
    WHO: gl.constexpr, out_map, y_map, vector, a_ring, b_ring, x_tiles, y_tiles,
    full, empty, x_full, x_empty, turns,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, B_TRANSPOSED: gl.constexpr, EPILOGUE: gl.constexpr,
    GELU: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups, 0 or 1: every other tile of the program."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    tiles: gl.constexpr = ((M + BM - 1) // BM) * ((N + BN - 1) // BN)
    steps: gl.constexpr = (K + BK - 1) // BK
    slices: gl.constexpr = BN // WIDTH
    for tile in range(gl.program_id(0) + WHO * PROGRAMS, tiles, 2 * PROGRAMS):
        m, n = place(tile, M, N, BM, BN, GROUP)
        count = tile // PROGRAMS * steps
        turn = tile // PROGRAMS // 2
        mbarrier.wait(turns.index(WHO), (turn & 1) ^ (1 - WHO))  # until the other has given its products
        sums = warpgroup_mma_init(gl.zeros((BM, BN), gl.float32, layout))
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            b_tile = b_ring.index(stage).permute((1, 0)) if B_TRANSPOSED else b_ring.index(stage)
            sums = warpgroup_mma(a_ring.index(stage), b_tile, sums, use_acc=step > 0, is_async=True)
            sums = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(sums,)))
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), pred=step > 0)  # the one before has been read
            count += 1
        mbarrier.arrive(turns.index(1 - WHO))
        values = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))

        if EPILOGUE == "gelu gradient":
            mbarrier.wait(x_full.index(WHO), turn & 1)
        else:
            tma.store_wait(0)  # until x_tiles are free
        parts = (values,) if slices == 1 else values.reshape([BM, 2, WIDTH]).permute(0, 2, 1).split()
        for i in gl.static_range(slices):
            finish(
                parts[i], m, n + i * WIDTH, out_map, y_map, vector, x_tiles.index(WHO * slices + i),
                y_tiles.index(WHO), M, N, EPILOGUE, GELU, BM,
            )  # fmt: skip
        if EPILOGUE == "gelu gradient":
            tma.store_wait(0)
            mbarrier.arrive(x_empty.index(WHO))
    tma.store_wait(0)


@gluon.jit
def pingpong_kernel(
    outs,  # (M, N); with GELU that of it ("gelu") or of `ins` ("gelu gradient"); sums over a tile's rows (the latter)
    ins,  # a (M, K), b (K, N) or transposed; bias [N] ("bias", "gelu"); what GELU was given (M, N) ("gelu gradient")
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    EPILOGUE: gl.constexpr,
    GELU: gl.constexpr,  # whether it is stored
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    a_map = tma.make_tensor_descriptor(ins[0], [M, K], [K, 1], [BM, BK], swizzled)
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], swizzled)
    if B_TRANSPOSED:
        b_map = tma.make_tensor_descriptor(ins[1], [N, K], [K, 1], [BN, BK], swizzled)
        b_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BK], swizzled)
    else:
        b_map = tma.make_tensor_descriptor(ins[1], [K, N], [N, 1], [BK, BN], swizzled)
        b_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK, BN], swizzled)
    out_map = tma.make_tensor_descriptor(outs[0], [M, N], [N, 1], [BM, WIDTH], swizzled)
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [2 * (BN // WIDTH), BM, WIDTH], swizzled)  # then out's
    x_map, y_map, y_tiles, vector = out_map, out_map, x_tiles, outs[0]
    if GELU:
        y_map = tma.make_tensor_descriptor(outs[1], [M, N], [N, 1], [BM, WIDTH], swizzled)
        y_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BM, WIDTH], swizzled)
    if EPILOGUE == "bias" or EPILOGUE == "gelu":
        vector = ins[2]
    if EPILOGUE == "gelu gradient":
        x_map, vector = tma.make_tensor_descriptor(ins[2], [M, N], [N, 1], [BM, WIDTH], swizzled), outs[len(outs) - 1]

    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    x_full = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    x_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (
                multiply,
                (0, out_map, y_map, vector, a_ring, b_ring, x_tiles, y_tiles, full, empty, x_full, x_empty, turns,
                 M, N, K, B_TRANSPOSED, EPILOGUE, GELU, BM, BN, BK, GROUP, STAGES, PROGRAMS),
            ),
            (
                multiply,
                (1, out_map, y_map, vector, a_ring, b_ring, x_tiles, y_tiles, full, empty, x_full, x_empty, turns,
                 M, N, K, B_TRANSPOSED, EPILOGUE, GELU, BM, BN, BK, GROUP, STAGES, PROGRAMS),
            ),
            (
                fetch_operands,
                (a_map, b_map, a_ring, b_ring, full, empty,
                 M, N, K, B_TRANSPOSED, BM, BN, BK, GROUP, STAGES, PROGRAMS),
            ),
            (fetch_inputs, (x_map, x_tiles, x_full, x_empty, M, N, EPILOGUE, BM, BN, GROUP, PROGRAMS)),
        ],
        [4, 1, 1],
        [REGISTERS, FEW, FEW],
    )  # fmt: skip
