"""Generation, a token of each row at a time: few kernels per layer, and the drawing of the next token among them.

A step of the model is bound by reading the weights and by the number of kernels, each of which waits for the one before
it. So a layer is five: layer norm and c_attn, attention, c_proj, layer norm and c_fc, c_proj. Whoever writes a block of
the stream also writes the mean and the sum of squared deviations of the block; whoever normalises the stream combines
them (Chan et al. 1979), instead of reading it once more. From Hopper on a kernel begins while the one before it ends
(graph.py), and reads what does not depend on that one, its weights above all, before it waits for it. The same kernels
add a prompt to the cache, many tokens of a row at a time.

data/text/sampling.py defines how tokens are drawn. Here the same is computed in float64, in another order of summation;
where the order could matter, no token is drawn, and the host is asked to (`Decoder.draw`).

In the comments N is the number of rows of a batch, T of tokens of each, R = N * T, P = n_positions; the rest is as in
model.py.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import triton
import triton.language as tl
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.dtype import DType
from tinygrad.helpers import Context

from data.checkpoints.config import GPT2Config
from data.text.sampling import Sampler, probability
from tinygrad_impl.kernels import matmul
from tinygrad_impl.kernels.fused import new
from tinygrad_impl.kernels.launch import Launch, launch
from tinygrad_impl.model import GPT2

STEPS = 32  # tokens of a row that are drawn before the host looks at them
SORTED = 512  # logits that one program sorts
LEAST = tl.constexpr(-(2**63))  # less than any key
CLOSE = tl.constexpr(1e-11)  # shares of probability nearer to each other may be told apart wrongly: n * 2^-53 and some


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
def wait(EARLY: tl.constexpr):
    """Until the kernel before this one has ended, and so all before that. What they wrote is read after this."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def begin_next(EARLY: tl.constexpr):
    """Lets the next kernel begin, once all programs of this one have come here or ended."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


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
    """What `product` reads of the model, if it is little enough to be asked for before the wait: for one row."""
    w, g, s = 0, 0, 0
    if ROWS == 1:
        k = tl.arange(0, BK)
        w = tl.load(weight + k[:, None] * W_ROW + n[None, :] * W_COLUMN, mask=k[:, None] < K, other=0.0)
        if NORM:
            g, s = tl.load(gain + k, mask=k < K, other=0.0), tl.load(shift + k, mask=k < K, other=0.0)
    return w, g, s


@triton.jit
def product(
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
    """This program's rows and columns of (R, N); the same, but those past the last are the last; which are inside."""
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
    total = product(x, means, squares, gain, shift, weight, asked, row, n, C, BLOCK, EPS, 3 * C, 1, ROWS, BN, BK, EARLY)
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
    asked = asked_for(weight, a, a, n, K, False, C, 1, ROWS, BK)
    b = tl.load(bias + n)[None, :]
    wait(EARLY)
    b += tl.load(x + place)
    total = b + product(a, a, a, a, a, weight, asked, row, n, K, 0, 0.0, C, 1, ROWS, BN, BK, EARLY)
    tl.store(out + place, total, mask=inside)
    mean, square = block_statistics(total, BN)
    tl.store(means + r * (C // BN) + tl.program_id(0), mean, mask=r < R)
    tl.store(squares + r * (C // BN) + tl.program_id(0), square, mask=r < R)


@triton.jit
def gelu_kernel(
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
):
    """The tanh form of GELU of layer_norm(x) @ weight + bias."""
    r, n, row, _, inside = place_of(R, N, ROWS, BN)
    asked = asked_for(weight, gain, shift, n, C, True, N, 1, ROWS, BK)
    b = tl.load(bias + n)[None, :]
    wait(EARLY)
    total = b + product(x, means, squares, gain, shift, weight, asked, row, n, C, BLOCK, EPS, N, 1, ROWS, BN, BK, EARLY)
    g = total / (1 + tl.exp(-1.5957691216057308 * total * (1 + 0.044715 * total * total)))  # as functional.gelu has it
    tl.store(y + r[:, None] * N + n[None, :], g.to(y.dtype.element_ty), mask=inside)


@triton.jit
def key_of(logit, token):
    """Whole numbers in the order in which tokens are taken: the largest logit first, of equal ones the lowest token."""
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 and 0 are equal
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) + (0x7FFFFFFF - token)


@triton.jit
def logit_of(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def token_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


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
    total = product(x, means, squares, gain, shift, wte, asked, row, column, C, BLOCK, EPS, 1, C, ROWS, BN, BK, EARLY)
    tl.store(logits + r[:, None] * V + n[None, :], total, mask=inside)
    total = tl.where(n[None, :] < V, total, -float("inf"))
    largest = tl.max(tl.where(n[None, :] < V, key_of(total, n[None, :]), LEAST), 1)  # (ROWS,)
    total = tl.sum(tl.exp(total - logit_of(largest)[:, None]), 1)
    place = r * ((V + BN - 1) // BN) + tl.program_id(0)
    tl.store(best + place, largest, mask=r < R)
    tl.store(sums + place, total, mask=r < R)


@triton.jit
def largest_key(best, row, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    """Of a row, and those of its blocks: (LANES,)."""
    b = tl.arange(0, LANES)
    keys = tl.load(best + row * BLOCKS + b, mask=b < BLOCKS, other=LEAST)
    return tl.max(keys, 0), keys


@triton.jit
def conclude(
    tokens, lengths, steps, drawn, chances, key, certain, best, sums, N, BLOCKS: tl.constexpr, LANES: tl.constexpr
):
    """Keeps what a row has drawn, with its probability, and makes it the row's next token; -1 where it is uncertain."""
    row = tl.program_id(0)
    largest, keys = largest_key(best, row, BLOCKS, LANES)
    b = tl.arange(0, LANES)
    total = tl.load(sums + row * BLOCKS + b, mask=b < BLOCKS, other=0.0)
    top = logit_of(largest)
    total = tl.sum(tl.where(b < BLOCKS, total * tl.exp(logit_of(keys) - top), 0.0), 0)
    step = tl.load(steps + row)
    tl.store(drawn + step * N + row, tl.where(certain, token_of(key), -1))
    tl.store(chances + step * N + row, tl.exp(logit_of(key) - top) / total)
    tl.store(steps + row, step + 1)
    tl.store(tokens + row, token_of(key))
    tl.store(lengths + row, tl.load(lengths + row) + 1)


@triton.jit
def greedy_kernel(
    tokens,  # (N,)
    lengths,
    steps,  # how many tokens the row has drawn since the host looked
    drawn,  # (STEPS, N)
    chances,
    best,
    sums,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait(EARLY)
    key, _ = largest_key(best, tl.program_id(0), BLOCKS, LANES)
    conclude(tokens, lengths, steps, drawn, chances, key, True, best, sums, N, BLOCKS, LANES)


@triton.jit
def sort_kernel(
    keys,  # (N, parts, SIZE): the largest first
    shares,  # their exp((logit - largest) / temperature), added up from the first of the part on
    logits,  # (N, V)
    best,
    settings,  # temperature, top-k or 0, top-p or 1
    V: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    EARLY: tl.constexpr,
):
    row, i = tl.program_id(1), tl.arange(0, SIZE)
    wait(EARLY)
    token = tl.program_id(0) * SIZE + i
    largest, _ = largest_key(best, row, BLOCKS, LANES)
    logit = tl.load(logits + row * V + token, mask=token < V, other=0.0)
    key = tl.sort(tl.where(token < V, key_of(logit, token), LEAST), descending=True)
    below = logit_of(key).to(tl.float64) - logit_of(largest).to(tl.float64)
    share = tl.where(key == LEAST, 0.0, tl.exp(below / tl.load(settings)))
    place = (row * tl.num_programs(0) + tl.program_id(0)) * SIZE + i
    tl.store(keys + place, key)
    tl.store(shares + place, tl.cumsum(share, 0))


@triton.jit
def measure(shares, count, COUNT: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr):
    """How many tokens the first count (LANES,) of each part are, or their share."""
    part = tl.arange(0, LANES)
    if COUNT:
        total = tl.sum(count, 0).to(tl.float64)
    else:
        total = tl.sum(tl.load(shares + part * SIZE + count - 1, mask=count > 0, other=0.0), 0)
    return total


@triton.jit
def find(keys, shares, first, last, target, COUNT: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr):
    """The first token, the likeliest before the others, with which the measure exceeds the target.

    It is looked for among those from `first` to before `last` (LANES,) of each part. Returns its key, the measure
    before it and with it, how many of each part come before it, and which part it is of: a quickselect.
    """
    part = tl.arange(0, LANES)
    key, before, through = tl.full((), LEAST, tl.int64), target * 0, target * 0
    owner = tl.zeros((LANES,), tl.int32)
    widest = tl.max(last - first, 0)
    while widest > 0:
        # the pivot is the middle one of the part in which most are left
        owner = (part == tl.argmax(last - first, 0)).to(tl.int32)
        middle = tl.sum(tl.where(owner > 0, (first + last - 1) // 2, 0), 0)
        key = tl.load(keys + tl.sum(tl.where(owner > 0, part, 0), 0) * SIZE + middle)
        low, high = first, last  # of each part, how many are larger
        while widest > 0:
            half_way = (low + high) // 2
            left = low < high
            larger = tl.load(keys + part * SIZE + half_way, mask=left, other=LEAST) > key
            low, high = tl.where(left & larger, half_way + 1, low), tl.where(left & (larger == 0), half_way, high)
            widest //= 2
        before = measure(shares, low, COUNT, SIZE, LANES)
        through = measure(shares, low + owner, COUNT, SIZE, LANES)
        if before > target:
            last = low
        elif through <= target:
            first = low + owner
        else:
            first, last = low, low  # found
        widest = tl.max(last - first, 0)
    return key, before, through, first, owner


@triton.jit
def draw_kernel(
    tokens,
    lengths,
    steps,
    drawn,
    chances,
    best,
    sums,
    keys,
    shares,
    numbers,  # (STEPS, N), from 0 to below 1
    settings,
    N: tl.constexpr,
    V: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PART_LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What `Sampler` does, line by line."""
    row, part = tl.program_id(0), tl.arange(0, PART_LANES)
    wait(EARLY)
    keys += row * PARTS * SIZE
    shares += row * PARTS * SIZE
    top_k, top_p = tl.load(settings + 1), tl.load(settings + 2)
    first = tl.zeros((PART_LANES,), tl.int32)
    last = tl.maximum(tl.minimum(V - part * SIZE, SIZE), 0)
    if top_k > 0:
        _, _, _, count, owner = find(keys, shares, first, last, tl.minimum(top_k, V) - 1, True, SIZE, PART_LANES)
        last = count + owner
    total = measure(shares, last, False, SIZE, PART_LANES)
    kept, certain = total, total > 0
    if top_p < 1:
        target = top_p * total
        _, before, kept, count, owner = find(keys, shares, first, last, target, False, SIZE, PART_LANES)
        certain = (target - before > total * CLOSE) & (kept - target > total * CLOSE)
        last = count + owner
    target = tl.load(numbers + tl.load(steps + row) * N + row) * kept
    key, before, through, _, _ = find(keys, shares, first, last, target, False, SIZE, PART_LANES)
    certain = certain & (target - before > total * CLOSE) & (through - target > total * CLOSE)
    conclude(tokens, lengths, steps, drawn, chances, key, certain, best, sums, N, BLOCKS, LANES)


@triton.jit
def copy_kernel(copies, weights, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):  # a program's block is one weight's
        if (block >= 0) & (block < tl.cdiv(SIZES[i], BLOCK)):
            place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = place < SIZES[i]
            tl.store(copies[i] + place, tl.load(weights[i] + place, mask=inside).to(tl.bfloat16), mask=inside)
        block -= tl.cdiv(SIZES[i], BLOCK)


def copies(sizes: Sequence[int]) -> Launch:
    """As many bfloat16 copies <- weights float32 of these sizes.

    It takes a third of the time that tinygrad's kernels do.
    """
    n, block = len(sizes), 4096
    grid = (sum(triton.cdiv(size, block) for size in sizes),)
    constants = {"SIZES": tuple(sizes), "BLOCK": block}
    return Launch(copy_kernel, grid, constants, 8, bytes=6 * sum(sizes), groups=(n, n))


class Launches:
    """The kernels for R = N * T tokens of a model's sizes, by what they do."""

    def __init__(self, config: GPT2Config, N: int, T: int, V: int):
        P, C, H = config.n_positions, config.n_embd, config.n_head
        R, one = N * T, N * T == 1
        early = {"EARLY": matmul.capability >= 90}  # what has the instructions
        stages = 4 if 90 <= matmul.capability < 120 else 2  # as much as fits into shared memory
        # rows of a program: a tensor core takes 16 or more; few, to have programs enough, while there are few in all
        tall = 1 if one else min(64, max(16, triton.next_power_of_2(R)))
        rows = tall if R > 64 else min(tall, 32)
        block = 16 if R <= 64 else 64  # columns of the stream that have statistics of their own
        wide = 32 if one else 16 if R <= 16 else 64 if R <= 64 else math.gcd(C, 128)
        self.R, self.C, self.blocks = R, C, C // block

        def linear(kernel: Any, reads: int, columns: int, writes: int, rows: int = rows, **constants: Any) -> Launch:
            deep = triton.next_power_of_2(reads) if one else math.gcd(reads, min(256, 8192 // columns))
            warps = min(16, max(2, deep * columns // 8192)) if one else 8 if rows * columns >= 4096 else 4
            constants |= {"R": R, "C": C, "ROWS": rows, "BN": columns, "BK": deep} | early
            grid = triton.cdiv(writes, columns), triton.cdiv(R, rows)
            return Launch(kernel, grid, constants, warps, stages, bytes=2 * reads * writes)

        sizes = {"T": T, "P": P}
        norm: dict[str, Any] = {"EPS": config.layer_norm_epsilon, "BLOCK": block}
        embed = sizes | early | {"R": R, "C": C, "ROWS": rows, "BN": block}
        self.embed = Launch(embed_kernel, (C // block, triton.cdiv(R, rows)), embed, 1)
        self.qkv = linear(qkv_kernel, C, wide, 3 * C, **sizes, **norm, D=C // H)
        tokens = min(32, max(16, triton.next_power_of_2(T)))
        attention = sizes | early | {"H": H, "D": C // H, "ROWS": tokens, "STAGES": 3, "FEW": one}
        attention |= {"BT": 128 if one else 64}
        self.attention = Launch(attention_kernel, (H, N, triton.cdiv(T, tokens)), attention)
        self.project = linear(residual_kernel, C, block, C, K=C)
        self.gelu = linear(gelu_kernel, C, wide, 4 * C, **norm, N=4 * C)
        self.contract = linear(residual_kernel, 4 * C, block, C, K=4 * C)
        self.head = linear(head_kernel, C, 16 if one else 128, V, tall, **norm, V=V)
        blocks = self.head.grid[0]
        drawing = early | {"BLOCKS": blocks, "LANES": triton.next_power_of_2(blocks)}
        self.greedy = Launch(greedy_kernel, (N,), {"N": N} | drawing, warps=8)
        parts = triton.cdiv(V, SORTED)
        drawing = drawing | {"V": V, "SIZE": SORTED}
        self.sort = Launch(sort_kernel, (parts, N), drawing)
        drawing = drawing | {"N": N, "PARTS": parts, "PART_LANES": triton.next_power_of_2(parts)}
        self.draw = Launch(draw_kernel, (N,), drawing)


class Weights:
    """A model's matrices in bfloat16, as of the last `update`."""

    def __init__(self, model: GPT2):
        self.model = model
        layers = [(b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj) for b in model.h]
        self.sources = [model.wte.weight, *(linear.weight for layer in layers for linear in layer)]
        self.copies = [Tensor.empty(*weight.shape, dtype=dtypes.bfloat16).realize() for weight in self.sources]
        self.wte, rest = self.copies[0], iter(self.copies[1:])
        self.layers = list(zip(rest, rest, rest, rest, strict=True))
        self.update = TinyJit(self._update)

    def _update(self) -> None:
        layer, written = len(self.layers[0]), list[Tensor]()
        for first in (0, *range(1, len(self.copies), layer)):  # the table of tokens, then layer by layer
            group = slice(first, first + layer if first else 1)
            kernel = copies([weight.numel() for weight in self.sources[group]])
            written += launch(kernel, self.copies[group], *self.sources[group])
        Tensor.realize(*written)


class Decoder:
    """A model with the cache of N rows, and the compiled graphs that work on it. What changes from token to token stays
    on the GPU, so that one step follows the other without the host. A prompt comes in chunks of so many tokens; V are
    the tokens to draw from, the first of the model's.
    """

    def __init__(self, weights: Weights, N: int, chunk: int, V: int):
        self.weights, self.model, self.N = weights, weights.model, N
        c = self.model.config
        self.one, self.many = Launches(c, N, 1, V), Launches(c, N, chunk, V)

        def zeros(*shape: int, dtype: DType) -> Tensor:
            return Tensor.zeros(*shape, dtype=dtype).contiguous().realize()

        cache = N, c.n_head, c.n_positions, c.n_embd // c.n_head
        self.keys = [zeros(*cache, dtype=dtypes.bfloat16) for _ in range(c.n_layer)]
        self.values = [zeros(*cache, dtype=dtypes.bfloat16) for _ in range(c.n_layer)]
        self.tokens, self.lengths, self.steps = (zeros(N, dtype=dtypes.int32) for _ in range(3))
        self.prompt = zeros(N, chunk, dtype=dtypes.int32)
        self.logits = zeros(N, V, dtype=dtypes.float32)
        self.numbers, self.settings = zeros(STEPS, N, dtype=dtypes.float64), zeros(3, dtype=dtypes.float64)
        self.drawn, self.chances = zeros(STEPS, N, dtype=dtypes.int32), zeros(STEPS, N, dtype=dtypes.float32)
        self.prefill, self.greedy, self.sampled = map(TinyJit, (self._prefill, self._greedy, self._sampled))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Adds tokens (N, chunk) to the cache, after the `lengths` (N,) tokens that each row has there."""
        write(self.prompt, tokens)
        write(self.lengths, lengths)
        self.prefill()

    def draw(
        self, tokens: np.ndarray, lengths: np.ndarray, most: int, sampler: Sampler
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What comes after tokens (N,), which are each row's next after `lengths` in the cache: the tokens drawn, and
        their probabilities, both (N,), step by step, at most so many.
        """
        count = min(most, STEPS) if type(sampler) is Sampler else 1
        drawn, chances = self.run(tokens, lengths, count, sampler)
        for i in range(count):
            if type(sampler) is not Sampler or drawn[i].min() < 0:  # it has to see the logits, those of this step
                self.run(drawn[i - 1] if i else tokens, lengths + i, 1, sampler)
                logits = read(self.logits)
                token = sampler(logits)
                yield token, np.array([probability(*row) for row in zip(logits, token, strict=True)])
                return
            sampler.random.random(self.N)  # now they are used up
            yield drawn[i], chances[i]

    def run(
        self, tokens: np.ndarray, lengths: np.ndarray, count: int, sampler: Sampler
    ) -> tuple[np.ndarray, np.ndarray]:
        """So many steps: the tokens drawn, or -1 where it is not certain which, and their probabilities, (count, N)."""
        write(self.tokens, tokens)
        write(self.lengths, lengths)
        write(self.steps, np.zeros(self.N))
        step = self.greedy
        if type(sampler) is Sampler and sampler.temperature > 0:
            step = self.sampled
            write(self.settings, np.array([sampler.temperature, sampler.top_k or 0, sampler.top_p or 1]))
            write(self.numbers, deepcopy(sampler.random).random((STEPS, self.N)))
        with Context(JIT_BATCH_SIZE=0):  # a step is one CUDA graph
            for _ in range(count):
                step()
        return read(self.drawn)[:count], read(self.chances)[:count]

    def _prefill(self) -> None:
        *_, changed = self.layers(self.prompt, self.many)
        Tensor.realize(*changed)

    def _greedy(self) -> None:
        best, sums, changed = self.head()
        outs = [self.tokens, self.lengths, self.steps, self.drawn, self.chances]
        Tensor.realize(*launch(self.one.greedy, outs, best, sums), *changed)

    def _sampled(self) -> None:
        best, sums, changed = self.head()
        k = self.one
        sizes = self.N, k.sort.grid[0], SORTED
        outs = [new(best, *sizes, dtype=dtypes.int64), new(best, *sizes, dtype=dtypes.float64)]
        keys, shares = launch(k.sort, outs, changed[-1], best, self.settings)
        outs = [self.tokens, self.lengths, self.steps, self.drawn, self.chances]
        drawn = launch(k.draw, outs, best, sums, keys, shares, self.numbers, self.settings)
        Tensor.realize(*drawn, *changed)

    def head(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The largest logits and the sums of each block of tokens, and whatever else a step changes, logits last."""
        k, norm = self.one, self.model.ln_f
        x, means, squares, changed = self.layers(self.tokens, k)
        blocks = self.N, k.head.grid[0]
        outs = [self.logits, new(x, *blocks, dtype=dtypes.int64), new(x, *blocks, dtype=dtypes.float32)]
        logits, best, sums = launch(k.head, outs, x, means, squares, norm.weight, norm.bias, self.weights.wte)
        return best, sums, [*changed, logits]

    def layers(self, tokens: Tensor, k: Launches) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The stream (R, C) after the last layer, with its statistics, and the keys and values."""
        model, changed = self.model, list[Tensor]()

        def stream() -> list[Tensor]:
            sizes = (k.R, k.C), (k.R, k.blocks), (k.R, k.blocks)
            return [new(tokens, *size, dtype=dtypes.float32) for size in sizes]

        x = launch(k.embed, stream(), tokens, self.lengths, model.wte.weight, model.wpe.weight)
        for i, (block, (c_attn, attn_proj, c_fc, mlp_proj)) in enumerate(
            zip(model.h, self.weights.layers, strict=True)
        ):
            ln_1, ln_2, attn, mlp = block.ln_1, block.ln_2, block.attn, block.mlp
            outs = [new(tokens, k.R, k.C), self.keys[i], self.values[i]]
            norm = ln_1.weight, ln_1.bias
            q, keys, values = launch(k.qkv, outs, *x, *norm, c_attn, attn.c_attn.bias, self.lengths)
            changed += [keys, values]
            [y] = launch(k.attention, [new(tokens, k.R, k.C)], q, keys, values, self.lengths)
            x = launch(k.project, stream(), y, attn_proj, attn.c_proj.bias, x[0])
            [g] = launch(k.gelu, [new(tokens, k.R, 4 * k.C)], *x, ln_2.weight, ln_2.bias, c_fc, mlp.c_fc.bias)
            x = launch(k.contract, stream(), g, mlp_proj, mlp.c_proj.bias, x[0])
        return x[0], x[1], x[2], changed


def write(tensor: Tensor, values: np.ndarray) -> None:
    """Overwrites a tensor's memory, in a hundredth of the time that assigning to it takes."""
    buffer = tensor.uop.buffer
    dtype = np.dtype(tensor.dtype.fmt)
    buffer.allocator._copyin(buffer._buf, memoryview(bytearray(np.ascontiguousarray(values, dtype).tobytes())))


def read(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor's memory."""
    buffer, values = tensor.uop.buffer, np.empty(tensor.shape, tensor.dtype.fmt)
    buffer.allocator._copyout(memoryview(values.data).cast("B"), buffer._buf)
    return values
