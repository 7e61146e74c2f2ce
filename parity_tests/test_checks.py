"""What is compared and measured: batches, their groups and steps, nudged weights, and clipping."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import parity_tests.setting
import tinygrad_impl.trainer
import torch_ref.trainer
from data.checkpoints.config import PRESETS, GPT2Config
from parity_tests.bounds import judge
from parity_tests.checks import clip_between, micro_batches, step_rows, training_steps
from parity_tests.mutants import CONFIG, LENGTH, ROWS
from parity_tests.setting import REFERENCE_TOKENS, Setting, nudged, random_batches
from parity_tests.weights import random_weights


@pytest.mark.parametrize(("tokens", "rows_each"), [(1, [1] * 12), (13, [1] * 12), (20, [2] * 6), (21, [3] * 4)])
def test_reference_of_few_rows_at_a_time_is_the_reference(
    tokens: int, rows_each: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU and on CPUs, to save memory; but not where rows score different numbers of targets."""
    monkeypatch.setattr(parity_tests.setting, "REFERENCE_TOKENS", tokens)
    config = GPT2Config(vocab_size=128, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    setting = Setting(config, random_weights(config, 0, 0.2), "float32", "CPU")
    uneven = random_batches(config, 6, 7, seed=0, count=2)
    assert setting.reference_batches(uneven) is uneven
    batches = [(x, np.roll(x, -1)) for x, _ in uneven]
    rows = setting.reference_batches(batches)
    assert [len(x) for x, _ in rows] == rows_each
    results = []
    for some in (batches, rows):
        trainer = torch_ref.trainer.Trainer(config, setting.exact)
        loss = np.array(trainer.accumulate(some))
        results.append({n: p.grad for n, p in trainer.parameters.items()} | {"loss": loss})
    at_once, singly = results
    assert all(row.passed for row in judge("gradient", "float64", [(at_once, singly, at_once)]))


def test_groups_of_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, two and five that are accumulated, in gradients and in steps; and every batch is in one of them."""
    batches: list[Any] = [(np.array(i), np.array(i)) for i in range(8)]

    def which(groups: Any) -> list[list[int]]:
        return [[int(x) for x, _ in group] for group in groups]

    assert which(micro_batches(batches)) == [[0], [1, 2], [3, 4, 5, 6, 7], [3], [4], [5], [6], [7]]
    steps = training_steps(batches, 4)
    assert which(batches for batches, *_ in steps) == [[0, 1], [2], [3, 4, 5, 6, 7], [0, 1]]
    rates = [torch_ref.trainer.learning_rate(i, 4, 1e-3, 1e-4, 2) for i in range(4)]
    assert [(lr, port) for _, lr, port in steps] == [(rate, rate) for rate in rates]
    with monkeypatch.context() as patch:
        patch.setattr(tinygrad_impl.trainer, "learning_rate", lambda *given: given[0] + 0.5)
        assert [(lr, port) for _, lr, port in training_steps(batches, 2)] == [
            (torch_ref.trainer.learning_rate(i, 2, 1e-3, 1e-4, 2), i + 0.5) for i in range(2)
        ]
    assert which(b for b, *_ in training_steps(batches, 3, (1,))) == [[0], [1], [2]]


def test_nudged_weights_are_the_nearest_neighbours() -> None:
    arrays = {"a": np.linspace(-1, 1, 1000, dtype=np.float32)}
    changed = nudged(arrays, 0)["a"]
    ups, downs = (np.nextafter(arrays["a"], np.float32(end)) for end in (np.inf, -np.inf))
    up = changed == ups
    assert 400 < up.sum() < 600
    np.testing.assert_array_equal(changed[~up], downs[~up])
    assert not np.array_equal(changed, nudged(arrays, 1)["a"])


def test_both_sides_of_clipping() -> None:
    setting = Setting(CONFIG, random_weights(CONFIG, 0, 0.2), "float32", "CPU")
    steps = training_steps(random_batches(CONFIG, ROWS, LENGTH, seed=0, count=5), 5, (1,))
    norms = []
    for batches, *_ in steps:
        trainer, _ = setting.references()
        trainer.accumulate(batches)
        gradients = [p.grad.numpy() for p in trainer.parameters.values() if p.grad is not None]
        norms.append(np.linalg.norm(np.concatenate([gradient.ravel() for gradient in gradients])))
    assert clip_between(setting, steps) == pytest.approx(0.99 * np.sort(norms)[2])


def test_the_last_step_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients after the steps are to be those of what AdamW has written, which restored weights are not."""
    setting = Setting(CONFIG, random_weights(CONFIG, 0), "float32", "CPU")
    port, references, calls = setting.trainer(), setting.references(), []

    def noted(name: str, call: Any) -> Any:
        def noting(*given: Any) -> Any:
            calls.append(name)
            return call(*given)

        return noting

    for name in ("update", "restore"):
        monkeypatch.setattr(port, name, noted(name, getattr(port, name)))
    step_rows(setting, port, references, [(random_batches(CONFIG, ROWS, LENGTH, seed=0, count=1), 1e-2, 1e-2)] * 3)
    assert calls == ["update", "restore"] * 2 + ["update"]
    for trainer in references:
        assert trainer.steps == 3
        for name, array in port.arrays().items():
            np.testing.assert_array_equal(trainer.parameters[name].detach().numpy(), array)


def test_tokens_of_the_reference_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU more of a small model's, which take some 10 GB in all, or a quarter of a small GPU's memory."""
    gpu = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    small = Setting(CONFIG, random_weights(CONFIG, 0), "float32", "CUDA")
    assert Setting(CONFIG, small.arrays, "float32", "CPU").reference_tokens(LENGTH) == REFERENCE_TOKENS
    for preset, T, tokens in (("tinystories", 256, 4371), ("gpt2", 1024, 1402), ("gpt2-xl", 1024, REFERENCE_TOKENS)):
        small.config = PRESETS[preset]
        assert small.reference_tokens(T) == tokens
    small.config, gpu.total_memory = PRESETS["tinystories"], 20 << 30
    assert small.reference_tokens(256) == 4371 // 2
