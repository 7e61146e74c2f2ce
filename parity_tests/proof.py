"""The proof that two implementations of GPT-2 compute the same thing, and the name of the sub-layer that does not.

Truth is torch_ref in float64. tinygrad in float64 has to agree with it to rounding (`EXACT`). In float32, and with
products in bfloat16, tinygrad's error may be at most a small multiple of torch's own error in that dtype (`MULTIPLE`):
no tolerance is set by hand. Both errors are taken over several batches, because one could be small by luck, and what
fails by little is asked again over more of them, with weights that are `nudged`, before it is called different.
"""

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tinygrad import dtypes

import tinygrad_impl.model
import tinygrad_impl.trainer
import torch_ref.model
import torch_ref.trainer
from data.checkpoints.config import GPT2Config, parameter_count, parameter_shapes, to_hf
from data.cli import Progress
from data.runs.revision import revision
from data.text.loader import IGNORED
from data.text.sampling import Sampler
from data.text.tokenizer import VOCAB_SIZE
from parity_tests import generation
from parity_tests.edges import Flow, edges, flow_in_tinygrad, flow_in_torch
from parity_tests.generation import GENERATED, SAMPLING
from tinygrad_impl.generate import Generator
from tinygrad_impl.trainer import Trainer

MULTIPLE = {"float32": 2.0, "bfloat16": 1.5}
EXACT = {"forward": 1e-13, "backward": 1e-13, "gradient": 1e-13, "training": 1e-12, "generation": 1e-13}
FEW = 128  # numbers, over all batches. The logarithm of the ratio of two RMS errors of n has a spread of about n^-1/2
ROUNDING = 2.0**-24  # of float32, in which results are stored: relative, half a unit in the last place
KEYS = " (keys)"
NUDGES = 8  # of torch's weights in their last place: how well conditioned is what is asked?
ROUNDED = ("ln_1", "ln_2", "ln_f", "c_attn.input", "c_fc.input")  # by the kernels, as torch's products round them
BATCHES = 4
GRAPH_BATCHES = 8  # through the graph that trains, which is quick once it is captured: more to tell luck by
MORE = 4  # times as many batches tell luck from a small difference,
BY_LUCK = 8.0  # where no error is over this multiple of what is allowed
ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "parity_tests", "tinygrad_impl", "torch_ref")
NO_SOURCES = ("tests", "catalogue", "conftest.py", "testing.py")  # nor files named test_*: these compute nothing
ACCUMULATED = (2, 1, 5)  # micro-batches of the steps, in turn
TIES = 0.5  # as many of the draws may be ties: more prove nothing

ONE_NUMBER = "one number: its error can be small by luck"
MOVED = "torch ends up this far off too if its weights are changed in their last place"
AS_FLOAT32 = "tokens are drawn from logits that were rounded to float32"
NOT_FINITE = "nothing may be updated"

Batch = tuple[np.ndarray, np.ndarray]
Excuse = tuple[float, str]  # an error that a tensor may have in a dtype however small torch's own is, and why
Tensors = Mapping[str, Any]  # by name, of numpy or torch
Step = tuple[Sequence[Batch], float, float]  # micro-batches, the reference's learning rate, the port's
AnyTrainer = Trainer | torch_ref.trainer.Trainer
References = tuple[torch_ref.trainer.Trainer, torch_ref.trainer.Trainer]  # in float64, and in the dtype


@dataclass
class Row:
    """One tensor judged. `error` and `own` are norms of the difference from the truth over the norm of the truth."""

    check: str  # forward, backward, gradient, training or generation
    name: str
    error: float
    worst: float  # the largest difference of an element, over the truth's RMS
    cosine: float
    own: float | None  # torch's in the same dtype; None in float64, where torch is the truth
    allowed: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.allowed < math.inf)  # NaN is not, nor is anything next to infinities of torch's

    @property
    def ratio(self) -> float | None:
        return self.error / self.own if self.own else None


@dataclass
class Tally:
    """The errors of one tensor, as sums of squares over batches."""

    truth: float = 0.0
    ours: float = 0.0
    error: float = 0.0
    own: float = 0.0
    product: float = 0.0
    worst: float = 0.0
    numbers: int = 0

    def add(self, truth: torch.Tensor, ours: torch.Tensor, own: Sequence[torch.Tensor], scale: torch.Tensor) -> None:
        """Tensors of one shape, torch's own as often as it was computed; errors are relative to the norm of `scale`."""
        square = float(scale.square().sum())
        self.numbers += truth.numel()
        difference = ours - truth
        self.truth += square
        self.ours += float(ours.square().sum())
        self.product += float((ours * truth).sum())
        self.error += float(difference.square().sum())
        self.own += float(np.mean([float((draw - truth).square().sum()) for draw in own]))
        if square:
            self.worst = max(self.worst, float(difference.abs().max()) / math.sqrt(square / scale.numel()))

    def relative(self, square: float) -> float:
        return math.sqrt(square / self.truth) if self.truth else math.inf if square else 0.0

    def row(self, check: str, name: str, dtype: str, excuse: Excuse | None, moved: bool) -> Row:
        """Judged by the strictest bound that holds: torch's own error first, then what excuses a larger one.

        `moved`: torch's own error is that of weights that were `nudged`.
        """
        own, keys = self.relative(self.own), name.endswith(KEYS)
        both = math.sqrt(self.truth * self.ours)
        error = self.relative(self.error)
        figures = (error, self.worst, self.product / both if both and not keys else 1.0)
        if not self.numbers:
            return Row(check, name, math.inf, math.inf, 0.0, None, 0.0, "there is nothing to compare")
        if dtype == "float64":
            if 2 * own <= EXACT[check]:
                return Row(check, name, *figures, None, EXACT[check])
            reason = "the exact value is known: these should not move at all" if keys else MOVED
            reason = AS_FLOAT32 if check == "generation" else reason
            return Row(check, name, *figures, own, 2 * own, reason)
        rounding = (ROUNDING, "no float32 is nearer than its rounding")
        if name.startswith("exp_avg_sq."):  # squares the scale, with its rounding, that clipping gives all gradients
            rounding = (2 * ROUNDING, "no float32 is nearer than its rounding, here a squared one")
        excuses = [rounding, *([excuse] if excuse else [])]
        if self.numbers < FEW and name not in ("loss", "norm"):  # which have an excuse that tells more
            factor = math.exp(5 / math.sqrt(self.numbers))
            why = f"only {self.numbers} numbers: their error can be small by luck"
            excuses.append((factor * max(own, ROUNDING), why))
        taken, reason = own, MOVED if moved else ""
        for least, why in excuses:
            if error > MULTIPLE[dtype] * taken and least > taken:
                taken, reason = least, why
        return Row(check, name, *figures, own, MULTIPLE[dtype] * taken, reason)


class Comparison:
    """Every tensor's tally over batches of (truth, tinygrad, torch in the dtype; `moved`: from weights `nudged`).

    The key third of attn.c_attn.bias has its own: a constant added to every key changes no softmax, so its gradient is
    exactly zero and it stays as in `start`. What is computed there is rounding noise, and has to be small on the scale
    of the other thirds.
    """

    def __init__(self, check: str, dtype: str, start: Tensors | None = None, moved: bool = False):
        self.check, self.dtype, self.start, self.moved = check, dtype, start, moved
        self.tallies: dict[str, Tally] = {}
        self.mismatched: list[Row] = []

    def add(self, truth: Tensors, ours: Tensors, *own: Tensors) -> None:
        for name in [*truth, *ours]:
            if (name in truth) != (name in ours):
                self.mismatch(name, "only one of the two has it")
        if self.mismatched:
            return
        for name in truth:
            b = torch.as_tensor(truth[name]).double()
            # to the device first: what widens them there is faster than what moves them
            a, *draws = (torch.as_tensor(tensors[name]).to(b.device).to(b) for tensors in (ours, *own))
            if a.shape != b.shape:
                self.mismatch(name, f"{tuple(a.shape)}, not {tuple(b.shape)}")
                continue
            if not name.endswith("attn.c_attn.bias"):
                self.tallies.setdefault(name, Tally()).add(b, a, draws, b)
                continue
            others = [torch.cat([q, v]) for q, _, v in (t.chunk(3) for t in (b, a, *draws))]
            self.tallies.setdefault(name, Tally()).add(others[0], others[1], others[2:], others[0])
            still = torch.zeros_like(b.chunk(3)[1])
            if self.start is not None and name in self.start:
                still = torch.as_tensor(self.start[name]).to(b).chunk(3)[1]
            keys = [t.chunk(3)[1] for t in (a, *draws)]
            self.tallies.setdefault(name + KEYS, Tally()).add(still, keys[0], keys[1:], others[0] / math.sqrt(2))

    def mismatch(self, name: str, reason: str) -> None:
        self.mismatched.append(Row(self.check, name, math.inf, math.inf, 0.0, None, 0.0, reason))

    def rows(self, at_least: Mapping[str, Excuse] | None = None) -> list[Row]:
        if self.mismatched:
            return self.mismatched
        # A norm is no further off than what it is the norm of: here the gradient, which exp_avg has in it.
        moments = [tally.relative(tally.own) for name, tally in self.tallies.items() if name.startswith("exp_avg.")]
        excuses = {"norm": (max(moments, default=0.0), ONE_NUMBER)} | dict(at_least or {})
        return [t.row(self.check, n, self.dtype, excuses.get(n), self.moved) for n, t in self.tallies.items()]


def judge(
    check: str,
    dtype: str,
    batches: Iterable[tuple[Tensors, Tensors, Tensors]],
    at_least: Mapping[str, Excuse] | None = None,
    start: Tensors | None = None,
) -> list[Row]:
    """A row for every tensor of a `Comparison` over the batches."""
    comparison = Comparison(check, dtype, start)
    for three in batches:
        comparison.add(*three)
    return comparison.rows(at_least)


def summed(config: GPT2Config, rows: int) -> dict[str, Excuse]:
    """The excuse of biases and gains, whose gradients are plain sums over rows: B * T numbers.

    PyTorch adds them pairwise, a graph may one after the other. Then n numbers of random signs carry a relative error
    of ROUNDING * sqrt(n / 6) in float32: each partial sum is rounded, by ROUNDING / sqrt(3) of itself, and the k-th is
    sqrt(k) numbers large (Higham, Accuracy and Stability of Numerical Algorithms, 4.2, with errors that are random).
    """
    excuse = ROUNDING * math.sqrt(rows / 6), f"a sum of {rows} rows, one after the other"
    return {name: excuse for name, shape in parameter_shapes(config).items() if len(shape) == 1}


def random_batches(config: GPT2Config, batch_size: int, seq_len: int, seed: int, count: int) -> list[Batch]:
    """Inputs and targets (B, T), int32: few different tokens, so that they repeat; end-of-text inside; some ignored."""
    random = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        some = [config.vocab_size - 1, *random.integers(0, config.vocab_size, 10)]  # GPT-2's last is end-of-text
        rows = random.choice(some, (batch_size, seq_len + 1)).astype(np.int32)
        rows[0, seq_len // 2] = config.vocab_size - 1
        x, y = rows[:, :-1].copy(), rows[:, 1:].copy()
        y.flat[3::5] = IGNORED
        batches.append((x, y))
    return batches


class Setting:
    """What is compared: the model's weights, the dtype, where torch and tinygrad compute, and tinygrad's kernels."""

    def __init__(
        self,
        config: GPT2Config,
        arrays: Mapping[str, np.ndarray],
        dtype: str,
        device: str,
        kernels: ModuleType | None = None,
    ):
        if arrays.keys() != parameter_shapes(config).keys():
            raise ValueError("the arrays are not the model's parameters")
        self.config, self.dtype, self.kernels = config, dtype, kernels
        self.exact = {name: array.astype(np.float64) for name, array in arrays.items()}
        stored = np.float64 if dtype == "float64" else np.float32
        self.arrays = {name: array.astype(stored) for name, array in arrays.items()}
        self.torch_device = "cuda" if device == "CUDA" else "cpu"
        self.torch_autocast = torch.bfloat16 if dtype == "bfloat16" else None
        self.tinygrad_autocast = dtypes.bfloat16 if dtype == "bfloat16" else None

    def references(self, **options: Any) -> References:
        """torch's trainers: the truth's, and the one in the dtype."""
        make = torch_ref.trainer.Trainer
        truth = make(self.config, self.exact, device=self.torch_device, **options)
        own = make(self.config, self.arrays, device=self.torch_device, autocast=self.torch_autocast, **options)
        return truth, own

    def trainer(self, **options: Any) -> Trainer:
        """tinygrad's."""
        return Trainer(self.config, self.arrays, autocast=self.tinygrad_autocast, kernels=self.kernels, **options)

    def model(self) -> tinygrad_impl.model.GPT2:
        """tinygrad's."""
        return tinygrad_impl.model.GPT2(self.config, self.arrays)

    def for_truth(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Micro-batches with the same mean loss: on a GPU row by row, since float64 takes several times the memory that
        training does. Not where some rows score fewer targets than others, whose means would count too much.
        """
        scored = {int(count) for _, y in batches for count in (y != IGNORED).sum(1)}
        if self.torch_device == "cpu" or len(scored) > 1:
            return batches
        return [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]

    def flow_of_truth(self, batch: Batch) -> Flow:
        return flow_in_torch(self.config, self.exact, *batch, device=self.torch_device)

    def flows(self, batch: Batch, fed: Flow | None = None, nudges: int = 0) -> tuple[Flow, Flow, list[Flow]]:
        """Of the truth, of tinygrad and of torch in the dtype, this once from each of so many nudged weights."""
        common: Any = {"device": self.torch_device, "fed": fed}
        truth = flow_in_torch(self.config, self.exact, *batch, **common)
        ours = flow_in_tinygrad(self.config, self.arrays, *batch, self.tinygrad_autocast, fed, self.kernels)
        weights = [nudged(self.arrays, seed) for seed in range(nudges)] or [self.arrays]
        own = [flow_in_torch(self.config, w, *batch, self.torch_autocast, **common) for w in weights]
        for flow in own if self.kernels else ():
            for name in flow.values:
                if name.endswith(ROUNDED):
                    flow.values[name] = torch.tensor(flow.values[name]).bfloat16().double().numpy()
        return truth, ours, own


def flow_rows(setting: Setting, references: References, batches: Iterable[Batch], nudges: int = 0) -> list[Row]:
    """Activations, and the loss's gradients with respect to them, at every edge."""
    forward, backward = (Comparison(check, setting.dtype, moved=nudges > 0) for check in ("forward", "backward"))
    names = edges(setting.config).keys() - {"loss"}
    for batch in batches:
        truth, ours, own = setting.flows(batch, nudges=nudges)
        flows = [truth, ours, *own]
        forward.add(*(flow.values for flow in flows))
        backward.add(*({n: g for n, g in flow.gradients.items() if n in names} for flow in flows))
    return forward.rows({"loss": (loss_error(references, batch), ONE_NUMBER)}) + backward.rows()


@torch.no_grad()
def loss_error(references: References, batch: Batch) -> float:
    """The RMS error of the positions' losses in torch's dtype over their mean: the mean's own error is at most that."""
    rows = max(1, 1024 // batch[0].shape[1])  # a thousand positions tell enough
    x, y = (torch.tensor(array[:rows], device=references[0].device) for array in batch)
    nll = []
    for trainer in references:
        with torch.autocast(trainer.device, trainer.autocast, enabled=trainer.autocast is not None):
            logits, _ = trainer.model(x)
        nll.append(
            torch.nn.functional.cross_entropy(logits[y != IGNORED].double(), y[y != IGNORED].long(), reduction="none")
        )
    return float((nll[1] - nll[0]).square().mean().sqrt() / nll[0].mean())


def gradient_rows(
    setting: Setting, port: Trainer, references: References, groups: Iterable[Sequence[Batch]], nudges: int = 0
) -> list[Row]:
    """The mean loss of each group of micro-batches, and its gradient by every parameter, out of the graph that trains.

    The graph runs plainly with the first batch that it ever gets, is captured with the second, and then replayed.
    `nudges`: torch computes from so many nudged weights.
    """
    truth, own = references
    arrays = {name: p.detach().cpu().numpy().copy() for name, p in own.parameters.items()}
    weights = [nudged(arrays, seed) for seed in range(nudges)]
    comparison = Comparison("gradient", setting.dtype, moved=nudges > 0)

    def results(reference: torch_ref.trainer.Trainer, batches: Sequence[Batch]) -> Tensors:
        loss = np.array(reference.accumulate(batches))
        return {name: p.grad for name, p in reference.parameters.items()} | {"loss": loss}

    def draws(batches: Sequence[Batch]) -> Iterator[Tensors]:
        for changed in weights:
            own.restore(changed, own.moments(), own.steps)
            yield results(own, batches)
        if weights:
            own.restore(arrays, own.moments(), own.steps)
        else:
            yield results(own, batches)

    for batches in groups:
        port.accumulate(batches)
        sums = {name: g.numpy() for name, g in port.gradients.items()} | {"loss": port.loss.numpy()}
        ours = {name: total / len(batches) for name, total in sums.items()}
        comparison.add(results(truth, setting.for_truth(batches)), ours, *draws(batches))
    x, _ = batches[0]
    return comparison.rows(summed(setting.config, x.size) | {"loss": (loss_error(references, batches[0]), ONE_NUMBER)})


def micro_batches(batches: Sequence[Batch]) -> list[Sequence[Batch]]:
    """The batches as groups: one by itself, two and five that are accumulated, and all but these two by themselves."""
    return [batches[:1], batches[1:3], batches[3:8], *([batch] for batch in batches[3:])]


def step_rows(
    setting: Setting,
    port: Trainer,
    references: References,
    steps: Iterable[Step],
    norms: Sequence[float | None] | None = None,
) -> list[Row]:
    """Parameters and moments after AdamW steps, norm and reported loss, judged after each single step, with the truth's
    state, gradients and loss fed in: where a gradient is next to nothing Adam's step is its sign, on which roundings
    need not agree. `norms`: what each step's gradient is scaled to, None for what it is. All begin where `port` stands,
    and all are left where the truth ends, so that `gradient_rows` can tell whether the graphs have followed.
    """
    truth, own = references
    first, start = port.steps, state(port)
    comparison = Comparison("training", setting.dtype, start)
    for reference in references:
        reference.restore(start, start, first)
    for done, ((batches, lr, port_lr), norm) in enumerate(zip(steps, norms or repeat(None)), first + 1):  # noqa: B905
        loss, port.count = truth.accumulate(setting.for_truth(batches)), len(batches)
        if norm is not None:
            own_norm = global_norm(truth)
            for p in truth.parameters.values():
                p.grad = None if p.grad is None else p.grad * (norm / own_norm)
        tinygrad_impl.trainer.write(port.loss, np.array(loss * port.count, port.dtype))
        for name, p in truth.parameters.items():
            assert p.grad is not None
            of_own = own.parameters[name]
            of_own.grad = p.grad.to(of_own.dtype, copy=True)
            tinygrad_impl.trainer.write(port.gradients[name], (p.grad * port.count).to(of_own.dtype).cpu().numpy())
        expected = outcome(truth, loss, truth.update(lr))
        comparison.add(expected, outcome(port, *port.update(port_lr)), outcome(own, loss, own.update(lr)))
        follow(port, references, done)
    return comparison.rows({"loss": (ROUNDING, ONE_NUMBER)})


def free_rows(
    setting: Setting, port: Trainer, references: References, steps: Iterable[Step], again: bool = False
) -> list[Row]:
    """The same, judged after all of the steps, each going its own way: for float64. How far roundings carry there torch
    tells from weights that are nudged; `again`: the port too, since how far it came the first time may be its luck.
    """
    truth, own = references
    first, start = port.steps, state(port)
    truth.restore(start, start, first)
    taken = []
    for batches, lr, port_lr in steps:
        taken.append((batches, lr, port_lr))
        loss, norm = truth.step(setting.for_truth(batches), lr)
    expected = outcome(truth, loss, norm)

    def end(trainer: AnyTrainer, start: Mapping[str, np.ndarray]) -> Tensors:
        trainer.restore(start, start, first)
        for batches, lr, port_lr in taken:
            loss, norm = trainer.step(batches, port_lr if trainer is port else lr)
        return outcome(trainer, loss, norm)

    weights = {name: start[name] for name in port.parameters}
    ends = [end(own, start | nudged(weights, seed)) for seed in range(NUDGES)]
    starts = [start | nudged(weights, NUDGES + seed) for seed in range(NUDGES)] if again else [start]
    comparison = Comparison("training", setting.dtype, start)
    for beginning in starts:
        comparison.add(expected, end(port, beginning), *ends)
    follow(port, references, truth.steps)
    return comparison.rows()


def not_finite_rows(port: Trainer) -> list[Row]:
    """A loss and a gradient that are not finite, each by itself: the port tells them as they are and updates nothing.
    Leaves the port as it was.
    """
    before, steps, rows = state(port), port.steps, list[Row]()
    port.count = 1
    for gradient in port.gradients.values():
        tinygrad_impl.trainer.write(gradient, np.zeros(gradient.shape, port.dtype))
    for of, value in (("loss", math.inf), ("loss", math.nan), ("norm", math.inf), ("norm", math.nan)):
        said = {"loss": 1.5, "norm": 2.0} | {of: value}
        tinygrad_impl.trainer.write(port.loss, np.array(said["loss"], port.dtype))
        last = np.append(np.zeros(port.model.config.n_embd - 1), said["norm"]).astype(port.dtype)
        tinygrad_impl.trainer.write(port.gradients["ln_f.bias"], last)
        told, after = port.update(1e-3), state(port)
        right = np.array_equal(told, (said["loss"], said["norm"]), equal_nan=True) and port.steps == steps
        right = right and all(np.array_equal(before[name], after[name]) for name in before)
        error = 0.0 if right else math.inf
        rows.append(Row("training", f"{of} {value}", error, error, 1.0, None, 0.0, NOT_FINITE))
        if not right:
            port.restore(before, before, steps)
    return rows


@dataclass
class Draw:
    """A token that the port drew."""

    place: str  # the row of its logits
    where: str
    token: int
    as_truth: bool  # is it the one that the host's sampler draws from the truth's logits?
    as_told: bool  # and from the port's?
    logits: np.ndarray  # the truth's, (V,)
    number: float  # the random number that it is drawn with


def generation_rows(setting: Setting, seeds: Sequence[int], steps: int, nudges: int = 0) -> Iterator[list[Row]]:
    """For each way of `SAMPLING`, of so many tokens after each seed's prompts: the logits of every step, inside and
    beyond the context, and the probabilities of the tokens, all given what the port drew; and what it drew.
    """
    config, V = setting.config, min(VOCAB_SIZE, setting.config.vocab_size)
    generator = Generator(setting.model(), setting.tinygrad_autocast, setting.kernels, V)
    weights = [nudged(setting.arrays, seed) for seed in range(nudges)] or [setting.arrays]
    for how, settings in SAMPLING.items():
        comparison, drawn = Comparison("generation", setting.dtype, moved=nudges > 0), list[Draw]()
        for seed in seeds:
            prompts = generation.prompts_for(config, seed)
            text = generation.written(generator, prompts, steps, Sampler(**settings, seed=seed))
            told = np.clip(text.tokens, 0, V - 1)

            def logits_of_torch(arrays: Mapping[str, np.ndarray], autocast: torch.dtype | None) -> list[np.ndarray]:
                model = torch_ref.model.GPT2(config, arrays).to(setting.torch_device)
                return generation.logits_of_torch(model, autocast, prompts, told, V)  # noqa: B023

            truth, ours = logits_of_torch(setting.exact, None), generation.logits_of_port(generator, prompts, told)
            if setting.dtype == "float64":  # the sampler gets float32: what that costs torch
                own = [[logits.astype(np.float32).astype(np.float64) for logits in truth]]
            else:
                own = [logits_of_torch(arrays, setting.torch_autocast) for arrays in weights]
            places = {
                f"{how}.inside": text.counted & (text.lengths <= config.n_positions),
                f"{how}.beyond": text.counted & (text.lengths > config.n_positions),
            }
            named = ~np.isnan(text.probabilities)
            tensors = [
                {name: np.stack(logits)[at[: len(logits)]] for name, at in places.items() if at.any()}
                for logits in (truth, ours, *own)
            ]
            for of_it, logits in zip(tensors, (truth, ours, *own), strict=True):
                of_it[f"{how}.probabilities"] = generation.probabilities(logits, told[: len(logits)])[
                    named[: len(logits)]
                ]
            tensors[1][f"{how}.probabilities"] = text.probabilities[named]  # as users are told them
            comparison.add(*tensors)
            numbers = generation.numbers(seed, steps, len(prompts))
            by_truth, by_ours = (generation.draws(logits, settings, seed) for logits in (truth, ours))
            for place, at in places.items():
                for s, i in np.argwhere(at[: min(len(truth), len(ours))]).tolist():
                    token, where = int(text.tokens[s, i]), f"row {i}, token {s}"
                    same = token == by_truth[s, i], token == by_ours[s, i]
                    drawn.append(Draw(place, where, token, *same, truth[s][i], numbers[s, i]))
        rows = comparison.rows()
        yield [*rows, tokens_row(setting, how, settings, drawn, {row.name: row.allowed for row in rows})]


def tokens_row(
    setting: Setting, how: str, settings: Mapping[str, Any], drawn: Sequence[Draw], allowed: Mapping[str, float]
) -> Row:
    """The tokens have to be those that the host's sampler draws from the port's logits, and from the truth's too unless
    that is a tie: nearer to a border than the logits' allowed error. In float64 there are none. Too many ties fail.
    """
    ties, wrong = 0, list[Draw]()
    for draw in drawn:
        off = 0.0
        if setting.dtype != "float64":
            off = generation.CHANCE * allowed.get(draw.place, 0.0) * math.sqrt(np.square(draw.logits).mean())
        if draw.as_truth and draw.as_told:
            continue
        if draw.as_told and generation.could_draw(draw.logits, draw.token, draw.number, settings, off):
            ties += 1
        else:
            wrong.append(draw)

    def row(error: float, bound: float, reason: str) -> Row:
        return Row("generation", f"{how}.tokens", error, error, 1.0, None, bound, reason)

    if wrong:
        first = wrong[0]
        of = "the truth's logits" if first.as_told else "its own logits"
        reason = f"{len(wrong)} of {len(drawn)} are not what the sampler draws from {of}; first {first.where}"
        return row(len(wrong) / len(drawn), 0.0, reason)
    if ties > TIES * len(drawn):
        return row(ties / len(drawn), TIES, f"{ties} of {len(drawn)} draws are ties: too many to prove anything")
    return row(0.0, 0.0, f"all {len(drawn)} the same" if not ties else f"{ties} of {len(drawn)} draws are ties")


def state(trainer: AnyTrainer) -> dict[str, Any]:
    """Copies of the parameters and both moments."""
    if isinstance(trainer, Trainer):
        return trainer.model.arrays() | trainer.moments()
    return {name: t.detach().clone() for name, t in (trainer.parameters | trainer.moments()).items()}


def outcome(trainer: AnyTrainer, loss: float, norm: float) -> Tensors:
    """What a step is judged by."""
    return state(trainer) | {"loss": np.array(loss), "norm": np.array(norm)}


def follow(port: Trainer, references: References, steps: int) -> None:
    """All go on from the truth's state, as far as the dtype can hold it."""
    truth, own = references
    dtype = next(iter(own.parameters.values())).dtype
    rounded = {name: t.to(dtype) for name, t in state(truth).items()}
    arrays = {name: t.cpu().numpy() for name, t in rounded.items()}
    port.restore(arrays, arrays, steps)
    for reference in references:
        reference.restore(rounded, rounded, steps)


def nudged(arrays: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Every number's next neighbour, up or down."""
    random = np.random.default_rng(seed)
    ends = np.array([-np.inf, np.inf])
    return {n: np.nextafter(a, random.choice(ends.astype(a.dtype), a.shape)) for n, a in arrays.items()}


def training_steps(batches: Sequence[Batch], count: int, accumulated: Sequence[int] = ACCUMULATED) -> list[Step]:
    """Steps with the learning rates of either's schedule, on as many of the batches each, both taken in turn."""
    steps, endless = list[Step](), cycle(batches)
    for i in range(count):
        micro = list(islice(endless, accumulated[i % len(accumulated)]))
        rates = [module.learning_rate(i, count, 1e-3, 1e-4, 2) for module in (torch_ref.trainer, tinygrad_impl.trainer)]
        steps.append((micro, *rates))
    return steps


def clip_between(setting: Setting, steps: Sequence[Step]) -> float:
    """A bound that about half of the steps' gradients are over, so that both sides of clipping are seen."""
    trainer, _ = setting.references()
    norms = []
    for batches, _, _ in steps:
        trainer.accumulate(batches)
        norms.append(global_norm(trainer))
    return float(np.median(norms)) * 0.99


def global_norm(trainer: torch_ref.trainer.Trainer) -> float:
    """Of the gradients that the trainer holds."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.parameters.values() if p.grad is not None))


def prove(
    setting: Setting,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    steps: int = 10,
    generated: int = GENERATED,
    quiet: bool = False,
) -> tuple[list[Row], str | None]:
    """Every row of the proof, and the culprit if one of them fails. `generated`: tokens of each row, 0 for none."""
    for times in (1, MORE):
        batches = random_batches(setting.config, batch_size, seq_len, seed, times * GRAPH_BATCHES)
        rows = evidence(setting, batches, times, seed, steps, generated, quiet)
        failed = [row for row in rows if not row.passed]
        if not (failed and by_luck(failed, setting.dtype)):
            break
    return rows, named(setting, failed, batches[: times * BATCHES], steps) if failed else None


def evidence(
    setting: Setting, batches: Sequence[Batch], times: int, seed: int, steps: int, generated: int, quiet: bool
) -> list[Row]:
    """Every row of the proof, over `times` as many batches as suffice if nothing fails."""
    free, nudges = setting.dtype == "float64", NUDGES if times > 1 else 0
    few, groups = batches[: times * BATCHES], micro_batches(batches)
    schedule = training_steps(batches, steps)
    options = {"clip": clip_between(setting, schedule)}
    total = len(few) + len(groups) + len(schedule) + (len(SAMPLING) if generated else 0)
    what = "parity" if times == 1 else "again, with more"
    with Progress(total=total, desc=what, unit="pass", disable=quiet) as progress:

        def counted(items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                yield item
                progress.update()

        references, port = setting.references(**options), setting.trainer(**options)
        rows = flow_rows(setting, references, counted(few), nudges)
        if free:
            training = free_rows(setting, port, references, counted(schedule), again=times > 1)
        else:
            training = step_rows(setting, port, references, counted(schedule))
        rows += gradient_rows(setting, port, references, counted(groups), nudges) + training + not_finite_rows(port)
        if generated:
            for some in counted(generation_rows(setting, range(seed, seed + times), generated, nudges)):
                rows += some
        return rows


def by_luck(failed: Sequence[Row], dtype: str) -> bool:
    """Can it be luck that all of these failed? Not that a single step of AdamW did, which rounds number by number."""
    single = dtype != "float64"
    return all(excess(row) <= BY_LUCK and not (single and row.check == "training") for row in failed)


def named(setting: Setting, failed: Sequence[Row], batches: Sequence[Batch], steps: int, **options: Any) -> str:
    """The part of the port that is to blame for the rows that failed. `options`: of the trainers, other than theirs."""
    if all(row.check == "generation" for row in failed):
        return f"generation: {said(worst(failed))}"
    failed = [row for row in failed if row.check != "generation"]  # which has the same sub-layers
    if all(row.check == "training" for row in failed):
        return training_culprit(setting, batches, steps, failed, **options)
    return culprit(setting, batches) or graph_culprit(setting, batches, failed)


def worst(rows: Sequence[Row]) -> Row:
    """The row that comes nearest to what is allowed, or is furthest over it."""
    return max(rows, key=excess)


def excess(row: Row) -> float:
    """error / allowed, with whatever cannot be told counted as the worst."""
    if row.error == 0:
        return 0.0
    ratio = row.error / row.allowed if row.allowed else math.inf
    return math.inf if math.isnan(ratio) else ratio


def said(row: Row) -> str:
    return f"{row.name}: error {row.error:.1e}, allowed {row.allowed:.1e}"


def culprit(setting: Setting, batches: Sequence[Batch]) -> str | None:
    """The first sub-layer that is wrong by itself: with the truth's activations as its inputs and, backward, the
    truth's gradients at its outputs. None if each is right by itself.
    """
    fed = [setting.flows(batch, setting.flow_of_truth(batch)) for batch in batches]
    table = edges(setting.config)
    theirs, ours = ([*flow.values] for flow in fed[0][:2])
    if skipped := next((name for name in theirs if name not in ours), None):
        return f"{skipped.removesuffix('.input')}: the port never comes to it"
    for expected, found in zip(theirs, ours, strict=True):
        if expected != found:
            within = expected.removesuffix(".input").rpartition(".")[0] or "the model"
            return f"{within} (its wiring): the port comes to {found} where the reference comes to {expected}"
    lucky = {"loss": (loss_error(setting.references(), batches[0]), ONE_NUMBER)}
    rows = judge("forward", setting.dtype, [(t.values, a.values, o.values) for t, a, [o] in fed], lucky)
    if first := first_over(rows):
        return f"{table[first.name][0]} forward: error {first.error:.1e}, allowed {first.allowed:.1e}"
    gradients = [(t.gradients, a.gradients, o.gradients) for t, a, [o] in fed]
    rows = judge("backward", setting.dtype, gradients, summed(setting.config, batches[0][0].size))
    # backward, a sub-layer gives the gradients of its inputs and of its parameters
    order = list(dict.fromkeys([*(table[name][1] for name in reversed(table)), "wte", "wpe"]))

    def owner(row: Row) -> str:
        name = row.name.removesuffix(KEYS)
        return table[name][1] if name in table else name.rpartition(".")[0]

    if first := first_over(sorted(rows, key=lambda row: order.index(owner(row)))):
        return f"{owner(first)} backward ({first.name}): error {first.error:.1e}, allowed {first.allowed:.1e}"
    return None


def graph_culprit(setting: Setting, batches: Sequence[Batch], failed: Sequence[Row]) -> str:
    """What is wrong with the graph that trains if every sub-layer is right by itself."""

    def right(groups: Iterable[Sequence[Batch]]) -> bool:
        return all(row.passed for row in gradient_rows(setting, setting.trainer(), setting.references(), groups))

    accumulates = right([[batch] for batch in batches]) and not right([batches])
    wrong = worst([row for row in failed if row.check != "training"])
    return f"{'accumulate' if accumulates else 'only the graph that trains'}: {said(wrong)}"


def first_over(rows: Sequence[Row]) -> Row | None:
    """The first row that fails, and clearly if any does: next to a large error one just over its bound is chance."""
    largest = max(map(excess, rows))
    return next((row for row in rows if excess(row) > max(1.0, min(math.sqrt(largest), 100.0))), None)


def training_culprit(
    setting: Setting, batches: Sequence[Batch], count: int, before: Sequence[Row], **given: Any
) -> str:
    """The part of the training step that is wrong: the one without which it is right."""

    def rows(accumulated: Sequence[int] = ACCUMULATED, **options: Any) -> list[Row]:
        steps = training_steps(batches, min(count, 4), accumulated)
        options = {"clip": clip_between(setting, steps)} | given | options
        return step_rows(setting, setting.trainer(**options), setting.references(**options), steps)

    for i, (_, lr, port_lr) in enumerate(training_steps(batches, count)):
        if lr != port_lr:
            return f"learning_rate: {port_lr:.3e} at step {i}, not {lr:.3e}"
    if all(row.reason == NOT_FINITE for row in before):
        return f"update of what is not finite: {said(before[0])}"
    found = rows()
    failed = [row for row in found if not row.passed]
    if not failed:
        if setting.dtype == "float64":  # where `before` are of free steps
            return "accumulate: from the truth's gradients AdamW's steps are right"
        return f"AdamW in some steps: {said(worst(before))}"
    for name, neutral in (
        ("accumulate", {"accumulated": (1,)}),
        ("clipping", {"clip": 1e9}),  # never
        ("clipping", {"clip": 1e-3}),  # always
        ("weight decay", {"weight_decay": 0.0}),
    ):
        if all(row.passed for row in rows(**neutral)):
            return f"{name}: {said(worst(failed))}"
    for name in ("loss", "norm", "exp_avg.", "exp_avg_sq."):
        if ours := [row for row in failed if row.name.startswith(name)]:
            return f"AdamW's {name.rstrip('.')}: {said(worst(ours))}"
    return f"AdamW's update: {said(worst(failed))}"


def as_json(certificate: Mapping[str, Any]) -> str:
    """The certificate as JSON, which knows no infinity and no NaN: they become null."""
    rows = [
        {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        for row in certificate["rows"]
    ]
    return json.dumps({**certificate, "rows": rows}, indent=1, allow_nan=False) + "\n"


def sources(root: Path = ROOT) -> dict[str, str]:
    """The SHA-256 of every source file that computes something, by its path in the repository."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            inside = path.relative_to(root)
            code = path.suffix in (".py", ".c") or path.name == "zig-clang"
            if code and not path.name.startswith("test_") and not {*inside.parts} & {*NO_SOURCES}:
                found[inside.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def certificate(setting: Setting, rows: Sequence[Row], culprit: str | None, **more: Any) -> dict[str, Any]:
    """What was proven, of what, and with what, for JSON."""
    weights = hashlib.sha256()
    for name, array in sorted(setting.arrays.items()):
        weights.update(name.encode() + array.tobytes())
    equal = bool(rows) and all(row.passed for row in rows)
    packages = ("torch", "tinygrad", "numpy")
    return {
        "verdict": "equal" if equal else "different",
        "culprit": culprit,
        "model": {
            "config": to_hf(setting.config),
            "parameters": parameter_count(setting.config),
            "sha256": weights.hexdigest(),
        },
        "revision": revision(),
        "sources": sources(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "dtype": setting.dtype,
        "multiple": MULTIPLE.get(setting.dtype),
        **more,
        "rows": [vars(row) | {"ratio": row.ratio, "passed": row.passed} for row in rows],
    }
