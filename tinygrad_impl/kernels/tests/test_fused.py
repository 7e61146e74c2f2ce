"""The kernels in tinygrad's graphs, as training uses them: the parity proof, and what they must not do besides."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tinygrad import Tensor, nn

import torch_ref.model
from data.checkpoints.config import GPT2Config
from parity_tests.checks import flow_rows, gradient_rows, step_rows
from parity_tests.setting import Setting, random_batches
from parity_tests.weights import random_weights
from tinygrad_impl.kernels import GPU, embedding, matmul, operations
from tinygrad_impl.kernels.fused import Fused
from tinygrad_impl.kernels.operations import Operations
from tinygrad_impl.kernels.tests.support import DEVICE, THIS_GPU, names, relative_error, slow_without_gpu
from tinygrad_impl.losses import Evaluator
from tinygrad_impl.trainer import Trainer

# heads of 32 and of 64; a vocabulary that fills no tile, and one that fills two
CONFIG = GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=1, n_head=2, layer_norm_epsilon=0.1)
OTHER = GPT2Config(vocab_size=256, n_positions=24, n_embd=64, n_layer=2, n_head=1)

pytestmark = pytest.mark.usefixtures("device")


def setting_of(config: GPT2Config, gpu: GPU = THIS_GPU) -> Setting:
    return Setting(config, random_weights(config, 0, 0.2), "bfloat16", DEVICE.upper(), Fused(gpu, strict=True))


@pytest.fixture(scope="module")
def setting(device: None) -> Setting:
    return setting_of(CONFIG)


@pytest.fixture(scope="module")
def trainer(setting: Setting) -> Trainer:
    return setting.trainer()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In several parts, of which the last are smaller: the rows of the head, sums for the gradients of weights and for
    that of the embedding.
    """
    monkeypatch.setattr(operations, "HEAD_ROWS", 20)
    for name in ("weight_gradient", "weight_gradients"):
        monkeypatch.setattr(matmul, name, partial(getattr(matmul, name), SPLITS=3))
    monkeypatch.setitem(matmul.TILES[THIS_GPU.family]["all"], "BK", 16)
    monkeypatch.setattr(embedding, "SORTED", 64)
    monkeypatch.setattr(embedding, "SUMMED", 4)


def random_batch(rows: int = 2, length: int = 8) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(rows * length).integers(0, CONFIG.vocab_size, (2, rows, length)).astype(np.int32)
    return x[0], x[1]


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


@slow_without_gpu  # there test_joins.py sees which rules fire
@pytest.mark.parametrize(
    "variant",
    [
        {"activation_function": "gelu", "n_inner": 192, "tie_word_embeddings": False},
        {"activation_function": "relu", "n_inner": 128},
    ],
)
def test_proof_of_variants(variant: dict[str, Any]) -> None:
    """All rules fire that can: a GEMM's epilogue computes the tanh form of GELU alone."""
    prove(setting_of(replace(CONFIG, **variant)), 2, 17)


@pytest.mark.gpu
@pytest.mark.skipif(not THIS_GPU.pairs_warpgroups, reason="needs a GPU of Hopper: others compute GELU again always")
def test_proof_where_gelu_is_computed_again() -> None:
    """As in models that are larger than 124M."""
    prove(setting_of(replace(CONFIG, n_inner=3136)), 2, 17)


@pytest.mark.usefixtures("small_parts")
def test_proof_in_parts() -> None:
    """And in several turns, since a GPU of one multiprocessor runs few programs: tiles of GEMMs, and rows of layer
    norm's backward pass.
    """
    prove(setting_of(OTHER, GPU(THIS_GPU.capability, 1)), 2, 24)


@slow_without_gpu  # the catalogue's bugs show it too
def test_proof_notices(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer norm that is 5 % too large."""
    right = Operations.layer_norm
    monkeypatch.setattr(Operations, "layer_norm", lambda *given, **more: [y * 1.05 for y in right(*given, **more)])
    rows = flow_rows(setting, setting.references(), random_batches(CONFIG, 1, 8, seed=0, count=1))
    assert "h.0.ln_1" in {row.name for row in rows if not row.passed}


def test_nothing_is_copied(trainer: Trainer) -> None:
    """Kernels read what kernels wrote, and write where the totals are; tinygrad's own are few, and none of a layer."""
    trainer.step([random_batch()], 1e-3)
    ours = (
        "matmul",
        "weight_gradients",
        "pingpong",
        "attention",
        "hopper_attention",
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
    matrices = sum(total.ndim == 2 for total in trainer.gradients.values())
    assert names(trainer._further).count("adding") == matrices + 1  # and all vectors of these layers


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
    monkeypatch.setattr(operations, "HEAD_ROWS", 8)
    evaluator = Evaluator(setting.trainer().model, setting.backend)
    evaluator([random_batch()] * 2)
    [graph] = evaluator.graphs.values()
    last = [name for name in names(graph) if name.startswith(("matmul", "token_loss"))][-4:]
    assert [name.split("_")[0] for name in last] == ["matmul", "token", "matmul", "token"]


@pytest.mark.usefixtures("small_parts")
def test_losses_of_tokens(setting: Setting) -> None:
    """They are PyTorch's in float64, but for bfloat16's rounding; the likeliest token is that of the same logits."""
    x, y = random_batch(3, 9)
    y = y.copy()
    y[0, 2] = -100
    exact = torch_ref.model.GPT2(CONFIG, {name: array.astype(np.float64) for name, array in setting.arrays.items()})
    with torch.no_grad():
        logits = exact(torch.tensor(x).long())[0]
        y[1:] = logits[1:].argmax(-1).numpy()
        true_losses, true_likeliest = exact.losses(torch.tensor(x).long(), torch.tensor(y))
    losses, likeliest = Evaluator(setting.trainer().model, setting.backend).of_tokens(x, y)
    assert relative_error(torch.tensor(losses), true_losses) < 0.02
    assert losses[0, 2] == 0
    assert not likeliest[0, 2]
    clear = np.sort(logits.numpy(), -1)[..., -1] - np.sort(logits.numpy(), -1)[..., -2] > 0.05
    assert clear.sum() > 10
    assert np.array_equal(likeliest[clear], true_likeliest.numpy()[clear])


@slow_without_gpu  # the interpreter has one order
def test_same_bits_in_every_run(setting: Setting) -> None:
    def trained() -> dict[str, np.ndarray]:
        trainer = setting.trainer()
        trainer.step([random_batch()], 1e-2)
        return trainer.model.arrays() | trainer.moments()

    first, second = trained(), trained()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def is_matrix(name: str) -> bool:
    """Whether GEMMs read this parameter."""
    return name.endswith("weight") and "ln_" not in name and name != "wpe.weight"


def agree(backend: Fused, parameters: Mapping[str, Tensor]) -> bool:
    """The copies are the matrices in bfloat16, those of other parameters are none, and rows of padding are 0."""
    copies = backend.operations.copies
    pairs = [(copies[p.uop].float().numpy(), p.numpy()) for name, p in parameters.items() if is_matrix(name)]
    assert len(pairs) == len(copies) == 1 + 4 * CONFIG.n_layer
    return all(
        np.array_equal(copy[: len(p)], torch.tensor(p).bfloat16().float().numpy()) and not copy[len(p) :].any()
        for copy, p in pairs
    )


def test_copies_follow_the_weights(trainer: Trainer) -> None:
    """The bfloat16 matrices are those of the weights after a step, and after weights were put in from outside."""
    backend, before = trainer.backend, (trainer.model.arrays(), trainer.moments())
    assert isinstance(backend, Fused)
    assert agree(backend, trainer.parameters)
    assert [len(copy) for copy in backend.operations.copies.values()].count(384) == 1  # of 300 tokens, three tiles
    for _ in range(2):
        trainer.step([random_batch()], 1e-2)
        assert agree(backend, trainer.parameters)
    trainer.restore(*before, 0)
    assert agree(backend, trainer.parameters)
    assert all(np.array_equal(p.numpy(), before[0][name]) for name, p in trainer.parameters.items())


def test_whose_copies_they_are(setting: Setting, trainer: Trainer) -> None:
    """A bound backend is bound to the model that it has copies of, and shares them; another model gets its own."""
    unbound, bound = setting.backend, trainer.backend
    assert isinstance(unbound, Fused)
    assert isinstance(bound, Fused)
    assert (unbound.copies, unbound.matrices) == (None, {})
    assert bound.bind(trainer.parameters) is bound
    assert (bound.gpu, bound.strict) == (unbound.gpu, unbound.strict)
    parameters = nn.state.get_state_dict(setting.model())
    other = bound.bind(parameters)
    assert agree(other, parameters)
    assert not other.operations.copies.keys() & bound.operations.copies.keys()
    assert agree(bound, trainer.parameters)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def test_gradients_of_other_losses(setting: Setting) -> None:
    """Of a multiple of the loss, and of logits."""
    x, y = random_batch()
    weights = normal(2, 8, CONFIG.vocab_size)
    model = setting.trainer().model
    exact = torch_ref.model.GPT2(CONFIG, {name: array.astype(np.float64) for name, array in setting.arrays.items()})
    parameters = [model.wte.weight, model.ln_f.bias]
    logits64, loss64 = exact(torch.tensor(x).long(), torch.tensor(y).long())
    logits, loss = model(Tensor(x), Tensor(y))
    assert loss is not None
    targets = 2.5 * loss, (logits.float() * Tensor(weights)).sum()
    for target, target64 in zip(targets, (2.5 * loss64, (logits64 * torch.tensor(weights)).sum()), strict=True):
        [lowered] = setting.backend.lower(target)
        found = setting.backend.gradient(lowered, parameters)
        expected = torch.autograd.grad(target64, [exact.wte.weight, exact.ln_f.bias], retain_graph=True)
        for got, true in zip(found, expected, strict=True):
            assert relative_error(torch.tensor(got.numpy()), true) < 0.02
