"""GEMMs of bfloat16 with float32 sums: those of linear layers and of the vocabulary head, forward and backward.

They are all tiles of a (M, K) @ b (K, N). What differs is which of a and b lies transposed in memory, which the tensor
cores read as well, and what is done with a tile before it is rounded, once, and stored. Tensor descriptors, by which
Hopper's copy engine moves whole tiles, give 0 for what is read outside of a matrix and drop what is written there.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, product
from typing import Any

import triton
import triton.language as tl

from tinygrad_impl.kernels import GPU
from tinygrad_impl.kernels.epilogue import described, finish, place
from tinygrad_impl.kernels.launch import Launch
from tinygrad_impl.kernels.pointers import matmul_pointers_kernel

# Tiles by the GPU's family, and by operation: what differs from the first row, of all.
# Stages are tiles of a and b in shared memory, of which `matmul_pointers_kernel` has one less.
TILES: dict[str, dict[str, dict[str, int]]] = {
    "sm_90": {  # Of those with a GELU two programs are on a multiprocessor: one computes it, the other multiplies
        "all": {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "SLICES": 2, "stages": 3, "programs": 1},
        "forward": {"GROUP": 4, "stages": 4},
        "gelu": {"BN": 128, "warps": 8, "programs": 2},
        "input gradient": {"GROUP": 4, "stages": 4},
        "gelu gradient": {"BN": 128, "BK": 32, "stages": 5, "warps": 8, "programs": 2},  # there is room for no more
        "head": {"SLICES": 1},
        "head weight gradient": {"GROUP": 16},
    },
    "sm_80": {
        "all": {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "SLICES": 1, "stages": 3, "warps": 4, "programs": 2},
        "forward": {"BK": 32, "stages": 4},
        "gelu gradient": {"SLICES": 2},
        "weight gradient": {"BN": 256, "warps": 8, "programs": 1},
        "head input gradient": {"BK": 32, "stages": 4},
    },
    "sm_86": {
        "all": {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "SLICES": 1, "stages": 4, "warps": 4, "programs": 2},
        "gelu gradient": {"SLICES": 2},
        "weight gradient": {"BN": 256, "BK": 64, "stages": 3, "warps": 8, "programs": 1},
        "head": {"BN": 256, "BK": 64, "stages": 3, "warps": 8, "programs": 1},
    },
    "sm_120": {  # which has never been measured
        "all": {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "SLICES": 2, "stages": 3, "warps": 8, "programs": 1},
        "forward": {"GROUP": 4},
        "input gradient": {"GROUP": 4},
        "head": {"SLICES": 1},
        "head weight gradient": {"GROUP": 16},
    },
}
PAIRED = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "STAGES": 4}  # of pingpong.py, see `pairs`


@triton.jit
def matmul_kernel(
    outs,  # (SPLITS, M, N); and GELU (M, N): of it ("gelu"), of `ins` ("gelu gradient", and sums over a tile's rows)
    ins,  # a, b and: bias [N] ("bias", "gelu"), what GELU was given (M, N) ("gelu gradient")
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,  # a lies as (K, M)
    B_TRANSPOSED: tl.constexpr,  # b lies as (N, K)
    A_FIRST: tl.constexpr,  # how many elements a begins after the first of its tensor
    B_FIRST: tl.constexpr,
    OUT_FIRST: tl.constexpr,
    OUT_ROWS: tl.constexpr,  # of out: past them nothing is stored
    EPILOGUE: tl.constexpr,
    SPLITS: tl.constexpr,  # of the sum over K
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,  # of a tile's columns, stored one after the other: 1 or 2
    PROGRAMS: tl.constexpr,
):
    multiply(
        ins[0] + A_FIRST, ins[1] + B_FIRST, outs[0] + OUT_FIRST, outs, ins, 0, M, N, K, A_TRANSPOSED, B_TRANSPOSED,
        OUT_ROWS, EPILOGUE, SPLITS, BM, BN, BK, GROUP, SLICES, PROGRAMS,
    )  # fmt: skip


@triton.jit
def weight_gradients_kernel(
    outs,  # of each GEMM (SPLITS, M, N)
    ins,  # of each, one after the other, a that lies as (R, M), and b (R, N)
    R: tl.constexpr,
    SHAPES: tl.constexpr,  # of each M, N, BN, and how many tiles, of all splits, those before it have
    SPLITS: tl.constexpr,  # of the sums over R
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """GEMMs one after another without waiting: a program begins the next one when it is through with its tiles."""
    for i in tl.static_range(len(outs)):
        multiply(
            ins[2 * i], ins[2 * i + 1], outs[i], outs, ins, SHAPES[4 * i + 3], SHAPES[4 * i], SHAPES[4 * i + 1], R,
            True, False, SPLITS * SHAPES[4 * i], "none", SPLITS, BM, SHAPES[4 * i + 2], BK, GROUP, SLICES, PROGRAMS,
        )  # fmt: skip


@triton.jit
def multiply(
    a, b, out, outs, ins, BEFORE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    OUT_ROWS: tl.constexpr, EPILOGUE: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """This program's tiles of a GEMM, if PROGRAMS take turns and have taken BEFORE tiles of others."""
    tiles: tl.constexpr = ((M + BM - 1) // BM) * ((N + BN - 1) // BN)
    steps: tl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS)
    if A_TRANSPOSED:
        a_tiles = tl.make_tensor_descriptor(a, [K, M], [M, 1], [BK, BM])
    else:
        a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    if B_TRANSPOSED:
        b_tiles = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, BK])
    else:
        b_tiles = tl.make_tensor_descriptor(b, [K, N], [N, 1], [BK, BN])
    tl.static_assert(SPLITS == 1 or M % BM == 0, "what is past one part's last row would be in the next part")
    out_tiles, y_tiles, x_tiles = described(outs, ins, out, M, N, OUT_ROWS, EPILOGUE, BM, BN // SLICES)

    first = tl.program_id(0) + (PROGRAMS - BEFORE % PROGRAMS)  # a remainder can have ptxas spill the sums
    first = tl.where(first < PROGRAMS, first, first - PROGRAMS)
    for work in tl.range(first, tiles * SPLITS, PROGRAMS, flatten=True):
        m, n = place(work % tiles, M, N, BM, BN, GROUP)
        part = work // tiles
        total = tl.zeros((BM, BN), tl.float32)
        for step in range(steps):
            k = (part * steps + step) * BK
            a_tile = a_tiles.load([k, m]).T if A_TRANSPOSED else a_tiles.load([m, k])
            b_tile = b_tiles.load([n, k]).T if B_TRANSPOSED else b_tiles.load([k, n])
            total = tl.dot(a_tile, b_tile, total)
        finish(total, outs, ins, out_tiles, y_tiles, x_tiles, part, m, n, M, N, EPILOGUE, BM, BN, SLICES)


@triton.jit
def parts_of_column_sums_kernel(
    out, x, R: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr
):
    """Each of PARTS sums of all columns takes every PARTSth block of ROWS rows."""
    part = tl.program_id(0) % PARTS
    n = tl.program_id(0) // PARTS * BN + tl.arange(0, BN)
    total = tl.zeros((ROWS, BN), tl.float32)
    for start in range(part * ROWS, R, PARTS * ROWS):
        r = start + tl.arange(0, ROWS)
        place, inside = r[:, None].to(tl.int64) * N + n[None, :], (r[:, None] < R) & (n[None, :] < N)
        total += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + part * N + n, tl.sum(total, 0), mask=n < N)


@triton.jit
def column_sums_kernel(outs, xs, SHAPES: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr):
    """Sums of all columns of several matrices, of which N go to each of a matrix's `outs`. SHAPES: of each matrix its
    rows, N, and the numbers of its first out and program; in the end 0, 0, and how many outs and programs there are.
    """
    for i in tl.static_range(len(xs)):
        if (tl.program_id(0) >= SHAPES[4 * i + 3]) & (tl.program_id(0) < SHAPES[4 * i + 7]):
            first = (tl.program_id(0) - SHAPES[4 * i + 3]) * BN
            sum_columns(outs, xs[i], first, SHAPES[4 * i], SHAPES[4 * i + 1], SHAPES[4 * i + 2], SHAPES[4 * i + 6],
                        ROWS, BN)  # fmt: skip


@triton.jit
def sum_columns(outs, x, first, R: tl.constexpr, N: tl.constexpr, OUT: tl.constexpr, PAST: tl.constexpr,
                ROWS: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Of BN columns from the `first`, of x (R, (PAST - OUT) * N), to the outs from OUT to PAST."""
    n = first + tl.arange(0, BN)
    width: tl.constexpr = (PAST - OUT) * N
    total = tl.zeros((ROWS, BN), tl.float32)
    for start in range(0, R, ROWS):
        r = start + tl.arange(0, ROWS)
        inside = (r[:, None] < R) & (n[None, :] < width)
        total += tl.load(x + r[:, None] * width + n[None, :], mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, 0)
    for i in tl.static_range(PAST - OUT):
        if first // N == i:
            tl.store(outs[OUT + i] + n - i * N, sums, mask=n < width)


def tiled(
    gpu: GPU,
    operation: str,
    M: int,
    N: int,
    K: int,
    transposed: tuple[bool, bool] = (False, False),
    epilogue: str = "none",
    split: bool = False,
    first: tuple[int, int, int] = (0, 0, 0),
    rows: int | None = None,
    **tiles: Any,
) -> Launch:
    """a @ b for a (M, K), stored as (K, M) if transposed[0], and b (K, N), stored as (N, K) if transposed[1].

    a, b and the result begin at row `first` of their tensors, and the result has not M but `rows` if given.
    `tiles` are what to take instead of what is known to be quick for the operation, as in TILES.
    """
    tiles = TILES[gpu.family]["all"] | TILES[gpu.family].get(operation, {}) | tiles
    tiles["programs"] *= gpu.multiprocessors  # how many they can hold, at once
    tiles = min(shapes(gpu, M, N, K, split, tiles), key=lambda shape: seconds(gpu, M, N, K, shape))
    warps, stages, splits = (tiles.pop(name) for name in ("warps", "stages", "SPLITS"))
    programs, count = tiles.pop("programs"), triton.cdiv(M, tiles["BM"]) * triton.cdiv(N, tiles["BN"])
    constants = {"M": M, "N": N, "K": K, "A_TRANSPOSED": transposed[0], "B_TRANSPOSED": transposed[1]}
    widths = M if transposed[0] else K, K if transposed[1] else N, N
    starts = [row * width for row, width in zip(first, widths, strict=True)]
    constants |= dict(zip(("A_FIRST", "B_FIRST", "OUT_FIRST"), starts, strict=True))
    constants |= {"OUT_ROWS": splits * M if rows is None else rows}
    constants |= {"EPILOGUE": epilogue, "SPLITS": splits} | tiles
    kernel, grid = matmul_pointers_kernel, (count * splits,)
    if gpu.has_copy_engine:
        kernel, grid = matmul_kernel, (min(programs, count * splits),)
        constants |= {"PROGRAMS": grid[0]}
    outs, ins = {"gelu": 2, "gelu gradient": 3}.get(epilogue, 1), (2 if epilogue in ("none", "add") else 3)
    moved = 2 * (M * K + K * N + M * N * outs)
    return Launch(kernel, grid, constants, warps, stages, 2 * M * N * K, moved, descriptors=5, groups=(outs, ins))


def shapes(gpu: GPU, M: int, N: int, K: int, split: bool, tiles: dict[str, int]) -> Iterator[dict[str, int]]:
    """The tiles to choose from: also half as wide, with which fewer multiprocessors may have nothing to do at the end;
    and with the sum over K in several parts, unless that is given.
    """
    several = range(1, min(16, triton.cdiv(K, 512)) + 1) if split else [1]
    heights = [tiles["BM"], 64] if split and M % tiles["BM"] else [tiles["BM"]]  # 64 divides all widths
    widths = [tiles]
    if gpu.family == "sm_90" and tiles["BN"] == 256:
        widths.append(tiles | {"BN": 128, "SLICES": 1, "stages": tiles["stages"] + 1, "warps": 8})
    for shape, BM, splits in product(widths, heights, [tiles["SPLITS"]] if "SPLITS" in tiles else several):
        BN = width(N, shape["BN"])
        if splits == 1 or M % BM == 0:  # else what is past one part's last row would be in the next part
            yield {"warps": max(4, BM * BN // 4096)} | shape | {"BM": BM, "BN": BN, "SPLITS": splits}


def width(N: int, widest: int) -> int:
    """The widest tile for N columns of which less than an eighth lies outside the matrix."""
    return next((w for w in (256, 128, 64) if w <= widest and triton.cdiv(N, w) * w * 7 < N * 8), 64)


def seconds(gpu: GPU, M: int, N: int, K: int, tiles: dict[str, int]) -> float:
    """An estimate of what a GEMM takes with such tiles, of which so many `programs` are computed at a time."""
    BM, BN, splits, programs = (tiles[name] for name in ("BM", "BN", "SPLITS", "programs"))
    rate = (6e12 if BN == 256 else 5.8e12) if gpu.has_copy_engine else 2.5e12  # FLOP/s of a multiprocessor
    rate *= gpu.multiprocessors / programs * (0.7 if BM == 64 else 1)  # of a program
    rounds = triton.cdiv(triton.cdiv(M, BM) * triton.cdiv(N, BN) * splits, programs)
    sums = 4 * M * N * (splits / 3e12 + (splits + 1) / 1.8e12)  # bytes/s of it, and of who adds up
    return rounds * 2 * BM * BN * triton.cdiv(K, splits) / rate + sums


def paired(
    gpu: GPU, M: int, N: int, K: int, transposed: bool, epilogue: str, gelu: bool = False, **tiles: Any
) -> Launch:
    """As `tiled`, for Hopper; `gelu`: whether GELU is stored."""
    from tinygrad_impl.kernels import pingpong  # here, because Triton's interpreter does not know Gluon

    tiles = PAIRED | tiles
    tiles["BN"] = width(N, tiles["BN"])
    grid = (min(gpu.multiprocessors, triton.cdiv(M, tiles["BM"]) * triton.cdiv(N, tiles["BN"])),)
    constants = {"M": M, "N": N, "K": K, "B_TRANSPOSED": transposed, "EPILOGUE": epilogue, "GELU": gelu}
    outs, ins = 1 + gelu + (epilogue == "gelu gradient"), 2 if epilogue == "none" else 3
    return Launch(
        pingpong.pingpong_kernel,
        grid,
        constants | {"PROGRAMS": grid[0]} | tiles,
        stages=tiles["STAGES"],
        workers=pingpong.WORKERS,
        flops=2 * M * N * K,
        bytes=2 * (M * K + K * N + M * N * outs),
        descriptors=5,
        groups=(outs, ins),
    )


def pairs(gpu: GPU, M: int, N: int, K: int, gelu: bool) -> bool:
    """Whether pingpong.py has the fastest kernel: always for GELU; without, if its tiles of 128 columns leave fewer
    multiprocessors without work at the end, or if sums are so short that what follows them takes time.
    """
    rows = triton.cdiv(M, 128)
    narrow, wide = (triton.cdiv(rows * triton.cdiv(N, BN), gpu.multiprocessors) * BN for BN in (128, 256))
    return gpu.pairs_warpgroups and (gelu or narrow < wide or (narrow == wide and K <= 2048))


def forward(gpu: GPU, R: int, K: int, N: int, gelu: bool = False, **tiles: Any) -> Launch:
    """y (R, N) <- x (R, K), weight [K, N], in bfloat16, bias [N] in float32. With gelu: y, gelu(y) <- them."""
    if pairs(gpu, R, N, K, gelu):
        return paired(gpu, R, N, K, False, "gelu" if gelu else "bias", gelu, **tiles)
    return tiled(gpu, "gelu" if gelu else "forward", R, N, K, epilogue="gelu" if gelu else "bias", **tiles)


def keeps_gelu(gpu: GPU, N: int) -> bool:
    """Whether GELU's output, N columns, is kept for the backward pass instead of computed again in it. That takes 2 N
    bytes of memory for each row of a layer, and saves a sixth to a fifth of that GEMM's time at 124M, but 5 % at
    gpt2-xl's width (README.md).
    """
    return gpu.pairs_warpgroups and N <= 3072


def input_gradient(gpu: GPU, R: int, K: int, N: int, gelu: bool = False, **tiles: Any) -> Launch:
    """dx (R, K) <- dy (R, N), weight [K, N], all in bfloat16.

    With gelu, x = gelu(h): dh, x (unless `keeps_gelu`), parts of the sums of dh's columns, float32 (R / BM rounded up,
    K) <- them, h.
    """
    operation, epilogue = ("gelu gradient", "gelu gradient") if gelu else ("input gradient", "none")
    if pairs(gpu, R, K, N, gelu):
        return paired(gpu, R, K, N, True, epilogue, gelu and not keeps_gelu(gpu, K), **tiles)
    return tiled(gpu, operation, R, K, N, (False, True), epilogue, **tiles)


def weight_gradient(gpu: GPU, R: int, K: int, N: int, **tiles: Any) -> Launch:
    """Parts of dweight, float32 (SPLITS, K, N) <- x (R, K), dy (R, N) in bfloat16."""
    return tiled(gpu, "weight gradient", K, N, R, (True, False), split=True, **tiles)


def weight_gradients(gpu: GPU, R: int, sizes: Sequence[tuple[int, int]], **tiles: Any) -> Launch:
    """As `weight_gradient`, of each of several layers, whose K and N are `sizes`: outs of all <- x and dy of the first,
    of the second, and so on. Together their tiles keep the multiprocessors busier than one by one. For GPUs with a copy
    engine.
    """
    tiles = TILES[gpu.family]["all"] | TILES[gpu.family].get("weight gradient", {}) | tiles
    several = [tiles["SPLITS"]] if "SPLITS" in tiles else range(1, min(16, triton.cdiv(R, 512)) + 1)
    programs, elements = tiles["programs"] * gpu.multiprocessors, sum(K * N for K, N in sizes)

    def shapes(BM: int) -> list[tuple[int, int, int, int]]:
        """Of each layer K, N, BN, and how many tiles it has."""
        widths = [width(N, tiles["BN"]) for _, N in sizes]
        return [(K, N, BN, triton.cdiv(K, BM) * triton.cdiv(N, BN)) for (K, N), BN in zip(sizes, widths, strict=True)]

    def seconds(choice: tuple[int, int]) -> float:
        BM, splits = choice
        rounds = triton.cdiv(sum(count for *_, count in shapes(BM)) * splits, programs)
        products = rounds * 2 * BM * tiles["BN"] * R / splits / (4.2e12 if BM == 64 else 6e12)
        return products + 4 * elements * (splits / 3e12 + (splits + 1) / 1.8e12 * (splits > 1))

    choices = [(BM, i) for BM, i in product((tiles["BM"], 64), several) if i == 1 or all(K % BM == 0 for K, _ in sizes)]
    BM, splits = min(choices, key=seconds)
    before = [0, *accumulate(count * splits for *_, count in shapes(BM))]
    flat = tuple(chain(*((*shape[:3], n) for shape, n in zip(shapes(BM), before, strict=False))))
    grid = (min(programs, before[-1]),)
    constants = {"R": R, "SHAPES": flat, "SPLITS": splits, "BM": BM, "PROGRAMS": grid[0]}
    return Launch(
        weight_gradients_kernel,
        grid,
        constants | {name: tiles[name] for name in ("BK", "GROUP", "SLICES")},
        tiles.get("warps", max(4, BM * tiles["BN"] // 4096)),
        tiles["stages"],
        flops=2 * R * elements,
        bytes=sum(2 * R * (K + N) + 4 * K * N for K, N in sizes),
        descriptors=3 * len(sizes),
        groups=(len(sizes), 2 * len(sizes)),
    )


def head(gpu: GPU, R: int, C: int, V: int, first: int = 0, **tiles: Any) -> Launch:
    """logits (R, V) <- x, of which these are R rows from the `first`, (any, C), table (V, C), all in bfloat16."""
    return tiled(gpu, "head", R, V, C, (False, True), first=(first, 0, 0), **tiles)


def head_input_gradient(gpu: GPU, R: int, C: int, V: int, first: int = 0, **tiles: Any) -> Launch:
    """R rows of dx (any, C) from the `first` <- dlogits (R, V), table (V, C), all in bfloat16."""
    return tiled(gpu, "head input gradient", R, C, V, first=(0, 0, first), **tiles)


def head_weight_gradient(
    gpu: GPU, R: int, C: int, V: int, rows: int, first: int = 0, add: bool = False, **tiles: Any
) -> Launch:
    """dtable (rows, C) in float32 <- dlogits (R, V), R rows of x (any, C) from the `first`, in bfloat16.

    With add, it is added to what is there.
    """
    epilogue, places = "add" if add else "none", (0, first, 0)
    return tiled(gpu, "head weight gradient", V, C, R, (True, False), epilogue, first=places, rows=rows, **tiles)


def parts_of_column_sums(R: int, N: int, parts: int) -> Launch:
    """Parts of the sums of columns, float32 (parts, N) <- x (R, N). One part is for few rows."""
    rows, columns = (triton.next_power_of_2(R), 512) if parts == 1 else (16, 128)
    constants = {"R": R, "N": N, "PARTS": parts, "ROWS": rows, "BN": columns}
    grid = (parts * triton.cdiv(N, columns),)
    return Launch(parts_of_column_sums_kernel, grid, constants, bytes=4 * R * N)  # mostly of float32


def column_sums(shapes: Sequence[tuple[int, int, int]]) -> Launch:
    """The sums of columns, `outs` vectors (N,) in float32 of each of several matrices <- x (R, outs * N) of each, which
    has at most 1,024 rows. 16 divides N. `shapes` has R, N and outs of each.
    """
    columns = 16  # few, so that there are many programs
    programs = [triton.cdiv(N * outs, columns) for _, N, outs in shapes]
    firsts = accumulate((outs for *_, outs in shapes), initial=0), accumulate(programs, initial=0)
    sizes = [(R, N) for R, N, _ in shapes] + [(0, 0)]
    flat = tuple(chain(*((R, N, out, program) for (R, N), out, program in zip(sizes, *firsts, strict=True))))
    rows = min(512, triton.next_power_of_2(max(R for R, *_ in shapes)))
    return Launch(
        column_sums_kernel,
        (sum(programs),),
        {"SHAPES": flat, "ROWS": rows, "BN": columns},
        warps=8,
        bytes=sum(4 * R * N * outs for R, N, outs in shapes),
        groups=(sum(outs for *_, outs in shapes), len(shapes)),
    )
