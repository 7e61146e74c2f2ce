"""Causal attention on tinygrad's CPU device, and its gradients: kernels in C (attention.c).

In the comments B is the batch, H the number of heads, T the sequence length, D the width of a head.
"""

from tinygrad import Tensor
from tinygrad.helpers import NUM_CPU_THREADS, round_up
from tinygrad.uop.ops import UOp

from tinygrad_impl.cpu import OPERATIONS, c_kernel

HIGH, BLOCK, LINE = 6, 96, 64  # attention.c's tile and block, in rows, and a cache line, in bytes


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q @ k.T / sqrt(D)) @ v of what a token sees, which is itself and those before: (B, H, T, D), as q, k and
    v are, all in float32 or all in float64.
    """
    y = Tensor.invalids(*q.shape, dtype=q.dtype, device=q.device)
    return y.custom_kernel(_memory(q), q, k, v, fxn=_forward, grad_fxn=_gradient)[0]


def _gradient(gradient: UOp, call: UOp) -> tuple[UOp | None, ...]:
    """gradient (B, H, T, D) -> those of q, k and v."""
    dy, q, k, v = map(Tensor, (gradient, *call.src[3:]))
    outs = [Tensor.invalids(*q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
    found = outs[0].custom_kernel(*outs[1:], _memory(q), q, k, v, dy.contiguous(), fxn=_backward)
    return None, None, *(t.uop for t in found[:3])


def _memory(q: Tensor) -> Tensor:
    """What each part works in: (parts, elements)."""
    _, _, T, D = q.shape
    line = LINE // q.dtype.itemsize
    width, height, across = round_up(T + HIGH, line) + line, round_up(T, HIGH), round_up(D, line)
    size = 2 * (D + BLOCK) * width + (4 * height + 2 * BLOCK + HIGH) * across  # attention.c checks this
    return Tensor.invalids(_parts(q.uop), round_up(size, line), dtype=q.dtype, device=q.device)


def _operations(q: UOp, products: int) -> int:
    """Of so many products of every token with those that it sees."""
    B, H, T, D = q.shape
    return int(products * B * H * T * (T + 1) * D)


def _parts(q: UOp) -> int:
    B, H = q.shape[:2]
    return int(max(1, min(NUM_CPU_THREADS.value, B * H, _operations(q, 2) // OPERATIONS)))


def _forward(*buffers: UOp) -> UOp:
    return _kernel("attention", buffers, outs=2, products=2)


def _backward(*buffers: UOp) -> UOp:
    return _kernel("attention_backward", buffers, outs=4, products=5)


def _kernel(name: str, buffers: tuple[UOp, ...], outs: int, products: int) -> UOp:
    """attention.c for what it writes, the last of which is memory, and what it reads."""
    q, (parts, memory) = buffers[outs], buffers[outs - 1].shape
    B, H, T, D = q.shape
    sizes = {"UNITS": B * H, "S": T, "D": D, "PARTS": parts, "MEMORY": memory, "BACKWARD": int(outs > 2)}
    return c_kernel("attention.c", f"{name}_{B * H}_{T}_{D}", sizes, buffers, outs, parts, _operations(q, products))
