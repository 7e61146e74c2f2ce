"""GPT-2's operations on Triton's kernels, each with its gradient: what functional.py calls where they can run.

They compute what `torch.autocast` to bfloat16 computes: products of bfloat16 with float32 sums, a float32 stream,
float32 layer norm and loss. A gradient is given as a function of tinygrad's graph, so that kernels know nothing of
automatic differentiation; what a later operation makes of an earlier one (the GELU after a linear layer, the loss after
the head) is seen in the graph, so that the model file knows nothing of kernels.

In the comments B is the batch, T the sequence length, R = B * T, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import triton
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType, Invalid
from tinygrad.uop.ops import Ops, UOp

from tinygrad_impl import functional
from tinygrad_impl.functional import VOCAB_TILE, long_sum
from tinygrad_impl.kernels import adamw, attention, cross_entropy, embedding, layer_norm, matmul
from tinygrad_impl.kernels.launch import launch, stored

HEAD_ROWS = 1 << 14  # whose logits are in memory at once


def new(like: Tensor, *shape: int, dtype: DType = dtypes.bfloat16) -> Tensor:
    """A tensor for a kernel to write."""
    return Tensor.invalids(*shape, dtype=dtype, device=like.device)


def differentiable(
    outs: Sequence[Tensor], gradient: Callable[..., tuple[UOp | None, ...]], sources: Sequence[Tensor], *kept: Tensor
) -> list[Tensor]:
    """The outs, with `gradient` to give the gradients of the sources from theirs; it finds sources, what it keeps
    besides and outs, in this order, in its call's `src[1:]`, and gives as many gradients.
    """
    tensors = [*sources, *kept, *outs]
    params = [t.as_param(len(sources) + len(kept) + i).uop for i, t in enumerate(outs)]
    call = UOp.maketuple(*params).call(*[t.uop for t in tensors], grad_fxn=gradient)
    return [Tensor(call.gettuple(i)) for i in range(len(outs))]


def made_by(x: Tensor, gradient: Callable[..., Any]) -> list[Tensor] | None:
    """The sources, what is kept and the outs of the operation with this gradient whose only output x is."""
    out = x.uop
    while out.op is Ops.RESHAPE:
        out = out.src[0]
    call = out.src[0] if out.op is Ops.GETTUPLE else None
    if call is None or call.op is not Ops.FUNCTION or call.arg.grad_fxn is not gradient:
        return None
    return [Tensor(u) for u in call.src[1:]]


summed: WeakKeyDictionary[UOp, Tensor] = WeakKeyDictionary()  # what kernels wrote, with its sums over rows
begun: WeakKeyDictionary[UOp, UOp] = WeakKeyDictionary()  # gradients of embeddings, with the zeros that they begin with
halves: WeakKeyDictionary[UOp, Tensor] = WeakKeyDictionary()  # of a trainer's matrices, which AdamW keeps up to date


def half(weight: Tensor, multiple: int = 1) -> Tensor:
    """A matrix in bfloat16, with rows of 0 up to a multiple."""
    if weight.uop in halves:
        return halves[weight.uop]
    return weight.detach().pad(((0, -weight.shape[0] % multiple), None)).cast(dtypes.bfloat16).contiguous()


def keep_halves(parameters: Mapping[str, Tensor]) -> None:
    """Makes the bfloat16 copies of these parameters' matrices, or brings them up to date."""
    for name, p in parameters.items():
        if p.ndim == 2 and name != "wpe.weight":
            kept = halves.pop(p.uop, None)
            new = half(p, VOCAB_TILE if name == "wte.weight" else 1)
            halves[p.uop] = new.clone().realize() if kept is None else kept.assign(new).realize()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) @ weight [K, N] + bias [N]: (..., N), in bfloat16."""
    *outer, K = x.shape
    R, N = math.prod(outer), weight.shape[1]
    rows, table = x.cast(dtypes.bfloat16).reshape(R, K), half(weight)
    [y] = launch(matmul.forward(R, K, N), [new(x, R, N)], rows, table, bias)
    if activation := made_by(x, _gelu_gradient):  # its gradient joins that of this layer
        [y] = differentiable([y], _linear_gelu_gradient, [activation[0], weight, bias], table)
    else:
        [y] = differentiable([y], _linear_gradient, [rows, weight, bias], table)
    return y.reshape(*outer, N)


def _linear_gradient(dy: UOp, call: UOp) -> tuple[UOp | None, ...]:
    rows, _, _, table, _ = map(Tensor, call.src[1:])
    dy_rows = Tensor(dy)  # (R, N)
    (R, K), N = rows.shape, table.shape[1]
    [dx] = launch(matmul.input_gradient(R, K, N), [new(rows, R, K)], dy_rows, table)
    return dx.uop, *_weight_gradients(rows, dy_rows), None, None


def _weight_gradients(x: Tensor, dy: Tensor) -> tuple[UOp, UOp]:
    """x (R, K), dy (R, N) -> the gradients of a weight [K, N] and its bias [N], in float32."""
    (R, K), N = x.shape, dy.shape[1]
    kernel = matmul.weight_gradient(R, K, N)
    splits = kernel.constants["SPLITS"]
    [dw] = launch(kernel, [new(x, splits * K * N, dtype=dtypes.float32)], x, dy)
    dw, db = column_sums(dw.reshape(splits, K * N)) if splits > 1 else dw, summed.get(stored(dy).uop)
    return dw.reshape(K, N).uop, (column_sums(dy) if db is None else db).uop


def column_sums(x: Tensor) -> Tensor:
    """x (R, N) -> the sums of its columns (N,), in float32: in parts first, if R is large."""
    R, N = x.shape
    if R > 1024:
        [x] = launch(matmul.column_sums(R, N, 64), [new(x, 64, N, dtype=dtypes.float32)], x)
    return launch(matmul.column_sums(x.shape[0], N, 1), [new(x, N, dtype=dtypes.float32)], x)[0]


def gelu(x: Tensor) -> Tensor | None:
    """The tanh form of GELU of a linear layer's output, computed in that layer; None of anything else."""
    if not (layer := made_by(x, _linear_gradient)):
        return None
    rows, weight, bias, table, _ = layer
    (R, K), N = rows.shape, table.shape[1]
    hidden, y = launch(matmul.forward(R, K, N, gelu=True), [new(x, R, N), new(x, R, N)], rows, table, bias)
    [hidden] = differentiable([hidden], _linear_gradient, [rows, weight, bias], table)
    [y] = differentiable([y], _gelu_gradient, [hidden])
    return y.reshape(x.shape)


def _gelu_gradient(dy: UOp, call: UOp) -> tuple[UOp | None, ...]:
    """Where no linear layer follows."""
    hidden = Tensor(call.src[1]).detach()
    return functional.gelu(hidden, "tanh").gradient(hidden, gradient=Tensor(dy))[0].uop, None


def _linear_gelu_gradient(dy: UOp, call: UOp) -> tuple[UOp | None, ...]:
    """The gradient of linear(gelu(hidden)): the derivative of GELU is multiplied in before anything is stored. GELU is
    computed once more there, so that it need not be kept from the forward pass on.
    """
    hidden, _, _, table, _ = map(Tensor, call.src[1:])
    dy_rows = Tensor(dy)  # (R, N)
    (R, K), N = hidden.shape, table.shape[1]
    kernel = matmul.input_gradient(R, K, N, gelu=True)
    parts = new(hidden, triton.cdiv(R, kernel.constants["BM"]), K, dtype=dtypes.float32)
    dhidden, g, parts = launch(kernel, [new(hidden, R, K), new(hidden, R, K), parts], dy_rows, table, hidden)
    summed[dhidden.uop] = column_sums(parts)
    return dhidden.uop, *_weight_gradients(g, dy_rows), None, None


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Causal attention where q, k, v (B, H, T, D) are what is split off one c_attn: then (B, H, T, D), else None."""
    B, H, T, D = q.shape
    qkv = Tensor(q.uop.base).reshape(B, T, 3 * H * D)
    split = [t.reshape(B, T, H, D).transpose(1, 2) for t in qkv.split(H * D, dim=2)]
    if any(given.uop is not t.uop for given, t in zip((q, k, v), split, strict=True)):
        return None
    y, lse = new(qkv, B, T, H * D), new(qkv, B, H, T, dtype=dtypes.float32)
    y, lse = launch(attention.forward(B, T, H, D), [y, lse], qkv)
    [y] = differentiable([y], partial(_attention_gradient, H), [qkv], lse)
    return y.reshape(B, T, H, D).transpose(1, 2)


def _attention_gradient(H: int, dy: UOp, call: UOp) -> tuple[UOp | None, ...]:
    qkv, lse, y = map(Tensor, call.src[1:])
    B, T, C = y.shape
    gradient = Tensor(dy)
    first = attention.query_gradient(B, T, H, C // H)
    sums = new(y, B * triton.cdiv(T, first.constants["QUERIES"]), 3 * C, dtype=dtypes.float32)
    outs = new(y, B, T, 3 * C), sums, new(y, B, H, T, dtype=dtypes.float32)
    dqkv, sums, delta = launch(first, outs, gradient, qkv, y, lse)
    dqkv, sums = launch(attention.key_gradient(B, T, H, C // H), [dqkv, sums], gradient, qkv, lse, delta)
    summed[dqkv.uop] = column_sums(sums)
    return dqkv.uop, None, None


def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of the stream x (..., C), in bfloat16. Where x is a sum, of the stream before and a layer's output,
    it is computed here, and x becomes what is stored: what reads it next reads that.
    """
    *outer, C = x.shape
    R = math.prod(outer)
    stream, added = x, list[Tensor]()
    if x.uop.op is Ops.ADD and x.uop.src[1].op is Ops.CAST and x.uop.src[1].src[0].dtype is dtypes.bfloat16:
        stream, added = Tensor(x.uop.src[0]), [Tensor(x.uop.src[1].src[0]).reshape(R, C)]
    rows = stream.reshape(R, C) if added else stream.reshape(R, C).contiguous()
    outs = [new(x, R, C, dtype=dtypes.float32)] if added else []
    outs += [new(x, R, C), *(new(x, R, dtype=dtypes.float32) for _ in range(2))]
    kernel = layer_norm.forward(R, C, eps, bool(added))
    *total, y, mean, rstd = launch(kernel, outs, rows, *added, weight, bias)
    total = total or [rows]
    out, y = differentiable([*total, y], _normalised_gradient, [rows, *added, weight, bias], mean, rstd)
    x.replace(out.reshape(x.shape))
    return y.reshape(x.shape)


def _normalised_gradient(*gradients: Any, call: UOp | None = None) -> tuple[UOp | None, ...]:
    if call is None:  # tinygrad's way where there is one gradient
        gradients, call = gradients[:-1], gradients[-1]
    *sources, weight, _, mean, rstd, total, _ = map(Tensor, call.src[1:])
    R, C = total.shape
    *past, dy = map(Tensor, gradients)  # past the last layer goes nothing
    kernel = layer_norm.backward(R, C, bool(past))
    outs = [new(total, R, C, dtype=dtypes.float32), new(total, R, C)]
    outs.append(new(total, *kernel.grid, 3 * C, dtype=dtypes.float32))
    dx, dx16, sums = launch(kernel, outs, dy, *(past or [total]), total, mean, rstd, weight)
    outs = [new(total, C, dtype=dtypes.float32) for _ in range(3)]
    dweight, dbias, summed[dx16.uop] = launch(matmul.column_sums(kernel.grid[0], C, 1, outs=3), outs, sums)
    return dx.uop, *([dx16.uop] if len(sources) > 1 else []), dweight.uop, dbias.uop, *[None] * 4


def tied_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, T, C) @ weight (V, C).T: logits (B, T, V rounded up to VOCAB_TILE), in bfloat16; those past V are -inf."""
    *outer, C = x.shape
    rows, table = x.cast(dtypes.bfloat16).reshape(-1, C), half(weight, VOCAB_TILE)
    (R, C), V = rows.shape, table.shape[0]
    [logits] = launch(matmul.head(R, C, V), [new(rows, R, V)], rows, table)
    [logits] = differentiable([logits], _head_gradient, [rows, weight], table)
    real = Tensor.arange(V) < weight.shape[0]
    return real.where(logits.reshape(*outer, V), -math.inf)


def _head_gradient(dlogits: UOp, call: UOp) -> tuple[UOp | None, ...]:
    rows, weight, table, _ = map(Tensor, call.src[1:])
    dx, dweight = _head_gradients([Tensor(dlogits)], rows, table, weight.shape[0])
    return dx.uop, dweight.uop, None, None


def _head_gradients(dlogits: Sequence[Tensor], rows: Tensor, table: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """dlogits (any, padded V) of parts of the rows -> the gradients of the rows (R, C), in bfloat16, and of the weight
    (V, C), in float32.
    """
    R, C = rows.shape
    dx, dweight, first = new(rows, R, C), new(rows, V, C, dtype=dtypes.float32), 0
    for part in dlogits:
        r, padded = min(part.shape[0], R - first), table.shape[0]
        [dx] = launch(matmul.head_input_gradient(r, C, padded, first), [dx], part, table)
        kernel = matmul.head_weight_gradient(r, C, padded, V, first, add=first > 0)
        [dweight] = launch(kernel, [dweight], part, rows)
        first += r
    return dx, dweight


def mean_loss(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor | None:
    """The mean of -log softmax(logits)[target] over the targets but ignore_index; None where no head made the logits.

    It computes the logits anew for itself, where others do not want them the only ones: their gradient takes their
    place, and those of other rows the gradient's, once it has been used.
    """
    if logits.uop.op is not Ops.WHERE or not (head := made_by(Tensor(logits.uop.src[1]), _head_gradient)):
        return None
    rows, weight, table, _ = head
    (R, C), V = rows.shape, table.shape[0]
    target = targets.reshape(R).cast(dtypes.int32)
    scale = (1 / (target != ignore_index).sum().float()).reshape(1).contiguous()
    part, losses, dlogits = new(rows, min(R, HEAD_ROWS), V), new(rows, R, dtype=dtypes.float32), list[Tensor]()
    for first in range(0, R, HEAD_ROWS):
        r = min(HEAD_ROWS, R - first)
        # tinygrad lets what reads the memory, the products of `_head_gradients` too, come before what overwrites it
        [part] = launch(matmul.head(r, C, V, first), [part], rows, table)
        kernel = cross_entropy.forward(r, weight.shape[0], V, ignore_index, first)
        losses, part = launch(kernel, [losses, part], target, scale)
        dlogits.append(part)
    mean = long_sum(losses) * scale.reshape(())
    return differentiable([mean], _loss_gradient, [rows, weight], table, *dlogits)[0]


def _loss_gradient(gradient: UOp, call: UOp) -> tuple[UOp | None, ...]:
    rows, weight, table, *dlogits, _ = map(Tensor, call.src[1:])
    dx, dweight = _head_gradients(dlogits, rows, table, weight.shape[0])
    if constant(gradient) != 1:  # something else is made of the loss
        dx, dweight = (dx * Tensor(gradient)).cast(dx.dtype), dweight * Tensor(gradient)
    return dx.uop, dweight.uop, *[None] * (len(dlogits) + 2)


def embedding_gradient(gradient: Tensor, tokens: Tensor, V: int) -> Tensor:
    """gradient (B, T, C) of the rows that tokens (B, T) name -> that of the table: (V, C), the same in every run."""
    R, C = tokens.numel(), gradient.shape[-1]
    index, rows = tokens.reshape(R).cast(dtypes.int32), gradient.reshape(R, C)
    (to_keys, to_order), (runs, rest) = embedding.sort(R), embedding.sums(R, C)
    [keys] = launch(to_keys, [new(rows, to_keys.grid[0] * embedding.SORTED, dtype=dtypes.int32)], index)
    [order] = launch(to_order, [new(rows, R, dtype=dtypes.int32)], keys)
    zeros = Tensor.zeros(V, C, dtype=dtypes.float32, device=rows.device).contiguous()
    total, parts = launch(runs, [zeros, new(rows, runs.grid[0], 2, C, dtype=dtypes.float32)], order, index, rows)
    [sums] = launch(rest, [total], parts, order, index)
    begun[sums.uop] = zeros.uop
    return sums


def write_gradients(totals: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Computes gradients into the memory of totals: what kernels would write to memory of its own, they write there.

    To the head's gradient the embedding's rows are added in place, instead of to zeros and then all to all.
    """
    places, found = {}, []
    for total, gradient in zip(totals, gradients, strict=True):
        uop = gradient.uop
        if uop.op is Ops.ADD and uop.src[1] in begun:
            head, sums = uop.src
            uop = sums.substitute({begun[sums]: stored(Tensor(head)).uop})
        if (memory := written(uop)) is None:
            uop = total.assign(Tensor(uop)).uop
        else:
            places[memory] = total.uop.reshape(memory.shape)
        found.append(uop)
    Tensor.realize(*(Tensor(uop.base) for uop in UOp.sink(*found).substitute(places).src))


def written(uop: UOp) -> UOp | None:
    """What `new` made, if the uop is that after kernels have written it."""
    while uop.op in (Ops.RESHAPE, Ops.AFTER):
        if uop.op is Ops.AFTER and uop.src[1].op is Ops.STORE:
            return uop if constant(uop) is Invalid else None
        uop = uop.src[0]
    return None


def constant(uop: UOp) -> Any:
    """The number, or Invalid, of which all of a tensor is made; None if it is no constant."""
    if uop.op is Ops.AFTER and uop.src[1].op is Ops.STORE:
        uop = uop.src[1].src[1]
    while uop.op in (Ops.RESHAPE, Ops.EXPAND):
        uop = uop.src[0]
    return uop.arg if uop.op is Ops.CONST else None


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names of parameters in groups of a layer's, which are alike, so that one compiled kernel serves them all."""
    groups = defaultdict(list)
    for name in names:
        groups[name.split(".")[1] if name.startswith("h.") else ""].append(name)
    return list(groups.values())


def sums_of_squares(gradients: Mapping[str, Tensor]) -> list[Tensor]:
    """Sums of the squares of parts of the gradients: some hundreds."""
    sums = []
    for names in by_layer(gradients):
        kernel = adamw.squares([gradients[name].numel() for name in names])
        like = gradients[names[0]]
        sums += launch(kernel, [new(like, *kernel.grid, dtype=dtypes.float32)], *(gradients[name] for name in names))
    return sums


def adamw_step(
    parameters: Mapping[str, Tensor],
    exp_avg: Mapping[str, Tensor],
    exp_avg_sq: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    scalars: Tensor,
    decays: Mapping[str, float],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of AdamW, in place; scalars as `Trainer.adamw` has them."""
    changed = []
    for names in by_layer(parameters):
        sizes = [parameters[name].numel() for name in names]
        halved = [name for name in names if parameters[name].uop in halves]
        places = [halved.index(name) if name in halved else None for name in names]
        kernel = adamw.step(sizes, [decays[name] for name in names], places, *betas, eps)
        outs = [tensors[name] for tensors in (parameters, exp_avg, exp_avg_sq) for name in names]
        outs += [halves[parameters[name].uop] for name in halved]
        changed += launch(kernel, outs, *(gradients[name] for name in names), scalars)
    Tensor.realize(*changed)
