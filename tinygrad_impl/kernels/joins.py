"""Which operations one kernel computes together: rules that rewrite a graph of `functional`'s nodes.

A rule is a pattern of nodes, and the node that takes their place. Two kinds of things are joined:

- forward, what would read a result again that a kernel still has in registers: linear + GELU, residual + layer norm,
  head + loss;
- backward, the gradient of a linear layer's bias. It is the sum over rows of the gradient of the layer's output, and
  the kernel that computes the latter has these rows in registers. So the node after a linear layer takes the layer's
  bias as a source of its own and gives its gradient, and the layer gets the bias detached.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from tinygrad import Tensor
from tinygrad.dtype import dtypes
from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat, graph_rewrite

from data.checkpoints.config import GPT2Config
from tinygrad_impl.functional import name_of, node, pattern, settings_of
from tinygrad_impl.kernels.launch import stored


def declared(like: UOp, slot: int, *shape: int) -> UOp:
    """Stands for an output within a node that is known by its name, not by a formula."""
    return UOp.param(slot, like.dtype, shape, like.device)


def linear_gelu(x: UOp, w: UOp, b: UOp) -> UOp:
    """Outputs: what the layer gives, kept for the backward pass, and GELU of it."""
    shape = (*x.shape[:-1], w.shape[1])
    return node("linear_gelu", [declared(x, i, *shape) for i in (3, 4)], (x, w, b))[1]


def gelu_linear(y: UOp, w: UOp, b: UOp) -> UOp:
    """The linear layer after GELU. Its backward pass computes GELU and its derivative again, in a GEMM's epilogue."""
    before, bias = y.src[0], y.src[0].src[3]
    hidden, y = map(without_bias(before).gettuple, (0, 1))
    return node("gelu_linear", [declared(y, 5, *y.shape[:-1], w.shape[1])], (hidden, y, w, b, bias))[0]


def split_attention(q: UOp, k: UOp, v: UOp, call: UOp) -> UOp | None:
    """Causal attention whose q, k and v (B, H, T, D) are thirds of one (B, T, 3C): they are read where they are."""
    B, H, T, D = q.shape
    C, qkv = H * D, q.src[0].src[0].src[0]
    for i, part in enumerate((q, k, v)):
        heads, third = part.src[0], part.src[0].src[0]
        place = (0, B), (0, T), (i * C, C)  # beginning and size
        if third.src[0] is not qkv or (part.marg, heads.shape, third.marg) != ((0, 2, 1, 3), (B, T, H, D), place):
            return None
    if qkv.shape != (B, T, 3 * C) or not settings_of(call)["is_causal"]:
        return None
    sources = (without_bias(qkv.src[0]).gettuple(0), bias_of(qkv)) if is_linear(qkv) else (qkv,)
    [y] = node("split_attention", [declared(qkv, len(sources), B, T, C)], sources, n_head=H)
    return y.reshape((B, T, H, D)).permute((0, 2, 1, 3))


def residual_layer_norm(
    ctx: dict[UOp, UOp], stream: UOp, branch: UOp, total: UOp, w: UOp, b: UOp, call: UOp
) -> UOp | None:
    """Layer norm of the residual stream after a layer's output is added to it. Outputs: the sum, and its norm. Whatever
    else reads the sum reads this one, which is why it is kept in `ctx`; its gradient is then added in the same kernel.
    """
    if not is_linear(branch):
        return None
    outs = [declared(total, i, *total.shape) for i in (5, 6)]
    sources = stream, without_bias(branch.src[0]).gettuple(0), bias_of(branch), w, b
    ctx[total], normal = node("residual_layer_norm", outs, sources, **settings_of(call))
    return normal


def embedding_layer_norm(
    ctx: dict[UOp, UOp], stream: UOp, branch: UOp, total: UOp, w: UOp, b: UOp, call: UOp
) -> UOp | None:
    """The same for the first layer norm, of the sum of both embeddings."""
    if is_linear(branch):
        return None
    outs = [declared(total, i, *total.shape) for i in (4, 5)]
    ctx[total], normal = node("embedding_layer_norm", outs, (stream, branch, w, b), **settings_of(call))
    return normal


def head_loss(x: UOp, w: UOp, targets: UOp, call: UOp) -> UOp:
    """The mean loss, or that of each target, for which the logits are computed by parts of the rows and not kept."""
    settings = settings_of(call)
    if settings["reduction"] == "none":
        return head_losses(x, w, targets, settings["ignore_index"])[0]
    return node("head_loss", [declared(x, 3)], (x, w, targets), **settings)[0]


def head_argmax(x: UOp, w: UOp, targets: UOp, call: UOp) -> UOp:
    """Whether each target is the likeliest token, out of the same node as its loss."""
    return head_losses(x, w, targets, settings_of(call)["ignore_index"])[1]


def head_losses(x: UOp, w: UOp, targets: UOp, ignore_index: int) -> list[UOp]:
    """Outputs: the loss of each target, and whether it is the likeliest token."""
    outs = [declared(x, 3, *targets.shape), UOp.param(4, dtypes.bool, targets.shape, x.device)]
    return node("head_loss", outs, (x, w, targets), ignore_index=ignore_index, reduction="none")


def embedding_gradient_onto_head(head: UOp, tokens: UOp, rows: UOp) -> UOp:
    """The rows' gradients are added in place to the head's, instead of to zeros and then table to table."""
    return node("embedding_gradient", [declared(rows, 3, *head.shape)], (tokens, rows, head), V=head.shape[0])[0]


LAYERS = 3  # whose weights' gradients one kernel computes: with more it is no faster, and more is kept until then
# Nodes that are put together: of each layer the gradients of four weights (c_attn, attn.c_proj, c_fc, mlp.c_proj), and
# four sums of columns (of attention, ln_2, GELU and the layer norm that follows).
GROUP = 4 * LAYERS
NORM = 3  # which output of the node of a layer norm's gradients is its own
BIAS = {"linear": 3, "linear_gelu": 3, "gelu_linear": 4}  # where a layer's node has it in its src


def is_linear(out: UOp) -> bool:
    """Whether this is the output of a linear layer, whose bias the node after it can take."""
    return out.op is Ops.GETTUPLE and name_of(out.src[0]) in ("linear", "gelu_linear")


def bias_of(out: UOp) -> UOp:
    call = out.src[0]
    return call.src[BIAS[call.arg.name]]


def without_bias(call: UOp) -> UOp:
    """A layer's node with its bias detached: it gives no gradient for it."""
    place, src = BIAS[call.arg.name], list(call.src)
    src[place] = src[place].detach()
    return call.replace(src=tuple(src))


@dataclass(frozen=True)
class Rule:
    """`join` gives what takes the place of a match of the pattern, or None; `count` how many a model's loss has."""

    pattern: UPat
    join: Callable[..., UOp | None]
    count: Callable[[GPT2Config], int]


def head_split_off(name: str) -> UPat:
    """(B, H, T, D) of a part of (B, T, any)."""
    split = UPat(Ops.SHRINK, allow_any_len=True)
    return UPat(Ops.PERMUTE, src=(UPat(Ops.RESHAPE, src=(split,), allow_any_len=True),), name=name)


def total(name: str) -> UPat:
    return UPat(Ops.ADD, src=(UPat.var("stream"), UPat.var("branch")), name=name)


def gelus(config: GPT2Config) -> int:
    """Activations of the one kind that a GEMM computes in its epilogue."""
    return config.n_layer if config.activation_function == "gelu_new" else 0


X, W, B = map(UPat.var, ("x", "w", "b"))
QKV = [head_split_off(name) for name in "qkv"]
RULES = {  # by the name of the node that a rule makes
    "linear_gelu": Rule(pattern("gelu", pattern("linear", X, W, B)), linear_gelu, gelus),
    "gelu_linear": Rule(
        pattern("linear", pattern("linear_gelu", UPat(), UPat(), UPat(), out=1, name="y"), W, B),
        gelu_linear,
        gelus,
    ),
    "split_attention": Rule(pattern("attention", *QKV, call="call"), split_attention, lambda c: c.n_layer),
    "residual_layer_norm": Rule(
        pattern("layer_norm", total("total"), W, B, call="call"), residual_layer_norm, lambda c: 2 * c.n_layer
    ),
    "embedding_layer_norm": Rule(
        pattern("layer_norm", total("total"), W, B, call="call"), embedding_layer_norm, lambda c: 1
    ),
    "head_loss": Rule(
        pattern("cross_entropy", pattern("lm_head", X, W), UPat.var("targets"), call="call"), head_loss, lambda c: 1
    ),
}
ARGMAX = pattern("is_argmax", pattern("lm_head", X, W), UPat.var("targets"), call="call")
LOSS = PatternMatcher([*((rule.pattern, rule.join) for rule in RULES.values()), (ARGMAX, head_argmax)])
GRADIENTS = PatternMatcher(
    [
        (
            UPat(Ops.ADD, src=(UPat.var("head"), pattern("embedding_gradient", UPat.var("tokens"), UPat.var("rows")))),
            embedding_gradient_onto_head,
        )
    ]
)


def joined(graph: UOp, rules: PatternMatcher = LOSS) -> UOp:
    """The graph with its nodes joined by the rules."""
    sums: dict[UOp, UOp] = {}
    return graph_rewrite(graph, rules, ctx=sums).substitute(sums)


def norms_again(graph: UOp) -> UOp:
    """The graph with gradients of weights that read the output of a layer norm from its backward pass, which computes
    it once more, so that it need not be kept from the forward pass on.
    """
    calls = graph.toposort()
    again = {call.src[1]: call.gettuple(NORM) for call in calls if name_of(call) == "norm_gradients"}
    places: dict[UOp, UOp] = {}
    for call in calls:
        if name_of(call) == "weight_gradients":
            x, dy = call.src[1:]
            places[call] = call.replace(src=(call.src[0], again.get(stored(Tensor(x)).uop, x), dy))
    return graph.substitute(places)


def grouped(graph: UOp, name: str, besides: int = 0) -> UOp:
    """The sink of a model's gradients, in the order of its parameters, with up to GROUP nodes of this name as one, from
    the last on, as the backward pass goes. Their settings are tuples, which are joined.

    `besides`: how many come before those of layers, and so last in the backward pass. They join the last group.
    """
    found = [u.src[0] for u in graph.src if u.op is Ops.GETTUPLE and name_of(u.src[0]) == name]
    calls, places = list(dict.fromkeys(found)), dict[UOp, UOp]()
    bounds = {0, len(calls), *range(len(calls) - GROUP, besides, -GROUP)}
    for start, end in pairwise(sorted(bounds)):
        group = calls[start:end]
        sources = [source for call in group for source in call.src[1:]]
        outs = [call.gettuple(i) for call in group for i in range(len(call.src[0].src))]
        settings: dict[str, tuple[int, ...]] = {}
        for call in group:
            settings = {key: settings.get(key, ()) + value for key, value in settings_of(call).items()}
        declarations = [declared(out, len(sources) + i, *out.shape) for i, out in enumerate(outs)]
        places |= zip(outs, node(name, declarations, sources, **settings), strict=True)
    return graph.substitute(places)


def missing(graph: UOp, config: GPT2Config) -> Mapping[str, str]:
    """The rules that made fewer or more nodes in the graph of such a model's loss than they have to: "3 of 12"."""
    made = [name_of(uop) for uop in graph.toposort()]
    counts = {name: (made.count(name), rule.count(config)) for name, rule in RULES.items()}
    return {name: f"{found} of {wanted}" for name, (found, wanted) in counts.items() if found != wanted}
