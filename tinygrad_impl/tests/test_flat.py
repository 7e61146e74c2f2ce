"""Parameters as ranges of one buffer."""

import numpy as np
from tinygrad import Tensor, dtypes

from tinygrad_impl.flat import ALIGNED, Flat
from tinygrad_impl.internals import contents, overwrite

SHAPES = {"wte": (3, 5), "bias": (), "weight": (ALIGNED,), "last": (ALIGNED + 1,)}  # 15, 1, 64 and 65 numbers


def test_where_they_are() -> None:
    """In memory in the opposite order, each at a multiple of ALIGNED; by name in the given one, shaped and zero."""
    flat = Flat(SHAPES, dtypes.float64)
    assert list(flat) == list(SHAPES)
    assert len(flat) == 4
    assert ALIGNED * 2 % 16 == 0  # bytes of bfloat16: what vectors of a kernel begin at
    assert flat.starts == {"last": 0, "weight": 2 * ALIGNED, "bias": 3 * ALIGNED, "wte": 4 * ALIGNED}
    assert flat.memory.shape == (5 * ALIGNED,)
    for name, shape in SHAPES.items():
        assert (flat[name].shape, flat[name].dtype) == (shape, dtypes.float64)
        assert not contents(flat[name]).any()


def test_they_share_memory() -> None:
    """What is written to a tensor is in the whole, and in a range of neighbours, with what lies between them."""
    flat = Flat(SHAPES, dtypes.float32)
    expected = np.zeros(5 * ALIGNED, np.float32)
    for i, (name, shape) in enumerate(SHAPES.items(), 1):
        values = np.full(shape, i, np.float32)
        overwrite(flat[name], values)
        expected[flat.starts[name] :][: values.size] = i
    np.testing.assert_array_equal(contents(flat.memory), expected)
    np.testing.assert_array_equal(contents(flat.range(["weight", "bias"])), expected[2 * ALIGNED : 3 * ALIGNED + 1])
    np.testing.assert_array_equal(contents(flat.range(["last"])), expected[: ALIGNED + 1])
    assert flat.range(["weight", "bias"]) is flat.range(["weight", "bias"])
    Tensor.realize(flat["weight"].assign(flat["weight"] * 10))
    expected[2 * ALIGNED : 3 * ALIGNED] *= 10
    np.testing.assert_array_equal(contents(flat.memory), expected)
