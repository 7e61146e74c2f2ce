"""What each node of `functional` becomes on Triton's kernels, with its gradient.

They compute what `torch.autocast` to bfloat16 computes: GEMMs of bfloat16 with float32 sums; the residual stream, layer
norm and the loss in float32. A gradient is given as a function of tinygrad's graph, so that kernels know nothing of
automatic differentiation. Which nodes there are besides those of `functional`, joins.py says.

In the comments B is the batch, T the sequence length, R = B * T, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import triton
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops, UOp

from tinygrad_impl import formulas
from tinygrad_impl.formulas import VOCAB_TILE, long_sum
from tinygrad_impl.functional import constant, node
from tinygrad_impl.kernels import GPU, attention, cross_entropy, embedding, layer_norm, matmul
from tinygrad_impl.kernels.launch import launch, new, stored

HEAD_ROWS = 1 << 14  # whose logits are in memory at once

Gradients = tuple[UOp | None, ...]  # of a call's sources


@dataclass(frozen=True)
class Operations:
    """The nodes on one GPU. `copies`: of parameters, in bfloat16."""

    gpu: GPU
    copies: Mapping[UOp, Tensor]

    def __call__(self, name: str, sources: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
        """A node's outputs. Those that are not joined with others, and have no kernel by themselves, are formulas."""
        if name in ("gelu", "gelu_erf", "relu"):
            return [getattr(formulas, name)(*sources)]
        if name in ("cross_entropy", "is_argmax"):
            return [getattr(formulas, name)(*sources, **settings)]
        if name == "attention":
            return [formulas.attention(*sources, **settings | {"dtype": dtypes.bfloat16})]
        compute: Callable[..., list[Tensor]] = getattr(self, name)
        return compute(*sources, **settings)

    def matrix(self, weight: Tensor, name: str = "") -> Tensor:
        """A matrix in bfloat16."""
        return self.copies[weight.uop] if weight.uop in self.copies else rounded(weight, name)

    def embedding(self, tokens: Tensor, weight: Tensor) -> list[Tensor]:
        return [formulas.embedding(tokens, weight, _embedding_gradient)]

    def embedding_gradient(self, tokens: Tensor, gradient: Tensor, *onto: Tensor, V: int) -> list[Tensor]:
        """gradient (B, T, C) of the rows that tokens (B, T) name -> that of the table: (V, C), the same in every run.

        With `onto`, float32 (V, C), it is added to that, in its memory.
        """
        R, C = tokens.numel(), gradient.shape[-1]
        index, rows = tokens.reshape(R).cast(dtypes.int32), gradient.reshape(R, C)
        (to_keys, to_order), (runs, rest) = embedding.sort(R), embedding.sums(R, C)
        [keys] = launch(self.gpu, to_keys, [new(rows, to_keys.grid[0] * embedding.SORTED, dtype=dtypes.int32)], index)
        [order] = launch(self.gpu, to_order, [new(rows, R, dtype=dtypes.int32)], keys)
        [total] = map(stored, onto or [Tensor.zeros(V, C, dtype=dtypes.float32, device=rows.device).contiguous()])
        parts = new(rows, runs.grid[0], 2, C, dtype=dtypes.float32)
        total, parts = launch(self.gpu, runs, [total, parts], order, index, rows)
        return launch(self.gpu, rest, [total], parts, order, index)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """x (..., K) @ weight [K, N] + bias [N]: (..., N), in bfloat16."""
        *outer, K = x.shape
        R, N = math.prod(outer), weight.shape[1]
        rows, table = bfloat16(x).reshape(R, K), self.matrix(weight)
        [y] = launch(self.gpu, matmul.forward(self.gpu, R, K, N), [new(x, R, N)], rows, table, bias)
        [y] = differentiable([y], self._linear_gradient, [rows, weight, bias], table)
        return [y.reshape(*outer, N)]

    def _linear_gradient(self, dy: UOp, call: UOp) -> Gradients:
        rows, _, bias, table, _ = map(Tensor, call.src[1:])
        dy_rows = Tensor(dy)  # (R, N)
        (R, K), N = rows.shape, table.shape[1]
        [dx] = launch(self.gpu, matmul.input_gradient(self.gpu, R, K, N), [new(rows, R, K)], dy_rows, table)
        return dx.uop, weight_gradient_node(rows, dy_rows), bias_gradient(self.gpu, bias, dy_rows), None, None

    def weight_gradients(self, *sources: Tensor) -> list[Tensor]:
        """x (R, K) and dy (R, N) of each of several layers -> the gradient of each weight [K, N], in float32."""
        xs, dys = sources[::2], sources[1::2]
        R, sizes = xs[0].shape[0], [(x.shape[1], dy.shape[1]) for x, dy in zip(xs, dys, strict=True)]
        assert all(x.shape[0] == R for x in sources)
        if self.gpu.has_copy_engine:
            kernel = matmul.weight_gradients(self.gpu, R, sizes)
        else:
            [(K, N)] = sizes  # joins.py leaves them as they are
            kernel = matmul.weight_gradient(self.gpu, R, K, N)
        splits = kernel.constants["SPLITS"]
        outs = [new(xs[0], splits * K * N, dtype=dtypes.float32) for K, N in sizes]
        outs = launch(self.gpu, kernel, outs, *sources)
        if splits > 1:
            outs = [self.few_rows(dw.reshape(splits, -1)) for dw in outs]
        return [dw.reshape(size) for dw, size in zip(outs, sizes, strict=True)]

    def few_rows(self, x: Tensor) -> Tensor:
        """x (R, N), float32, of few rows -> their sum (N,)."""
        R, N = x.shape
        return launch(self.gpu, matmul.parts_of_column_sums(R, N, 1), [new(x, N, dtype=dtypes.float32)], x)[0]

    def column_sums(self, *xs: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
        """Several x (R, count * N) -> the sums of their columns in float32, N to each of `count` outputs (N,)."""
        shapes = [(x.shape[0], x.shape[1] // count, count) for x, count in zip(xs, counts, strict=True)]
        sums = [new(xs[0], N, dtype=dtypes.float32) for _, N, count in shapes for _ in range(count)]
        return launch(self.gpu, matmul.column_sums(shapes), sums, *xs)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """A linear layer's output and the tanh form of GELU of it, both (..., N), in bfloat16."""
        *outer, K = x.shape
        R, N = math.prod(outer), weight.shape[1]
        rows, table = bfloat16(x).reshape(R, K), self.matrix(weight)
        kernel = matmul.forward(self.gpu, R, K, N, gelu=True)
        hidden, y = launch(self.gpu, kernel, [new(x, R, N), new(x, R, N)], rows, table, bias)
        [hidden] = differentiable([hidden], self._linear_gradient, [rows, weight, bias], table)
        [y] = differentiable([y], _gelu_gradient, [hidden])
        return [hidden.reshape(*outer, N), y.reshape(*outer, N)]

    def gelu_linear(self, hidden: Tensor, x: Tensor, weight: Tensor, bias: Tensor, bias_before: Tensor) -> list[Tensor]:
        """x (..., K) @ weight [K, N] + bias [N], x being GELU of hidden, which came of a layer with `bias_before`."""
        *outer, K = x.shape
        R, N = math.prod(outer), weight.shape[1]
        rows, before, table = bfloat16(x).reshape(R, K), bfloat16(hidden).reshape(R, K), self.matrix(weight)
        [y] = launch(self.gpu, matmul.forward(self.gpu, R, K, N), [new(x, R, N)], rows, table, bias)
        [y] = differentiable([y], self._gelu_linear_gradient, [before, weight, bias, bias_before], table, rows)
        return [y.reshape(*outer, N)]

    def _gelu_linear_gradient(self, dy: UOp, call: UOp) -> Gradients:
        """The derivative of GELU is multiplied in before anything is stored. GELU, x, is computed once more, so that it
        need not be kept from the forward pass on, unless there is memory for it.
        """
        hidden, _, bias, _, table, x, _ = map(Tensor, call.src[1:])
        dy_rows = Tensor(dy)  # (R, N)
        (R, K), N = hidden.shape, table.shape[1]
        kernel = matmul.input_gradient(self.gpu, R, K, N, gelu=True)
        again = [] if matmul.keeps_gelu(self.gpu, K) else [new(hidden, R, K)]
        parts = new(hidden, triton.cdiv(R, kernel.constants["BM"]), K, dtype=dtypes.float32)
        dhidden, *again, parts = launch(self.gpu, kernel, [new(hidden, R, K), *again, parts], dy_rows, table, hidden)
        [x] = again or [x]
        dw, db = weight_gradient_node(x, dy_rows), bias_gradient(self.gpu, bias, dy_rows)
        return dhidden.uop, dw, db, *column_sums_node(self.gpu, parts), *[None] * 3

    def split_attention(self, qkv: Tensor, *bias: Tensor, n_head: int) -> list[Tensor]:
        """Causal attention of qkv (B, T, 3C), which came of a layer with this bias: (B, T, C), in bfloat16."""
        B, T, width = qkv.shape
        qkv, C = bfloat16(qkv), width // 3
        kernel = attention.forward(self.gpu, B, T, n_head, C // n_head)
        outs = [new(qkv, B, T, C), new(qkv, B, n_head, T, dtype=dtypes.float32)]
        if attention.fits_hopper(self.gpu, T, C // n_head):
            outs.append(new(qkv, *kernel.grid, dtype=dtypes.int32))
        y, *kept = launch(self.gpu, kernel, outs, qkv)
        return differentiable([y], partial(_attention_gradient, self.gpu, n_head), [qkv, *bias], *kept)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[Tensor]:
        """Layer norm of x (..., C), in bfloat16."""
        return self.stored_and_normal(x, weight, bias, eps)[1:]

    def embedding_layer_norm(self, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[Tensor]:
        """a + b, and layer norm of it in bfloat16."""
        return self.stored_and_normal(a + b, weight, bias, eps)

    def stored_and_normal(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[Tensor]:
        """x (..., C) as the kernel reads it, and layer norm of it, in bfloat16."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        R, C = rows.shape
        outs = [new(x, R, C), *(new(x, R, dtype=dtypes.float32) for _ in range(2))]
        y, mean, rstd = launch(self.gpu, layer_norm.forward(R, C, eps, added=False), outs, rows, weight, bias)
        outs = differentiable([rows, y], self._layer_norm_gradient, [rows, weight, bias], mean, rstd)
        return [out.reshape(x.shape) for out in outs]

    def _layer_norm_gradient(self, *gradients: Any, call: UOp | None = None) -> Gradients:
        *past, dy, call = real_gradients(gradients, call)
        rows, weight, bias, mean, rstd, _, y = map(Tensor, call.src[1:])
        dx, _, dweight, dbias, _ = norm_gradients_node(self.gpu, past, y, dy, rows, mean, rstd, weight, bias)
        return dx, dweight, dbias, *[None] * 4

    def residual_layer_norm(
        self, stream: Tensor, branch: Tensor, bias_before: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> list[Tensor]:
        """stream + branch (..., C), in float32, and layer norm of it, in bfloat16. The branch came of a layer with
        `bias_before`.
        """
        R, C = math.prod(stream.shape[:-1]), stream.shape[-1]
        rows, added = stream.reshape(R, C), bfloat16(branch).reshape(R, C)
        outs = [new(rows, R, C, dtype=dtypes.float32), new(rows, R, C)]
        outs += [new(rows, R, dtype=dtypes.float32) for _ in range(2)]
        total, y, mean, rstd = launch(
            self.gpu, layer_norm.forward(R, C, eps, added=True), outs, rows, added, weight, bias
        )
        sources = [rows, added, bias_before, weight, bias]
        outs = differentiable([total, y], self._residual_layer_norm_gradient, sources, mean, rstd)
        return [out.reshape(stream.shape) for out in outs]

    def _residual_layer_norm_gradient(self, *gradients: Any, call: UOp | None = None) -> Gradients:
        *past, dy, call = real_gradients(gradients, call)
        *_, weight, bias, mean, rstd, total, y = map(Tensor, call.src[1:])
        dx, dx16, *rest = norm_gradients_node(self.gpu, past, y, dy, total, mean, rstd, weight, bias)
        dweight, dbias, dbias_before = rest
        return dx, dx16, dbias_before, dweight, dbias, *[None] * 4

    def norm_gradients(
        self,
        y: Tensor,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        *past: Tensor,
    ) -> list[Tensor]:
        """Of the norm y of x (R, C), from dy and from what reaches x past the norm: dx in float32 and in bfloat16;
        parts (any, 3C) of the gradients of weight and bias, and of the sums of dx over rows; and y computed once more.
        The y that is given is not read: it is there for joins.py to find the node by.
        """
        R, C = x.shape
        kernel = layer_norm.backward(self.gpu, R, C, bool(past))
        outs = [new(x, R, C, dtype=dtypes.float32), new(x, R, C), new(x, R, C)]
        outs.append(new(x, *kernel.grid, 3 * C, dtype=dtypes.float32))
        dx, dx16, y, sums = launch(self.gpu, kernel, outs, dy, *(past or [x]), x, mean, rstd, weight, bias)
        return [dx, dx16, sums, y]

    def lm_head(self, x: Tensor, weight: Tensor) -> list[Tensor]:
        """x (B, T, C) @ weight (V, C).T: logits (B, T, V rounded up to VOCAB_TILE), in bfloat16, past V -inf."""
        *outer, C = x.shape
        rows, table = bfloat16(x).reshape(-1, C), self.matrix(weight, "lm_head.weight")
        (R, C), V = rows.shape, table.shape[0]
        [logits] = launch(self.gpu, matmul.head(self.gpu, R, C, V), [new(rows, R, V)], rows, table)
        [logits] = differentiable([logits], self._head_gradient, [rows, weight], table)
        real = Tensor.arange(V) < weight.shape[0]
        return [real.where(logits.reshape(*outer, V), -math.inf)]

    def _head_gradient(self, dlogits: UOp, call: UOp) -> Gradients:
        rows, weight, table, _ = map(Tensor, call.src[1:])
        dx, dweight = self.head_gradients([Tensor(dlogits)], rows, table, weight.shape[0])
        return dx.uop, dweight.uop, None, None

    def head_gradients(self, dlogits: Sequence[Tensor], rows: Tensor, table: Tensor, V: int) -> tuple[Tensor, Tensor]:
        """dlogits (any, padded V) of parts of the rows -> the gradients of the rows (R, C), in bfloat16, and of the
        weight (V, C), in float32.
        """
        R, C = rows.shape
        dx, dweight, first = new(rows, R, C), new(rows, V, C, dtype=dtypes.float32), 0
        for part in dlogits:
            r, padded = min(part.shape[0], R - first), table.shape[0]
            [dx] = launch(self.gpu, matmul.head_input_gradient(self.gpu, r, C, padded, first), [dx], part, table)
            kernel = matmul.head_weight_gradient(self.gpu, r, C, padded, V, first, add=first > 0)
            [dweight] = launch(self.gpu, kernel, [dweight], part, rows)
            first += r
        return dx, dweight

    def head_loss(self, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> list[Tensor]:
        """The mean of -log softmax(x @ weight.T)[target] over the targets but ignore_index; or, with the reduction
        "none", that of each target and whether it is the argmax, both (B, T), without gradients.

        The gradient of logits takes their place, and that of other rows the place of the gradient, once it was used.
        """
        if reduction == "none":
            return self.head_losses(x, weight, targets, ignore_index)
        rows, table = bfloat16(x).reshape(-1, x.shape[-1]), self.matrix(weight, "lm_head.weight")
        (R, C), V = rows.shape, table.shape[0]
        target = targets.reshape(R).cast(dtypes.int32)
        scale = (1 / (target != ignore_index).sum().float()).reshape(1).contiguous()
        part, losses, dlogits = new(rows, min(R, HEAD_ROWS), V), new(rows, R, dtype=dtypes.float32), list[Tensor]()
        for first in range(0, R, HEAD_ROWS):
            r = min(HEAD_ROWS, R - first)
            # tinygrad lets what reads the memory, the GEMMs of `head_gradients` too, come before what overwrites it
            [part] = launch(self.gpu, matmul.head(self.gpu, r, C, V, first), [part], rows, table)
            kernel = cross_entropy.forward(r, weight.shape[0], V, ignore_index, first)
            losses, part = launch(self.gpu, kernel, [losses, part], target, scale)
            dlogits.append(part)
        mean = long_sum(losses) * scale.reshape(())
        return differentiable([mean], self._loss_gradient, [rows, weight], table, *dlogits)

    def head_losses(self, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> list[Tensor]:
        """-log softmax(x @ weight.T)[target] of each target, 0 for ignore_index, and whether it is the argmax."""
        rows, table = bfloat16(x).reshape(-1, x.shape[-1]), self.matrix(weight, "lm_head.weight")
        (R, C), V = rows.shape, table.shape[0]
        target = targets.reshape(R).cast(dtypes.int32)
        logits = new(rows, min(R, HEAD_ROWS), V)
        losses, likeliest = new(rows, R, dtype=dtypes.float32), new(rows, R, dtype=dtypes.int32)
        for first in range(0, R, HEAD_ROWS):
            r = min(HEAD_ROWS, R - first)
            [logits] = launch(self.gpu, matmul.head(self.gpu, r, C, V, first), [logits], rows, table)
            kernel = cross_entropy.of_tokens(r, weight.shape[0], V, ignore_index, first)
            losses, likeliest, logits = launch(self.gpu, kernel, [losses, likeliest, logits], target)
        return [losses.reshape(targets.shape), (likeliest == 1).reshape(targets.shape)]

    def _loss_gradient(self, gradient: UOp, call: UOp) -> Gradients:
        rows, weight, table, *dlogits, _ = map(Tensor, call.src[1:])
        dx, dweight = self.head_gradients(dlogits, rows, table, weight.shape[0])
        if constant(gradient) != 1:  # something else is made of the loss
            dx, dweight = (dx * Tensor(gradient)).cast(dx.dtype), dweight * Tensor(gradient)
        return dx.uop, dweight.uop, *[None] * (len(dlogits) + 2)


def padded(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """A matrix's shape with the rows that tables of tokens have at their end, up to a multiple of VOCAB_TILE."""
    rows = -shape[0] % VOCAB_TILE if name in ("wte.weight", "lm_head.weight") else 0
    return shape[0] + rows, shape[1]


def rounded(weight: Tensor, name: str) -> Tensor:
    """A matrix in bfloat16, `padded` with rows of 0."""
    rows = padded(weight.shape, name)[0] - weight.shape[0]
    return weight.detach().pad(((0, rows), None)).cast(dtypes.bfloat16).contiguous()


def bfloat16(x: Tensor) -> Tensor:
    """x in bfloat16: what it was widened from, if it was, before being moved about."""
    uop, moves = x.uop, list[UOp]()
    while uop.op in (Ops.RESHAPE, Ops.PERMUTE):
        moves.append(uop)
        uop = uop.src[0]
    if uop.op is not Ops.CAST or uop.src[0].dtype is not dtypes.bfloat16:
        return x.cast(dtypes.bfloat16)
    uop = uop.src[0]
    for move in reversed(moves):
        uop = uop.permute(move.marg) if move.op is Ops.PERMUTE else uop.reshape(move.marg)
    return Tensor(uop)


def differentiable(
    outs: Sequence[Tensor], gradient: Callable[..., Gradients], sources: Sequence[Tensor], *kept: Tensor
) -> list[Tensor]:
    """The outs, with `gradient` to give the gradients of the sources from theirs; it finds sources, what it keeps
    besides and outs, in this order, in its call's `src[1:]`, and gives as many gradients.
    """
    tensors = [*sources, *kept, *outs]
    params = [t.as_param(len(sources) + len(kept) + i).uop for i, t in enumerate(outs)]
    call = UOp.maketuple(*params).call(*[t.uop for t in tensors], grad_fxn=gradient)
    return [Tensor(call.gettuple(i)) for i in range(len(outs))]


def real_gradients(gradients: tuple[Any, ...], call: UOp | None) -> list[Any]:
    """What a gradient function of a call with two outputs is given, as tensors, and the call. tinygrad gives the
    gradients of those outputs that have one; if it is one only, the call is the second argument, and not named.
    """
    if call is None:  # nothing but the norm reads the sum
        gradients, call = gradients[:-1], gradients[-1]
    return [*map(Tensor, gradients), call]


def column_sums_node(gpu: GPU, x: Tensor, outs: int = 1) -> list[UOp]:
    """A node, because joins.py puts several together: x (R, outs * N) -> the sums of its columns, in float32, N to each
    of the outs. If R is large, they are added up in parts first.
    """
    R, width = x.shape
    if R > 1024:
        kernel = matmul.parts_of_column_sums(R, width, 64)
        [x] = launch(gpu, kernel, [new(x, 64, width, dtype=dtypes.float32)], x)
    sums = [UOp.param(1 + i, dtypes.float32, (width // outs,), x.device) for i in range(outs)]
    return node("column_sums", sums, [x.uop], counts=(outs,))


def norm_gradients_node(gpu: GPU, past: list[Tensor], y: Tensor, *sources: Tensor) -> list[UOp]:
    """Of `Operations.norm_gradients`, which is a node, because joins.py has gradients of weights read y from it: dx in
    float32 and in bfloat16, the gradients of weight and bias, and the sums of dx over rows.
    """
    R, C = y.shape
    parts = layer_norm.backward(gpu, R, C, bool(past)).grid[0], 3 * C
    outs = ((R, C), dtypes.float32), ((R, C), y.dtype), (parts, dtypes.float32), ((R, C), y.dtype)
    given = [t.uop for t in (y, *sources, *past)]
    declared = [UOp.param(len(given) + i, dtype, shape, y.device) for i, (shape, dtype) in enumerate(outs)]
    dx, dx16, sums, _ = node("norm_gradients", declared, given)
    return [dx, dx16, *column_sums_node(gpu, Tensor(sums), outs=3)]


def weight_gradient_node(x: Tensor, dy: Tensor) -> UOp:
    """A node, because joins.py puts those of some layers together: x (R, K), dy (R, N) -> of a weight [K, N]."""
    out = UOp.param(2, dtypes.float32, (x.shape[1], dy.shape[1]), x.device)
    return node("weight_gradients", [out], (x.uop, dy.uop))[0]


def bias_gradient(gpu: GPU, bias: Tensor, dy: Tensor) -> UOp | None:
    """From dy (R, N); None of a bias that is detached, since the node after the layer gives its gradient."""
    return None if bias.uop.op is Ops.DETACH else column_sums_node(gpu, dy)[0]


def _gelu_gradient(dy: UOp, call: UOp) -> Gradients:
    """Where no linear layer follows."""
    hidden = Tensor(call.src[1]).detach()
    return formulas.gelu(hidden).gradient(hidden, gradient=Tensor(dy))[0].uop, None


def _attention_gradient(gpu: GPU, H: int, dy: UOp, call: UOp) -> Gradients:
    qkv, *rest, y = map(Tensor, call.src[1:])
    B, T, C = y.shape
    gradient, D = Tensor(dy), C // H
    passed = [rest.pop()] if attention.fits_hopper(gpu, T, D) else []
    *bias, lse = rest
    dqkv, delta = new(y, B, T, 3 * C), new(y, B, H, T, dtype=dtypes.float32)
    if passed:
        kernel = attention.hopper_gradient(gpu, B, T, H)
        sums = new(y, B * T // attention.TILE, 3 * C, dtype=dtypes.float32)
        outs = dqkv, sums, delta, new(y, *kernel.grid, 2, T, D, dtype=dtypes.float32), *passed
        dqkv, sums, *_ = launch(gpu, kernel, outs, gradient, qkv, y, lse)
    else:
        first = attention.query_gradient(gpu, B, T, H, D)
        sums = new(y, B * triton.cdiv(T, first.constants["QUERIES"]), 3 * C, dtype=dtypes.float32)
        dqkv, sums, delta = launch(gpu, first, [dqkv, sums, delta], gradient, qkv, y, lse)
        dqkv, sums = launch(gpu, attention.key_gradient(gpu, B, T, H, D), [dqkv, sums], gradient, qkv, lse, delta)
    return dqkv.uop, *(column_sums_node(gpu, sums)[0] for _ in bias), *[None] * (2 + len(passed))


def _embedding_gradient(gradient: UOp, call: UOp) -> Gradients:
    """A node, because the gradient may be added to the head's (joins.GRADIENTS)."""
    weight, tokens = call.src[1:]
    out = UOp.param(2, weight.dtype, weight.shape, weight.device)
    return node("embedding_gradient", [out], (tokens, gradient), V=weight.shape[0])[0], None
