"""Gradients that kernels write where they stay."""

import numpy as np
from tinygrad import Tensor
from tinygrad.helpers import GlobalCounters

from tinygrad_impl import cpu
from tinygrad_impl.flat import zeros
from tinygrad_impl.functional import in_place
from tinygrad_impl.internals import contents

RANDOM = np.random.default_rng(0)


def kernels(*tensors: Tensor) -> int:
    """Realizes the tensors. Returns how many kernels that took."""
    before = GlobalCounters.kernel_count
    Tensor.realize(*tensors)
    return GlobalCounters.kernel_count - before


def test_a_kernel_writes_to_the_total() -> None:
    a, b = (RANDOM.standard_normal((8, 8)).astype(np.float32) for _ in range(2))
    x, y = Tensor(a).realize(), Tensor(b).realize()
    total, other = zeros(64, x.dtype).reshape(8, 8), zeros(64, x.dtype).reshape(8, 8)
    product = cpu.gemm(x, y)
    assert kernels(*in_place([total, other], [product, x + y])) == 2
    np.testing.assert_allclose(contents(total), a @ b, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(contents(other), a + b)


def test_one_kernel_for_two_totals() -> None:
    """It writes to one of them, and that is copied."""
    a = RANDOM.standard_normal((8, 8)).astype(np.float32)
    x = Tensor(a).realize()
    totals = [zeros(64, x.dtype).reshape(8, 8) for _ in range(2)]
    product = cpu.gemm(x, x)
    Tensor.realize(*in_place(totals, [product, product]))
    for total in totals:
        np.testing.assert_allclose(contents(total), a @ a, rtol=0, atol=1e-5)
