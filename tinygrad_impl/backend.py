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
from tinygrad_impl import formulas, functional
from tinygrad_impl.cached_model import CachedModel, Decoder
from tinygrad_impl.flat import Flat
from tinygrad_impl.kernels import gpu_of, obstacle, overlap
from tinygrad_impl.model import GPT2

if TYPE_CHECKING:
    from tinygrad_impl.kernels.fused import Fused

CHOICES = ("auto", "fused", "plain")
GEMMS = ("linear", "attention", "lm_head")  # whose formulas take the dtype that they run in

State = tuple[Flat, Flat, Flat, Flat]  # parameters, exp_avg, exp_avg_sq, gradients


class Backend(Protocol):
    """Computes the nodes of `functional` in a graph, and what training does to all parameters at once.

    `name` is what --kernels calls it; GEMMs run in `dtype`, None being the parameters' own. Whatever the dtype,
    parameters, gradients, moments, the residual stream, layer norm, softmax and the loss keep the parameters'.
    """

    name: str
    dtype: DType | None

    def bind(self, parameters: Mapping[str, Tensor]) -> Backend:
        """This backend with what it keeps of a model's parameters (copies in bfloat16), up to date."""

    def refresh(self) -> None:
        """Brings what is kept of the parameters up to date, after they were written from outside."""

    def lower(self, *tensors: Tensor, loss_of: GPT2Config | None = None) -> list[Tensor]:
        """The tensors, with all nodes of their graphs computed. With `loss_of` it is the loss of such a model."""

    def gradient(self, out: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of a lowered scalar by these tensors, of their shapes and dtypes."""

    def write(self, totals: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Computes the values into the memory of the totals."""

    def squares(self, gradients: Flat) -> list[Tensor]:
        """Sums of squares of parts of the gradients, some hundreds of them, realized."""

    def adamw(
        self,
        state: State,
        scalars: Tensor,
        decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """One step of AdamW, in place, on (parameters, exp_avg, exp_avg_sq, gradients), and on what is kept.

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

    def bind(self, parameters: Mapping[str, Tensor]) -> Plain:
        return self

    def refresh(self) -> None:
        pass

    def lower(self, *tensors: Tensor, loss_of: GPT2Config | None = None) -> list[Tensor]:
        return functional.lower(tensors, self._compute)

    def _compute(self, name: str, sources: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
        more = {"dtype": self.dtype} if name in GEMMS else {}
        return [getattr(formulas, name)(*sources, **settings, **more)]

    def gradient(self, out: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        return out.gradient(*targets)

    def write(self, totals: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        Tensor.realize(*(total.assign(value) for total, value in zip(totals, values, strict=True)))

    def squares(self, gradients: Flat) -> list[Tensor]:
        return [formulas.partial_sums(g.square().flatten(), 256).realize() for g in gradients.values()]

    def adamw(
        self,
        state: State,
        scalars: Tensor,
        decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        parameters, exp_avg, exp_avg_sq, gradients = state
        scale, rest, lr, correction1, correction2 = (scalars[i] for i in range(5))
        beta1, beta2 = betas
        # Realised piece by piece, because tinygrad plans many small graphs, mostly alike, sooner than one large graph.
        for name, p in parameters.items():
            total, m, v = gradients[name], exp_avg[name], exp_avg_sq[name]
            g = total * scale + total * rest
            m.assign(beta1 * m + (1 - beta1) * g)
            v.assign(beta2 * v + (1 - beta2) * g * g)
            p.assign(p * (1 - lr * decays[name]) - (lr / correction1) * m / ((v / correction2).sqrt() + eps))
            Tensor.realize(m, v, p)

    def decoder(self, model: GPT2, N: int, chunk: int, V: int) -> Decoder:
        return CachedModel(model, self, N, V)


def choose(wanted: str, config: GPT2Config, device: str, bfloat16: bool) -> Backend:
    """The backend for a model on a device, with GEMMs in bfloat16 or in float32: "fused", "plain", or "auto".

    "auto" is fused where it can be, and says why where an NVIDIA GPU cannot. Raises `InputError` where "fused" is
    wanted and cannot be.
    """
    plain = Plain(dtypes.bfloat16 if bfloat16 else None)
    if wanted == "plain":
        return plain
    reason = obstacle(config, device, bfloat16)
    if reason and wanted == "fused":
        raise InputError(f"--kernels fused cannot be: {reason}; leave it out")
    if reason and device == "CUDA":
        print(f"note: tinygrad's own kernels compute this, which are slower: {reason}", file=sys.stderr)
    return plain if reason else fused(device, strict=wanted == "fused")


def fused(device: str, strict: bool) -> Fused:
    from tinygrad_impl.kernels.fused import Fused  # here, because it imports Triton

    overlap(device)
    return Fused(gpu_of(device), strict)
