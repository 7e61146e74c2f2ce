"""Who computes: what a trainer, an evaluator and a generator are made with. `choose` picks one for a device."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tinygrad import Tensor
from tinygrad.dtype import DType, dtypes

from data.checkpoints.config import GPT2Config
from data.cli import InputError
from tinygrad_impl import cpu, cpu_adamw, formulas, functional
from tinygrad_impl.cached_model import CachedModel, Decoder
from tinygrad_impl.cpu_decode import CPUDecoder
from tinygrad_impl.flat import Bucket, Segment, joined_segments
from tinygrad_impl.internals import part_of
from tinygrad_impl.kernels import GPU, gpu_of, obstacle, own_graphs
from tinygrad_impl.model import GPT2

if TYPE_CHECKING:
    from tinygrad_impl.kernels.fused import Fused

CHOICES = ("auto", "fused", "plain")
GEMMS = ("linear", "attention", "lm_head")  # whose formulas take the dtype that they run in


@dataclass(frozen=True)
class Part:
    """What one rank updates of a bucket of parameters: all of it, or one of equal parts. Tensors are (elements,)."""

    bucket: Bucket
    segments: Sequence[Segment]  # of parameters
    whole: bool
    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradients: Tensor


class Backend(Protocol):
    """Computes the nodes of `functional` in a graph, and what training does to all parameters at once.

    `name` is what --kernels calls it; GEMMs run in `dtype`, None being the parameters' own. Whatever the dtype,
    parameters, gradients, moments, the residual stream, layer norm, softmax and the loss keep the parameters'.
    """

    name: str
    prompt_tokens: int  # of all prompts together, so many that it pays to add them to a cache at once
    dtype: DType | None

    @property
    def gpu(self) -> GPU | None:
        """What its kernels are compiled for; tinygrad's own are for the device."""

    def bind(self, parameters: Mapping[str, Tensor], ranks: int | None = None) -> Backend:
        """This backend with what it keeps of a model's parameters (copies in bfloat16), up to date.

        Not yet up to date for a trainer, which says how many `ranks` there are and writes the parameters itself.
        """

    def reads(self, bucket: Bucket) -> bool:
        """Whether kernels read these parameters as they are, not only what is kept of them."""

    def kept(self, bucket: Bucket) -> Tensor | None:
        """Of parameters that are not read as they are: the memory (bucket.size,) of what is kept of the bucket."""

    def refresh(self, buckets: bool = True) -> None:
        """Brings what is kept of the parameters up to date, after they were written from outside; without `buckets`
        only that of parameters which kernels read as they are too.
        """

    def round_off(self, parts: Sequence[Part], rank: int) -> None:
        """Brings this rank's part of what is kept up to date, after its parameters were written from outside."""

    def lower(self, *tensors: Tensor, loss_of: GPT2Config | None = None) -> list[Tensor]:
        """The tensors, with all nodes of their graphs computed. With `loss_of` it is the loss of such a model."""

    def gradient(self, out: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of a lowered scalar by these tensors, of their shapes and dtypes."""

    def written(self, totals: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """The totals, in their memory, after the values have been computed into it."""

    def added(self, totals: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """The totals, in their memory, after the values have been added."""

    def squares(self, parts: Sequence[Part]) -> list[Tensor]:
        """Sums of squares of pieces of the gradients, some hundreds of them, realized; on all ranks equally many."""

    def adamw(
        self,
        part: Part,
        rank: int,
        scalars: Tensor,
        decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
    ) -> list[Tensor]:
        """The tensors that one step of AdamW writes, in place: those of the part, which is the rank-th of its bucket,
        and what is kept of it.

        scalars, of the parameters' dtype: the gradients' factor and the rest of it, that its rounding lost; the
        learning rate; 1 - beta1^t; 1 - beta2^t. `decays` has each parameter's weight decay.
        """

    def decoder(self, model: GPT2, N: int, chunk: int, V: int) -> Decoder:
        """For N rows at a time, whose prompts come in chunks of so many tokens, drawing from the first V tokens."""
        ...


@dataclass
class Plain:
    """tinygrad's own kernels compute the formulas."""

    dtype: DType | None = None
    name: str = "plain"
    prompt_tokens: int = 0
    gpu: GPU | None = None

    def bind(self, parameters: Mapping[str, Tensor], ranks: int | None = None) -> Plain:
        return self

    def reads(self, bucket: Bucket) -> bool:
        return True

    def kept(self, bucket: Bucket) -> Tensor | None:
        return None

    def refresh(self, buckets: bool = True) -> None:
        pass

    def round_off(self, parts: Sequence[Part], rank: int) -> None:
        pass

    def lower(self, *tensors: Tensor, loss_of: GPT2Config | None = None) -> list[Tensor]:
        return functional.lower(tensors, self._compute)

    def _compute(self, name: str, sources: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
        more = {"dtype": self.dtype} if name in GEMMS else {}
        return [getattr(formulas, name)(*sources, **settings, **more)]

    def gradient(self, out: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        return out.gradient(*targets)

    def written(self, totals: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        return functional.in_place(totals, values)

    def added(self, totals: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        return [total.assign(total + new) for total, new in zip(totals, values, strict=True)]

    def squares(self, parts: Sequence[Part]) -> list[Tensor]:
        if on_cpu(parts[0]):
            return [cpu_adamw.squares(part.gradients).realize() for part in parts]
        pieces = list[Tensor]()
        for part in parts:  # of equal parts all ranks have equally many sums
            whole = [part_of(part.gradients, s.start, s.size) for s in part.segments]
            pieces += whole if part.whole else [part.gradients]
        return [formulas.partial_sums(g.square(), 256).realize() for g in pieces]

    def adamw(
        self,
        part: Part,
        rank: int,
        scalars: Tensor,
        decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
    ) -> list[Tensor]:
        if on_cpu(part):
            sizes, starts, of_decay, _ = joined_segments(part.segments, decays, dict.fromkeys(decays))
            segments = [
                (first, first + size, decay) for first, size, decay in zip(starts, sizes, of_decay, strict=True)
            ]
            memory = part.parameters, part.exp_avg, part.exp_avg_sq, part.gradients
            return cpu_adamw.adamw(memory, scalars, segments, betas, eps) if segments else [part.parameters]
        scale, rest, lr, correction1, correction2 = (scalars[i] for i in range(5))
        beta1, beta2 = betas
        # Realised piece by piece, because tinygrad plans many small graphs, mostly alike, sooner than one large graph.
        for s in part.segments:
            memory = part.parameters, part.exp_avg, part.exp_avg_sq, part.gradients
            p, m, v, total = (part_of(t, s.start, s.size) for t in memory)
            g = total * scale + total * rest
            m.assign(beta1 * m + (1 - beta1) * g)
            v.assign(beta2 * v + (1 - beta2) * g * g)
            p.assign(p * (1 - lr * decays[s.name]) - (lr / correction1) * m / ((v / correction2).sqrt() + eps))
            Tensor.realize(m, v, p)
        return [part.parameters]

    def decoder(self, model: GPT2, N: int, chunk: int, V: int) -> Decoder:
        weight = model.wte.weight
        if formulas.is_cpu(weight) and self.dtype is None and weight.dtype in cpu.TYPES:
            return CPUDecoder(model, N, V)
        return CachedModel(model, self, N, chunk, V)


def on_cpu(part: Part) -> bool:
    """Whether kernels in C compute what is done with all parameters."""
    return formulas.is_cpu(part.parameters) and part.parameters.dtype in cpu.TYPES


def choose(wanted: str, config: GPT2Config, device: str, bfloat16: bool, arch: str | None = None) -> Backend:
    """The backend for a model on a device, with GEMMs in bfloat16 or in float32: "fused", "plain", or "auto".

    "auto" is fused where it can be, and says why where an NVIDIA GPU cannot. Raises `InputError` where "fused" is
    wanted and cannot be. With `arch` (`gpu_of`) the kernels are compiled and chosen for another architecture than that
    of the GPU at hand, and can only be fused.
    """
    if arch and device != "CUDA":
        raise InputError(f"--arch is of NVIDIA GPUs, and the device is {device}; leave it out")
    if arch and wanted == "plain":
        raise InputError("--arch is of the fused kernels; leave it out, or pass --kernels fused")
    if device == "CUDA":
        own_graphs(device)
    plain = Plain(dtypes.bfloat16 if bfloat16 else None)
    if wanted == "plain":
        return plain
    reason = obstacle(config, device, bfloat16)
    if reason and (wanted == "fused" or arch):
        option = "--kernels fused" if wanted == "fused" else "--arch, which is of the fused kernels,"
        raise InputError(f"{option} cannot be: {reason}; leave it out")
    if reason and device == "CUDA":
        print(f"note: tinygrad's own kernels compute this, which are slower: {reason}", file=sys.stderr)
    return plain if reason else fused(device, strict=wanted == "fused", arch=arch)


def fused(device: str, strict: bool, arch: str | None = None) -> Fused:
    from tinygrad_impl.kernels.fused import Fused  # here, because it imports Triton

    return Fused(gpu_of(device, arch), strict)
