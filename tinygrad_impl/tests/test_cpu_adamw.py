"""AdamW and the sums of squares in C."""

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.helpers import Context

from tinygrad_impl import cpu_adamw
from tinygrad_impl.cpu_adamw import adamw, squares

RANDOM = np.random.default_rng(0)
SIZE = 64 * 40
SEGMENTS = ((0, 700, 0.1), (704, 1984, 0.0), (1984, SIZE, 0.3))  # with a gap, which stays as it is
SCALARS = (0.7, 1e-3, 0.02, 0.19, 0.0975)


def given(dtype: type[np.floating]) -> list[np.ndarray]:
    """Parameters, both moments, gradients."""
    p, m, v, g = (RANDOM.standard_normal(SIZE).astype(dtype) for _ in range(4))
    return [p, m, v * v, g]


def found(arrays: list[np.ndarray]) -> list[np.ndarray]:
    memory = [Tensor(array.copy()).realize() for array in arrays]
    written = adamw(memory, Tensor(np.array(SCALARS, arrays[0].dtype)), SEGMENTS, (0.9, 0.95), 1e-3)
    Tensor.realize(*written)
    return [t.numpy() for t in memory]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_of_adamw(dtype: type[np.floating]) -> None:
    arrays = given(dtype)
    p, m, v, g = (array.astype(np.float64) for array in arrays)
    scale, rest, lr, correction1, correction2 = SCALARS
    g = g * scale + g * rest
    for start, end, decay in SEGMENTS:
        at = slice(start, end)
        m[at] = 0.9 * m[at] + 0.1 * g[at]
        v[at] = 0.95 * v[at] + 0.05 * g[at] ** 2
        p[at] = p[at] * (1 - lr * decay) - lr * m[at] / correction1 / (np.sqrt(v[at] / correction2) + 1e-3)
    for ours, theirs in zip(found(arrays), (p, m, v, arrays[3]), strict=True):
        eps = float(np.finfo(dtype).eps)
        np.testing.assert_allclose(ours, theirs, rtol=8 * eps, atol=4 * eps)


def test_parts_are_the_whole_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_adamw, "LEAST", 64)
    arrays, results = given(np.float32), []
    monkeypatch.setattr(cpu_adamw, "PIECE", 192)  # of which 2560 elements are no whole number
    for cores in (1, 2, 3, 64):
        with Context(NUM_CPU_THREADS=cores):
            results.append([*found(arrays), squares(Tensor(arrays[0])).numpy()])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    pieces = [np.square(piece.astype(np.float64)).sum() for piece in np.split(arrays[0], range(192, SIZE, 192))]
    np.testing.assert_allclose(results[0][-1], pieces, rtol=1e-7)


def test_squares_stay_exact() -> None:
    """Of 2^17 equal elements, which one running sum in float32 would have wrong."""
    sums = squares(Tensor(np.full(1 << 17, 0.1, np.float32))).numpy()
    np.testing.assert_allclose(sums, [2**16 * np.float64(np.float32(0.1)) ** 2] * 2, rtol=1e-7)
