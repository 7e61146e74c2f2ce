"""The formulas of the port's operations, against numpy and PyTorch."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

import tinygrad_impl.formulas as F
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from tinygrad_impl.backend import Plain
from tinygrad_impl.model import GPT2

pytestmark = pytest.mark.tuned

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [7, 24, 64])  # a kernel's block is 32 wide, or what of that divides the width
def test_embedding_and_its_gradient(width: int, dtype: type[np.floating]) -> None:
    table = RANDOM.standard_normal((11, width)).astype(dtype)
    tokens = np.array([[3, 3, 10, 0], [3, 0, 5, 3]], np.int32)  # rows named repeatedly, and some never
    above = RANDOM.standard_normal((2, 4, width)).astype(dtype)
    weight = Tensor(table)
    rows = F.embedding(Tensor(tokens), weight)
    gradient = rows.gradient(weight, gradient=Tensor(above))[0].numpy()
    np.testing.assert_array_equal(rows.numpy(), table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, above)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, expected)  # exactly: both add the rows up in order


@pytest.fixture(params=["CPU", "other"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions as they are on a CPU, and as on other devices."""
    monkeypatch.setattr(F, "is_cpu", lambda x: request.param == "CPU")


# as one block, of rows and columns that have blocks, and of sums that have
@pytest.mark.parametrize("device", ["other"], indirect=True)
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(6, 8, 8), (384, 16, 320), (6, 640, 24)])
def test_blocked_matmul_and_its_gradients(device: None, rows: int, n_in: int, n_out: int) -> None:
    x, weight = RANDOM.standard_normal((2, rows // 2, n_in)), RANDOM.standard_normal((n_in, n_out))
    above = RANDOM.standard_normal((2, rows // 2, n_out))
    a, b = Tensor(x), Tensor(weight)
    y = F.blocked_matmul(a, b)
    of_x, of_weight = y.gradient(a, b, gradient=Tensor(above))
    for ours, exact in (
        (y, x @ weight),
        (of_x, above @ weight.T),
        (of_weight, np.einsum("bti,bto->io", x, above)),
    ):
        np.testing.assert_allclose(ours.numpy(), exact, rtol=0, atol=1e-12)


HALF_A_UNIT = 2.0**-24  # in float32's last place, relative


def relative_error(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(ours.astype(np.float64) - exact) / np.linalg.norm(exact))


def test_what_is_added_to_a_product_is_rounded_once() -> None:
    """It does not become the first term of the sum, as tinygrad would have it where a sum is short enough to unroll."""
    stream = (1000 * RANDOM.standard_normal((8, 30))).astype(np.float32)
    x, weight = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((8, 30), (30, 30)))
    y = Tensor(stream) + F.linear(Tensor(x), Tensor(weight), Tensor.zeros(30))
    assert relative_error(y.numpy(), stream + x.astype(np.float64) @ weight) < HALF_A_UNIT


def test_bfloat16_product_is_rounded_once() -> None:
    """After the bias is added, and so are its gradients. Of powers of two, as a CPU rounds what goes into a sum too."""
    x, above = (
        2.0 ** RANDOM.integers(-2, 3, shape) * RANDOM.choice([-1, 1], shape) for shape in ((2, 5, 24), (2, 5, 16))
    )
    weight, bias = (
        Tensor(RANDOM.standard_normal(shape).astype(np.float32)).cast(dtypes.bfloat16).float().numpy()
        for shape in ((24, 16), (16,))
    )
    given = a, w, b = [Tensor(array.astype(np.float32)) for array in (x, weight, bias)]
    y = F.linear(a, w, b, dtype=dtypes.bfloat16)
    gradients = y.gradient(*given, gradient=Tensor(above.astype(np.float32)).cast(dtypes.bfloat16))
    exact = (x @ weight + bias, above @ weight.T, np.einsum("bti,bto->io", x, above), above.sum((0, 1)))
    for ours, theirs in zip((y, *gradients), exact, strict=True):
        nearest = Tensor(theirs.astype(np.float32)).cast(dtypes.bfloat16)
        np.testing.assert_array_equal(ours.float().numpy(), nearest.float().numpy())


@pytest.mark.parametrize("scale", [0.1, 1, 3, 10])
def test_gelu_and_its_derivative(scale: float) -> None:
    x = (scale * RANDOM.standard_normal(10_000)).astype(np.float32)
    given = Tensor(x)
    y = F.gelu(given)
    slope = y.sum().gradient(given)[0]
    z = x.astype(np.float64)
    u, du = (np.sqrt(2 / np.pi) * v for v in (z + 0.044715 * z**3, 1 + 3 * 0.044715 * z**2))
    assert relative_error(y.numpy(), 0.5 * z * (1 + np.tanh(u))) < HALF_A_UNIT
    derivative = 0.5 * (1 + np.tanh(u)) + 0.5 * z * du * (1 - np.tanh(u) ** 2)
    assert relative_error(slope.numpy(), derivative) < 2 * HALF_A_UNIT


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [0.1, 1, 3, 10])
def test_gelu_with_erf_and_its_derivative(scale: float, dtype: type[np.floating]) -> None:
    """Python's erfc has all of its digits, also where 1 + erf would have lost most."""
    x: np.ndarray = (scale * RANDOM.standard_normal(5_000)).astype(dtype)
    given = Tensor(x)
    y = F.gelu_erf(given)
    slope = y.sum().gradient(given)[0]
    z = x.astype(np.float64)
    phi = np.array([math.erfc(-number / math.sqrt(2)) / 2 for number in z])
    unit = float(np.finfo(dtype).eps)
    assert relative_error(y.numpy(), z * phi) < unit / 2
    assert relative_error(slope.numpy(), phi + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)) < unit / 2
    far: np.ndarray = np.linspace(-5, 5, 2001).astype(dtype)
    exact = np.array([number * math.erfc(-number / math.sqrt(2)) / 2 for number in far.astype(np.float64)])
    np.testing.assert_allclose(F.gelu_erf(Tensor(far)).numpy(), exact, rtol=32 * unit, atol=0)


def test_relu_and_its_derivative() -> None:
    """As in PyTorch: 0 has the derivative 0, and NaN is not taken for 0."""
    x = np.array([-np.inf, -2, -0.0, 0, 1e-40, 3, np.inf, np.nan], np.float32)
    given, theirs = Tensor(x), torch.tensor(x, requires_grad=True)
    y, expected = F.relu(given), torch.relu(theirs)
    expected.sum().backward()
    np.testing.assert_array_equal(y.numpy(), expected.detach().numpy())
    assert theirs.grad is not None
    np.testing.assert_array_equal(y.sum().gradient(given)[0].numpy()[:-1], theirs.grad.numpy()[:-1])


@pytest.mark.parametrize("count", [1, 32, 33, 1000, 50304])
def test_long_sum(count: int) -> None:
    """Nearer to the exact sum than one rounding a stage."""
    x = RANDOM.standard_normal((3, count)).astype(np.float32) ** 2
    exact = x.astype(np.float64).sum(-1)
    np.testing.assert_allclose(F.long_sum(Tensor(x)).numpy(), exact, rtol=4e-7)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("rows", [5, F.VOCAB_TILE, F.VOCAB_TILE + 1])
def test_lm_head(rows: int) -> None:
    table = RANDOM.standard_normal((rows, 16)).astype(np.float32)
    x = RANDOM.standard_normal((2, 3, 16)).astype(np.float32)
    targets = RANDOM.integers(0, rows, (2, 3)).astype(np.int32)
    weight, stream = Tensor(table), Tensor(x)
    logits = F.lm_head(stream, weight)
    assert logits.shape == (2, 3, -(-rows // F.VOCAB_TILE) * F.VOCAB_TILE)
    values = logits.numpy()
    np.testing.assert_allclose(values[..., :rows], x @ table.T, rtol=1e-4, atol=1e-5)
    assert (values[..., rows:] == -np.inf).all()

    # d loss / d logits = (softmax - one-hot) / N: in the padding zero, or these gradients would not be finite
    # (from a new graph: what is realized has forgotten what it was made from)
    loss = F.cross_entropy(F.lm_head(stream, weight), Tensor(targets), ignore_index=-100)
    of_weight, of_x = (g.numpy() for g in loss.gradient(weight, stream))
    exact = (x @ table.T).astype(np.float64)
    softmax = np.exp(exact - exact.max(-1, keepdims=True))
    above = softmax / softmax.sum(-1, keepdims=True)
    np.put_along_axis(above, targets[..., None], np.take_along_axis(above, targets[..., None], -1) - 1, -1)
    above /= targets.size
    np.testing.assert_allclose(of_weight, np.einsum("btv,btc->vc", above, x), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_x, above @ table, rtol=1e-4, atol=1e-6)


def test_cross_entropy_leaves_out_ignored_targets() -> None:
    logits = RANDOM.standard_normal((2, 4, 9)).astype(np.float32)
    targets = np.array([[1, -100, 8, 0], [-100, -100, 3, 3]], np.int32)
    given = Tensor(logits)
    loss = F.cross_entropy(given, Tensor(targets), ignore_index=-100)
    log_softmax = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    scored = targets != -100
    expected = -np.take_along_axis(log_softmax, np.maximum(targets, 0)[..., None], -1)[..., 0][scored].mean()
    gradient = loss.gradient(given)[0].numpy()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert (gradient[~scored] == 0).all()
    assert (gradient[scored] != 0).all()


def test_losses_of_tokens_and_argmax() -> None:
    """Of two equally large logits the first is the argmax, as in PyTorch."""
    logits = RANDOM.standard_normal((2, 4, 9)).astype(np.float32)
    logits[0, :2, [3, 5]] = 7.0
    targets = logits.argmax(-1).astype(np.int32)
    targets[0, 1], targets[1, 1], targets[1, 2] = 5, (targets[1, 1] + 1) % 9, -100
    losses = F.cross_entropy(Tensor(logits), Tensor(targets), ignore_index=-100, reduction="none").numpy()
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).double().flatten(0, 1), torch.tensor(targets).long().flatten(), reduction="none"
    )
    np.testing.assert_allclose(losses, expected.reshape(2, 4).numpy(), rtol=1e-5, atol=1e-7)
    likeliest = F.is_argmax(Tensor(logits), Tensor(targets), ignore_index=-100).numpy()
    assert likeliest.tolist() == [[True, False, True, True], [True, False, False, True]]


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_cross_entropy_of_shifted_logits(shift: float) -> None:
    logits = (RANDOM.integers(-40, 40, (1, 4, 9)) / 8).astype(np.float32)  # exact when shifted
    targets = Tensor(np.array([[0, 1, 2, 8]], np.int32))
    losses = [F.cross_entropy(Tensor(values), targets, -100).item() for values in (logits, logits + np.float32(shift))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_attention_sees_the_past_only() -> None:
    q, k, v = (RANDOM.standard_normal((1, 2, 5, 4)).astype(np.float32) for _ in range(3))
    changed = v.copy()
    changed[:, :, 3] += 1
    first, second = (
        F.attention(Tensor(q), Tensor(k), Tensor(values), is_causal=True).numpy() for values in (v, changed)
    )
    np.testing.assert_array_equal(first[:, :, :3], second[:, :, :3])
    assert (first[:, :, 3:] != second[:, :, 3:]).all()
    scores = q @ k.swapaxes(-1, -2) / 2
    scores[..., ~np.tri(5, dtype=bool)] = -np.inf
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(first, weights @ v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("computed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bfloat16_keeps_what_needs_it_in_float32(computed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual stream, softmax, loss and gradients; the operands of GEMMs alone are of 16 bits."""
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model, backend = GPT2(config, initial_weights(config, 0)), Plain(dtypes.bfloat16)
    tokens = RANDOM.integers(0, 61, (2, 17)).astype(np.int32)
    x, y = Tensor(tokens[:, :-1].copy()), Tensor(tokens[:, 1:].copy())
    softmax, softmaxed, asked = Tensor.softmax, list[DType](), list[DType | None]()

    def watched(self: Tensor, axis: int = -1) -> Tensor:
        softmaxed.append(self.dtype)
        return softmax(self, axis)

    loss = model(x, y)[1]
    assert loss is not None
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "softmax", watched)
        for name in ("linear", "attention", "lm_head"):
            formula = getattr(F, name)

            def given(*sources: Tensor, formula: Any = formula, dtype: DType | None = None, **more: Any) -> Tensor:
                asked.append(dtype)
                return cast(Tensor, formula(*sources, **more | {"dtype": dtype}))

            patch.setattr(F, name, given)
        [lowered] = backend.lower(loss)
    assert softmaxed == [dtypes.float32]
    assert asked == [dtypes.bfloat16] * 6  # four linear layers, attention and the head
    gradients = backend.gradient(lowered, [model.wte.weight, model.h[0].attn.c_attn.weight])
    assert [g.dtype for g in (lowered, *gradients)] == [dtypes.float32] * 3
    if not computed:  # of inference test_generate.py has it
        return
    [exact] = Plain().lower(loss)
    assert lowered.item() != exact.item()
    assert lowered.item() == pytest.approx(exact.item(), rel=2**-8)  # bfloat16 has 8 bits


def compare(
    ours: tuple[Tensor, list[Tensor]], theirs: tuple[torch.Tensor, list[torch.Tensor]], tolerance: float
) -> None:
    """The value and the gradients of the sum of its elements, each times a weight of its own, with PyTorch's."""
    (y, inputs), (z, others) = ours, theirs
    above = np.cos(np.arange(z.numel())).reshape(z.shape)
    gradients = y.gradient(*inputs, gradient=Tensor(above).cast(y.dtype))
    z.backward(torch.tensor(above))
    exact = [z.detach(), *(other.grad for other in others)]
    for found, expected in zip((y, *gradients), exact, strict=True):
        assert expected is not None
        assert found.dtype == dtypes.float64
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=tolerance)


def both(*arrays: np.ndarray) -> tuple[list[Tensor], list[torch.Tensor]]:
    return [Tensor(a) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("rows", [F.ROWS, F.ROWS + 1, 3 * F.ROWS])  # one block, two and three
def test_linear(rows: int) -> None:
    ours, theirs = both(*(RANDOM.standard_normal(shape) for shape in ((1, rows, 24), (24, 12), (12,))))
    z = theirs[0] @ theirs[1] + theirs[2]
    compare((F.linear(*ours), ours), (z, theirs), 1e-11)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("rows", "width", "eps"), [(3, 16, 0.3), (F.ROWS + 3, 256, 0.02), (5, 384, 0.3)])
def test_layer_norm(rows: int, width: int, eps: float) -> None:
    """In one sum, and of more than 256 numbers in blocks of 128; the epsilon is that of the model."""
    x, weight, bias = (RANDOM.standard_normal(shape) for shape in ((1, rows, width), (width,), (width,)))
    (a, w, b), theirs = both(x / 2 + 1, weight, bias)
    z = torch.nn.functional.layer_norm(theirs[0], (width,), theirs[1], theirs[2], eps)
    compare((F.layer_norm(a, w, b, eps), [a, w, b]), (z, theirs), 1e-11)


@pytest.mark.parametrize("mask", ["causal", "given", "none"])
def test_attention(mask: str) -> None:
    """Two rows with two heads, of which each query sees what the mask of its row says."""
    S, T = 5, 5 if mask == "causal" else 3
    (q_ours, k_ours, v_ours), theirs = both(*(RANDOM.standard_normal((2, 2, size, 4)) for size in (T, S, S)))
    ours = [q_ours, k_ours, v_ours]
    seen = np.tri(T, S, S - T, dtype=bool) & (RANDOM.random((2, 1, T, S)) < 0.6) | np.eye(T, S, dtype=bool)
    given, causal = mask == "given", mask == "causal"
    y = F.attention(q_ours, k_ours, v_ours, attn_mask=Tensor(seen) if given else None, is_causal=causal)
    q, k, v = theirs
    other = torch.tensor(seen) if given else None
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=other, is_causal=causal)
    compare((y, ours), (z, theirs), 1e-12)


# two blocks of the other devices, and as many as there may be; a CPU has none
@pytest.mark.parametrize(("device", "rows"), [("CPU", 130), ("other", 130), ("other", 2100)], indirect=["device"])
def test_the_head_and_the_loss(device: None, rows: int) -> None:
    """Of a vocabulary that is padded; every fifth target is ignored."""
    V = F.VOCAB_TILE + 5
    ours, theirs = both(RANDOM.standard_normal((2, rows // 2, 3)), RANDOM.standard_normal((V, 3)))
    targets = RANDOM.integers(0, V, (2, rows // 2))
    targets.flat[::5] = -100
    loss = F.cross_entropy(F.lm_head(*ours), Tensor(targets.astype(np.int32)), ignore_index=-100)
    logits = (theirs[0] @ theirs[1].T).flatten(0, 1)
    z = torch.nn.functional.cross_entropy(logits, torch.tensor(targets).flatten(), ignore_index=-100)
    compare((loss, ours), (z, theirs), 1e-12)


def test_the_head_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On both kinds of device the product of what is rounded to 8 bits, rounded once."""
    x, table = (2.0 ** RANDOM.integers(-2, 3, shape) * RANDOM.choice([-1, 1], shape) for shape in ((1, 2, 8), (130, 8)))
    nearest = torch.tensor(x @ table.T).bfloat16().float().numpy()
    for on_cpu in (True, False):
        monkeypatch.setattr(F, "is_cpu", lambda x, on_cpu=on_cpu: on_cpu)
        given = Tensor(x.astype(np.float32)), Tensor(table.astype(np.float32))
        logits = F.lm_head(*given, dtype=dtypes.bfloat16)
        assert logits.dtype == dtypes.bfloat16
        np.testing.assert_array_equal(logits.float().numpy()[..., :130], nearest)


@pytest.mark.parametrize(("count", "parts"), [(16, 16), (17, 2), (32, 2), (256, 16), (257, 2)])
def test_partial_sums(count: int, parts: int) -> None:
    """At most as many as asked for, which are sums of every so manyth, padded with zeros."""
    x = RANDOM.standard_normal((2, count))
    found = F.partial_sums(Tensor(x), 16).numpy()
    assert found.shape == (2, parts)
    np.testing.assert_allclose(found.sum(-1), x.sum(-1), rtol=0, atol=1e-12)


def test_gradients_of_biases_are_sums_in_blocks_of_rows() -> None:
    """Of 4096 rows of one sign: in one running sum, their rounding errors would be ten times as large."""
    above, hidden = RANDOM.random((1, 4096, 4), np.float32), RANDOM.standard_normal((1, 4096, 4), np.float32)
    weight, bias = Tensor.ones(4, 4).contiguous(), Tensor.zeros(4).contiguous()
    layer, norm = F.linear(Tensor(hidden), weight, bias), F.layer_norm(Tensor(hidden), weight[0], bias, 1e-5)
    for out, parameter in ((layer, bias), (norm, bias)):
        [gradient] = out.gradient(parameter, gradient=Tensor(above))
        np.testing.assert_allclose(gradient.numpy(), above.astype(np.float64).sum((0, 1)), rtol=6e-7)


@pytest.mark.parametrize("device", ["other"], indirect=True)
def test_logits_of_few_rows_are_sums_in_blocks(device: None) -> None:
    """As in generation. Of products of one sign, which one running sum would lose digits of."""
    x, table = RANDOM.random((1, 3, 768), np.float32), RANDOM.random((130, 768), np.float32)
    logits = F.lm_head(Tensor(x), Tensor(table)).numpy()[..., :130]
    assert relative_error(logits, x.astype(np.float64) @ table.T) < 1.5 * HALF_A_UNIT
