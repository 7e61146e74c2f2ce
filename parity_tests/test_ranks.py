"""Training on several ranks is what one process computes from all of their windows: both trainers, in float64."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tinygrad_impl.trainer
import torch_ref.trainer
from data.checkpoints.config import parameter_shapes
from data.cli import InputError
from data.ranks import ALONE, Ranks
from data.runs.run_folder import read_metrics, write_sealed
from data.testing import save_model, write_tokens
from data.tests.ranks import in_ranks
from data.text.loader import Loader
from parity_tests import gate, mutants
from parity_tests.averaging import SENT
from parity_tests.certificate import programs
from parity_tests.checks import AnyTrainer
from parity_tests.lockstep import Arriving, in_lockstep
from parity_tests.planted import ROOT
from parity_tests.setting import Batch
from parity_tests.weights import random_weights
from tinygrad_impl.device import open_device
from tinygrad_impl.exchange import Exchange
from tinygrad_impl.flat import ALIGNED
from tinygrad_impl.internals import part_of

CONFIG, T = replace(mutants.CONFIG, n_layer=1), mutants.LENGTH
WINDOWS, STEPS, HALF = 24, 10, 5  # windows an update, over all ranks; updates
LR, EPS = 1e-2, 1e-4  # of AdamW. As small as usual, the keys' biases, whose gradient is rounding noise, would follow it
slow = pytest.mark.slow

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Course:
    """Steps that a trainer takes from a state, or from the beginning."""

    package: str  # of the trainer
    accumulated: int = 1  # micro-batches of a rank's step
    begin: Mapping[str, Any] | None = None
    first: int = 0
    last: int = STEPS
    options: Mapping[str, Any] | None = None  # of the trainer
    shared: int | None = None  # the course, among those before it, in whose middle it begins
    every: int = 1  # of so many windows of the global batch one


@dataclass(frozen=True)
class Found:
    """What a rank has of a course."""

    gradients: Arrays  # of the first step
    reported: list[tuple[float, float]]  # loss and norm of each step
    middle: Arrays  # parameters and moments after HALF steps
    end: Arrays


def weights() -> Arrays:
    return {n: a.astype(np.float64) for n, a in random_weights(CONFIG, 0, initializer_range=0.2).items()}


def global_batch(step: int) -> np.ndarray:
    """Windows (WINDOWS, T + 1) in which a few tokens are most, and in each quarter others: ranks' gradients differ."""
    quarters = np.random.default_rng(step).zipf(1.5, (4, WINDOWS // 4, T + 1)) + 90 * np.arange(4)[:, None, None]
    return (quarters % CONFIG.vocab_size).reshape(WINDOWS, T + 1).astype(np.int32)


def share(ranks: Ranks, step: int, accumulated: int, every: int = 1) -> list[Batch]:
    """The rank's part of the global batch, or of one of `every` so many windows of it, in so many micro-batches."""
    windows = np.split(global_batch(step)[::every], ranks.size * accumulated)
    own = windows[ranks.rank * accumulated : (ranks.rank + 1) * accumulated]
    return [(batch[:, :-1].copy(), batch[:, 1:].copy()) for batch in own]


def state(trainer: AnyTrainer, keep: bool = True) -> Arrays:
    """Parameters and moments, copied."""
    return {name: np.asarray(a).copy() for name, a in {**trainer.arrays(keep), **trainer.moments(keep)}.items()}


def made(ranks: Ranks, package: str, **options: Any) -> AnyTrainer:
    """A trainer of `weights()`."""
    module = tinygrad_impl.trainer if package == "tinygrad_impl" else torch_ref.trainer
    return module.Trainer(CONFIG, weights(), eps=EPS, ranks=ranks, **options)


def take(ranks: Ranks, courses: Sequence[Course]) -> list[Found]:
    """What this rank has of each course."""
    open_device("CPU")
    torch.set_num_threads(1)
    found = list[Found]()
    for course in courses:
        trainer = made(ranks, course.package, **(course.options or {}))
        begin = found[course.shared].middle if course.shared is not None else course.begin
        if begin is not None:
            trainer.restore(begin, begin, course.first)
        trainer.accumulate(share(ranks, course.first, course.accumulated, course.every))
        gradients = {name: np.asarray(g).copy() for name, g in trainer.mean_gradients()[1].items()}
        reported, middle = [], state(trainer)
        for step in range(course.first, course.last):
            if step == HALF:
                middle = state(trainer)
            reported.append(trainer.step(share(ranks, step, course.accumulated, course.every), LR))
        found.append(Found(gradients, reported, middle, state(trainer)))
    return found


def distance(found: Arrays, expected: Arrays) -> float:
    """The largest relative difference of a tensor, in the 2-norm."""
    assert found.keys() == expected.keys()
    return max(float(np.linalg.norm(a - expected[n]) / np.linalg.norm(expected[n])) for n, a in found.items())


def assert_same(found: Sequence[Found], expected: Found, first: int = 0) -> None:
    """Fails unless all ranks have the same bits, and what one process has, but for rounding."""
    for name in ("gradients", "middle", "end"):
        for one, other in pairwise(getattr(of_rank, name) for of_rank in found):
            assert all(np.array_equal(array, other[n]) for n, array in one.items()), name
    assert all(of_rank.reported == found[0].reported for of_rank in found)
    assert distance(found[0].middle, expected.middle) < 1e-12
    assert distance(found[0].end, expected.end) < 1e-12
    np.testing.assert_allclose(found[0].reported, expected.reported[first:], rtol=1e-12, atol=0)
    if first == 0:
        assert distance(found[0].gradients, expected.gradients) < 1e-13
        np.testing.assert_allclose(found[0].reported[0], expected.reported[0], rtol=1e-13, atol=0)


@pytest.fixture(scope="module")
def clip() -> float:
    """A norm that some steps' gradients are over, and some are under."""
    [free] = take(ALONE, [Course("torch_ref", options={"clip": 1e9})])
    return float(np.median([norm for _, norm in free.reported]))


@pytest.fixture(scope="module")
def alone(clip: float) -> Found:
    """What one process has: the reference, from one batch of all windows."""
    [found] = take(ALONE, [Course("torch_ref", options={"clip": clip})])
    clipped = [norm > clip for _, norm in found.reported]
    assert any(clipped)
    assert not all(clipped)
    return found


def test_two_ranks_are_one_process(alone: Found, clip: float) -> None:
    """Gradients, losses, norms, parameters and moments, with the optimizer divided among ranks and without; each goes
    on from where the other was. In one process: test_processes_are_one_process has the same of several.
    """
    courses = [
        Course("tinygrad_impl", 2, options={"clip": clip, "zero": True}),
        Course("tinygrad_impl", 1, first=HALF, shared=0, options={"clip": clip, "zero": False}),
        Course("torch_ref", 3, options={"clip": clip, "zero": True}),
        Course("torch_ref", 1, first=HALF, shared=0, options={"clip": clip, "zero": False}),
    ]
    for course, found in zip(courses, zip(*in_lockstep(2, take, courses), strict=True), strict=True):
        assert_same(found, alone, course.first)


def test_gradients_sent_as_bfloat16() -> None:
    """Their mean is as far off as roundings of numbers that are sent may carry it, and some are seen."""
    courses = [Course("tinygrad_impl", 1, last=1, options={"reduce_dtype": "bfloat16"}, every=2)]
    found = in_lockstep(2, take, courses)[0][0].gradients
    shares = []
    for rank in range(2):
        trainer = made(ALONE, "torch_ref")
        trainer.accumulate(share(place(rank, 2), 0, 1, every=2))
        shares.append({name: np.asarray(g) for name, g in trainer.mean_gradients()[1].items()})
    for name, (one, other) in {name: (one, shares[1][name]) for name, one in shares[0].items()}.items():
        exact, sent = (one + other) / 2, (np.abs(one) + np.abs(other)) / 2
        assert np.all(np.abs(found[name] - exact) <= ((1 + SENT) ** 3 - 1) * sent + 1e-15), name
        assert np.linalg.norm(found[name] - exact) > 1e-4 * np.linalg.norm(exact), name


def place(rank: int, size: int) -> Ranks:
    """One of so many ranks that tell each other nothing."""
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


@slow  # test_two_ranks_are_one_process has all that the trainers do
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("zero", [False, True])
def test_four_ranks_are_one_process(accumulated: int, zero: bool, alone: Found, clip: float) -> None:
    options = {"clip": clip, "zero": zero}
    courses = [Course(package, accumulated, options=options) for package in ("tinygrad_impl", "torch_ref")]
    for found in zip(*in_lockstep(4, take, courses), strict=True):
        assert_same(found, alone)


@slow
@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("zero", [False, True])
def test_accumulation_on_two_ranks(accumulated: int, zero: bool, alone: Found, clip: float) -> None:
    courses = [Course("tinygrad_impl", accumulated, options={"clip": clip, "zero": zero})]
    assert_same([found for [found] in in_lockstep(2, take, courses)], alone)


@slow  # test_two_ranks_are_one_process goes on from another course too
def test_a_run_goes_on_with_other_numbers_of_ranks(alone: Found, clip: float) -> None:
    """From two ranks to one, in the other implementation, and to four, back in the first."""
    options = {"clip": clip}
    for one, other in (("tinygrad_impl", "torch_ref"), ("torch_ref", "tinygrad_impl")):
        [two, _] = in_ranks(2, take, [Course(one, 2, last=4, options=options)])
        [single] = take(ALONE, [Course(other, 3, two[0].end, 4, 7, options)])
        four = in_ranks(4, take, [Course(one, 3, single.end, 7, STEPS, options)])
        assert distance(four[0][0].end, alone.end) < 1e-12
        reported = [*two[0].reported, *single.reported, *four[0][0].reported]
        np.testing.assert_allclose(reported, alone.reported, rtol=1e-12, atol=0)


@slow  # what torch.distributed does is in data/tests/test_ranks.py
@pytest.mark.parametrize(("size", "accumulated"), [(2, 2), (8, 3)])
def test_processes_are_one_process(size: int, accumulated: int, alone: Found, clip: float) -> None:
    courses = [Course("tinygrad_impl", accumulated, options={"clip": clip, "zero": zero}) for zero in (False, True)]
    for found in zip(*in_ranks(size, take, courses), strict=True):
        assert_same(found, alone)


@slow
@pytest.mark.parametrize("size", [2, 4])
def test_two_jobs_have_the_same_bits(size: int, clip: float) -> None:
    courses = [Course(package, 3, options={"clip": clip}) for package in ("tinygrad_impl", "torch_ref")]
    first, second = (in_ranks(size, take, courses)[0] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.reported == other.reported
        assert all(np.array_equal(array, other.end[name]) for name, array in one.end.items())


@slow  # data/runs/tests/test_ranks.py has the loop, and the gate is below
def test_the_command_on_two_ranks(tmp_path: Path) -> None:
    """Through torchrun, with the gate: the losses and norms of one process with the same global batch."""
    tokens = np.random.default_rng(0).integers(0, 50257, 1200)
    write_tokens(tmp_path / "data", tokens[:1000], tokens[1000:])
    save_model(tmp_path / "init")
    words = "--init init --data data --steps 4 --batch-size 2 --grad-accum 4 --seq-len 16 --lr 0.01 --warmup 1"
    words += " --eval-tokens 64 --sample-every 99 --dtype float32 --device CPU --quiet"
    for name, more in (("one", []), ("two", ["--gpus", "2"])):
        command = [sys.executable, "-m", "tinygrad_impl.train", *words.split(), "--out", name, *more]
        ended = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
        assert ended.returncode == 0
    rows = [read_metrics(tmp_path / name) for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 5
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & {"loss", "val_loss", "grad_norm"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4)
    proofs = [json.loads((tmp_path / name / "parity.json").read_text()) for name in ("one", "two")]
    assert [proof["verdict"] for proof in proofs] == ["equal", "equal"]
    assert [proof.get("ranks") for proof in proofs] == [None, 2]


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 1200)
    return write_tokens(tmp_path_factory.mktemp("ranks") / "data", tokens[:1000], tokens[1000:])


def prove(ranks: Ranks, folder: Path, accumulated: int = 2, reduce_dtype: str = "float32") -> dict[str, Any]:
    """The gate's certificate of a trainer of float32 on these ranks, whose micro-batches have 2 windows."""
    arrays = {name: array.astype(np.float32) for name, array in weights().items()}
    loader = Loader(folder, "train", 2 * accumulated, T, 1337, ranks.rank, ranks.size)
    options = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 0.5, "lr": 1e-3, "dtype": "float32", "quiet": True}
    options |= {"batch_size": 2, "seq_len": T, "grad_accum": accumulated * ranks.size, "seed": 1337}
    start: Any = SimpleNamespace(options=SimpleNamespace(**options), config=CONFIG, arrays=arrays, moments=None)
    vars(start).update(state={"step": 0}, folder=folder, loader=loader, ranks=ranks, micro_batches=accumulated)
    trainer = tinygrad_impl.trainer.Trainer(CONFIG, arrays, clip=0.5, ranks=ranks, reduce_dtype=reduce_dtype)
    setting, references = gate.ready_references(start, "CPU", trainer.backend)
    certificate = gate.prove_graphs(trainer, start, "CPU", time.perf_counter(), setting, references)
    assert not references, "PyTorch's trainers keep the memory that training is to have"
    assert loader.position == 0
    assert trainer.steps == 0
    assert all(np.array_equal(array, arrays[name]) for name, array in trainer.arrays().items())
    return certificate


def test_the_gate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It proves the averages of two ranks, as often as it would one process's; all ranks have the same verdict. Ranks
    that torchrun has started again have the one that is kept.
    """
    monkeypatch.setattr(gate, "certificate_before", lambda start, device: {"kept": True})
    with monkeypatch.context() as again:
        again.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert in_lockstep(2, prove, folder, 1) == [{"kept": True}] * 2
    one, other = in_lockstep(2, prove, folder, 1)
    assert (one["verdict"], one["ranks"], one["batches"]) == ("equal", 2, 8)
    assert one["rows"] == other["rows"]
    assert {row["name"] for row in one["rows"] if row["check"] == "gradient"} >= {*parameter_shapes(CONFIG), "norm"}
    assert "16 gradients, averaged over 2 ranks, within" in one["summary"]


@slow  # test_what_roundings_of_what_is_sent_may_do has the bound
def test_the_gate_of_gradients_sent_as_bfloat16(folder: Path) -> None:
    one, _ = in_lockstep(2, prove, folder, 2, "bfloat16")
    assert any("bfloat16" in row["reason"] for row in one["rows"])


def test_the_gate_looks_at_the_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that train on the same ones compute the same average, and that of the same windows is right."""

    class OfRank0(Loader):
        def __init__(self, *args: Any):
            super().__init__(*args)
            self.rank = 0

    monkeypatch.setattr("parity_tests.test_ranks.Loader", OfRank0)
    with pytest.raises(InputError, match="the data of rank 1: not its part"):
        in_lockstep(2, prove, folder)


@pytest.mark.parametrize("changed", [{}, {"batch_size": 4}, {"verdict": "different"}, {"sources": {}}, {"ranks": 4}])
def test_ranks_that_are_started_again_were_proven(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the certificate in the run's folder is of something else, or torchrun has not started them again."""
    options = {"batch_size": 2, "seq_len": T, "grad_accum": 2, "dtype": "float32", "quiet": True, "out": tmp_path}
    start: Any = SimpleNamespace(options=SimpleNamespace(**options), state={"step": 3}, ranks=SimpleNamespace(size=2))
    assert gate.certificate_before(start, "CPU") is None
    found = {"verdict": "equal", "dtype": "float32"} | programs() | gate.circumstances(start, "CPU") | changed
    write_sealed(tmp_path / "parity.json", found)
    assert gate.certificate_before(start, "CPU") == (None if changed else found)
    start.state["step"] = 0
    assert gate.certificate_before(start, "CPU") is None


def unsent(self: Any, bucket: str) -> None:
    """No rank hears of the others' gradients."""


def summed(self: Any, bucket: str) -> None:
    send(self, bucket)
    arrived = self.averaging[-1].wait

    def wait() -> None:
        arrived()
        self.gradients[bucket][:] *= self.ranks.size

    self.averaging[-1] = Arriving(wait)


def local_norm(self: Any, lr: float) -> tuple[float, float]:
    """Of the part that this rank updates."""
    gather_parts, here = self.ranks.gather_parts, np.arange(self.ranks.size) == self.ranks.rank

    def of_this_rank(part: Any, keep: bool = True) -> np.ndarray:
        found = gather_parts(part, keep).reshape(self.ranks.size, -1)
        found[~here, 1:] = 0
        return found.reshape(-1)

    self.ranks.gather_parts = of_this_rank
    try:
        return update(self, lr)
    finally:
        self.ranks.gather_parts = gather_parts


def shifted(self: Any, bucket: Any, dtype: Any) -> Any:
    found = part(self, bucket, dtype)
    if self.rank == 0 or bucket.name == "rest":
        return found
    size = bucket.size // self.shards  # ALIGNED elements late: kernels read vectors
    gradients = part_of(self.gradients.memory[bucket.name], self.rank * size - ALIGNED, size)
    return replace(found, gradients=gradients)


def early(self: Any, batches: Sequence[Batch], send: bool = True) -> None:
    """Averages the first micro-batch's gradients, and adds to them what is this rank's own."""
    accumulate(self, batches[:1], send)
    self.exchange.wait_for_gradients()
    self.count = len(batches)
    for x, y in batches[1:]:
        self._further(self._input("x", x), self._input("y", y))


Port = tinygrad_impl.trainer.Trainer
accumulate, send, update, part = Port.accumulate, Exchange.average, Port.update, Port._part


@slow  # the rows of catalogue/ranks.py plant these in the source, and quick tests catch them
@pytest.mark.parametrize(
    ("of", "method", "planted", "words"),
    [
        (Exchange, "average", unsent, "not averaged over ranks"),
        (Exchange, "average", summed, "the sum over ranks and not the mean"),
        (Port, "accumulate", early, "only the first micro-batch's"),
        (Port, "update", local_norm, "the norm, which is not that of the average"),
        (Port, "_part", shifted, "AdamW's step, which the ranks share out"),
        (Exchange, "gather", lambda self, bucket: None, "AdamW's step, which|the weights, of which"),
    ],
    ids=["not averaged", "summed", "early", "the norm of a part", "a shard late", "weights not gathered"],
)
def test_the_gate_names_what_ranks_do_wrong_together(
    of: Any, method: str, planted: Any, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of, method, planted)
    with pytest.raises(InputError, match=words):
        in_lockstep(2, prove, folder)
