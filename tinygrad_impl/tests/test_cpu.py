"""The CPU device's parts at once, and its GEMM."""

from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.helpers import Context
from tinygrad.schedule import schedule_cache

from tinygrad_impl.cpu import column_sums, gemm, head, kernel

pytestmark = pytest.mark.tuned

RANDOM = np.random.default_rng(0)


def given(layout: str, M: int, N: int, K: int, dtype: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
    """Random a and b as `gemm` takes them."""
    a, b = RANDOM.standard_normal((M, K)).astype(dtype), RANDOM.standard_normal((K, N)).astype(dtype)
    return (a.T if layout[0] == "T" else a).copy(), (b.T if layout[1] == "T" else b).copy()


def exact(layout: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a.T if layout[0] == "T" else a) @ (b.T if layout[1] == "T" else b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["NN", "NT", "TN"])
# one number, less than a tile, full tiles, and more than a tile, a block of rows and a block of products, in parts of
# rows and of columns, each of which ends within a tile
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (5, 7, 3), (12, 64, 128), (265, 131, 300), (131, 265, 129)])
def test_gemm(M: int, N: int, K: int, layout: str, dtype: type[np.floating]) -> None:
    a, b = given(layout, M, N, K, dtype)
    c = gemm(Tensor(a), Tensor(b), layout).numpy()
    assert c.dtype == dtype
    np.testing.assert_allclose(c, exact(layout, a, b), rtol=0, atol=40 * np.sqrt(K) * np.finfo(dtype).eps)


@pytest.mark.parametrize("layout", ["NN", "NT"])
def test_gradients_of_a_gemm(layout: str) -> None:
    a, b = given(layout, 70, 65, 9, np.float64)
    above = RANDOM.standard_normal((70, 65))
    x, y = Tensor(a), Tensor(b)
    of_a, of_b = gemm(x, y, layout).gradient(x, y, gradient=Tensor(above))
    np.testing.assert_allclose(of_a.numpy(), above @ (b if layout == "NT" else b.T), rtol=0, atol=1e-12)
    np.testing.assert_allclose(of_b.numpy(), above.T @ a if layout == "NT" else a.T @ above, rtol=0, atol=1e-12)


def test_the_same_product_is_planned_once() -> None:
    """With its gradient, which tinygrad knows by the function that gives it."""
    planned = list[int]()
    for _ in range(3):
        x, y = (Tensor(array) for array in given("NN", 5, 6, 7, np.float64))
        of_x = (gemm(x, y) * 3).gradient(x, gradient=Tensor(np.ones((5, 6))))[0]
        (gemm(x, y) * 3).realize(of_x)
        planned.append(len(schedule_cache))
    assert planned[1] == planned[2]


@pytest.mark.parametrize(("M", "N", "cores"), [(10, 70, 1), (300, 70, 2), (70, 300, 2)])
def test_head_and_its_gradients(M: int, N: int, cores: int) -> None:
    """Columns of -inf, whose gradients are not read; in one part, and in parts of rows and of columns."""
    x, table = given("NT", M, N, 40, np.float64)
    above = RANDOM.standard_normal((M, N + 9))
    above[:, N:] = np.nan
    a, b = Tensor(x), Tensor(table)
    with Context(NUM_CPU_THREADS=cores):
        logits = head(a, b, N + 9)
        of_a, of_b = (t.numpy() for t in logits.gradient(a, b, gradient=Tensor(above)))
        found = logits.numpy()
    np.testing.assert_allclose(found[:, :N], x @ table.T, rtol=0, atol=1e-12)
    assert (found[:, N:] == -np.inf).all()
    np.testing.assert_allclose(of_a, above[:, :N] @ table, rtol=0, atol=1e-12)
    np.testing.assert_allclose(of_b, above[:, :N].T @ x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("R", "M"), [(1, 1), (150, 200), (5000, 130)])
def test_sums_of_columns(R: int, M: int) -> None:
    x = RANDOM.standard_normal((R, M)).astype(np.float32)
    results = []
    for cores in (1, 3):
        with Context(NUM_CPU_THREADS=cores):
            results.append(column_sums(Tensor(x)).numpy())
    np.testing.assert_array_equal(results[0], results[1])
    atol = 16 * np.sqrt(R) * np.finfo(np.float32).eps
    np.testing.assert_allclose(results[0], x.astype(np.float64).sum(0), rtol=0, atol=atol)


def test_sums_of_columns_stay_exact() -> None:
    """Of 50,000 equal rows, which one running sum would have wrong by 6e-4."""
    x = np.full((50_000, 1), 0.1, np.float32)
    assert column_sums(Tensor(x)).item() == pytest.approx(50_000 * float(x[0, 0]), rel=1e-5)


@pytest.mark.parametrize(("M", "N"), [(200, 64), (64, 200)])  # parts of rows, and of columns
def test_parts_are_the_whole_bit_for_bit(M: int, N: int) -> None:
    a, b = map(Tensor, given("NN", M, N, 300, np.float32))
    results = []
    for cores in (1, 2, 3, 64):
        gemm(a * np.nan, b).numpy()  # what is not written is not right by chance: memory is used again
        with Context(NUM_CPU_THREADS=cores):
            results.append(gemm(a, b).numpy())
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def parameters(layout: str, M: int, N: int, K: int, cores: int) -> tuple[Any, int, str]:
    """What tinygrad is told of a GEMM: estimates, parts, and the part of the source that says the sizes."""
    a, b = given(layout, M, N, K, np.float64)
    with Context(NUM_CPU_THREADS=cores):
        program = kernel(layout, *(Tensor(array).uop for array in (np.zeros((M, N)), a, b)))
    info, [sink, _, source] = program.arg, program.src
    return sink.arg.estimates, info.global_size[0], source.arg


def test_sizes_parts_and_estimates() -> None:
    """Parts of at least 2^18 operations, of whole tiles (6 rows, 64 columns) of the longer side, as many as cores."""
    for (M, N, K), cores, part, parts in (
        ((200, 64, 300), 1, 204, 1),
        ((200, 64, 300), 2, 102, 2),
        ((200, 64, 300), 3, 72, 3),
        ((64, 200, 300), 3, 128, 2),
        ((64, 200, 300), 64, 64, 4),
        ((200, 64, 10), 64, 204, 1),  # 256,000 operations
        ((256, 64, 16), 64, 132, 2),  # 2 x 2^18
        ((64, 64, 100), 2, 64, 1),
        ((65, 64, 100), 2, 36, 2),
    ):
        estimates, count, source = parameters("NN", M, N, K, cores)
        assert (count, f"#define PART {part}L\n" in source) == (parts, True), (M, N, K, cores, source[:200])
        assert estimates.ops == 2 * M * N * K
        assert estimates.mem == estimates.lds == 8 * (M * N + M * K + K * N)
    strides = {"NN": (7, 1, 5, 1), "NT": (7, 1, 1, 7), "TN": (1, 3, 5, 1)}  # of (3, 5) and seven products
    for layout, (AM, AK, BK, BN) in strides.items():
        _, _, source = parameters(layout, 3, 5, 7, 2)
        for name, value in {"M": 3, "N": 5, "K": 7, "AM": AM, "AK": AK, "BK": BK, "BN": BN}.items():
            assert f"#define {name} {value}L\n" in source
        assert "#define T double\n" in source


def test_long_sums_stay_exact() -> None:
    """Of 50,000 equal products, which one running sum would have wrong by 6e-4."""
    a, b = np.full((1, 50_000), 0.1, np.float32), np.full((50_000, 1), 0.3, np.float32)
    found = gemm(Tensor(a), Tensor(b)).item()
    assert found == pytest.approx(50_000 * float(a[0, 0]) * float(b[0, 0]), rel=1e-6)
