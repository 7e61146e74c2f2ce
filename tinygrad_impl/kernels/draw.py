"""Kernels that draw the next token of each row.

data/text/sampling.py defines how tokens are drawn. Here the same is computed in float64, in another order of summation;
where the order could matter, no token is drawn, and the host is asked to (`decode.Decoder.draw`).
"""

import triton
import triton.language as tl

from tinygrad_impl.kernels.early import wait

SORTED = 512  # logits that one program sorts
LEAST = tl.constexpr(-(2**63))  # less than any key
CLOSE = tl.constexpr(1e-11)  # shares of probability nearer to each other may be told apart wrongly: n * 2^-53 and some


@triton.jit
def key_of(logit, token):
    """int64 keys that sort tokens: a larger logit has a larger key, and of equal logits the lower token has."""
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
def largest_key(best, row, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    """The largest key of a row, and the largest key of each of its blocks (LANES,)."""
    b = tl.arange(0, LANES)
    keys = tl.load(best + row * BLOCKS + b, mask=b < BLOCKS, other=LEAST)
    return tl.max(keys, 0), keys


@triton.jit
def conclude(
    tokens, lengths, steps, drawn, chances, key, certain, best, sums, N, BLOCKS: tl.constexpr, LANES: tl.constexpr
):
    """Stores the token that a row has drawn, -1 if it is not certain, with its probability; it is the next token."""
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
    """How many the first `count` (LANES,) tokens of each part are together, or the sum of their shares."""
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
    """Draws a token for each row, step by step as `Sampler` does."""
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
