"""The training step of both implementations, by the same tests. The truth is the reference's gradients in float64, and
AdamW written out.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch

import tinygrad_impl.trainer
import torch_ref.model
import torch_ref.trainer
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.testing import write_tokens
from data.text.loader import IGNORED, windows
from data.text.sampling import Sampler
from tinygrad_impl.generate import Generator
from tinygrad_impl.internals import overwrite
from tinygrad_impl.losses import Evaluator
from torch_ref.generate import generate

pytestmark = pytest.mark.tuned

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=1, n_head=2, layer_norm_epsilon=1e-2)
T = 11  # below n_positions
BETAS, EPS, DECAY, CLIP = (0.8, 0.99), 1e-3, 0.3, 1.0  # none but the last is a default

Batch = tuple[np.ndarray, np.ndarray]
Arrays = dict[str, np.ndarray]


def batch(seed: int, ignored: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (2, T + 1)).astype(np.int32)
    x, y = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    y.flat[:ignored] = IGNORED
    return x, y


def weights(seed: int = 0) -> Arrays:
    """No bias is 0 and no gain 1. The gradients' norms are on both sides of `CLIP`."""
    random = np.random.default_rng(seed)
    return {name: a + 0.2 * random.standard_normal(a.shape) for name, a in initial_weights(CONFIG, seed).items()}


class Trained(Protocol):
    """A trainer of either implementation, with its state in numpy."""

    trainer: Any

    def arrays(self) -> Arrays: ...
    def moments(self) -> Arrays: ...
    def spoil(self, loss: float | None, gradient: float | None) -> None:
        """Puts a number in the loss's place, or in that of one element of a gradient."""

    def evaluate(self, batches: Iterable[Batch]) -> float: ...
    def sample(self, new: int) -> list[int]: ...


class Port:
    def __init__(self) -> None:
        self.trainer = tinygrad_impl.trainer.Trainer(CONFIG, weights(), BETAS, EPS, DECAY, CLIP)
        self.evaluate = Evaluator(self.trainer.model)
        self.generator = Generator(self.trainer.model, V=CONFIG.vocab_size)

    def arrays(self) -> Arrays:
        return self.trainer.model.arrays()

    def moments(self) -> Arrays:
        return self.trainer.moments()

    def spoil(self, loss: float | None, gradient: float | None) -> None:
        if loss is not None:
            overwrite(self.trainer.loss, np.array(loss))
        if gradient is not None:
            array = self.trainer.gradients["h.0.mlp.c_fc.bias"].numpy().copy()
            array[3] = gradient
            overwrite(self.trainer.gradients["h.0.mlp.c_fc.bias"], array)

    def sample(self, new: int) -> list[int]:
        return self.generator([[1, 2, 3]], new, Sampler(seed=1))[0]


class Reference:
    def __init__(self) -> None:
        self.trainer = torch_ref.trainer.Trainer(CONFIG, weights(), BETAS, EPS, DECAY, CLIP)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        total, count = self.trainer.evaluate(batches)
        return total / count

    def arrays(self) -> Arrays:
        return self.trainer.model.arrays()

    def moments(self) -> Arrays:
        return {name: t.numpy().copy() for name, t in self.trainer.moments().items()}

    def spoil(self, loss: float | None, gradient: float | None) -> None:
        if loss is not None:
            self.trainer.loss = loss
        if gradient is not None:
            of_bias = self.trainer.parameters["h.0.mlp.c_fc.bias"].grad
            assert of_bias is not None
            of_bias[3] = gradient

    def sample(self, new: int) -> list[int]:
        return generate(self.trainer.model, [[1, 2, 3]], new, Sampler(seed=1))[0]


@pytest.fixture(scope="module", params=[Port, Reference], ids=["tinygrad", "torch"])
def made(request: pytest.FixtureRequest) -> Iterator[Trained]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would take longer on so little
    yield request.param()
    torch.set_num_threads(threads)


@pytest.fixture
def trained(made: Trained) -> Trained:
    """Of each implementation one trainer for all tests, because graphs take long; set back to its beginning."""
    zeros = {f"{m}.{name}": np.zeros_like(a) for m in ("exp_avg", "exp_avg_sq") for name, a in weights().items()}
    made.trainer.restore(weights(), zeros, 0)
    return made


class Truth:
    """Clipping and AdamW (Loshchilov & Hutter 2019, algorithm 2), in numpy."""

    def __init__(self) -> None:
        self.arrays, self.steps = weights(), 0
        self.m, self.v = ({name: np.zeros_like(a) for name, a in self.arrays.items()} for _ in range(2))

    def step(self, batches: list[Batch], lr: float) -> tuple[float, float]:
        model = torch_ref.model.GPT2(CONFIG, self.arrays)
        losses = [model(torch.tensor(x), torch.tensor(y))[1] for x, y in batches]
        loss = torch.stack(losses).mean()
        loss.backward()
        gradients = {name: np.asarray(p.grad) for name, p in model.named_parameters()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        self.steps += 1
        for name, p in self.arrays.items():
            g = gradients[name] * min(1, CLIP / (norm + 1e-6))
            self.m[name] = BETAS[0] * self.m[name] + (1 - BETAS[0]) * g
            self.v[name] = BETAS[1] * self.v[name] + (1 - BETAS[1]) * g**2
            m, v = self.m[name] / (1 - BETAS[0] ** self.steps), self.v[name] / (1 - BETAS[1] ** self.steps)
            decay = DECAY if name.endswith("weight") and "ln_" not in name else 0
            self.arrays[name] = p - lr * decay * p - lr * m / (np.sqrt(v) + EPS)
        return loss.item(), norm


def assert_state(trained: Trained, truth: Truth, tolerance: float = 1e-12) -> None:
    assert trained.trainer.steps == truth.steps
    for name, array in trained.arrays().items():
        np.testing.assert_allclose(array, truth.arrays[name], rtol=0, atol=tolerance, err_msg=name)
    moments = trained.moments()
    assert list(moments) == [f"{m}.{name}" for m in ("exp_avg", "exp_avg_sq") for name in truth.arrays]
    for name in truth.arrays:
        np.testing.assert_allclose(moments[f"exp_avg.{name}"], truth.m[name], rtol=0, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(moments[f"exp_avg_sq.{name}"], truth.v[name], rtol=0, atol=tolerance, err_msg=name)


# how many micro-batches each step has, and its learning rate
STEPS = [(1, 1e-3), (5, 2e-2), (2, 0.0), (1, 1e-2), (2, 3e-3), (5, 1e-3)]


def test_steps(trained: Trained) -> None:
    """Of 1, 2 and 5 micro-batches in turn, whose losses count alike though one has fewer targets; clipped or not."""
    truth, norms, seed = Truth(), [], 0
    for count, lr in STEPS:
        batches = [batch(seed + i, ignored=i * 7 % 15) for i in range(count)]
        seed += count
        found, expected = trained.trainer.step(batches, lr), truth.step(batches, lr)
        assert found == pytest.approx(expected, rel=1e-11)
        assert_state(trained, truth)
        norms.append(expected[1])
    assert min(norms) < 0.9 * CLIP < 1.1 * CLIP < max(norms)


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [(math.inf, None), (math.nan, None), (None, math.inf), (None, -math.inf), (None, math.nan), (math.nan, math.nan)],
)
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_not_finite_changes_nothing(
    count: int, loss: float | None, gradient: float | None, trained: Trained
) -> None:
    """The loss alone, the norm alone, or both; the next step is as if it had not been."""
    truth = Truth()
    batches = [batch(seed) for seed in range(count)]
    trained.trainer.step(batches, 1e-2)
    truth.step(batches, 1e-2)
    arrays, moments = trained.arrays(), trained.moments()
    mean = trained.trainer.accumulate(batches)
    trained.spoil(loss, gradient)
    result = trained.trainer.update(1e-2)
    found, norm = (mean if loss is None else loss, result) if isinstance(result, float) else result
    assert math.isfinite(found) == (loss is None)
    assert math.isfinite(norm) == (gradient is None)
    for name, array in trained.arrays().items():
        np.testing.assert_array_equal(array, arrays[name])
    for name, array in trained.moments().items():
        np.testing.assert_array_equal(array, moments[name])
    trained.trainer.step(batches, 1e-2)
    truth.step(batches, 1e-2)
    assert_state(trained, truth)


def test_restore(trained: Trained) -> None:
    """Goes on bit for bit, in copies; with another count of steps, which AdamW corrects its moments by, differently."""
    trained.trainer.step([batch(0)], 1e-2)
    trained.trainer.step([batch(1)], 1e-2)
    arrays, moments = trained.arrays(), trained.moments()
    kept = {name: array.copy() for name, array in (arrays | moments).items()}
    expected = trained.trainer.step([batch(2)], 1e-2)
    after = trained.arrays() | trained.moments()
    for steps in (2, 5):
        trained.trainer.restore(arrays, moments, steps)
        for name, array in (trained.arrays() | trained.moments()).items():
            np.testing.assert_array_equal(array, kept[name])
        assert trained.trainer.steps == steps
        assert trained.trainer.step([batch(2)], 1e-2) == expected
        same = [np.array_equal(array, after[name]) for name, array in (trained.arrays() | trained.moments()).items()]
        assert all(same) == (steps == 2)
    for name, array in kept.items():
        np.testing.assert_array_equal((arrays | moments)[name], array)


def test_evaluation_counts_every_token_once(trained: Trained, tmp_path: Path) -> None:
    """Over windows of which the last batch is mostly padding, and one row nothing else."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 2 * 3 * T + 5)
    folder = write_tokens(tmp_path / "data", tokens, tokens)
    model = torch_ref.model.GPT2(CONFIG, weights())
    losses: list[float] = []
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, T):
            row = torch.tensor(tokens[start : start + T + 1])
            losses += torch.nn.functional.cross_entropy(model(row[None, :-1])[0][0], row[1:], reduction="none").tolist()
    assert len(losses) == 70
    assert trained.evaluate(windows(folder, "valid", 2, T)) == pytest.approx(np.mean(losses), rel=1e-12)
    assert trained.evaluate(windows(folder, "valid", 2, T, 50)) == pytest.approx(np.mean(losses[:50]), rel=1e-12)


def test_sampling_between_steps_changes_nothing(trained: Trained) -> None:
    """Not one bit of losses, norms and weights; and what is sampled is of the weights as they are then."""
    steps = [trained.trainer.step([batch(seed)], 1e-2) for seed in range(4)]
    expected, zeros = trained.arrays(), {name: np.zeros_like(array) for name, array in trained.moments().items()}
    trained.trainer.restore(weights(), zeros, 0)
    texts = []
    for seed in range(4):  # the sampler's graphs are run plainly, captured and then replayed
        texts.append(trained.sample(2 * CONFIG.n_positions))
        reference = torch_ref.model.GPT2(CONFIG, trained.arrays())
        assert texts[-1] == generate(reference, [[1, 2, 3]], 2 * CONFIG.n_positions, Sampler(seed=1), cached=True)[0]
        assert trained.trainer.step([batch(seed)], 1e-2) == steps[seed]
    for name, array in trained.arrays().items():
        np.testing.assert_array_equal(array, expected[name])
    assert all(text != texts[0] for text in texts[1:])


@pytest.mark.parametrize("learning_rate", [tinygrad_impl.trainer.learning_rate, torch_ref.trainer.learning_rate])
def test_learning_rate(learning_rate: Any) -> None:
    rates = [learning_rate(step, 110, 1.0, 0.1, 10) for step in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)  # a line that ends in the peak
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # halfway between peak and minimum
    assert rates[35] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5))
    assert 0.1 < rates[-1] < 0.101
    assert learning_rate(110, 110, 1.0, 0.1, 10) == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    # without warm-up it begins at the peak
    assert learning_rate(0, 5, 0.3, 0.0, 0) == 0.3
    assert learning_rate(0, 1, 0.3, 0.0, 0) == 0.3
    # nothing but warm-up
    assert [learning_rate(step, 2, 1.0, 0.1, 2) for step in range(2)] == [0.5, 1.0]
    assert math.isfinite(learning_rate(2, 2, 1.0, 0.1, 2))


def test_clipping_gives_gradients_no_error_in_common() -> None:
    """One number multiplies them all: what its rounding is off by would not average out over a tensor."""
    config = GPT2Config(vocab_size=401, n_positions=16, n_embd=128, n_layer=1, n_head=2)
    clipped = tinygrad_impl.trainer.Trainer(config, initial_weights(config, 0), betas=(0.5, 0.5))
    random = np.random.default_rng(0)
    for _ in range(40):
        size = np.float32(2 ** random.random())
        gradients = {n: size * random.standard_normal(t.shape, np.float32) for n, t in clipped.gradients.items()}
        for name, gradient in gradients.items():
            overwrite(clipped.gradients[name], gradient)
        for part in clipped.parts:
            overwrite(part.exp_avg, np.zeros(part.bucket.size, np.float32))
        clipped.count = 1
        _, found = clipped.update(1e-6)
        norm = math.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in gradients.values()))
        assert found == pytest.approx(norm, rel=2.0**-25)
        expected = 0.5 * gradients["wte.weight"].astype(np.float64) / (norm + 1e-6)
        error = np.linalg.norm(clipped.moments()["exp_avg.wte.weight"] - expected) / np.linalg.norm(expected)
        assert error < 1.2 * 2.0**-24


def test_memory() -> None:
    """Where parameters, moments and totals lie: not copies, and what is written there is what the trainer goes on from.
    `restore` takes tensors of PyTorch's too.
    """
    trainer = tinygrad_impl.trainer.Trainer(CONFIG, weights())
    random, memory = np.random.default_rng(1), trainer.memory()
    arrays = {name: random.standard_normal(a.shape) for name, a in memory.items() if not name.startswith("total.")}
    trainer.restore({name: torch.tensor(a) for name, a in arrays.items()}, arrays, 3)
    found = trainer.arrays() | trainer.moments()
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(memory[name], array)
        np.testing.assert_array_equal(found[name], array)
    for name in trainer.parameters:
        memory[f"total.{name}"][:] = 2.0
        memory[name][:] = 5.0
        np.testing.assert_array_equal(trainer.model.arrays()[name], 5.0)
    trainer.count = 2
    assert all((gradient == 1.0).all() for gradient in trainer.mean_gradients()[1].values())
