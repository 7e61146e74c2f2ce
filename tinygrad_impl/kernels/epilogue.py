"""What both GEMM kernels (matmul.py, pointers.py) do with a tile: which one it is, and what becomes of its sums."""

import triton
import triton.language as tl


@triton.jit
def rounded(x):
    """x to the 8 bits that bfloat16 keeps of it, in float32 (Veltkamp 1968): three additions and products, which take
    less time than a conversion there and back.
    """
    scaled = tl.fma(x, 65536.0, x)
    return scaled - (scaled - x)


@triton.jit
def gelu_and_slope(x):
    """gelu(x) = x sigmoid(z) with z = 2 sqrt(2 / pi) (x + 0.044715 x^3), its tanh form, and its derivative."""
    square = x * x
    root = tl.rsqrt(1 + tl.exp2(x * (-2.302208198 - 0.1029432397 * square)))  # exp(-z), z log2(e) in the constants
    sigmoid = root * root  # 1 / (1 + exp(-z)), without a division, which takes longer
    y = x * sigmoid
    return y, sigmoid + (y - y * sigmoid) * (1.5957691216 + 0.2140644488 * square)


@triton.jit
def place(tile, M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of a tile, in groups of GROUP rows of tiles, so that programs that run at the same time
    share what they read.
    """
    tiles_m: tl.constexpr = (M + BM - 1) // BM
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    group = tile // (GROUP * tiles_n)
    rows = min(tiles_m - group * GROUP, GROUP)
    return (group * GROUP + tile % (GROUP * tiles_n) % rows) * BM, tile % (GROUP * tiles_n) // rows * BN


@triton.jit
def described(
    outs, ins, out, M: tl.constexpr, N: tl.constexpr, OUT_ROWS: tl.constexpr, EPILOGUE: tl.constexpr,
    BM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tensor descriptors of what `finish` stores and reads: out, GELU, what GELU was given (or out, for those that the
    epilogue is without).
    """
    out_tiles = tl.make_tensor_descriptor(out, [OUT_ROWS, N], [N, 1], [BM, WIDTH])
    y_tiles, x_tiles = out_tiles, out_tiles
    if EPILOGUE == "gelu" or EPILOGUE == "gelu gradient":
        y_tiles = tl.make_tensor_descriptor(outs[1], [M, N], [N, 1], [BM, WIDTH])
    if EPILOGUE == "gelu gradient":
        x_tiles = tl.make_tensor_descriptor(ins[2], [M, N], [N, 1], [BM, WIDTH])
    return out_tiles, y_tiles, x_tiles


@triton.jit
def finish(
    total, outs, ins, out_tiles, y_tiles, x_tiles, part, m, n,
    M: tl.constexpr, N: tl.constexpr, EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Stores a tile (BM, BN) of sums, whose first row and column are m and n, and what the epilogue makes of it."""
    width: tl.constexpr = BN // SLICES
    slices = (total,) if SLICES == 1 else total.reshape(BM, 2, width).permute(0, 2, 1).split()
    for i in tl.static_range(SLICES):
        values = slices[i]
        column = n + i * width
        columns = column + tl.arange(0, width)
        if EPILOGUE == "bias" or EPILOGUE == "gelu":
            values += tl.load(ins[2] + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if EPILOGUE == "gelu":
            values = rounded(values)
            y, slope = gelu_and_slope(values)
            y_tiles.store([m, column], y.to(outs[1].dtype.element_ty))
        if EPILOGUE == "gelu gradient":
            x = x_tiles.load([m, column]).to(tl.float32)
            # x, but tied to values (which may be NaN): else Triton computes all of this twice, for y and for values
            y, slope = gelu_and_slope(tl.where(values == values, x, values))
            y_tiles.store([m, column], y.to(outs[1].dtype.element_ty))
            values *= slope
        if EPILOGUE == "add":  # by the memory itself; no two programs add to the same place
            out_tiles.atomic_add([m, column], values)
        else:
            out_tiles.store([part * M + m, column], values.to(outs[0].dtype.element_ty))
        if EPILOGUE == "gelu gradient":
            tl.store(outs[2] + m // BM * N + columns, tl.sum(values, 0), mask=columns < N)
