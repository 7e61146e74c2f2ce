"""The reference on several ranks: together they compute what one process does from all their windows, in float64."""

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.ranks import ALONE, Ranks
from data.tests.ranks import in_ranks
from torch_ref.trainer import Trainer, owners

CONFIG = GPT2Config(vocab_size=61, n_layer=1, n_head=2, n_embd=8, n_positions=8)
WINDOWS, T, STEPS, LR = 12, 8, 10, 1e-3  # windows of the global batch
CLIP = 0.85
EPS = 1e-6  # at 1e-8, a step by a gradient that is 0 but for rounding is of the size of what is tested
SAVED = 4  # steps before the state that is resumed from
# `zero`, and the number of micro-batches a rank
ALL_VARIANTS = list(product((True, False), (1, 3)))
VARIANTS = [(True, 3), (False, 1)]  # which between them show the same, sooner

Arrays = dict[str, np.ndarray]
Batches = list[tuple[np.ndarray, np.ndarray]]


def weights() -> Arrays:
    """Float64; no bias is 0 and no gain 1."""
    random = np.random.default_rng(0)
    return {name: a + 0.2 * random.standard_normal(a.shape) for name, a in initial_weights(CONFIG, 0).items()}


def batches_of(ranks: Ranks, step: int, count: int = 1) -> Batches:
    """A rank's part of the step's global batch, in so many micro-batches. Every window has a range of tokens of its
    own, so that no two ranks' gradients are alike; the global gradients' norms are on both sides of what clips them.
    """
    random = np.random.default_rng(step)
    rows = (random.integers(0, 30, (WINDOWS, T + 1)) + 2 * np.arange(WINDOWS)[:, None]) % CONFIG.vocab_size
    mine = rows.reshape(ranks.size, count, -1, T + 1)[ranks.rank]
    return [(batch[:, :-1], batch[:, 1:]) for batch in mine]


def made(ranks: Ranks, **options: Any) -> Trainer:
    torch.set_num_threads(1)  # more would take longer on so little
    return Trainer(CONFIG, weights(), eps=EPS, clip=CLIP, ranks=ranks, **options)


def state(trainer: Trainer, keep: bool = True) -> Arrays:
    """Copies of parameters and moments."""
    return {**trainer.arrays(keep), **{name: t.cpu().numpy().copy() for name, t in trainer.moments(keep).items()}}


def course(ranks: Ranks, zero: bool, count: int, begun: Arrays | None = None) -> dict[str, Any]:
    """All that comes of training, from the start or from what `saved` was."""
    trainer, first = made(ranks, zero=zero), 0
    if begun:
        trainer.restore(begun, begun, SAVED)
        first = SAVED
    found: dict[str, Any] = {"told": []}
    for step in range(first, STEPS):
        loss = trainer.accumulate(batches_of(ranks, step, count))
        if step == first:
            found["gradients"] = {name: g.numpy().copy() for name, g in trainer.mean_gradients()[1].items()}
        found["told"].append((loss, trainer.update(LR)))
        if trainer.steps == SAVED:
            found["saved"] = state(trainer, keep=ranks.rank == 0)
    return found | {"end": state(trainer), "held": sum(p.numel() for p in trainer.optimizer.state)}


def courses(ranks: Ranks, variants: list[tuple[bool, int]]) -> dict[tuple[bool, int], dict[str, Any]]:
    return {variant: course(ranks, *variant) for variant in variants}


def again(ranks: Ranks, begun: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    return course(ranks, True, 3), course(ranks, True, 1, begun)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return course(ALONE, True, 1)


@pytest.fixture(scope="module")
def of_two() -> list[dict[tuple[bool, int], dict[str, Any]]]:
    return in_ranks(2, courses, VARIANTS)


def assert_same_bits(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def apart(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest difference of two tensors of one name, in the norm of the expected."""
    assert list(found) == list(expected)
    return max(float(np.linalg.norm(found[n] - e) / (np.linalg.norm(e) or 1)) for n, e in expected.items())


def is_as_alone(found: dict[str, Any], alone: dict[str, Any]) -> None:
    steps = len(found["told"])
    np.testing.assert_allclose(found["told"], alone["told"][-steps:], rtol=1e-12)
    if steps == STEPS:
        assert apart(found["gradients"], alone["gradients"]) <= 1e-13
    assert apart(found["end"], alone["end"]) <= 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one_process(variant: tuple[bool, int], of_two: Any, alone: dict[str, Any]) -> None:
    assert {norm > CLIP for _, norm in alone["told"]} == {True, False}
    for found in of_two:
        is_as_alone(found[variant], alone)
        assert found[variant]["told"] == of_two[0][variant]["told"]
        assert_same_bits(found[variant]["end"], of_two[0][variant]["end"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_ranks_adamw_holds(variant: tuple[bool, int], of_two: Any) -> None:
    """Half of the model's elements, or all; a rank that does not keep them takes part in gathering moments."""
    elements = sum(array.size for array in weights().values())
    for rank, found in enumerate(of_two):
        assert found[variant]["held"] == (elements / 2 if variant[0] else elements)
        assert bool(found[variant]["saved"]) == (rank == 0)


def test_a_run_of_two_ranks_goes_on_in_one_process(of_two: Any, alone: dict[str, Any]) -> None:
    for variant in VARIANTS:
        is_as_alone(course(ALONE, True, 1, of_two[0][variant]["saved"]), alone)


def test_two_jobs_have_the_same_bits_and_a_run_of_one_process_goes_on_in_two(of_two: Any, alone: Any) -> None:
    """Two things, one job."""
    for rank, (same, resumed) in enumerate(in_ranks(2, again, alone["saved"])):
        assert same["told"] == of_two[rank][True, 3]["told"]
        assert_same_bits(same["end"], of_two[rank][True, 3]["end"])
        is_as_alone(resumed, alone)
        assert resumed["held"] == of_two[rank][True, 3]["held"]


@pytest.mark.slow  # the quick tests see the same of two ranks
def test_four_ranks(of_two: Any, alone: dict[str, Any]) -> None:
    """In all variants, as two; from the start, and from what two ranks saved."""
    for ranks in (2, 4):
        for found in in_ranks(ranks, courses, ALL_VARIANTS):
            for variant in ALL_VARIANTS:
                is_as_alone(found[variant], alone)
    for same, resumed in in_ranks(4, again, of_two[0][True, 3]["saved"]):
        is_as_alone(same, alone)
        is_as_alone(resumed, alone)


def spoilt(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """What comes of a step in which the loss of rank 1, or its gradient, is not finite; and of the next step."""
    found = {}
    for which in ("loss", "gradient"):
        trainer, micro = made(ranks), batches_of(ranks, 0, 3)
        trainer.step(micro, LR)
        before, right = state(trainer), trainer.forward
        loss, factor = (math.nan, 1.0) if which == "loss" else (0.0, math.inf)

        def wrong(x: Any, y: Any, right: Any = right, added: float = loss) -> Any:
            return None, right(x, y)[1] + added  # which changes nothing of the gradient

        if ranks.rank == 1:
            trainer.forward = wrong
            hooked = trainer.parameters["ln_f.bias"].register_hook(lambda gradient, factor=factor: gradient * factor)
        told = trainer.step(micro, LR)
        found[which] = {"before": before, "told": told, "steps": trainer.steps, "after": state(trainer)}
        found[which]["finite"] = trainer.finite(micro)
        if ranks.rank == 1:
            trainer.forward = right
            hooked.remove()
        found[which]["next"] = trainer.step(micro, LR)
    return found


def test_what_is_not_finite_on_one_rank_updates_none() -> None:
    for rank, found in enumerate(in_ranks(2, spoilt)):
        for which, of in found.items():
            loss, norm = of["told"]
            assert (math.isfinite(loss), math.isfinite(norm)) == (which != "loss", which != "gradient")
            assert of["steps"] == 1
            assert_same_bits(of["after"], of["before"])
            assert of["finite"] == (rank != 1)
            assert math.isfinite(sum(of["next"]))


def rounded(ranks: Ranks) -> tuple[list[Arrays], Arrays, tuple[float, float]]:
    """All ranks' own gradients; their mean as bfloat16 is sent; and a step from it."""
    own = made(ALONE)
    own.accumulate(batches_of(ranks, 0))
    trainer = made(ranks, reduce_dtype="bfloat16")
    trainer.accumulate(batches_of(ranks, 0))
    all_own = ranks.gather({name: gradient.numpy() for name, gradient in own.mean_gradients()[1].items()})
    mean = {name: gradient.numpy().copy() for name, gradient in trainer.mean_gradients()[1].items()}
    return all_own, mean, (trainer.loss, trainer.update(LR))


def test_gradients_that_are_sent_in_bfloat16() -> None:
    """Each rank's are rounded, then their sum: each by 2**-8 of itself at most. In one process nothing is."""
    found = in_ranks(2, rounded)
    own, mean, told = found[0]
    differs = False
    for name, gradient in mean.items():
        one, other = (gradients[name] for gradients in own)
        assert np.all(abs(gradient - (one + other) / 2) <= 2**-7 * (abs(one) + abs(other)) / 2)
        differs = differs or not np.array_equal(gradient, (one + other) / 2)
    assert differs
    assert_same_bits(found[1][1], mean)
    assert found[1][2] == told

    trainers = made(ALONE), made(ALONE, reduce_dtype="bfloat16")
    plain, asked = (trainer.step(batches_of(ALONE, 0), LR) for trainer in trainers)
    assert asked == plain


def test_owners_have_about_as_many_elements_each() -> None:
    assert owners({"a": 3, "b": 5, "c": 4, "d": 2}, 2) == {"b": 0, "c": 1, "a": 1, "d": 0}
    assert owners({"a": 3, "b": 5}, 1) == {"a": 0, "b": 0}


def test_more_ranks_than_parameters() -> None:
    """The last has nothing to update."""
    last = Ranks()
    last.rank, last.size = 99, 100
    trainer = made(last)
    assert not trainer.own
    trainer.load_gradients(1.0, weights())
    assert trainer.update(LR) > 0
