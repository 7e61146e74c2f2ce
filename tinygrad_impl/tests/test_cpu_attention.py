"""Causal attention in C, and its gradients."""

import numpy as np
import pytest
import torch
from tinygrad import Tensor, dtypes
from tinygrad.helpers import Context
from tinygrad.uop.ops import Ops

from tinygrad_impl.cpu_attention import attention
from tinygrad_impl.formulas import attention as formula

RANDOM = np.random.default_rng(0)


def given(B: int, H: int, T: int, D: int, dtype: type[np.floating]) -> list[np.ndarray]:
    """Random q, k, v and gradient, with scores that are far apart."""
    return [(2 * RANDOM.standard_normal((B, H, T, D))).astype(dtype) for _ in range(4)]


def found(q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
    """The result, and the gradients of q, k and v."""
    sources = [Tensor(array) for array in (q, k, v)]
    y = attention(*sources)
    return [t.numpy() for t in (y, *y.gradient(*sources, gradient=Tensor(dy)))]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
# one token; less than a tile; heads that are no whole vector; more than a tile, a vector, a block of queries and a sum
@pytest.mark.parametrize(("B", "H", "T", "D"), [(1, 2, 1, 3), (2, 3, 5, 7), (1, 2, 50, 64), (1, 2, 131, 20)])
def test_attention_and_its_gradients(B: int, H: int, T: int, D: int, dtype: type[np.floating]) -> None:
    q, k, v, dy = given(B, H, T, D, dtype)
    exact = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(exact[0], exact[1], exact[2], is_causal=True)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    expected = [y.detach().numpy(), *(t.grad.numpy() for t in exact if t.grad is not None)]
    for ours, theirs in zip(found(q, k, v, dy), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=40 * np.finfo(dtype).eps * np.abs(theirs).max())


def test_heads_have_the_same_bits_on_any_number_of_threads() -> None:
    arrays, results = given(2, 5, 70, 16, np.float32), []
    for cores in (1, 2, 3, 64):
        with Context(NUM_CPU_THREADS=cores):
            results.append(found(arrays[0], arrays[1], arrays[2], arrays[3]))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_scores_that_overflow_exp() -> None:
    """Of softmax, only differences count; and what a token does not see, however large, has no part in it."""
    q, k, v, _ = given(1, 1, 40, 8, np.float32)
    k[..., -1, :] = 1e4
    ours = attention(Tensor(q * 50), Tensor(k * 50), Tensor(v)).numpy()
    exact = [torch.tensor(array) for array in (q * 50, k * 50, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(exact[0], exact[1], exact[2], is_causal=True)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


def test_nan_stays() -> None:
    q, k, v, _ = given(1, 1, 10, 8, np.float32)
    k[0, 0, 4, 2] = np.nan
    ours = attention(Tensor(q), Tensor(k), Tensor(v)).numpy()
    assert np.isfinite(ours[:, :, :4]).all()
    assert np.isnan(ours[:, :, 4:]).all()


def test_what_is_in_c() -> None:
    """Causal attention in float32 and float64; all else are tinygrad's kernels."""
    q = Tensor.empty(1, 2, 8, 4)
    mask = Tensor.ones(1, 1, 8, 8, dtype=dtypes.bool)

    def in_c(y: Tensor) -> bool:
        calls = [uop.src[0].arg for uop in y.uop.toposort() if uop.op is Ops.CALL]
        return any(getattr(info, "name", "").startswith("attention_") for info in calls)

    assert in_c(formula(q, q, q, is_causal=True))
    assert in_c(formula(q.double(), q.double(), q.double(), is_causal=True))
    assert not in_c(formula(q, q, q, is_causal=True, dtype=dtypes.bfloat16))
    assert not in_c(formula(q, q, q, attn_mask=mask))
