"""Where captured graphs keep what they need within a call: in memory that they share, and in that of gradients."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.device import Buffer
from tinygrad.engine import jit
from tinygrad.helpers import GlobalCounters
from tinygrad.schedule.memory import memory_plan_rewrite
from tinygrad.uop.ops import Ops, UOp

import tinygrad_impl.flat
import tinygrad_impl.trainer
from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.ranks import Ranks
from parity_tests.lockstep import in_lockstep
from tinygrad_impl.arena import BLOCK, Life, Span, places
from tinygrad_impl.internals import Captured, captured_at_once, contents, overwrite, part_of
from tinygrad_impl.losses import Evaluator
from tinygrad_impl.tests.test_trainer import Batch
from tinygrad_impl.trainer import Trainer

CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=36, n_layer=2, n_head=2)  # with padding behind matrices
ROWS = 2
COUNTS = (1, 3, 1)  # of micro-batches of a step


def test_where_buffers_lie() -> None:
    """Those that are needed least long come first. One may span two spans, unless there is padding between these, and
    ends before the first of them is written. Two that are never alive together share a place.
    """
    spans = [Span(0, 4 * BLOCK, 10), Span(4 * BLOCK, 8 * BLOCK, 20), Span(9 * BLOCK, 16 * BLOCK, 30)]
    assert places([Life(6 * BLOCK, 0, 9)], spans) == {0: 0}
    assert places([Life(6 * BLOCK, 0, 10)], spans) == {0: 9 * BLOCK}  # the call that writes a span may still read it
    assert places([Life(4 * BLOCK, 0, 10)], spans) == {0: 4 * BLOCK}
    assert places([Life(9 * BLOCK, 0, 9)], spans) == {}
    assert places([Life(BLOCK, 0, 30)], spans) == {}
    assert places([Life(BLOCK - 1, 0, 12), Life(BLOCK - 1, 1, 9), Life(1, 1, 11)], spans) == {
        **{1: 0},
        **{2: 4 * BLOCK},
        **{0: 5 * BLOCK},
    }
    later = [Life(4 * BLOCK, 0, 5), Life(6 * BLOCK, 3, 8), Life(3 * BLOCK, 6, 7)]
    assert places(later, spans) == {0: 0, 1: 9 * BLOCK, 2: 0}
    assert places([Life(BLOCK, 0, 1)], []) == places([], spans) == {}
    assert places([Life(BLOCK, 0, 1)], [Span(BLOCK // 2, 3 * BLOCK, 10)]) == {0: BLOCK}  # each begins at a block


@pytest.mark.parametrize("seed", range(8))
def test_no_two_that_are_alive_share_a_byte(seed: int) -> None:
    """By a map of memory and time, in pieces of half a block."""
    random, calls = np.random.default_rng(seed), 40
    spans, start = list[Span](), 0
    for until in sorted(random.integers(calls // 2, calls, 8).tolist()):
        stop = start + int(random.integers(1, 12)) * BLOCK // 2
        spans.append(Span(start, stop, until))
        start = stop + int(random.integers(0, 2)) * BLOCK // 2
    lives = list[Life]()
    for _ in range(60):
        first, last = sorted(random.integers(0, calls, 2).tolist())
        lives.append(Life(int(random.integers(1, 4 * BLOCK)), first, last))
    free = np.zeros((2 * start // BLOCK, calls), bool)
    for span in spans:
        free[2 * span.start // BLOCK : 2 * span.stop // BLOCK, : span.until] = True
    found = places(lives, spans)
    assert len(found) > 5
    for i, begin in found.items():
        assert begin % BLOCK == 0
        own = (
            slice(2 * begin // BLOCK, -(-2 * (begin + lives[i].size) // BLOCK)),
            slice(lives[i].first, lives[i].last + 1),
        )
        assert free[own].all()
        free[own] = False


def test_a_graph_that_is_lent_memory() -> None:
    """What it does not write is not lent; what it writes may hold anything before, but not what is read meanwhile. A
    second one shares its arena.
    """
    memory = Tensor.zeros(2048).contiguous().realize()
    lent, arena = [part_of(memory, start, 1024) for start in (0, 1024)], list[Buffer]()

    def function(x: Tensor) -> None:
        more = (x.flip(0) + 1).contiguous()
        much = (more.flip(0) * 2).contiguous()
        Tensor.realize(lent[0].assign((much.flip(0) - more).contiguous().flip(0) + 1))

    lending, sharing = captured_at_once(function, arena, lent), captured_at_once(function, arena)
    overwrite(lent[1], np.full(1024, 7, np.float32))
    array = np.arange(1024, dtype=np.float32)
    x = Tensor(array).realize()
    for graph, buffers in ((lending, 2), (sharing, 3), (lending, 3), (sharing, 3)):
        graph(x)
        np.testing.assert_array_equal(contents(lent[0]), array + 2)
        np.testing.assert_array_equal(contents(lent[1]), 7)
        assert sum(buffer.nbytes for buffer in arena) == buffers * 4096
    assert jit.memory_plan_rewrite is memory_plan_rewrite  # for the graphs of others
    whole = memory.uop.base.buffer
    assert any(buffer.base is whole for call in calls(lending)[:-1] for buffer in call)
    assert not any(buffer.base is whole for call in calls(sharing)[:-1] for buffer in call)

    def reading(x: Tensor) -> None:
        Tensor.realize(lent[0].assign((x.flip(0) + 1).contiguous().flip(0) * 2))

    other = Tensor.zeros(1024).contiguous().realize()

    def all_of_it(x: Tensor) -> None:
        """Before a part is named, the whole is."""
        more = (x.flip(0) + 1).contiguous().realize()
        Tensor.realize(memory.assign(memory * 0 + 5))
        Tensor.realize(other.assign(more * 2))
        Tensor.realize(lent[0].assign(x + 0))

    captured_at_once(all_of_it, arena, lent)(x)
    np.testing.assert_array_equal(contents(other), 2 * (array[::-1] + 1))
    np.testing.assert_array_equal(contents(lent[1]), 5)

    reads = captured_at_once(reading, arena, lent)
    reads(x)
    np.testing.assert_array_equal(contents(lent[0]), 2 * array + 2)
    assert [sum(buffer.base is whole for buffer in call) for call in calls(reads)] == [0, 1]


def test_a_graph_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is captured, or in its first run: graphs of others are planned as ever, and it may be called again."""
    arena, x = list[Buffer](), Tensor(np.arange(1024, dtype=np.float32)).realize()

    def fails(*_: object, **__: object) -> None:
        raise MemoryError("none is left")

    with pytest.raises(MemoryError, match="none is left"):
        captured_at_once(fails, arena)(x)
    assert jit.memory_plan_rewrite is memory_plan_rewrite

    def function(x: Tensor) -> Tensor:
        return ((x.flip(0) + 1).contiguous().flip(0) * 2).contiguous().realize()

    graph = captured_at_once(function, arena)
    with monkeypatch.context() as patch:
        patch.setattr(jit, "run_linear", fails)
        with pytest.raises(MemoryError, match="none is left"):
            graph(x)
    [memory] = arena
    np.testing.assert_array_equal(graph(x).numpy(), 2 * np.arange(1024) + 2)
    assert arena == [memory]
    assert any(buffer.base is memory for call in calls(graph) for buffer in call)


@dataclass
class Trained:
    """A trainer after steps, with what they have left behind."""

    trainer: Trainer
    reported: list[tuple[float, float]]
    arrays: list[dict[str, np.ndarray]]  # after each step: gradients, parameters and moments
    allocated: list[int]  # bytes by the graphs of one micro-batch, and by those of further ones


def batches(seed: int, count: int) -> list[Batch]:
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (count, ROWS, CONFIG.n_positions + 1))
    return [(batch[:, :-1].astype(np.int32), batch[:, 1:].astype(np.int32)) for batch in tokens]


def train(config: GPT2Config = CONFIG) -> Trained:
    trainer = Trainer(config, initial_weights(config, 0))
    reported, arrays, allocated = [], [], []
    for seed, count in enumerate(COUNTS):
        gc.collect()
        before = GlobalCounters.mem_used_per_device["CPU"]
        trainer.accumulate(batches(seed, count))
        allocated.append(GlobalCounters.mem_used_per_device["CPU"] - before)
        _, gradients = trainer.mean_gradients()
        reported.append(trainer.update(1e-2))
        moments = {name: array.copy() for name, array in trainer.moments().items()}
        weights = {f"weights.{name}": array.copy() for name, array in trainer.arrays().items()}
        arrays.append(gradients | weights | moments)
    return Trained(trainer, reported, arrays, allocated[:2])


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[Trained, Trained]]:
    """As it is, and with an arena for each graph and nothing lent. There is a bucket for each layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinygrad_impl.flat, "LEAST", 1)
        lending = train()
        with patch.context() as other:
            other.setattr(tinygrad_impl.trainer, "captured_at_once", lambda function, **_: captured_at_once(function))
            plain = train()
        yield lending, plain


def test_not_one_bit_is_another(trained: tuple[Trained, Trained]) -> None:
    """Of losses, norms, gradients, weights and moments, whatever graphs take turns."""
    lending, plain = trained
    assert lending.reported == plain.reported
    for found, expected in zip(lending.arrays, plain.arrays, strict=True):
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def lent_bytes(trainer: Trainer) -> int:
    return sum(t.numel() * t.dtype.itemsize for n, t in trainer.gradients.items() if n.startswith("h.") and t.ndim == 2)


def test_memory_is_spared(trained: tuple[Trained, Trained]) -> None:
    """Nearly as much as the gradients of layers' matrices have; and further micro-batches take little more memory than
    if they had been the first.
    """
    lending, plain = trained
    lent = lent_bytes(lending.trainer)
    assert lent > 0.1 * plain.allocated[0]
    assert 0.7 * lent < plain.allocated[0] - lending.allocated[0] < 1.1 * lent
    assert plain.allocated[1] > 0.9 * plain.allocated[0], "tinygrad gives a further graph no arena of its own"
    assert sum(lending.allocated) < 1.1 * plain.allocated[1]


def test_validation_takes_no_memory_of_its_own(trained: tuple[Trained, Trained]) -> None:
    """But for the losses and what else it returns; in batches of any shape that are no larger than training's."""
    trainer = trained[0].trainer
    evaluator, (batch,) = Evaluator(trainer.model, trainer.backend, trainer.arena), batches(9, 1)
    gc.collect()
    before = GlobalCounters.mem_used_per_device["CPU"]
    whole, _ = evaluator.sums([batch])
    parts = [evaluator.sums([(batch[0][i : i + 1], batch[1][i : i + 1])])[0] for i in range(ROWS)]
    assert GlobalCounters.mem_used_per_device["CPU"] - before < 4096
    arena = list[Buffer]()  # that no graph has been planned in yet
    assert Evaluator(trainer.model, arena=arena).arena is arena
    assert whole == pytest.approx(sum(parts), rel=1e-5)


def test_padding_stays_zero(trained: tuple[Trained, Trained]) -> None:
    trainer = trained[0].trainer
    assert any(size % tinygrad_impl.flat.ALIGNED for b in trainer.gradients.buckets for size in b.sizes.values())
    for bucket in trainer.gradients.buckets:
        arrays = {name: contents(trainer.gradients[name]) for name in bucket.starts}
        np.testing.assert_array_equal(
            contents(trainer.gradients.memory[bucket.name]), bucket.flatten(arrays, np.dtype(np.float32))
        )


def calls(graph: Captured) -> list[list[Buffer]]:
    """What each of the graph's calls names, but for its inputs."""
    assert graph.captured is not None
    found = list[UOp]()
    for call in graph.captured.linear.src:
        found += call.src[0].src[0].src if call.src[0].op is Ops.CUSTOM_FUNCTION else [call]
    return [[source.buffer for source in call.src[1:] if source.op is not Ops.PARAM] for call in found]


def test_lent_memory_is_free(trained: tuple[Trained, Trained]) -> None:
    """Of each layer's matrices, until a call names their gradients: no later call has anything else there. A graph that
    adds to the gradients has nothing there at all.
    """
    trainer = trained[0].trainer
    assert guests(trainer, trainer._first) > 0
    assert guests(trainer, trainer._further) == 0
    assert [len(graph.lent) for graph in (trainer._first, trainer._only, trainer._last)] == [8, 8, 0]


def test_lent_memory_is_free_on_two_ranks(trained: tuple[Trained, Trained]) -> None:
    """Where a gradient is read once more after it was computed, to be sent to the other rank."""

    def found(ranks: Ranks) -> int:
        trainer = Trainer(CONFIG, initial_weights(CONFIG, 0), ranks=ranks)
        trainer.accumulate(batches(ranks.rank, 1))
        return guests(trainer, trainer._only)

    assert all(count > 0 for count in in_lockstep(2, found))


def guests(trainer: Trainer, graph: Captured) -> int:
    """How many times the graph's calls name something else in the memory of gradients. Fails if one does after that
    memory's own gradient has been named.
    """
    named, count = calls(graph), 0
    for name, gradient in trainer.gradients.items():
        part = gradient.uop.base.buffer
        own = [i for i, buffers in enumerate(named) if part in buffers]
        others = [i for i, buffers in enumerate(named) for b in buffers if b is not part and overlap(b, part)]
        assert own, name
        assert max(others, default=-1) < own[0], name
        count += len(others)
    return count


def overlap(one: Buffer, other: Buffer) -> bool:
    together = one.offset < other.offset + other.nbytes and other.offset < one.offset + one.nbytes
    return one.base is other.base and together
