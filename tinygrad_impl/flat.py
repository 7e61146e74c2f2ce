"""One buffer for what belongs together: of the gradients, of each moment, of the weights, of their bfloat16 copies.

What is of all parameters (AdamW, the norm, averaging over GPUs) is then of ranges of a few buffers (as in llm.c), and a
parameter's tensor is one of these ranges.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from tinygrad import Tensor
from tinygrad.dtype import DType
from tinygrad.helpers import round_up

from tinygrad_impl.internals import part_of

ALIGNED = 64  # elements that each range begins at a multiple of, for vectors and for the GPU's copy engine


class Flat(Mapping[str, Tensor]):
    """Zeros of these shapes, by a parameter's name, in the order of `shapes`; in memory in the opposite order, which is
    that in which the backward pass finishes their gradients.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: DType, device: str | None = None):
        self.starts: dict[str, int] = {}
        end = 0
        for name in reversed(list(shapes)):
            self.starts[name] = end
            end += round_up(math.prod(shapes[name]), ALIGNED)
        self.memory = Tensor.zeros(end, dtype=dtype, device=device).contiguous().realize()
        self.tensors = {
            name: part_of(self.memory, self.starts[name], math.prod(shape)).reshape(shape)
            for name, shape in shapes.items()
        }
        self._ranges: dict[tuple[str, ...], Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def range(self, names: Sequence[str]) -> Tensor:
        """The memory (elements,) of neighbours, named in the order in which they are in memory."""
        key = tuple(names)
        if key not in self._ranges:
            start = self.starts[names[0]]
            size = self.starts[names[-1]] + self[names[-1]].numel() - start
            self._ranges[key] = part_of(self.memory, start, int(size))
        return self._ranges[key]
