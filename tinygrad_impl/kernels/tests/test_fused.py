"""The kernels in tinygrad's graphs, as training uses them: the parity proof, and what they must not do besides."""

from collections import defaultdict

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

import tinygrad_impl.functional as F
from data.cli import InputError
from data.config import PRESETS, GPT2Config
from parity_tests.proof import Setting, flow_rows, gradient_rows, random_batches, step_rows
from parity_tests.weights import random_weights
from tinygrad_impl.evaluate import Evaluator
from tinygrad_impl.kernels import choose, fused
from tinygrad_impl.kernels.tests.support import DEVICE
from tinygrad_impl.trainer import Trainer

CONFIG = GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=1, n_head=2)


pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def setting() -> Setting:
    return Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "bfloat16", DEVICE.upper(), fused)


@pytest.fixture
def trainer(setting: Setting) -> Trainer:
    return setting.trainer()


def random_batch(rows: int = 2, length: int = 8) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(rows * length).integers(0, CONFIG.vocab_size, (2, rows, length)).astype(np.int32)
    return x[0], x[1]


def names(graph: object) -> list[str]:
    """Of the kernels of a captured graph, in order."""
    calls = graph.captured.linear.src  # type: ignore[attr-defined]
    inner = [c for call in calls for c in (call.src[0].src[0].src if call.src[0].arg == "graph" else [call])]
    return [call.src[0].arg.name for call in inner if hasattr(call.src[0].arg, "name")]


@pytest.mark.parametrize("head_rows", [fused.HEAD_ROWS, 20])  # all in one part; three parts, the last a smaller one
def test_proof(setting: Setting, head_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations at the edges between sub-layers, gradients and an AdamW step out of the graphs that train: all of it
    is PyTorch's, by the bounds of the parity proof.
    """
    monkeypatch.setattr(fused, "HEAD_ROWS", head_rows)
    batches = random_batches(CONFIG, 2, 24, seed=0, count=2)
    references, trainer = setting.references(), setting.trainer()
    rows = flow_rows(setting, references, batches[:1])
    rows += gradient_rows(setting, trainer, references, [[batch] for batch in batches])
    rows += step_rows(setting, trainer, references, [([batches[0]], 1e-3, 1e-3)])
    assert {row.check for row in rows} == {"forward", "backward", "gradient", "training"}
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


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


def test_further_batches_are_added(trainer: Trainer) -> None:
    x, y = random_batch()
    batches, sums = [(x, y), (y, x)], defaultdict[str, float | np.ndarray](float)
    for batch in batches:
        trainer.accumulate([batch])
        for name, gradient in [*trainer.gradients.items(), ("loss", trainer.loss)]:
            sums[name] += gradient.numpy()
    trainer.accumulate(batches)
    for name, gradient in [*trainer.gradients.items(), ("loss", trainer.loss)]:
        np.testing.assert_allclose(gradient.numpy(), sums[name], rtol=1e-5, atol=1e-7)


def test_loss_alone_needs_no_products_of_gradients(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation with its rows in two parts has each part's logits and loss, and that is all."""
    monkeypatch.setattr(fused, "HEAD_ROWS", 8)
    evaluator = Evaluator(setting.trainer().model, dtypes.bfloat16, fused)
    evaluator([random_batch()] * 2)
    last = [name for name in names(evaluator._loss) if name.startswith(("matmul", "cross_entropy"))][-4:]
    assert [name.split("_")[0] for name in last] == ["matmul", "cross", "matmul", "cross"]


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
        return all(
            np.array_equal(fused.halves[p.uop][: p.shape[0]].float().numpy(), p.cast(dtypes.bfloat16).float().numpy())
            for name, p in trainer.parameters.items()
            if p.ndim == 2 and name != "wpe.weight"
        )

    before = trainer.model.arrays(), trainer.moments()
    assert agree()
    trainer.step([random_batch()], 1e-2)
    assert agree()
    trainer.restore(*before, 0)
    assert agree()


def test_gelu_by_itself() -> None:
    """Not between linear layers, it has a gradient all the same."""
    random = np.random.default_rng(0)
    x, w = (Tensor(random.standard_normal((64, 64)).astype(np.float32)) for _ in range(2))
    with F.autocast(dtypes.bfloat16, fused):
        hidden = F.linear(x, w, Tensor.zeros(64))
        [got] = F.gelu(hidden, "tanh").float().sum().gradient(x)
    with F.autocast(dtypes.bfloat16):
        [expected] = F.gelu(F.linear(x, w, Tensor.zeros(64)), "tanh").float().sum().gradient(x)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=0.1, atol=0.1)


def test_choice() -> None:
    for wanted in ("auto", "plain"):
        assert choose(wanted, PRESETS["gpt2"], "CPU", bfloat16=True) is None
    with pytest.raises(InputError, match="for NVIDIA GPUs, and the device is CPU; leave it out"):
        choose("fused", PRESETS["gpt2"], "CPU", bfloat16=True)
