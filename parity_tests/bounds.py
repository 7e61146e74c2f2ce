"""How far off the port may be: the error of every tensor over several batches, and the bound that it is judged by.

The float64 reference is torch_ref in float64. tinygrad in float64 has to agree with it to rounding (`EXACT`). In
float32, and with bfloat16 matmuls, tinygrad's error may be at most a small multiple (`MULTIPLE`) of PyTorch's own error
in that dtype: no tolerance is set by hand.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.checkpoints.config import GPT2Config, parameter_shapes

MULTIPLE = {"float32": 2.0, "bfloat16": 1.5}
EXACT = {"forward": 1e-13, "backward": 1e-13, "gradient": 1e-13, "training": 1e-12, "generation": 1e-13}
FEW = 128  # numbers, over all batches. The logarithm of the ratio of two RMS errors of n has a spread of about n^-1/2
ROUNDING = 2.0**-24  # of float32, in which results are stored: relative, half a unit in the last place
NEAR_MISS = 8.0  # an error up to this multiple of its bound may be chance: more batches decide
KEYS = " (keys)"  # ends the name of the row that has the key third of a bias of attn.c_attn

ONE_NUMBER = "one number: its error may be small by chance"
NUDGED = "PyTorch ends up this far off too if its weights are changed in their last place"
AS_FLOAT32 = "tokens are drawn from logits that were rounded to float32"

Excuse = tuple[float, str]  # an error that a tensor may have however small PyTorch's own is, and the reason
Tensors = Mapping[str, Any]  # by name, of numpy or torch


@dataclass
class Row:
    """One tensor's verdict. `error` and `own` are ‖difference from the float64 reference‖ / ‖float64 reference‖."""

    check: str  # forward, backward, gradient, training or generation
    name: str
    error: float
    worst: float  # the largest difference of an element, over the reference's RMS
    cosine: float
    own: float | None  # PyTorch's error in the same dtype; None in float64, where PyTorch is the reference
    allowed: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        # NaN is not passed, nor is anything where PyTorch's own error is infinite
        return bool(self.error <= self.allowed < math.inf)

    @property
    def ratio(self) -> float | None:
        return self.error / self.own if self.own else None


@dataclass
class Tally:
    """The errors of one tensor, as sums of squares over batches."""

    reference: float = 0.0
    port: float = 0.0
    error: float = 0.0
    own: float = 0.0
    dot: float = 0.0
    worst: float = 0.0
    numbers: int = 0

    def add(
        self, reference: torch.Tensor, port: torch.Tensor, own: Sequence[torch.Tensor], scale: torch.Tensor
    ) -> None:
        """Tensors of one shape; `own` has PyTorch's as often as it was computed, of which the mean square counts.
        Errors are relative to the norm of `scale`.
        """
        square = float(scale.square().sum())
        self.numbers += reference.numel()
        difference = port - reference
        self.reference += square
        self.port += float(port.square().sum())
        self.dot += float((port * reference).sum())
        self.error += float(difference.square().sum())
        self.own += float(np.mean([float((draw - reference).square().sum()) for draw in own]))
        if square:
            self.worst = max(self.worst, float(difference.abs().max()) / math.sqrt(square / scale.numel()))

    def relative(self, square: float) -> float:
        return math.sqrt(square / self.reference) if self.reference else math.inf if square else 0.0

    def row(self, check: str, name: str, dtype: str, excuse: Excuse | None, nudged: bool) -> Row:
        """Judged by the strictest bound that holds: PyTorch's own error first, then what excuses a larger one.

        `nudged`: PyTorch's own error is that of weights changed in their last place (`parity_tests.setting.nudged`).
        """
        own, keys = self.relative(self.own), name.endswith(KEYS)
        both = math.sqrt(self.reference * self.port)
        error = self.relative(self.error)
        figures = (error, self.worst, self.dot / both if both and not keys else 1.0)
        if not self.numbers:
            return Row(check, name, math.inf, math.inf, 0.0, None, 0.0, "there is nothing to compare")
        if dtype == "float64":
            if 2 * own <= EXACT[check]:
                return Row(check, name, *figures, None, EXACT[check])
            reason = "the exact value is known: these should not move at all" if keys else NUDGED
            reason = AS_FLOAT32 if check == "generation" else reason
            return Row(check, name, *figures, own, 2 * own, reason)
        rounding = (ROUNDING, "no float32 is nearer than its rounding")
        if name.startswith("exp_avg_sq."):  # squares the factor by which clipping scales all gradients, rounded
            rounding = (2 * ROUNDING, "no float32 is nearer than its rounding, here a squared one")
        excuses = [rounding, *([excuse] if excuse else [])]
        if self.numbers < FEW and name not in ("loss", "norm"):  # these two come with a more precise excuse
            factor = math.exp(5 / math.sqrt(self.numbers))
            why = f"only {self.numbers} numbers: their error may be small by chance"
            excuses.append((factor * max(own, ROUNDING), why))
        taken, reason = own, NUDGED if nudged else ""
        for least, why in excuses:
            if error > MULTIPLE[dtype] * taken and least > taken:
                taken, reason = least, why
        return Row(check, name, *figures, own, MULTIPLE[dtype] * taken, reason)


class Comparison:
    """A tally for every tensor, over batches of (float64 reference, tinygrad, PyTorch in tinygrad's dtype).

    The key third of attn.c_attn.bias has a tally of its own: softmax does not change when a constant is added to every
    key, so the gradient of that third is exactly zero, and training leaves it as it is in `start`. What is computed
    there is rounding noise, which has to be small on the scale of the other two thirds.
    """

    def __init__(self, check: str, dtype: str, start: Tensors | None = None, nudged: bool = False):
        self.check, self.dtype, self.nudged = check, dtype, nudged
        begin = {name: value for name, value in (start or {}).items() if name.endswith("attn.c_attn.bias")}
        self.start = {name: torch.as_tensor(value).clone() for name, value in begin.items()}
        self.tallies: dict[str, Tally] = {}
        self.mismatched: list[Row] = []

    def add(self, reference: Tensors, port: Tensors, *own: Tensors) -> None:
        """A batch's tensors. Several of `own` are from as many nudged weights."""
        for name in [*reference, *port]:
            if (name in reference) != (name in port):
                self.mismatch(name, "only one of the two has it")
        if self.mismatched:
            return
        for name in reference:
            b = torch.as_tensor(reference[name]).double()
            # to the device first: widening there is faster than moving the wider numbers
            a, *draws = (torch.as_tensor(tensors[name]).to(b.device).to(b) for tensors in (port, *own))
            if a.shape != b.shape:
                self.mismatch(name, f"{tuple(a.shape)}, not {tuple(b.shape)}")
                continue
            if not name.endswith("attn.c_attn.bias"):
                self.tallies.setdefault(name, Tally()).add(b, a, draws, b)
                continue
            others = [torch.cat([q, v]) for q, _, v in (t.chunk(3) for t in (b, a, *draws))]
            self.tallies.setdefault(name, Tally()).add(others[0], others[1], others[2:], others[0])
            unmoved = torch.zeros_like(b.chunk(3)[1])
            if name in self.start:
                unmoved = self.start[name].to(b).chunk(3)[1]
            keys = [t.chunk(3)[1] for t in (a, *draws)]
            self.tallies.setdefault(name + KEYS, Tally()).add(unmoved, keys[0], keys[1:], others[0] / math.sqrt(2))

    def mismatch(self, name: str, reason: str) -> None:
        self.mismatched.append(Row(self.check, name, math.inf, math.inf, 0.0, None, 0.0, reason))

    def rows(self, excuses: Mapping[str, Excuse] | None = None) -> list[Row]:
        """The verdicts. `excuses`: of tensors by name, beside those that every tensor has."""
        if self.mismatched:
            return self.mismatched
        # A norm's relative error is at most that of the vector: here the gradient, of which exp_avg is made.
        moments = [tally.relative(tally.own) for name, tally in self.tallies.items() if name.startswith("exp_avg.")]
        known = {"norm": (max(moments, default=0.0), ONE_NUMBER)} | dict(excuses or {})
        return [t.row(self.check, n, self.dtype, known.get(n), self.nudged) for n, t in self.tallies.items()]


def judge(
    check: str,
    dtype: str,
    batches: Iterable[tuple[Tensors, Tensors, Tensors]],
    excuses: Mapping[str, Excuse] | None = None,
    start: Tensors | None = None,
) -> list[Row]:
    """A row for every tensor of a `Comparison` over the batches of (float64 reference, tinygrad, PyTorch)."""
    comparison = Comparison(check, dtype, start)
    for three in batches:
        comparison.add(*three)
    return comparison.rows(excuses)


def summation_excuses(config: GPT2Config, rows: int) -> dict[str, Excuse]:
    """The excuse of biases and gains, whose gradients are plain sums over B * T rows.

    PyTorch adds them pairwise, another graph may add them one after the other. Then n numbers of random signs carry a
    relative error of ROUNDING * sqrt(n / 6) in float32: each partial sum is rounded, by ROUNDING / sqrt(3) of itself,
    and the k-th is sqrt(k) numbers large (Higham, Accuracy and Stability of Numerical Algorithms, 4.2, with errors that
    are random).
    """
    excuse = ROUNDING * math.sqrt(rows / 6), f"a sum of {rows} rows, one after the other"
    return {name: excuse for name, shape in parameter_shapes(config).items() if len(shape) == 1}


def excess(row: Row) -> float:
    """error / allowed, where an error of NaN, or any with nothing allowed, counts as infinite."""
    if row.error == 0:
        return 0.0
    ratio = row.error / row.allowed if row.allowed else math.inf
    return math.inf if math.isnan(ratio) else ratio


def worst(rows: Sequence[Row]) -> Row:
    """The row that comes nearest to its bound, or is furthest over it."""
    return max(rows, key=excess)


def near_miss(failed: Sequence[Row], dtype: str) -> bool:
    """Whether all of these may have failed by chance, so that more batches should decide.

    Not single steps of AdamW, which are what is compared but in float64: they are rounded number by number.
    """
    single = dtype != "float64"
    return all(excess(row) <= NEAR_MISS and not (single and row.check == "training") for row in failed)
