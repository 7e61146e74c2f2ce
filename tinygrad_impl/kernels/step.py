"""Kernels of one step of the model, a token of each row at a time: five for a layer.

A step is bound by reading the weights and by the number of kernels, each of which waits for the one before it. The five
are layer norm and c_attn, attention, c_proj, layer norm and c_fc, c_proj. Whoever writes a block of the residual stream
also writes the mean and the sum of squared deviations of the block; whoever normalises the stream combines them (Chan
et al. 1979), instead of reading it once more. From Hopper on a kernel begins while the one before it ends (graph.py),
and reads what does not depend on that one, its weights above all, before it waits for it. The same kernels add a prompt
to the cache, many tokens of a row at a time.

In the comments N is the number of rows of a batch, T of tokens of each, R = N * T, P = n_positions; the rest is as in
model.py.
"""

import triton
import triton.language as tl

from tinygrad_impl.kernels.draw import LEAST, key_of, logit_of
from tinygrad_impl.kernels.early import begin_next, wait


@triton.jit
def block_statistics(x, BLOCK: tl.constexpr):
    """x (ROWS, BLOCK) -> the mean and the sum of squared deviations of each row."""
    mean = tl.sum(x, 1) / BLOCK
    centred = x - mean[:, None]
    return mean, tl.sum(centred * centred, 1)


@triton.jit
def row_statistics(block_mean, square, blocks: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of rows from those of their blocks (ROWS, LANES), which are 0 past the last."""
    mean = tl.sum(block_mean, 1) / blocks
    centred = tl.where(tl.arange(0, block_mean.shape[1])[None, :] < blocks, block_mean - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(square + C // blocks * centred * centred, 1) / C + EPS)


@triton.jit
def asked_for(
    weight,
    gain,
    shift,
    n,
    K: tl.constexpr,
    NORM: tl.constexpr,
    W_ROW: tl.constexpr,
    W_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
):
    """Loads what `gemm` reads of the model before waiting for the kernel before; only for one row, where it fits."""
    w, g, s = 0, 0, 0
    if ROWS == 1:
        k = tl.arange(0, BK)
        w = tl.load(weight + k[:, None] * W_ROW + n[None, :] * W_COLUMN, mask=k[:, None] < K, other=0.0)
        if NORM:
            g, s = tl.load(gain + k, mask=k < K, other=0.0), tl.load(shift + k, mask=k < K, other=0.0)
    return w, g, s


@triton.jit
def gemm(
    x,
    means,
    squares,
    gain,
    shift,
    weight,
    asked,  # `asked_for` of the same
    r,
    n,
    K: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of x that have statistics of their own; 0: x is taken as it is
    EPS: tl.constexpr,
    W_ROW: tl.constexpr,  # element (k, n) of the weight lies at k * W_ROW + n * W_COLUMN
    W_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows r of layer_norm(x) or x (R, K) times columns n of the weight: float32 (ROWS, BN)."""
    k = tl.arange(0, BK)
    w, g, s = asked
    if ROWS == 1:  # it would fill no tensor core; all that is to be read is asked for before any of it is waited for
        begin_next(EARLY)
        a = tl.load(x + r * K + k, mask=k < K, other=0.0).to(tl.float32)
    if BLOCK:
        blocks: tl.constexpr = K // BLOCK
        b = tl.arange(0, triton.next_power_of_2(blocks))[None, :]
        place = r[:, None] * blocks + b
        block_mean = tl.load(means + place, mask=b < blocks, other=0.0)
        square = tl.load(squares + place, mask=b < blocks, other=0.0)
        mean, rstd = row_statistics(block_mean, square, blocks, K, EPS)
    if ROWS == 1:
        if BLOCK:
            # of one row; as scalars, so that a keeps the layout that it has
            a = ((a - tl.sum(mean, 0)) * tl.sum(rstd, 0) * g + s).to(weight.dtype.element_ty).to(tl.float32)
        total = tl.sum(a[:, None] * w.to(tl.float32), 0)[None, :]
    else:
        total = tl.zeros((ROWS, BN), tl.float32)
        for start in range(0, K, BK):
            a_tile = tl.load(x + r[:, None] * K + (start + k)[None, :])
            if BLOCK:
                a_tile = (a_tile - mean[:, None]) * rstd[:, None] * tl.load(gain + start + k)[None, :]
                a_tile += tl.load(shift + start + k)[None, :]
            w_tile = tl.load(weight + (start + k)[:, None] * W_ROW + n[None, :] * W_COLUMN)
            total = tl.dot(a_tile.to(w_tile.dtype), w_tile, total)
        if ROWS < 32:  # and not before; of more rows, they need the room that those of the next kernel would take
            begin_next(EARLY)
    return total


@triton.jit
def place_of(R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr):
    """This program's rows and columns of (R, N); the same, clamped to the last row and column; and which are inside."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    return r, n, tl.minimum(r, R - 1), tl.minimum(n, N - 1), (r[:, None] < R) & (n[None, :] < N)


@triton.jit
def embed_kernel(
    x,  # (R, C)
    means,  # (R, C / BN)
    squares,
    tokens,  # (R,)
    lengths,  # (N,): tokens that a row has in the cache
    wte,
    wpe,
    R: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
):
    r, n, row, _, inside = place_of(R, C, ROWS, BN)
    begin_next(EARLY)
    wait(EARLY)
    position = tl.minimum(tl.load(lengths + row // T) + row % T, P - 1)  # what is past the last is padding
    token = tl.load(tokens + row)
    total = tl.load(wte + token[:, None] * C + n[None, :]) + tl.load(wpe + position[:, None] * C + n[None, :])
    tl.store(x + r[:, None] * C + n[None, :], total, mask=inside)
    mean, square = block_statistics(total, BN)
    tl.store(means + r * (C // BN) + tl.program_id(0), mean, mask=r < R)
    tl.store(squares + r * (C // BN) + tl.program_id(0), square, mask=r < R)


@triton.jit
def qkv_kernel(
    q,  # (R, C)
    keys,  # (N, H, P, D)
    values,
    x,
    means,
    squares,
    gain,
    shift,
    weight,
    bias,
    lengths,
    R: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
):
    r, n, row, _, inside = place_of(R, 3 * C, ROWS, BN)
    asked = asked_for(weight, gain, shift, n, C, True, 3 * C, 1, ROWS, BK)
    b = tl.load(bias + n)[None, :]
    position = tl.load(lengths + row // T) + row % T  # which changes only after the last of a step's kernels
    wait(EARLY)
    total = gemm(x, means, squares, gain, shift, weight, asked, row, n, C, BLOCK, EPS, 3 * C, 1, ROWS, BN, BK, EARLY)
    total = (total + b).to(q.dtype.element_ty)
    c = n % C
    part = tl.program_id(0) * BN // C  # BN divides C
    slot = (
        (row // T).to(tl.int64)[:, None] * C * P + (c // D)[None, :] * P * D + position[:, None] * D + (c % D)[None, :]
    )
    kept = inside & (position < P)[:, None]
    if part == 0:
        tl.store(q + r[:, None] * C + c[None, :], total, mask=inside)
    elif part == 1:
        tl.store(keys + slot, total, mask=kept)
    else:
        tl.store(values + slot, total, mask=kept)


@triton.jit
def attention_kernel(
    y,  # (R, C)
    q,  # (R, C)
    keys,  # (N, H, P, D)
    values,
    lengths,
    T: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
    FEW: tl.constexpr,  # programs, beside which those of the next kernel have room
    EARLY: tl.constexpr,
):
    """softmax(q @ keys.T / sqrt(D)) @ values of ROWS tokens of a row, for one head, in blocks of what they see."""
    h, n, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * ROWS
    held = tl.load(lengths + n)
    wait(EARLY)
    if FEW:
        begin_next(EARLY)
    i, d, t = first + tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BT)
    place = ((n * T + tl.minimum(i, T - 1)) * H + h)[:, None] * D + d[None, :]
    query = tl.load(q + place)
    seen = tl.minimum(held + tl.minimum(first + ROWS, T), P)
    keys += (n.to(tl.int64) * H + h) * P * D
    values += (n.to(tl.int64) * H + h) * P * D
    largest, total = tl.full((ROWS,), -1e30, tl.float32), tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, D), tl.float32)
    for start in tl.range(0, seen, BT, num_stages=STAGES):
        s = start + t
        block, inside = s[:, None] * D + d[None, :], s[:, None] < seen
        k = tl.load(keys + block, mask=inside, other=0.0)
        v = tl.load(values + block, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(k)) * (1.4426950408889634 / D**0.5)  # for exp2
        scores = tl.where(s[None, :] <= (held + i)[:, None], scores, -1e30)  # (ROWS, BT)
        larger = tl.maximum(largest, tl.max(scores, 1))
        p, kept = tl.exp2(scores - larger[:, None]), tl.exp2(largest - larger)
        total = total * kept + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * kept[:, None])
        largest = larger
    tl.store(y + place, (out / total[:, None]).to(y.dtype.element_ty), mask=(i < T)[:, None])


@triton.jit
def residual_kernel(
    out,  # (R, C)
    means,  # (R, C / BN)
    squares,
    a,  # (R, K)
    weight,
    bias,
    x,  # (R, C)
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x + a @ weight + bias, and the statistics of its blocks."""
    r, n, row, _, inside = place_of(R, C, ROWS, BN)
    place = row[:, None] * C + n[None, :]
    asked = asked_for(weight, None, None, n, K, False, C, 1, ROWS, BK)
    b = tl.load(bias + n)[None, :]
    wait(EARLY)
    b += tl.load(x + place)
    total = b + gemm(a, None, None, None, None, weight, asked, row, n, K, 0, 0.0, C, 1, ROWS, BN, BK, EARLY)
    tl.store(out + place, total, mask=inside)
    mean, square = block_statistics(total, BN)
    tl.store(means + r * (C // BN) + tl.program_id(0), mean, mask=r < R)
    tl.store(squares + r * (C // BN) + tl.program_id(0), square, mask=r < R)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activations of model.py, as formulas.py has them. NaN stays NaN."""
    if ACTIVATION == "gelu_new":
        return x / (1 + tl.exp(-1.5957691216057308 * x * (1 + 0.044715 * x * x)))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(0.7071067811865476 * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(x < 0, 0.0, x)


@triton.jit
def expand_kernel(
    y,  # (R, N)
    x,
    means,
    squares,
    gain,
    shift,
    weight,
    bias,
    R: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The activation of layer_norm(x) @ weight + bias."""
    r, n, row, _, inside = place_of(R, N, ROWS, BN)
    asked = asked_for(weight, gain, shift, n, C, True, N, 1, ROWS, BK)
    b = tl.load(bias + n)[None, :]
    wait(EARLY)
    total = b + gemm(x, means, squares, gain, shift, weight, asked, row, n, C, BLOCK, EPS, N, 1, ROWS, BN, BK, EARLY)
    total = activated(total, ACTIVATION)
    tl.store(y + r[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def head_kernel(
    logits,  # (R, V)
    best,  # (R, blocks): of each block of tokens the largest key
    sums,  # and the sum of exp(logit - the largest)
    x,
    means,
    squares,
    gain,
    shift,
    wte,
    R: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EARLY: tl.constexpr,
):
    r, n, row, column, inside = place_of(R, V, ROWS, BN)
    asked = asked_for(wte, gain, shift, column, C, True, 1, C, ROWS, BK)
    wait(EARLY)
    total = gemm(x, means, squares, gain, shift, wte, asked, row, column, C, BLOCK, EPS, 1, C, ROWS, BN, BK, EARLY)
    tl.store(logits + r[:, None] * V + n[None, :], total, mask=inside)
    total = tl.where(n[None, :] < V, total, -float("inf"))
    largest = tl.max(tl.where(n[None, :] < V, key_of(total, n[None, :]), LEAST), 1)  # (ROWS,)
    total = tl.sum(tl.exp(total - logit_of(largest)[:, None]), 1)
    place = r * ((V + BN - 1) // BN) + tl.program_id(0)
    tl.store(best + place, largest, mask=r < R)
    tl.store(sums + place, total, mask=r < R)
