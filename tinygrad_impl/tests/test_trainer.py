"""The training step, by its own properties; that it equals PyTorch's is for parity_tests."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from data.config import GPT2Config
from data.initialize import initial_weights
from data.sampling import Sampler
from data.tokenizer import VOCAB_SIZE
from tinygrad_impl.generate import Generator
from tinygrad_impl.trainer import Trainer, learning_rate, write

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=1, n_head=2)
LR = 1e-3

Batch = tuple[np.ndarray, np.ndarray]


def batch(seed: int, rows: int = 2) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, CONFIG.n_positions + 1)).astype(np.int32)
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def trainer(weight_decay: float = 0.1) -> Trainer:
    return Trainer(CONFIG, initial_weights(CONFIG, 0), weight_decay=weight_decay)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    x, y = batch(1, rows=4)
    accumulated, whole = trainer(), trainer()
    parts = list(zip(np.split(x, 2), np.split(y, 2), strict=True))
    for _ in range(4):  # the graphs are captured in the second step and replayed from the third on
        losses = accumulated.step(parts, LR), whole.step([(x, y)], LR)
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    moments = whole.moments()
    for name, moment in accumulated.moments().items():
        np.testing.assert_allclose(moment, moments[name], rtol=1e-3, atol=1e-7)


def test_replay_uses_the_new_batch_and_learning_rate() -> None:
    # what was frozen at capture would give the same loss again, or move the weights although the rate is 0
    replayed = trainer()
    for seed in range(3):
        replayed.step([batch(seed)], LR)
    fresh = Trainer(CONFIG, replayed.model.arrays())
    expected = [fresh.step([batch(seed)], 0.0)[0] for seed in (7, 8, 9)]
    before = replayed.model.arrays()
    losses = [replayed.step([batch(seed)], 0.0)[0] for seed in (7, 8, 9)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert len(set(losses)) == 3
    for name, array in replayed.model.arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_going_on_from_saved_moments_is_exact() -> None:
    through = trainer()
    for seed in range(3):
        through.step([batch(seed)], LR)
    arrays, moments = through.model.arrays(), through.moments()
    resumed = Trainer(CONFIG, arrays)
    resumed.restore(arrays, moments, 3)
    for name, moment in resumed.moments().items():
        np.testing.assert_array_equal(moment, moments[name])
    for seed in range(3, 6):
        assert resumed.step([batch(seed)], LR) == through.step([batch(seed)], LR)
    for name, array in resumed.model.arrays().items():
        np.testing.assert_array_equal(array, through.model.arrays()[name])


def test_restore_without_the_step_count_would_differ() -> None:
    """The count decides AdamW's bias correction, so it is part of the state."""
    after = {}
    for steps in (0, 3):
        restored = trainer()
        restored.restore(restored.model.arrays(), restored.moments(), steps)
        restored.step([batch(0)], LR)
        after[steps] = restored.model.arrays()["wte.weight"]
    assert not np.array_equal(after[0], after[3])


def test_sampling_between_steps_changes_nothing() -> None:
    """Not one bit of losses, norms and weights; and what is sampled is of the weights as they are then."""
    config = replace(CONFIG, vocab_size=VOCAB_SIZE)
    arrays = initial_weights(config, 0)
    plain, sampled = Trainer(config, arrays), Trainer(config, arrays)
    generator = Generator(sampled.model)
    prompts, new = [[1, 2, 3], [4]], 2 * config.n_positions  # prefilled, and beyond the context

    texts = []
    for seed in range(5):  # the trainer's graphs and the sampler's are both run plainly, captured and then replayed
        texts.append(generator(prompts, new, Sampler(seed=1)))
        assert sampled.step([batch(seed)], 0.1) == plain.step([batch(seed)], 0.1)
    for name, array in sampled.model.arrays().items():
        np.testing.assert_array_equal(array, plain.model.arrays()[name])
    assert all(text != texts[0] for text in texts[1:])
    assert generator(prompts, new, Sampler(seed=1)) == Generator(plain.model)(prompts, new, Sampler(seed=1))


def test_only_matrices_decay() -> None:
    decayed, free = trainer(weight_decay=0.5), trainer(weight_decay=0.0)
    start = free.model.arrays()
    decayed.step([batch(0)], LR)
    free.step([batch(0)], LR)
    for name, array in free.model.arrays().items():
        lost = array - decayed.model.arrays()[name]
        expected = LR * 0.5 * start[name] if array.ndim == 2 else np.zeros_like(array)
        np.testing.assert_allclose(lost, expected, atol=2e-8, err_msg=name)


def test_clipping_bounds_the_update_and_reports_the_norm_before() -> None:
    clipped, free = (Trainer(CONFIG, initial_weights(CONFIG, 0), clip=clip) for clip in (1e-3, 1e9))
    norms = [t.step([batch(0)], LR)[1] for t in (clipped, free)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    sums = [math.sqrt(sum(float(m.square().sum().item()) for m in t.exp_avg.values())) for t in (clipped, free)]
    assert sums[0] == pytest.approx(0.1 * 1e-3, rel=1e-2)  # 1 - beta1 times the clipped gradient
    assert sums[1] == pytest.approx(0.1 * norms[1], rel=1e-4)


def test_learning_rate() -> None:
    rates = [learning_rate(step, 110, 1.0, 0.1, 10) for step in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)  # a line that ends in the peak
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # halfway between peak and minimum
    assert 0.1 < rates[-1] < 0.101
    assert learning_rate(110, 110, 1.0, 0.1, 10) == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_learning_rate_without_warm_up_begins_at_the_peak() -> None:
    assert learning_rate(0, 5, 0.3, 0.0, 0) == 0.3
    assert learning_rate(0, 1, 0.3, 0.0, 0) == 0.3


def test_learning_rate_of_nothing_but_warm_up() -> None:
    assert [learning_rate(step, 2, 1.0, 0.1, 2) for step in range(2)] == [0.5, 1.0]
    assert math.isfinite(learning_rate(2, 2, 1.0, 0.1, 2))


def test_clipping_gives_gradients_no_error_in_common() -> None:
    """One number multiplies them all: what its rounding is off by would not average out over a tensor."""
    config = GPT2Config(vocab_size=401, n_positions=16, n_embd=128, n_layer=1, n_head=2)
    clipped, random = Trainer(config, initial_weights(config, 0), betas=(0.5, 0.5)), np.random.default_rng(0)
    for _ in range(40):
        size = np.float32(2 ** random.random())
        gradients = {n: size * random.standard_normal(t.shape, np.float32) for n, t in clipped.gradients.items()}
        for name, gradient in gradients.items():
            write(clipped.gradients[name], gradient)
            write(clipped.exp_avg[name], np.zeros_like(gradient))
        clipped.count = 1
        _, found = clipped.update(1e-6)
        norm = math.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in gradients.values()))
        assert found == pytest.approx(norm, rel=2.0**-25)
        expected = 0.5 * gradients["wte.weight"].astype(np.float64) / (norm + 1e-6)
        error = np.linalg.norm(clipped.exp_avg["wte.weight"].numpy() - expected) / np.linalg.norm(expected)
        assert error < 1.2 * 2.0**-24
