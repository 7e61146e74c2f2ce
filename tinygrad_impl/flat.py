"""Flat memory for what belongs together: the gradients, each of AdamW's moments, the weights, their bfloat16 copies.

What is done with all parameters (AdamW, the norm, sending gradients to other GPUs) is then done with a few buckets.
Each lies in one piece (as in llm.c and in PyTorch's DDP), and a parameter's tensor is a range of its bucket.
With several ranks, each of them updates one part of every bucket (ZeRO-1, Rajbhandari et al. 2020).
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor
from tinygrad.dtype import DType
from tinygrad.helpers import round_up

from tinygrad_impl.internals import on_host, part_of

ALIGNED = 64  # elements that each range begins at a multiple of, for vectors and for the GPU's copy engine
LEAST = 1 << 24  # elements of a bucket of layers, but for the last: less is sent at a lower rate
REST = "rest"  # the bucket of all that is not a layer's matrix


@dataclass(frozen=True)
class Segment:
    """What a part of a bucket has of a parameter: `size` elements, from its `first` on; in the part from `start` on."""

    name: str
    first: int
    size: int
    start: int


@dataclass(frozen=True)
class Bucket:
    """Parameters that lie side by side, in the order in which the backward pass finishes their gradients."""

    name: str
    starts: dict[str, int]  # of each parameter, in elements
    sizes: dict[str, int]
    size: int  # with what is between and behind them, which is 0

    def segments(self, rank: int, ranks: int) -> list[Segment]:
        """What is in the rank-th of equal parts of the bucket."""
        size = self.size // ranks
        begin = rank * size
        found = []
        for name, start in self.starts.items():
            first, last = max(start, begin), min(start + self.sizes[name], begin + size)
            if first < last:
                found.append(Segment(name, first - start, last - first, first - begin))
        return found

    def flatten(self, arrays: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
        """The parameters' arrays, as `internals.overwrite` takes them, as they lie in the bucket: (size,)."""
        flat = np.zeros(self.size, dtype)
        for name, start in self.starts.items():
            flat[start : start + self.sizes[name]] = on_host(arrays[name]).reshape(-1)
        return flat


def buckets(shapes: Mapping[str, tuple[int, ...]], ranks: int = 1) -> list[Bucket]:
    """The parameters of these shapes in buckets whose sizes `ranks` divides: the matrices of some layers, from the last
    layer to the first, and then the rest, of which only the embeddings are large and have their gradients last.
    """
    layers: dict[str, list[str]] = {}
    rest = []
    for name in reversed(list(shapes)):  # a layer's gradients come in the opposite of the model's order
        if name.startswith("h.") and len(shapes[name]) == 2:
            layers.setdefault(".".join(name.split(".")[:2]), []).append(name)
        else:
            rest.append(name)
    found, names = [], list[str]()
    for layer, matrices in layers.items():
        names += matrices
        if sum(math.prod(shapes[name]) for name in names) >= LEAST or layer == list(layers)[-1]:
            found.append(_bucket(layer, names, shapes, ranks))
            names = []
    return [*found, _bucket(REST, rest, shapes, ranks)]


def _bucket(name: str, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], ranks: int) -> Bucket:
    sizes = {name: math.prod(shapes[name]) for name in names}
    starts, end = {}, 0
    for parameter, size in sizes.items():
        starts[parameter] = end
        end += round_up(size, ALIGNED)
    return Bucket(name, starts, sizes, round_up(end, ALIGNED * ranks))


def joined_segments(
    segments: Sequence[Segment], decays: Mapping[str, float], copies: Mapping[str, int | None]
) -> tuple[list[int], list[int], list[float], list[int | None]]:
    """The segments' sizes, where in the part they begin, their decays, and where their copies begin (None: without).

    Neighbours that are alike become one: what lies between them is 0 and stays 0.
    """
    sizes, starts, of_decay, of_copy = list[int](), list[int](), list[float](), list[int | None]()
    for s in segments:
        decay, copy = decays[s.name], copies[s.name]
        if starts and of_decay[-1] == decay:
            before = of_copy[-1]
            if copy == (None if before is None else before + s.start - starts[-1]):
                sizes[-1] = s.start + s.size - starts[-1]
                continue
        sizes.append(s.size)
        starts.append(s.start)
        of_decay.append(decay)
        of_copy.append(copy)
    return sizes, starts, of_decay, of_copy


class Flat(Mapping[str, Tensor]):
    """Zeros of these shapes, by a parameter's name, in the order of `shapes`; `memory` has the bytes of each bucket.

    held: the names of buckets that there is memory for. Tensors of others stand for parameters that no kernel reads.
    These buckets are parts of one piece of memory, one after another, so that something else may lie across their
    borders.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: DType,
        device: str | None = None,
        ranks: int = 1,
        held: Collection[str] | None = None,
    ):
        self.buckets = buckets(shapes, ranks)
        in_memory = [bucket for bucket in self.buckets if held is None or bucket.name in held]
        everything, start = zeros(sum(bucket.size for bucket in in_memory), dtype, device), 0
        self.memory: dict[str, Tensor] = {}
        found = dict[str, Tensor]()
        for bucket in self.buckets:
            if bucket in in_memory:
                memory = self.memory[bucket.name] = part_of(everything, start, bucket.size)
                start += bucket.size
                found |= {n: part_of(memory, s, bucket.sizes[n]).reshape(shapes[n]) for n, s in bucket.starts.items()}
            else:
                found |= {name: Tensor.empty(*shapes[name], dtype=dtype, device=device) for name in bucket.starts}
        self.tensors = {name: found[name] for name in shapes}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def zeros(size: int, dtype: DType, device: str | None = None) -> Tensor:
    """A tensor (size,) with memory of its own."""
    return Tensor.zeros(size, dtype=dtype, device=device).contiguous().realize()
