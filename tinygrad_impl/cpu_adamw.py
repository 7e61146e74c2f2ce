"""AdamW on tinygrad's CPU device, and the gradient's norm: kernels in C (adamw.c), of many parameters at once."""

from collections.abc import Sequence
from functools import partial

from tinygrad import Tensor
from tinygrad.helpers import NUM_CPU_THREADS, ceildiv, round_up
from tinygrad.uop.ops import UOp

from tinygrad_impl.cpu import c_kernel

PIECE = 1 << 16  # elements whose squares are one sum
LEAST = 1 << 15  # elements of a part: fewer are done before another thread has begun
ALIGNED = 64  # elements that what a part computes begins at a multiple of


def adamw(
    memory: Sequence[Tensor],
    scalars: Tensor,
    segments: Sequence[tuple[int, int, float]],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """One step of AdamW, in place. Returns the first three of `memory`, which are the parameters, both moments and the
    gradients, all (elements,).

    scalars (5,): the gradients' factor and the rest of it, that its rounding lost; the learning rate; 1 - beta1^t;
    1 - beta2^t. `segments` are where parameters begin and end, with their weight decay.
    """
    return memory[0].custom_kernel(*memory[1:], scalars, fxn=partial(_adamw, tuple(segments), betas, eps))[:3]


def _adamw(segments: tuple[tuple[int, int, float], ...], betas: tuple[float, float], eps: float, *buffers: UOp) -> UOp:
    size = int(buffers[0].numel())
    listed = ", ".join(f"{{{start}, {end}, {decay!r}}}" for start, end, decay in segments)
    words: dict[str, str | int] = {
        "SEGMENTS": f"{{{listed}}}",
        "BETA1": repr(betas[0]),
        "BETA2": repr(betas[1]),
        "EPS": repr(eps),
    }
    parts, part = _parts(size, ALIGNED)
    words |= {"SIZE": size, "PART": part}
    return c_kernel("adamw.c", f"adamw_{size}", words, buffers, outs=3, parts=parts, operations=12 * size)


def squares(gradients: Tensor) -> Tensor:
    """gradients (elements,), a multiple of 64 -> the sums of the squares of its pieces: (pieces,)."""
    sums = Tensor.invalids(ceildiv(int(gradients.numel()), PIECE), dtype=gradients.dtype, device=gradients.device)
    return sums.custom_kernel(gradients, fxn=_squares)[0]


def _squares(sums: UOp, gradients: UOp) -> UOp:
    size = int(gradients.numel())
    parts, part = _parts(size, PIECE)
    words = {"SIZE": size, "PART": part, "PIECE": PIECE}
    return c_kernel("adamw.c", f"squares_{size}", words, (sums, gradients), outs=1, parts=parts, operations=2 * size)


def _parts(size: int, unit: int) -> tuple[int, int]:
    """How many parts there are, and how many elements each has: whole units."""
    part = round_up(ceildiv(size, max(1, min(NUM_CPU_THREADS.value, size // LEAST))), unit)
    return ceildiv(size, part), part
