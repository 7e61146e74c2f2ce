"""Parameters as ranges of the memory of a few buckets."""

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tinygrad_impl import flat as module
from tinygrad_impl.flat import ALIGNED, Flat, Segment, buckets
from tinygrad_impl.internals import contents, overwrite

SHAPES = {
    "wte.weight": (3, 5),
    "h.0.ln_1.bias": (4,),
    "h.0.attn.c_attn.weight": (ALIGNED, 1),
    "h.0.mlp.c_fc.weight": (ALIGNED, 2),
    "h.1.attn.c_attn.weight": (ALIGNED + 1, 1),
    "ln_f.bias": (7,),
}


@pytest.fixture(autouse=True)
def a_bucket_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", ALIGNED)


def test_small_layers_share_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until they have enough together; what is left for the last is less."""
    matrices = {f"h.{layer}.mlp.c_fc.weight": (ALIGNED, 1) for layer in range(5)}
    monkeypatch.setattr(module, "LEAST", 2 * ALIGNED)
    found = {b.name: [name.split(".")[1] for name in b.starts] for b in buckets(matrices | {"wte.weight": (3, 5)})}
    assert found == {"h.3": ["4", "3"], "h.1": ["2", "1"], "h.0": ["0"], "rest": ["weight"]}


def test_where_they_are() -> None:
    """In the order in which the backward pass finishes their gradients, each at a multiple of ALIGNED."""
    assert ALIGNED * 2 % 16 == 0  # bytes of bfloat16: what vectors of a kernel begin at
    last, first, rest = buckets(SHAPES)
    assert (last.name, last.starts, last.size) == ("h.1", {"h.1.attn.c_attn.weight": 0}, 2 * ALIGNED)
    assert first.starts == {"h.0.mlp.c_fc.weight": 0, "h.0.attn.c_attn.weight": 2 * ALIGNED}
    assert rest.starts == {"ln_f.bias": 0, "h.0.ln_1.bias": ALIGNED, "wte.weight": 2 * ALIGNED}
    assert rest.sizes == {"ln_f.bias": 7, "h.0.ln_1.bias": 4, "wte.weight": 15}
    assert [bucket.size for bucket in buckets(SHAPES, 4)] == [4 * ALIGNED] * 3  # each part at a multiple of ALIGNED too


def test_they_share_memory() -> None:
    """By name in the given order, shaped and zero; what is written to a tensor is in its bucket, and the other way."""
    flat = Flat(SHAPES, dtypes.float32)
    assert list(flat) == list(SHAPES)
    assert len(flat) == 6
    for i, (name, shape) in enumerate(SHAPES.items(), 1):
        assert (flat[name].shape, flat[name].dtype) == (shape, dtypes.float32)
        assert not contents(flat[name]).any()
        overwrite(flat[name], np.full(shape, i, np.float32))
    arrays = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(SHAPES.items(), 1)}
    for bucket in flat.buckets:
        expected = bucket.flatten(arrays, np.dtype(np.float32))
        assert expected.sum() == sum(arrays[name].sum() for name in bucket.starts)
        np.testing.assert_array_equal(contents(flat.memory[bucket.name]), expected)
    Tensor.realize(flat["ln_f.bias"].assign(flat["ln_f.bias"] * 10))
    np.testing.assert_array_equal(contents(flat.memory["rest"])[: ALIGNED + 1], [60.0] * 7 + [0.0] * 57 + [2.0])


def test_buckets_lie_side_by_side() -> None:
    """In one piece of memory, each with what its parameters are and zeros in between."""
    flat = Flat(SHAPES, dtypes.float32, ranks=2)
    places = [flat.memory[bucket.name].uop.base.buffer for bucket in flat.buckets]
    assert len({place.base for place in places}) == 1
    assert [place.offset for place in places] == [0, 4 * 2 * ALIGNED, 4 * 6 * ALIGNED]
    arrays = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(SHAPES.items(), 1)}
    for name, array in arrays.items():
        overwrite(flat[name], array)
    for bucket in flat.buckets:
        expected = bucket.flatten(arrays, np.dtype(np.float32))
        np.testing.assert_array_equal(contents(flat.memory[bucket.name]), expected)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parts_are_all_of_a_bucket(ranks: int) -> None:
    """Each element of each parameter is in one rank's part, at its place."""
    arrays = {name: np.random.default_rng(0).random(shape) for name, shape in SHAPES.items()}
    for bucket in buckets(SHAPES, ranks):
        whole = bucket.flatten(arrays, np.dtype(np.float64))
        found = {name: np.full(arrays[name].size, np.nan) for name in bucket.starts}
        for rank in range(ranks):
            part = whole.reshape(ranks, -1)[rank]
            for s in bucket.segments(rank, ranks):
                assert np.isnan(found[s.name][s.first : s.first + s.size]).all()
                found[s.name][s.first : s.first + s.size] = part[s.start : s.start + s.size]
        for name, array in found.items():
            np.testing.assert_array_equal(array, arrays[name].reshape(-1))
    assert buckets(SHAPES, 2)[1].segments(1, 2) == [Segment("h.0.attn.c_attn.weight", 0, ALIGNED, 0)]


def test_what_is_not_held_takes_no_memory() -> None:
    flat = Flat(SHAPES, dtypes.float32, held=["rest"])
    assert flat.memory.keys() == {"rest"}
    assert flat["h.0.mlp.c_fc.weight"].shape == (ALIGNED, 2)
    assert not flat["h.0.mlp.c_fc.weight"].uop.base.buffer.is_allocated()
