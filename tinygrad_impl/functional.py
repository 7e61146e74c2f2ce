"""What torch.nn.functional is to the reference: GPT-2's operations by name, as nodes of tinygrad's graph.

A call computes nothing. It adds a node that has the operation's name, its sources, and within it the formula
(formulas.py), so that its shape is known. What computes it is chosen for a whole graph at once: a backend (backend.py)
replaces every node, by the formula or by kernels, and can see what stands next to what. A graph that no backend has
seen computes the formulas, in the dtype of the parameters; it has no gradients.

In the comments B is the batch, T the sequence length, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tinygrad import Tensor, nn
from tinygrad.dtype import Invalid
from tinygrad.uop.ops import CallInfo, Ops, PatternMatcher, UOp, UPat, graph_rewrite

from tinygrad_impl import formulas

# (name, sources, settings) of a node -> its outputs, of the shapes that it has; dtypes may differ
Compute = Callable[[str, list[Tensor], dict[str, Any]], list[Tensor]]


def operation(name: str, *sources: Tensor, **settings: Any) -> Tensor:
    """The node `name`, which is that of a formula too, of these sources and settings, which are constants."""
    body: Tensor = getattr(formulas, name)(*(t.as_param(i) for i, t in enumerate(sources)), **settings)
    return Tensor(node(name, [body.uop], [t.uop for t in sources], **settings)[0])


def node(name: str, outs: Iterable[UOp], sources: Iterable[UOp], **settings: Any) -> list[UOp]:
    """The outputs of a node. Within it they are `outs`, of the parameters that stand for its sources."""
    body = UOp.maketuple(*outs)
    call = body.call(*sources, name=name, grad_fxn=_no_gradient, aux=tuple(settings.items()))
    return [call.gettuple(i) for i in range(len(body.src))]


def _no_gradient(*given: Any, **named: Any) -> NoReturn:
    """tinygrad's own would be wrong, since it numbers anew the parameters of the calls that are within formulas."""
    raise RuntimeError("there are gradients only of a graph that a backend has lowered")


def pattern(of: str, *sources: UPat, out: int = 0, name: str | None = None, call: str | None = None) -> UPat:
    """Matches output `out` of a node `of` such sources. The match names the output `name`, and the node `call`."""
    function = UPat(Ops.FUNCTION, src=(UPat(), *sources), arg=Named(of), name=call)
    return UPat(Ops.GETTUPLE, arg=out, src=(function,), name=name)


@dataclass(frozen=True, eq=False)
class Named:
    """In a pattern, what equals the arg of any node of this name."""

    name: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named | CallInfo) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


def name_of(uop: UOp) -> str | None:
    """A node's; None of what is no node. (A tag would not do: tinygrad takes tagged UOps for its own.)"""
    return uop.arg.name if uop.op is Ops.FUNCTION and uop.arg.aux is not None else None


def settings_of(call: UOp) -> dict[str, Any]:
    return dict(call.arg.aux)


def lower(tensors: Iterable[Tensor], compute: Compute) -> list[Tensor]:
    """The same tensors, with every node of their graphs computed by `compute`, sources before what is made of them."""
    outs: dict[UOp, list[Tensor]] = {}
    graph = UOp.sink(*(t.uop for t in tensors))
    return [Tensor(uop) for uop in graph_rewrite(graph, LOWER, ctx=(compute, outs)).src]


def _lower(ctx: tuple[Compute, dict[UOp, list[Tensor]]], out: UOp, call: UOp) -> UOp | None:
    compute, outs = ctx
    if (name := name_of(call)) is None:
        return None
    if call not in outs:
        outs[call] = compute(name, [Tensor(source) for source in call.src[1:]], settings_of(call))
    found: UOp = outs[call][out.arg].cast(out.dtype).uop
    return found


LOWER = PatternMatcher([(UPat(Ops.GETTUPLE, src=(UPat(Ops.FUNCTION, name="call"),), name="out"), _lower)])


def in_place(totals: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """The totals, which are realized, after the values have been computed into their memory. What kernels would write
    to memory of its own, they write to that of the totals.
    """
    places, found = {}, []
    for total, value in zip(totals, values, strict=True):
        uop = value.uop
        if (memory := _written(uop)) is None or memory in places:
            uop = total.assign(value).uop
        else:
            places[memory] = total.uop.reshape(memory.shape)
        found.append(uop)
    return [Tensor(uop.base) for uop in UOp.sink(*found).substitute(places).src]


def _written(uop: UOp) -> UOp | None:
    """The memory that `Tensor.invalids` stands for, if the uop is that after kernels have written it."""
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


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """The rows of weight (V, C) that tokens (B, T) name: (B, T, C)."""
    return operation("embedding", tokens, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., in) @ weight [in, out] + bias [out]: (..., out)."""
    return operation("linear", x, weight, bias)


class LayerNorm(nn.LayerNorm):
    """Over the last dimension, with a weight and a bias for each of its elements."""

    def __call__(self, x: Tensor) -> Tensor:
        return operation("layer_norm", x, self.weight, self.bias, eps=self.eps)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU (...) -> (...): "none" is x Phi(x) with the normal distribution's Phi, "tanh" is its tanh form."""
    return operation({"tanh": "gelu", "none": "gelu_erf"}[approximate], x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0): (...) -> (...). NaN stays NaN."""
    return operation("relu", x)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """softmax(q @ k.T / sqrt(D)) @ v for q, k, v (B, H, T, D).

    With attn_mask, bool (B, 1, T, S), k and v are (B, H, S, D), of which a query takes those where it is true.
    """
    masks = [] if attn_mask is None else [attn_mask]
    return operation("attention", q, k, v, *masks, is_causal=is_causal)


def lm_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, T, C) @ weight (V, C).T: logits (B, T, V rounded up to VOCAB_TILE), those past V being -inf."""
    return operation("lm_head", x, weight)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, reduction: str = "mean") -> Tensor:
    """logits (B, T, any), targets (B, T) -> -log softmax(logits)[target]: its mean over the targets but ignore_index,
    or with the reduction "none" of each target (B, T), 0 where that is ignore_index.
    """
    return operation("cross_entropy", logits, targets, ignore_index=ignore_index, reduction=reduction)


def is_argmax(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """logits (B, T, any), targets (B, T) -> logits.argmax(-1) == targets, bool (B, T); False for ignore_index."""
    return operation("is_argmax", logits, targets, ignore_index=ignore_index)
