"""The loss of bfloat16 logits, and their gradient in their place: float32 ones are never stored.

loss = logsumexp(row) - row[target], and its gradient softmax(row) - onehot(target), all in float32.
"""

import triton
import triton.language as tl

from tinygrad_impl.kernels.launch import Launch


@triton.jit
def cross_entropy_kernel(loss, logits, target, scale, V: tl.constexpr, STRIDE: tl.constexpr, IGNORED: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """A program has a row."""
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * STRIDE
    label = tl.load(target + r)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):  # a running logsumexp in each lane
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        lowest = tl.where(higher == float("-inf"), 0.0, higher)  # a lane that has seen nothing yet
        summed = summed * tl.exp(largest - lowest) + tl.exp(x - lowest)
        largest = higher
    top = tl.max(largest, 0)
    lse = top + tl.log(tl.sum(summed * tl.exp(largest - top), 0))
    scored = label != IGNORED
    chosen = tl.load(row + tl.where(scored, label, 0)).to(tl.float32)
    tl.store(loss + r, tl.where(scored, lse - chosen, 0.0))
    factor = tl.where(scored, tl.load(scale), 0.0)
    tl.debug_barrier()  # `chosen` is read before another thread writes there
    for start in range(0, STRIDE, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(x - lse) - tl.where(v == label, 1.0, 0.0)) * factor
        tl.store(row + v, gradient.to(logits.dtype.element_ty), mask=v < STRIDE)


def forward(R: int, V: int, stride: int, ignored: int, block: int = 4096, warps: int = 16) -> Launch:
    """loss float32 (R,), and in the place of logits bfloat16 (R, stride) their gradient <- target int32 (R,), scale (1,).

    V of a row's columns are logits; the others become 0. The loss and gradient of a target `ignored` are 0, the
    gradients of the others are multiplied by `scale`.
    """
    constants = {"V": V, "STRIDE": stride, "IGNORED": ignored, "BLOCK": block}
    return Launch(cross_entropy_kernel, (R,), constants, warps, bytes=4 * R * stride)
