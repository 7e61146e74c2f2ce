"""What is joined; and that what is not is computed all the same, with its gradients, whatever stands beside it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from tinygrad import Tensor, nn
from tinygrad.uop.ops import Ops, PatternMatcher, UOp

import tinygrad_impl.functional as F
import torch_ref.model
from data.checkpoints.config import GPT2Config
from parity_tests.weights import random_weights
from tinygrad_impl.kernels.fused import Fused
from tinygrad_impl.kernels.tests.support import DEVICE, THIS_GPU, names, relative_error
from tinygrad_impl.losses import Evaluator
from tinygrad_impl.model import GPT2, MLP
from tinygrad_impl.trainer import Trainer

from tinygrad_impl.kernels import fused, joins  # isort: skip: after the support

pytestmark = pytest.mark.usefixtures("device")

STRICT, LOOSE = Fused(THIS_GPU, strict=True), Fused(THIS_GPU)
X = np.array([[1, 2, 3, 1]], np.int32)
Y = np.array([[2, 3, -100, 4]], np.int32)


def config_of(layers: int) -> GPT2Config:
    return GPT2Config(vocab_size=40, n_positions=8, n_embd=64, n_layer=layers, n_head=2)


def loss_of(model: GPT2) -> Tensor:
    _, loss = model(Tensor(X), Tensor(Y))
    assert loss is not None
    return loss


def nodes(*tensors: Tensor) -> Counter[str]:
    """How many there are, by name."""
    graph = UOp.sink(*(t.uop for t in tensors))
    return Counter(name for uop in graph.toposort() if (name := F.name_of(uop)))


def joined(*tensors: Tensor) -> Counter[str]:
    return nodes(*map(Tensor, joins.joined(UOp.sink(*(t.uop for t in tensors))).src))


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_rules_fire(layers: int) -> None:
    """In a model's loss, as often as `Rule.count` says; nothing else is left than linear layers before and after."""
    config = config_of(layers)
    made = joined(loss_of(GPT2(config, random_weights(config, 0))))
    expected = {
        "embedding": 1,
        "embedding_layer_norm": 1,
        "linear": 2 * layers,  # c_attn and attn.c_proj
        "split_attention": layers,
        "linear_gelu": layers,
        "gelu_linear": layers,
        "residual_layer_norm": 2 * layers,
        "head_loss": 1,
    }
    assert made == expected
    assert {name: rule.count(config) for name, rule in joins.RULES.items()} == {n: expected[n] for n in joins.RULES}


def test_losses_and_argmax_come_of_one_node() -> None:
    """So that the logits are computed once, and not kept."""
    config = config_of(1)
    losses = GPT2(config, random_weights(config, 0)).losses(Tensor(X), Tensor(Y))
    made = joined(*losses)
    assert made["head_loss"] == 1
    assert not made.keys() & {"lm_head", "cross_entropy", "is_argmax"}
    STRICT.lower(*losses, loss_of=config)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_rules_fire_in_variants(activation: str) -> None:
    """All but those of the tanh form of GELU, which alone is in a GEMM's epilogue; an untied head has them too."""
    config = replace(config_of(2), activation_function=activation, tie_word_embeddings=False, n_inner=64)
    loss = loss_of(GPT2(config, random_weights(config, 0)))
    made = joined(loss)
    node = {"gelu": "gelu_erf", "relu": "relu"}[activation]
    assert (made["linear"], made[node], made["residual_layer_norm"], made["head_loss"]) == (8, 2, 4, 1)
    assert not made.keys() & {"linear_gelu", "gelu_linear", "lm_head"}
    STRICT.lower(loss, loss_of=config)


@pytest.mark.parametrize(
    ("layers", "groups"), [(2, [["h.0", "h.1"]]), (7, [["h.0"], ["h.1", "h.2", "h.3"], ["h.4", "h.5", "h.6"]])]
)
def test_gradients_of_weights(layers: int, groups: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What layer norm gave to c_attn and c_fc is, for the gradients of these, out of its backward pass. The last three
    layers come first; so do their sums of columns, which wait for no other layer.
    """
    config, lowered = config_of(layers), list[UOp]()
    model = GPT2(config, random_weights(config, 0))
    parameters = nn.state.get_state_dict(model)
    [loss] = STRICT.lower(loss_of(model), loss_of=config)
    monkeypatch.setattr(fused, "lower", lambda tensors, compute: lowered.extend(t.uop for t in tensors))
    STRICT.gradient(loss, list(parameters.values()))
    nodes: dict[UOp, list[str]] = {}
    sums: dict[UOp, list[str]] = {}
    for name, uop in zip(parameters, lowered, strict=True):
        if uop.op is Ops.GETTUPLE and F.name_of(uop.src[0]) == "weight_gradients":
            nodes.setdefault(uop.src[0], []).append(".".join(name.split(".")[:2]))
        if name.endswith(("attn.c_attn.bias", "mlp.c_fc.bias")):
            sums.setdefault(uop.src[0], []).append(".".join(name.split(".")[:2]))
    xs = [x for node in nodes for x in node.src[1::2]]
    again = [x for x in xs if x.op is Ops.GETTUPLE and (F.name_of(x.src[0]), x.arg) == ("norm_gradients", joins.NORM)]
    assert (len(xs), len(again), len(set(again))) == (4 * layers, 2 * layers, 2 * layers)
    assert [sorted(set(names)) for names in sums.values()] == groups
    if THIS_GPU.has_copy_engine:
        assert [sorted(set(names)) for names in nodes.values()] == groups


def test_the_embedding_gradient_is_added_to_the_heads() -> None:
    model = GPT2(config_of(1), random_weights(config_of(1), 0))
    [loss] = STRICT.lower(loss_of(model), loss_of=model.config)
    [gradient] = loss.gradient(model.wte.weight)
    [added] = joins.joined(UOp.sink(gradient.uop), joins.GRADIENTS).src
    for uop, sources in ((gradient.uop, 2), (added, 3)):
        made = [u for u in uop.toposort() if F.name_of(u) == "embedding_gradient"]
        assert [len(call.src) - 1 for call in made] == [sources]
    assert added.op is Ops.GETTUPLE  # nothing is added outside of it


@pytest.mark.skipif(DEVICE == "cuda", reason="tinygrad's own kernels are not the same there")
@pytest.mark.parametrize(("layers", "groups"), [(1, 1), (3, 1), (4, 2)])
def test_how_many_kernels(layers: int, groups: int) -> None:
    """Of a layer 7 in the forward pass (four GEMMs, attention, two layer norms) and 8 in the backward pass (four GEMMs,
    two of attention, two of layer norm). Of three layers one for the weights, but four a layer without a copy engine;
    and one that adds up what others have summed for biases and norms, the first layer norm with the first.

    Besides 2 for the embeddings and their layer norm, 6 for head and loss, 1 for the last layer norm's gradient, 5 for
    the embeddings' gradients.
    """
    config = config_of(layers)
    trainer = Trainer(config, random_weights(config, 0), backend=STRICT)
    trainer.step([(X, Y)], 1e-3)
    of_weights = groups if THIS_GPU.has_copy_engine else 4 * layers
    assert len(names(trainer._first)) == 14 + 15 * layers + groups + of_weights
    assert names(trainer._squares)[:-1] == ["squares"] * 2  # of the layers' matrices and the rest; the last joins them
    assert names(trainer._adamw) == ["adamw"] * 2


def left_out(*rules: str) -> Callable[..., UOp]:
    """`joins.joined` without some of the rules."""
    some = PatternMatcher([(rule.pattern, rule.join) for name, rule in joins.RULES.items() if name not in rules])
    right = joins.joined
    return lambda graph, rules=some: right(graph, rules)


# with what else does not fire then
MISSING = {
    "linear_gelu": "linear_gelu (0 of 1), gelu_linear (0 of 1)",
    "gelu_linear": "gelu_linear (0 of 1)",
    "split_attention": "split_attention (0 of 1)",
    "residual_layer_norm": "residual_layer_norm (0 of 2)",
    "embedding_layer_norm": "embedding_layer_norm (0 of 1)",
    "head_loss": "head_loss (0 of 1)",
}


def check_model(model: GPT2, loss: Tensor) -> None:
    """A lowered loss and its gradients, beside float64."""
    exact = torch_ref.model.GPT2(model.config, {name: a.astype(np.float64) for name, a in model.arrays().items()})
    loss64 = exact(torch.tensor(X).long(), torch.tensor(Y).long())[1]
    loss64.backward()
    parameters = nn.state.get_state_dict(model)
    gradients = LOOSE.gradient(loss, list(parameters.values()))
    Tensor.realize(loss, *gradients)
    assert abs(loss.item() - loss64.item()) < 0.01 * loss64.item()
    expected = {name: p.grad for name, p in exact.named_parameters()}
    for name, got in zip(parameters, gradients, strict=True):
        true = expected[name]
        assert true is not None
        assert relative_error(torch.tensor(got.numpy()), true) < 0.05, name


@pytest.mark.parametrize("rule", joins.RULES)
def test_a_rule_that_does_not_fire(
    rule: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named by the error of `strict`, and else by a note; then the same is computed."""
    assert MISSING.keys() == joins.RULES.keys()
    monkeypatch.setattr(joins, "joined", left_out(rule))
    model = GPT2(config_of(1), random_weights(config_of(1), 0, 0.2))
    said = f"these rules of kernels/joins.py did not fire as often as the model needs: {MISSING[rule]}"
    with pytest.raises(RuntimeError) as error:
        STRICT.lower(loss_of(model), loss_of=model.config)
    assert str(error.value) == said
    assert capsys.readouterr() == ("", "")

    [loss] = LOOSE.lower(loss_of(model), loss_of=model.config)
    assert capsys.readouterr() == ("", f"note: slower than it could be, as {said}\n")
    check_model(model, loss)
    LOOSE.lower(loss_of(model))  # of what is not said to be a model's loss nothing is expected
    assert capsys.readouterr() == ("", "")


def test_a_model_whose_gelu_is_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Training and evaluation have the loss's rules counted."""
    monkeypatch.setattr(MLP, "__call__", lambda mlp, x: mlp.c_proj(F.gelu(mlp.c_fc(x).contiguous(), "tanh")))
    config, arrays = config_of(2), random_weights(config_of(2), 0, 0.2)
    trainer = Trainer(config, arrays, backend=STRICT)
    for compute in (lambda: trainer.step([(X, Y)], 1e-3), lambda: Evaluator(trainer.model, STRICT)([(X, Y)])):
        with pytest.raises(RuntimeError, match=r"needs: linear_gelu \(0 of 2\), gelu_linear \(0 of 2\)$"):
            compute()
    assert capsys.readouterr() == ("", "")
    [loss] = LOOSE.lower(loss_of(trainer.model), loss_of=config)
    assert "linear_gelu (0 of 2), gelu_linear (0 of 2)\n" in capsys.readouterr().err
    check_model(trainer.model, loss)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


# rows, a layer's weight and bias, those of a wider one, those of a layer norm, a residual stream
ROWS, STREAM = normal(2, 5, 64), normal(2, 5, 64, seed=1)
WEIGHT, BIAS = normal(64, 64) / 8, normal(64)
OTHER_WEIGHT, OTHER_BIAS = normal(64, 64, seed=1) / 8, normal(64, seed=1)
WIDE_WEIGHT, WIDE_BIAS = normal(64, 192) / 8, normal(192)
GAIN, SHIFT = 1 + normal(64, seed=2) / 10, normal(64, seed=3)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 5)).astype(np.int32)
TOKENS[1, 2] = -100


class Torch:
    """What F has, of PyTorch's."""

    @staticmethod
    def linear(x: Any, w: Any, b: Any) -> Any:
        return x @ w + b

    @staticmethod
    def gelu(x: Any) -> Any:
        return TF.gelu(x, approximate="tanh")

    @staticmethod
    def norm(x: Any, w: Any, b: Any) -> Any:
        return TF.layer_norm(x, (64,), w, b)

    @staticmethod
    def attention(q: Any, k: Any, v: Any, causal: bool = True) -> Any:
        return TF.scaled_dot_product_attention(q, k, v, is_causal=causal)

    @staticmethod
    def loss(logits: Any) -> Any:
        return TF.cross_entropy(logits.flatten(0, 1), torch.tensor(TOKENS).long().flatten(), ignore_index=-100)

    @staticmethod
    def head(x: Any, w: Any) -> Any:
        return TF.pad(x @ w.T, (0, 64), value=-1e30)


class Ours:
    """The same of F."""

    linear = staticmethod(F.linear)

    @staticmethod
    def gelu(x: Any) -> Any:
        return F.gelu(x, "tanh")

    @staticmethod
    def norm(x: Any, w: Any, b: Any) -> Any:
        return F.operation("layer_norm", x, w, b, eps=1e-5)

    @staticmethod
    def attention(q: Any, k: Any, v: Any, causal: bool = True) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    @staticmethod
    def loss(logits: Any) -> Any:
        return F.cross_entropy(logits, Tensor(TOKENS), ignore_index=-100)

    head = staticmethod(F.lm_head)


def heads(x: Any) -> list[Any]:
    """q, k and v of x (B, T, 3C)."""
    B, T, _ = x.shape
    return [t.reshape(B, T, 2, -1).transpose(1, 2) for t in x.split(64, 2)]


def check(compute: Callable[..., Sequence[Any]], arrays: Sequence[np.ndarray], made: dict[str, int]) -> None:
    """What `compute(operations, *arrays)` gives, and its gradients, are near float64's; these nodes compute it."""
    ours = [Tensor(array) for array in arrays]
    exact = [torch.tensor(array).double().requires_grad_() for array in arrays]
    graph, outs64 = compute(Ours, *ours), compute(Torch, *exact)
    assert joined(*graph) == made
    outs = STRICT.lower(*graph)
    scales = [normal(*out.shape, seed=9 + i) for i, out in enumerate(outs)]
    total = sum(((out * Tensor(scale)).sum() for out, scale in zip(outs, scales, strict=True)), start=Tensor(0.0))
    total64 = sum((out * torch.tensor(scale)).sum() for out, scale in zip(outs64, scales, strict=True))
    expected = [*(out.detach() for out in outs64), *torch.autograd.grad(total64, exact)]
    for i, (got, true) in enumerate(zip([*outs, *STRICT.gradient(total, ours)], expected, strict=True)):
        assert relative_error(torch.tensor(got.numpy()), true) < 0.01, i


LAYER = (ROWS, WEIGHT, BIAS)


@pytest.mark.parametrize("rows", [10, 1030])  # and a bias's gradient is summed in parts
@pytest.mark.parametrize("activated", [False, True])
def test_linear_and_gelu(rows: int, activated: bool) -> None:
    """Where no other layer follows."""
    arrays = normal(rows, 64), WEIGHT, BIAS
    if activated:
        check(lambda F, *layer: [F.gelu(F.linear(*layer))], arrays, {"linear_gelu": 1})
    else:
        check(lambda F, *layer: [F.linear(*layer)], arrays, {"linear": 1})


def test_gelu_of_no_linear_layer() -> None:
    check(lambda F, x: [F.gelu(x)], [ROWS], {"gelu": 1})
    made = {"linear": 1, "gelu": 1, "layer_norm": 1}
    check(lambda F, x, w, b: [F.linear(F.gelu(F.norm(x, b, b)), w, b)], LAYER, made)


def test_gelu_twice() -> None:
    """After each of two layers: the second one's is not joined with it, as the first one's is."""
    check(
        lambda F, x, w, b: [F.gelu(F.linear(F.gelu(F.linear(x, w, b)), w, b))],
        LAYER,
        {"linear_gelu": 1, "gelu_linear": 1, "gelu": 1},
    )


QKV = normal(2, 5, 192)


def test_attention() -> None:
    """Of thirds of one tensor in their order, in another one, and where all positions see all."""
    check(lambda F, qkv: [F.attention(*heads(qkv))], [QKV], {"split_attention": 1})
    check(lambda F, qkv: [F.attention(*(heads(qkv)[i] for i in (1, 0, 2)))], [QKV], {"attention": 1})
    check(lambda F, qkv: [F.attention(*heads(qkv), causal=False)], [QKV], {"attention": 1})


def test_attention_that_is_not_joined() -> None:
    """In any other order; of several tensors; of three of four parts; of a part that was changed."""
    attention: Callable[..., Tensor] = Ours.attention
    parts, others, wide = (heads(Tensor(array)) for array in (QKV, QKV, normal(2, 5, 256)))
    for order in [(0, 0, 2), (0, 1, 0), (1, 1, 2), (0, 2, 1), (2, 1, 0)]:
        assert joined(attention(*(parts[i] for i in order))) == {"attention": 1}
    for i in range(3):
        assert joined(attention(*parts[:i], others[i], *parts[i + 1 :])) == {"attention": 1}
        assert joined(attention(*parts[:i], parts[i].contiguous(), *parts[i + 1 :])) == {"attention": 1}
    for some in (wide[:3], wide[1:], [Tensor(normal(2, 3, 5, 16)) for _ in range(3)]):
        assert joined(attention(*some)) == {"attention": 1}
    assert joined(attention(*parts)) == {"split_attention": 1}


def test_layer_norm_of_other_things() -> None:
    """Of no sum; of one that is no layer's and is read by others too, or is not; of a layer's output plus a stream."""
    norm = (GAIN, SHIFT)
    check(lambda F, x, w, b: [F.norm(x, w, b)], [ROWS, *norm], {"layer_norm": 1})
    check(lambda F, x, y, w, b: [F.norm(x + y, w, b)], [ROWS, STREAM, *norm], {"embedding_layer_norm": 1})
    check(lambda F, x, y, w, b: [F.norm(x + y, w, b), x + y], [ROWS, STREAM, *norm], {"embedding_layer_norm": 1})
    check(lambda F, x, w, b: [F.norm(x * 2, w, b), x * 2], [ROWS, *norm], {"layer_norm": 1})
    made = {"linear": 1, "embedding_layer_norm": 1}
    check(lambda F, s, x, w, b, g, h: [F.norm(F.linear(x, w, b) + s, g, h)], [STREAM, *LAYER, *norm], made)
    made = {"linear_gelu": 1, "embedding_layer_norm": 1}
    check(lambda F, s, x, w, b, g, h: [F.norm(s + F.gelu(F.linear(x, w, b)), g, h)], [STREAM, *LAYER, *norm], made)


def test_a_loss_of_other_things() -> None:
    """Of logits that no head gave, and of a head's with something done to them."""
    check(lambda F, x: [F.loss(x)], [4 * ROWS], {"cross_entropy": 1})
    check(lambda F, x, w: [F.loss(F.head(x, w))], [ROWS, WEIGHT], {"head_loss": 1})
    check(lambda F, x, w: [F.loss(F.head(x, w) * 2)], [ROWS, WEIGHT], {"lm_head": 1, "cross_entropy": 1})
    made = {"head_loss": 1, "lm_head": 1}
    check(lambda F, x, w: [F.loss(F.head(x, w)), F.head(x, w)[..., :64]], [ROWS, WEIGHT], made)


Case = tuple[Callable[..., Sequence[Any]], Sequence[np.ndarray], dict[str, int]]
RESIDUAL = (STREAM, *LAYER, GAIN, SHIFT)


def uses() -> Iterator[tuple[str, Case]]:
    """Of a layer's output y: what is made of it, of which arrays, by which nodes."""

    def stream(F: Any, s: Any, x: Any, w: Any, b: Any, g: Any, h: Any) -> list[Any]:
        return [F.norm(s + F.linear(x, w, b), g, h)]

    yield "a norm", (stream, RESIDUAL, {"linear": 1, "residual_layer_norm": 1})

    def stream_itself(F: Any, s: Any, x: Any, w: Any, b: Any, g: Any, h: Any) -> list[Any]:
        total = s + F.linear(x, w, b)
        return [F.norm(total, g, h), total]

    yield "and the sum", (stream_itself, RESIDUAL, {"linear": 1, "residual_layer_norm": 1})

    def output_itself(F: Any, s: Any, x: Any, w: Any, b: Any, g: Any, h: Any) -> list[Any]:
        y = F.linear(x, w, b)
        return [F.norm(s + y, g, h), s + y, y]

    yield "and y", (output_itself, RESIDUAL, {"linear": 2, "residual_layer_norm": 1})

    def two_norms(F: Any, s: Any, x: Any, w: Any, b: Any, g: Any, h: Any) -> list[Any]:
        total = s + F.linear(x, w, b)
        return [F.norm(total, g, h), F.norm(total, h, g), total]

    yield "two norms of one sum", (two_norms, RESIDUAL, {"linear": 1, "residual_layer_norm": 2})

    def two_streams(F: Any, s: Any, x: Any, w: Any, b: Any, g: Any, h: Any) -> list[Any]:
        y = F.linear(x, w, b)
        return [F.norm(s + y, g, h), F.norm(x + y, g, h)]

    yield "norms of two sums", (two_streams, RESIDUAL, {"linear": 1, "residual_layer_norm": 2})

    def gelu(F: Any, x: Any, w: Any, b: Any) -> list[Any]:
        y = F.linear(x, w, b)
        return [F.gelu(y), y]

    yield "GELU and y", (gelu, LAYER, {"linear_gelu": 1, "linear": 1})

    def gelu_and_norm(F: Any, s: Any, x: Any, w: Any, b: Any, g: Any, h: Any) -> list[Any]:
        y = F.linear(x, w, b)
        return [F.gelu(y), F.norm(s + y, g, h)]

    yield "GELU and a norm", (gelu_and_norm, RESIDUAL, {"linear_gelu": 1, "linear": 1, "residual_layer_norm": 1})

    def mlp(F: Any, s: Any, x: Any, w: Any, b: Any, v: Any, a: Any, g: Any, h: Any) -> list[Any]:
        return [F.norm(s + F.linear(F.gelu(F.linear(x, w, b)), v, a), g, h)]

    made = {"linear_gelu": 1, "gelu_linear": 1, "residual_layer_norm": 1}
    yield "an MLP", (mlp, (STREAM, *LAYER, OTHER_WEIGHT, OTHER_BIAS, GAIN, SHIFT), made)

    def gelu_and_layer(F: Any, x: Any, w: Any, b: Any, v: Any, a: Any) -> list[Any]:
        y = F.gelu(F.linear(x, w, b))
        return [y, F.linear(y, v, a)]

    two = (*LAYER, OTHER_WEIGHT, OTHER_BIAS)
    yield "GELU, and a layer of it", (gelu_and_layer, two, {"linear_gelu": 2, "gelu_linear": 1})

    def two_layers(F: Any, x: Any, w: Any, b: Any, v: Any, a: Any) -> list[Any]:
        y = F.gelu(F.linear(x, w, b))
        return [F.linear(y, v, a), F.linear(y, w, b)]

    yield "GELU, and two layers of it", (two_layers, two, {"linear_gelu": 1, "gelu_linear": 2})

    def attention(F: Any, x: Any, w: Any, b: Any) -> list[Any]:
        y = F.linear(x, w, b)
        return [F.attention(*heads(y)), y]

    yield "attention and y", (attention, (ROWS, WIDE_WEIGHT, WIDE_BIAS), {"split_attention": 1, "linear": 2})


USES = dict(uses())


@pytest.mark.parametrize("use", USES)
def test_where_a_layers_output_goes(use: str) -> None:
    """Its bias gets the whole gradient, of whoever takes it and of the layer itself."""
    check(*USES[use])


@pytest.mark.parametrize("swapped", [False, True])
def test_a_gradient_that_is_given_is_not_written_to(swapped: bool) -> None:
    """What is not a kernel's own memory is not what the embedding's gradient is added to."""
    weight, given = Tensor(normal(64, 64)), normal(64, 64, seed=1)
    scale = Tensor(given.copy()).realize()
    [rows] = LOOSE.lower(F.embedding(Tensor(np.array([[1, 1, 5]], np.int32)), weight))
    sums = rows.sum(), (weight * scale).sum()
    [gradient] = LOOSE.gradient(sums[swapped] + sums[not swapped], [weight])
    expected = given.copy()
    expected[1] += 2
    expected[5] += 1
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(scale.numpy(), given)
