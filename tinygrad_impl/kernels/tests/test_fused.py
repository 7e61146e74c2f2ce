"""The kernels in tinygrad's graphs, as training uses them: the parity proof, and what they must not do besides."""

import numpy as np
import pytest
import torch
from tinygrad import Tensor, dtypes

import tinygrad_impl.functional as F
import torch_ref.model
from data.checkpoints.config import GPT2Config
from parity_tests.proof import Setting, flow_rows, gradient_rows, random_batches, step_rows
from parity_tests.weights import random_weights
from tinygrad_impl.evaluate import Evaluator
from tinygrad_impl.kernels import embedding, fused, layer_norm, matmul
from tinygrad_impl.kernels.tests.support import DEVICE, relative_error, slow_without_gpu
from tinygrad_impl.trainer import Trainer

# heads of 32 and of 64; a vocabulary that fills no tile, and one that fills two
CONFIG = GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=1, n_head=2, layer_norm_epsilon=0.1)
OTHER = GPT2Config(vocab_size=256, n_positions=24, n_embd=64, n_layer=2, n_head=1)

pytestmark = pytest.mark.usefixtures("device")


def setting_of(config: GPT2Config) -> Setting:
    return Setting(config, random_weights(config, 0, 0.2), "bfloat16", DEVICE.upper(), fused)


@pytest.fixture(scope="module")
def setting(device: None) -> Setting:
    return setting_of(CONFIG)


@pytest.fixture(scope="module")
def trainer(setting: Setting) -> Trainer:
    return setting.trainer()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in several parts or turns, of which the last are smaller: the rows of the head, sums for the gradients
    of weights, tiles of products and of layer norm's backward pass, sums for that of the embedding.
    """
    monkeypatch.setattr(fused, "HEAD_ROWS", 20)
    monkeypatch.setattr(matmul, "parts", lambda *sizes: 3)
    monkeypatch.setitem(matmul.HOPPER, "BK", 16)
    monkeypatch.setattr(matmul, "PROCESSORS", 2)
    monkeypatch.setattr(layer_norm, "PROGRAMS", 2)
    monkeypatch.setattr(embedding, "SORTED", 64)
    monkeypatch.setattr(embedding, "SUMMED", 4)


def random_batch(rows: int = 2, length: int = 8) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(rows * length).integers(0, CONFIG.vocab_size, (2, rows, length)).astype(np.int32)
    return x[0], x[1]


def names(graph: object) -> list[str]:
    """Of the kernels of a captured graph, in order."""
    calls = graph.captured.linear.src  # type: ignore[attr-defined]
    inner = [c for call in calls for c in (call.src[0].src[0].src if call.src[0].arg == "graph" else [call])]
    return [call.src[0].arg.name for call in inner if hasattr(call.src[0].arg, "name")]


def prove(setting: Setting, rows: int, length: int) -> None:
    """Activations at the edges between sub-layers, gradients and an AdamW step out of the graphs that train: all of it
    is PyTorch's, by the bounds of the parity proof.
    """
    batches = random_batches(setting.config, rows, length, seed=0, count=2)
    references, trainer = setting.references(), setting.trainer()
    found = flow_rows(setting, references, batches[:1])
    found += gradient_rows(setting, trainer, references, [[batch] for batch in batches])
    found += step_rows(setting, trainer, references, [([batches[0]], 1e-3, 1e-3)])
    assert {row.check for row in found} == {"forward", "backward", "gradient", "training"}
    assert all(row.passed for row in found), [row for row in found if not row.passed]


def test_proof(setting: Setting) -> None:
    prove(setting, 2, 17)


@pytest.mark.usefixtures("small_parts")
def test_proof_in_parts() -> None:
    prove(setting_of(OTHER), 2, 24)


@slow_without_gpu  # the catalogue's bugs show it too
def test_proof_notices(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer norm that is 5 % too large."""
    right = fused.normalised
    monkeypatch.setattr(fused, "normalised", lambda *args: right(*args) * 1.05)
    rows = flow_rows(setting, setting.references(), random_batches(CONFIG, 1, 8, seed=0, count=1))
    assert "h.0.ln_1" in {row.name for row in rows if not row.passed}


def test_nothing_is_copied(trainer: Trainer) -> None:
    """Kernels read what kernels wrote, and write where the totals are; tinygrad's own are few, and none of a layer."""
    trainer.step([random_batch()], 1e-3)
    ours = (
        "matmul",
        "attention",
        "norm",
        "cross_entropy",
        "column_sums",
        "embed",
        "sort",
        "merge",
        "sum_",
        "add_parts",
    )
    plain = [name for name in names(trainer._first) if not name.startswith(ours)]
    assert len(plain) <= 6, plain
    assert all(name.startswith(("adamw", "squares")) for name in names(trainer._adamw))


def totals(trainer: Trainer, batches: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sums of gradients, and of the loss."""
    trainer.accumulate(batches)
    return {name: t.numpy().copy() for name, t in [*trainer.gradients.items(), ("loss", trainer.loss)]}


def test_further_batches_are_added(trainer: Trainer) -> None:
    """To none, to one and to three; the next step begins anew."""
    x, y = random_batch()
    a, b = (x, y), (y[::-1].copy(), x)
    alone = [totals(trainer, [batch]) for batch in (a, b)]
    for batches, counts in (([a, b], (1, 1)), ([b, a, b, b, b], (1, 4))):
        for name, got in totals(trainer, batches).items():
            expected = sum(count * one[name] for count, one in zip(counts, alone, strict=True))
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert all(np.array_equal(got, alone[0][name]) for name, got in totals(trainer, [a]).items())


def test_ignored_targets(setting: Setting, trainer: Trainer) -> None:
    """None, some, a whole row, and all but one: loss and gradients are those of the others in float64."""
    x, y = random_batch()
    some, row, most = y.copy(), y.copy(), np.full_like(y, -100)
    some[0, 2], some[1, -1], row[0], most[1, 3] = -100, -100, -100, y[1, 3]
    exact = torch_ref.model.GPT2(CONFIG, {name: array.astype(np.float64) for name, array in setting.arrays.items()})
    exact.load_state_dict({name: torch.tensor(array).double() for name, array in trainer.model.arrays().items()})
    for targets in (y, some, row, most):
        found = totals(trainer, [(x, targets)])
        exact.zero_grad()
        loss = exact(torch.tensor(x).long(), torch.tensor(targets).long())[1]
        loss.backward()
        assert abs(found["loss"] - loss.item()) < 0.01 * loss.item()
        for name, p in exact.named_parameters():
            assert p.grad is not None
            assert relative_error(torch.tensor(found[name]), p.grad) < 0.05, name


def test_loss_alone_needs_no_products_of_gradients(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation with its rows in two parts has each part's logits and loss, and that is all."""
    monkeypatch.setattr(fused, "HEAD_ROWS", 8)
    evaluator = Evaluator(setting.trainer().model, dtypes.bfloat16, fused)
    evaluator([random_batch()] * 2)
    last = [name for name in names(evaluator._loss) if name.startswith(("matmul", "cross_entropy"))][-4:]
    assert [name.split("_")[0] for name in last] == ["matmul", "cross", "matmul", "cross"]


@slow_without_gpu  # the interpreter has one order
def test_same_bits_in_every_run(setting: Setting) -> None:
    def trained() -> dict[str, np.ndarray]:
        trainer = setting.trainer()
        trainer.step([random_batch()], 1e-2)
        return trainer.model.arrays() | trainer.moments()

    first, second = trained(), trained()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_copies_follow_the_weights(trainer: Trainer) -> None:
    """The bfloat16 matrices are those of the weights after a step, and after weights were put in from outside."""

    def agree() -> bool:
        """They are, and rows of padding are 0."""
        pairs = [
            (fused.halves[p.uop].float().numpy(), p.numpy()) for name, p in trainer.parameters.items() if halved(name)
        ]
        assert len(pairs) == 5
        return all(
            np.array_equal(half[: len(p)], torch.tensor(p).bfloat16().float().numpy()) and not half[len(p) :].any()
            for half, p in pairs
        )

    def halved(name: str) -> bool:
        return name.endswith("weight") and "ln_" not in name and name != "wpe.weight"

    before = trainer.model.arrays(), trainer.moments()
    assert agree()
    for _ in range(2):
        trainer.step([random_batch()], 1e-2)
        assert agree()
    trainer.restore(*before, 0)
    assert agree()
    assert all(np.array_equal(p.numpy(), before[0][name]) for name, p in trainer.parameters.items())


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def halves_of(*arrays: np.ndarray) -> list[torch.Tensor]:
    """Rounded to bfloat16, in float64, and differentiable."""
    return [torch.tensor(array).bfloat16().double().requires_grad_() for array in arrays]


def test_linear_and_gelu_by_themselves() -> None:
    """Where no other layer follows: of so many rows that the gradient of a bias is summed in parts."""
    x, w, b, dy = normal(1030, 64), normal(64, 64) / 8, normal(64), normal(1030, 64)
    tensors = [Tensor(t) for t in (x, w, b)]
    truth = [*halves_of(x, w), torch.tensor(b).double().requires_grad_()]
    for activated in (False, True):
        with F.autocast(dtypes.bfloat16, fused):
            y = F.linear(*tensors)
            y = (F.gelu(y, "tanh") if activated else y).float()
            found = [y, *(y * Tensor(dy).cast(dtypes.bfloat16).float()).sum().gradient(*tensors)]
        y64 = truth[0] @ truth[1] + truth[2]
        y64 = torch.nn.functional.gelu(y64, approximate="tanh") if activated else y64
        expected = [y64, *torch.autograd.grad(y64, truth, torch.tensor(dy).bfloat16().double())]
        for got, true in zip(found, expected, strict=True):
            assert relative_error(torch.tensor(got.numpy()), true.detach()) < 0.005


def test_what_no_kernel_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU of no linear layer, attention of what is no c_attn's output, in its order, and the loss of no head: None."""
    x, target = Tensor(normal(2, 5, 64)), Tensor(np.zeros((2, 5), np.int32))
    q, k, v = (t.reshape(2, 5, 2, 32).transpose(1, 2) for t in Tensor(normal(2, 5, 192)).split(64, dim=2))
    assert fused.gelu(x) is None
    assert fused.mean_loss(x, target, -100) is None
    for others in ((q, q, v), (q, k, q), (k, k, v), (k, q, v), (q, k, v.contiguous())):
        assert fused.scaled_dot_product_attention(*others) is None
    assert fused.scaled_dot_product_attention(q, k, v) is not None
    monkeypatch.setattr(fused, "scaled_dot_product_attention", lambda *given: pytest.fail("it is causal"))
    with F.autocast(dtypes.bfloat16, fused):
        assert F.scaled_dot_product_attention(q, k, v).shape == (2, 2, 5, 32)


def test_gradients_of_other_losses(setting: Setting) -> None:
    """Of a multiple of the loss, and of logits."""
    x, y = random_batch()
    weights = normal(2, 8, CONFIG.vocab_size)
    model = setting.trainer().model
    exact = torch_ref.model.GPT2(CONFIG, {name: array.astype(np.float64) for name, array in setting.arrays.items()})
    parameters = [model.wte.weight, model.ln_f.bias]
    logits64, loss64 = exact(torch.tensor(x).long(), torch.tensor(y).long())
    for target64 in (2.5 * loss64, (logits64 * torch.tensor(weights)).sum()):
        with F.autocast(dtypes.bfloat16, fused):
            logits, loss = model(Tensor(x), Tensor(y))
            assert loss is not None
            target = 2.5 * loss if target64.item() == 2.5 * loss64.item() else (logits.float() * Tensor(weights)).sum()
            found = target.gradient(*parameters)
        expected = torch.autograd.grad(target64, [exact.wte.weight, exact.ln_f.bias], retain_graph=True)
        for got, true in zip(found, expected, strict=True):
            assert relative_error(torch.tensor(got.numpy()), true) < 0.02
