"""GPT-2's operations in tinygrad's own: what each computes, with a gradient where tinygrad's own would not do.

They are written to lose no more digits than PyTorch does: sums in blocks instead of one long running sum, GEMMs rounded
once, and a derivative of GELU without cancellation. `contiguous` stands where fusing on would compute the same thing
many times over. `dtype` is what GEMMs run in, None being that of their operands; all else is at least float32.

In the comments B is the batch, T the sequence length, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import AxisType, KernelInfo, UOp

from tinygrad_impl import cpu, cpu_attention

VOCAB_TILE = 128  # 50257 = 29 * 1733 has no factor to tile by; 393 * 128 = 50304 has many
ROWS = 64  # of a block: what is summed over more rows than that, as gradients of parameters are, is so in blocks

Gradient = Callable[[UOp, UOp], tuple[UOp | None, ...]]  # of a call: from its output's, those of its sources


def cast(x: Tensor, dtype: DType | None) -> Tensor:
    """x in the dtype that GEMMs run in."""
    return x if dtype is None else x.cast(dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """x unless it is of 16 bits: for arithmetic that bfloat16 is too coarse for."""
    return x.float() if x.dtype in (dtypes.bfloat16, dtypes.half) else x


def is_cpu(x: Tensor | UOp) -> bool:
    return str(x.device).startswith("CPU")


def embedding(tokens: Tensor, weight: Tensor, gradient: Gradient | None = None) -> Tensor:
    """The rows of weight (V, C) that tokens (B, T) name: (B, T, C). `gradient` takes the place of `_add_rows`."""
    table, index = weight.as_param(0), tokens.as_param(1)
    one_hot = Tensor.arange(weight.shape[0]) == index.unsqueeze(-1)  # becomes a plain gather
    rows = one_hot.unsqueeze(-1).where(table, 0).sum(-2, dtype=weight.dtype)
    return Tensor.call(weight, tokens, fxn=rows, grad_fxn=gradient or _embedding_gradient)


def _embedding_gradient(gradient: UOp, call: UOp) -> tuple[UOp, None]:
    """gradient (B, T, C) -> that of the table (V, C). tinygrad's own multiplies by the one-hot, V times the work."""
    weight, tokens = call.src[1:]
    total = Tensor.zeros(*weight.shape, dtype=gradient.dtype, device=weight.device).contiguous().uop
    rows = gradient.reshape((tokens.numel(), weight.shape[1])).contiguous()  # (B*T, C)
    index = tokens.reshape((tokens.numel(),)).contiguous()  # (B*T,)
    return total.custom_kernel(index, rows, fxn=partial(_add_rows, on_cpu=is_cpu(weight)))[0], None


def _add_rows(total: UOp, index: UOp, rows: UOp, on_cpu: bool) -> UOp:
    """The kernel total[index[i]] += rows[i], in the order of i, so that a sum is the same in every run.

    total (V, C), index (N,), rows (N, C). A thread owns a column: no two write to the same place.
    """
    width = math.gcd(total.shape[1], 32)
    block = UOp.range(total.shape[1] // width, 0, AxisType.WEAK if on_cpu else AxisType.GLOBAL)
    lane = UOp.range(width, 1, AxisType.WEAK if on_cpu else AxisType.LOCAL)
    i = UOp.range(rows.shape[0], 2, AxisType.LOOP)
    column = block * width + lane
    row = index[i].load().clip(0, total.shape[0] - 1).cast(dtypes.weakint)  # known bounds spare an index check
    cell = total.after(i).index(row, column)  # `after(i)`: read anew each time round
    stored = cell.store(cell.load() + rows[i, column].load())
    return stored.end(i, lane, block).sink(arg=KernelInfo(name="embedding_gradient", opts_to_apply=()))


def long_sum(x: Tensor) -> Tensor:
    """x.sum(-1) in stages: (..., any) -> (...). What is divided by it gets its rounding error, which one long running
    sum would let grow with the number of terms.
    """
    return partial_sums(x, 16).sum(-1)


def partial_sums(x: Tensor, most: int) -> Tensor:
    """Sums of parts of x, of which there are at most `most` (16 or more): (..., any) -> (..., parts)."""
    while x.shape[-1] > most:
        x = x.pad((*[None] * (x.ndim - 1), (0, -x.shape[-1] % 16)))
        x = x.reshape(*x.shape[:-1], 16, -1).sum(-2).contiguous()  # not of 16 neighbours: columns are for vectors
    return x


def for_rows(p: Tensor, x: Tensor) -> Tensor:
    """p (M,) for each row of x (..., any): (..., M). Its gradient is summed in blocks of rows, then over the blocks."""
    *outer, _ = x.shape
    R, M = math.prod(outer), p.shape[-1]
    if R <= ROWS or p.dtype.itemsize < 4:  # the sums of blocks would be rounded to 16 bits
        return p
    if is_cpu(x) and p.dtype in cpu.TYPES:
        return Tensor.call(p, fxn=p.as_param(0).expand(*outer, M), grad_fxn=_column_sums)
    blocks = -(-R // ROWS)
    p = p.expand(blocks, 1, M).contiguous_backward().expand(blocks, ROWS, M)
    return p.reshape(blocks * ROWS, M)[:R].reshape(*outer, M)


def _column_sums(gradient: UOp, call: UOp) -> tuple[UOp]:
    """gradient (..., M) -> its sum over all rows: (M,)."""
    return (cpu.column_sums(Tensor(gradient).reshape(-1, gradient.shape[-1])).uop,)


def linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: DType | None = None) -> Tensor:
    """x (..., in) @ weight [in, out] + bias [out]: (..., out)."""
    x, weight, bias = cast(x, dtype).contiguous(), cast(weight, dtype).contiguous(), cast(bias, dtype)
    if at_least_float32(x).dtype == x.dtype:
        y = blocked_matmul(x, weight) + for_rows(bias, x)
    else:  # rounded to 16 bits once, after the bias; and its gradient given, so that all products are of 16 bits
        y = (x.matmul(weight, dtype=dtypes.float32) + bias).detach().cast(x.dtype)
        y = Tensor.call(x, weight, bias, y, fxn=y.as_param(3), grad_fxn=_linear_gradient)
    return y.contiguous_backward()  # three kernels read its gradient: those of x, weight and bias


def _linear_gradient(gradient: UOp, call: UOp) -> tuple[UOp, UOp, UOp, None]:
    """gradient (..., out) -> those of x, weight and bias."""
    dy, x, weight = map(Tensor, (gradient, *call.src[1:3]))
    rows, drows = (t.reshape(-1, t.shape[-1]) for t in (x, dy))  # (R, in), (R, out)
    return (dy @ weight.T).uop, (rows.T @ drows).uop, drows.sum(0).uop, None


def blocked_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) @ weight [in, out], with sums of 128 products or so, in it and in its gradients, then added up, as
    PyTorch's libraries do it: in one long running sum the rounding error grows with its length.
    """
    *outer, K = x.shape
    M, R = weight.shape[1], math.prod(outer)
    if is_cpu(x):
        return cpu.gemm(x.reshape(R, K), weight).reshape(*outer, M)
    r = min(R, ROWS)
    k, m = (math.gcd(size, 128) if size > 256 else size for size in (K, M))  # of a block; blocks are first below
    x = x.reshape(R, K).pad(((0, -R % r), None))
    x = x.reshape(-1, r, K // k, 1, k).permute(0, 2, 3, 1, 4).expand(-1, -1, M // m, -1, -1)
    weight = weight.reshape(1, K // k, k, M // m, m).permute(0, 1, 3, 2, 4).expand(x.shape[0], -1, -1, -1, -1)
    # Each by itself, and so its gradients: the sum over blocks comes after it, and what the caller adds to the product
    # does not become the first term of a sum, in which the others would lose their digits.
    y = (x.contiguous_backward() @ weight.contiguous_backward()).contiguous()  # (R / r, K / k, M / m, r, m)
    y = y.sum(1, keepdim=True)
    return y.permute(0, 3, 1, 2, 4).reshape(-1, M)[:R].reshape(*outer, M)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of x (..., C) over C, with sums in blocks: over rows, and on a CPU over a wide row too."""
    C = x.shape[-1]
    if C <= 256 or not is_cpu(x):
        y = x.layernorm(eps=eps)
    else:
        blocks = x.reshape(*x.shape[:-1], -1, math.gcd(C, 128))  # (..., C / c, c)

        def mean(t: Tensor) -> Tensor:
            total = t.sum(-1, keepdim=True).contiguous().sum(-2, keepdim=True)
            return (total / C).expand(*t.shape[:-1], 1).contiguous_backward()  # (..., C / c, 1)

        centred = blocks - mean(blocks)
        y = (centred * (mean(centred.square()) + eps).rsqrt()).reshape(x.shape)
    return y * for_rows(weight, x) + for_rows(bias, x)


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016).

    Its derivative is given here, sigmoid'(z) being exp(-|z|) / (1 + exp(-|z|))^2. tinygrad's own has 1 - sigmoid in it,
    of which few digits are left where the sigmoid is near 1.
    """
    x, dtype, k = at_least_float32(x), x.dtype, 2 * math.sqrt(2 / math.pi)
    z = k * (x + 0.044715 * x * x * x)
    sigmoid, far = z.sigmoid(), (-z.abs()).exp()
    slope = sigmoid + x * (k * (1 + 3 * 0.044715 * x * x)) * far / (1 + far).square()
    y = x * sigmoid
    return (y.detach() + (x - x.detach()) * slope.detach()).cast(dtype)  # y, with slope as its derivative


# (1 + 2 z) exp(z^2) erfc(z) for z >= 0 as powers of t = (z - 3.75) / (z + 3.75), in which it is smooth (Shepherd &
# Laframboise 1981): its Chebyshev interpolant of degree 22, whose error is that of float64's rounding.
ERFC = (
    *(1.2375126308378275, -0.14024059858554525, 0.0035854154854790257, 0.08227673848999506, -0.10880393014244462),
    *(0.09230432116428125, -0.05869339857664934, 0.02836227737211114, -0.009746579683265262, 0.0017556261651970652),
    *(0.000293714378044958, -0.00029015535246077655, 5.164652974177416e-05, 2.2387565714911816e-05),
    *(-1.1438048033346894e-05, -9.792625707303523e-07, 1.7419821586224816e-06, -5.084465378687302e-08),
    *(-2.4857126248016745e-07, 1.879082322370048e-08, 3.197926671666804e-08, -1.9551358868985616e-09),
    -2.623107347133476e-09,
)
# erf(z) / z in powers of z^2: Maclaurin's series, without the factor 2 / sqrt(pi)
ERF = tuple((-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(15))


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The sum of coefficients[n] x^n, by Horner's rule."""
    total: Any = 0
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


def gelu_erf(x: Tensor) -> Tensor:
    """x Phi(x), where Phi is the normal distribution's (Hendrycks & Gimpel 2016); its derivative is Phi(x) + x Phi'(x).

    Phi(x) = (1 + erf(x / sqrt(2))) / 2, whose digits would cancel far below 0: there it is computed from erfc, and near
    0 from erf's series. tinygrad's own erf has 7 digits, too few for float64.
    """
    x, dtype = at_least_float32(x), x.dtype
    half, z = x.square() / 2, x.abs() * math.sqrt(0.5)
    density = (-half).exp() / math.sqrt(2 * math.pi)
    tail = (-half).exp() * polynomial(1 - 7.5 / (z + 3.75), ERFC) / (2 + 4 * z)  # Phi(-|x|)
    near = 0.5 + x * polynomial(half, ERF) / math.sqrt(2 * math.pi)
    phi = (z < 0.75).where(near, (x < 0).where(tail, 1 - tail))
    y, slope = x * phi, phi + x * density
    return (y.detach() + (x - x.detach()) * slope.detach()).cast(dtype)  # y, with slope as its derivative


def relu(x: Tensor) -> Tensor:
    """max(x, 0), whose derivative at 0 is 0. NaN stays NaN, as in PyTorch, or else a model of NaN would go unseen."""
    return (x > 0).where(x, x.isnan().where(x, 0))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dtype: DType | None = None,
) -> Tensor:
    """softmax(q @ k.T / sqrt(D)) @ v for q, k, v (B, H, T, D); the scores and their softmax are at least float32.

    With attn_mask, bool (B, 1, T, S), k and v are (B, H, S, D), of which a query takes those where it is true.
    """
    q, k, v = (cast(t, dtype).contiguous().contiguous_backward() for t in (q, k, v))
    if is_cpu(q) and is_causal and q.dtype in cpu.TYPES:
        return cpu_attention.attention(q, k, v)
    scores = q.matmul(k.transpose(-2, -1), dtype=at_least_float32(q).dtype) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    if is_causal:
        seen = Tensor.ones(*scores.shape[-2:], dtype=dtypes.bool).tril()
        scores = seen.where(scores, -math.inf)
    if attn_mask is not None:
        scores = attn_mask.where(scores, -math.inf)
    return scores.softmax(-1).cast(v.dtype).contiguous() @ v


def lm_head(x: Tensor, weight: Tensor, dtype: DType | None = None) -> Tensor:
    """x (B, T, C) @ weight (V, C).T: logits (B, T, V rounded up to VOCAB_TILE), those past V being -inf.

    -inf is what makes the padding invisible: its probability and its gradient are exactly zero.
    """
    B, T, C = x.shape
    V = weight.shape[0]
    tiles = -(-V // VOCAB_TILE)
    if is_cpu(x):
        rows, table = (at_least_float32(cast(t, dtype)) for t in (x.reshape(B * T, C), weight))
        logits = cpu.head(rows, table, tiles * VOCAB_TILE).cast(cast(weight, dtype).dtype)
        return logits.reshape(B, T, -1).contiguous_backward()
    # `contiguous_backward`: the gradient too is tiled, and added to the embedding's only then
    table = cast(weight, dtype).pad(((0, tiles * VOCAB_TILE - V), None)).contiguous().contiguous_backward()
    if dtype is not None:  # the rounding of 16 bits is larger than the error of a long sum
        logits = (cast(x, dtype).contiguous() @ table.T).contiguous()
    elif B * T <= ROWS:  # as in generation, where a long running sum would cost the likeliest token most digits
        logits = blocked_matmul(x, table.T).contiguous()
    else:
        # The gradient of x is then a sum over the tiles, and that of the table one over blocks of r rows.
        r = min(B * T, max(2 * ROWS, -(-B * T // 16)))  # each block has a gradient of the whole table: 16 at most
        x = x.reshape(B * T, C).pad(((0, -(B * T) % r), None)).reshape(1, -1, r, C)
        x = x.expand(tiles, -1, -1, -1).contiguous_backward()
        table = table.reshape(tiles, 1, VOCAB_TILE, C).expand(-1, x.shape[1], -1, -1).contiguous_backward()
        logits = (x @ table.transpose(2, 3)).contiguous()  # (tiles, B*T / r, r, VOCAB_TILE)
        logits = logits.permute(1, 2, 0, 3).reshape(-1, tiles * VOCAB_TILE)[: B * T].reshape(B, T, -1)
    real = Tensor.arange(tiles * VOCAB_TILE) < V
    return real.where(logits.contiguous_backward(), -math.inf)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, reduction: str = "mean") -> Tensor:
    """logits (B, T, any), targets (B, T) -> -log softmax(logits)[target]: its mean over the targets but ignore_index,
    or with the reduction "none" of each target (B, T), 0 where that is ignore_index.
    """
    logits = at_least_float32(logits)
    index = Tensor.arange(logits.shape[-1])
    chosen = (index == targets.unsqueeze(-1)).where(logits, 0).sum(-1)  # (B, T)
    largest = logits.max(-1, keepdim=True).detach()  # (B, T, 1)
    nll = long_sum((logits - largest).exp()).log() + largest.squeeze(-1) - chosen  # (B, T)
    scored = targets != ignore_index
    losses = scored.where(nll, 0)
    return losses if reduction == "none" else long_sum(losses.flatten()) / scored.sum()


def is_argmax(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """logits (B, T, any), targets (B, T) -> whether argmax(logits) is the target, bool (B, T); of several equally large
    ones argmax is the first. False where the target is ignore_index.
    """
    index, target = Tensor.arange(logits.shape[-1]), targets.unsqueeze(-1)
    chosen = (index == target).where(logits, 0).sum(-1, keepdim=True)  # (B, T, 1)
    ahead = (logits > chosen) | ((logits == chosen) & (index < target))
    return ahead.any(-1).logical_not() & (targets != ignore_index)
