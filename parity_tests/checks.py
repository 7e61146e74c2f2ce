"""What is measured: activations and gradients at every edge, gradients of the graph that trains, and AdamW's steps.

Each function gives rows, which parity_tests.bounds has judged; parity_tests/generation.py has the check of generation.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice, repeat
from typing import Any

import numpy as np
import torch

import tinygrad_impl.trainer
import torch_ref.trainer
from data.checkpoints.config import parameter_shapes
from data.distributed import tensor_of
from data.text.loader import IGNORED
from parity_tests.bounds import ONE_NUMBER, ROUNDING, Comparison, Row, Tensors, summation_excuses
from parity_tests.edges import edges
from parity_tests.setting import NUDGES, Batch, References, Setting, nudged
from tinygrad_impl.trainer import Trainer

ACCUMULATED = (2, 1, 5)  # micro-batches of the steps, in turn
NOT_FINITE = "nothing may be updated"  # the reason of rows whose step had a loss or a norm that was not finite

Step = tuple[Sequence[Batch], float, float]  # micro-batches, the reference's learning rate, the port's
AnyTrainer = Trainer | torch_ref.trainer.Trainer


# --- activations and gradients ------------------------------------------------------------------------------------


def flow_rows(setting: Setting, references: References, batches: Iterable[Batch], nudges: int = 0) -> list[Row]:
    """Activations, and the loss's gradients with respect to them, at every edge."""
    forward, backward = (Comparison(check, setting.dtype, nudged=nudges > 0) for check in ("forward", "backward"))
    names = edges(setting.config).keys() - {"loss"}
    for batch in batches:
        reference, port, own = setting.flows(batch, nudges=nudges)
        flows = [reference, port, *own]
        forward.add(*(flow.values for flow in flows))
        backward.add(*({n: g for n, g in flow.gradients.items() if n in names} for flow in flows))
    return forward.rows({"loss": (loss_error(references, batch), ONE_NUMBER)}) + backward.rows()


@torch.no_grad()
def loss_error(references: References, batch: Batch) -> float:
    """The RMS error of each position's loss in PyTorch, over the mean loss: the mean's own error is at most that."""
    rows = max(1, 1024 // batch[0].shape[1])  # a thousand positions are enough for an RMS
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

    Each of the port's graphs is captured in its first call, and replayed in those after it.
    `nudges`: PyTorch computes from that many sets of nudged weights, and not from the weights as they are.
    """
    reference, own = references
    comparison, starts = Comparison("gradient", setting.dtype, nudged=nudges > 0), beginnings(own, nudges)
    for batches in groups:
        ours = results(port, batches)
        comparison.add(results(reference, setting.reference_batches(batches)), ours, *draws(own, starts, batches))
    x, _ = batches[0]
    return comparison.rows(
        summation_excuses(setting.config, x.size) | {"loss": (loss_error(references, batches[0]), ONE_NUMBER)}
    )


def results(trainer: AnyTrainer, batches: Sequence[Batch]) -> Tensors:
    """The micro-batches' mean loss and its gradients. Not of a port that shards its state (ZeRO)."""
    trainer.accumulate(batches)
    if isinstance(trainer, Trainer):
        totals = held(trainer, "total.")
        # a tensor, because on GPUs PyTorch divides by a number by multiplying by its inverse, which rounds twice
        count = torch.tensor(float(trainer.count), device=totals["wte.weight"].device)
        return {name: total / count for name, total in totals.items()} | {"loss": np.array(trainer.mean_loss())}
    loss, gradients = trainer.mean_gradients()
    return {**gradients, "loss": np.array(loss)}


def beginnings(own: torch_ref.trainer.Trainer, nudges: int) -> list[dict[str, np.ndarray]]:
    """A copy of PyTorch's weights, and `nudges` sets of them nudged; without `nudges` one empty set, as the weights
    stay as they are.
    """
    if not nudges:
        return [{}]
    arrays = {name: p.detach().cpu().numpy().copy() for name, p in own.parameters.items()}
    return [arrays, *(nudged(arrays, seed) for seed in range(nudges))]


def draws(
    own: torch_ref.trainer.Trainer, starts: Sequence[Mapping[str, np.ndarray]], batches: Sequence[Batch]
) -> Iterator[Tensors]:
    """PyTorch's results from each set of nudged weights, or from the weights as they are where there is none."""
    arrays, *weights = starts
    for changed in weights:
        own.restore(changed, own.moments(), own.steps)
        yield results(own, batches)
    if weights:
        own.restore(arrays, own.moments(), own.steps)
    else:
        yield results(own, batches)


def micro_batches(batches: Sequence[Batch]) -> list[Sequence[Batch]]:
    """The batches as groups to accumulate: the first alone, the next two, the next five, and all from the fourth on
    once more, each alone.
    """
    return [batches[:1], batches[1:3], batches[3:8], *([batch] for batch in batches[3:])]


# --- steps of AdamW -----------------------------------------------------------------------------------------------


def training_steps(batches: Sequence[Batch], count: int, accumulated: Sequence[int] = ACCUMULATED) -> list[Step]:
    """Steps, each with the learning rates of both schedules. How many micro-batches a step has, and which, goes around
    `accumulated` and the batches.
    """
    steps, endless = list[Step](), cycle(batches)
    for i in range(count):
        micro = list(islice(endless, accumulated[i % len(accumulated)]))
        rates = [module.learning_rate(i, count, 1e-3, 1e-4, 2) for module in (torch_ref.trainer, tinygrad_impl.trainer)]
        steps.append((micro, *rates))
    return steps


def clip_between(setting: Setting, steps: Sequence[Step]) -> float:
    """A norm to clip to that about half of the steps' gradients are over, so that both sides of clipping are seen."""
    trainer, _ = setting.references()
    norms = []
    for batches, _, _ in steps:
        trainer.accumulate(batches)
        norms.append(global_norm(trainer.mean_gradients()[1]))
    return float(np.median(norms)) * 0.99


def global_norm(gradients: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))


def held(trainer: Trainer, prefix: str) -> dict[str, torch.Tensor]:
    """The port's own memory, not copied, as tensors: of all names with this prefix, which is left out."""
    memory = trainer.memory().items()
    return {name.removeprefix(prefix): tensor_of(array) for name, array in memory if name.startswith(prefix)}


def now(trainer: AnyTrainer) -> dict[str, torch.Tensor]:
    """The parameters and both moments, by name: not copied, so that they change with the trainer's next step (copied
    where several ranks share them out).
    """
    if isinstance(trainer, Trainer) and trainer.shards == 1:
        return {name: tensor for name, tensor in held(trainer, "").items() if not name.startswith("total.")}
    everything = trainer.arrays() if isinstance(trainer, Trainer) else trainer.parameters
    return {name: torch.as_tensor(tensor).detach() for name, tensor in (everything | trainer.moments()).items()}


def state(trainer: AnyTrainer) -> dict[str, torch.Tensor]:
    """Copies of the parameters and both moments, by name, on the trainer's device."""
    return {name: tensor.clone() for name, tensor in now(trainer).items()}


def outcome(trainer: AnyTrainer, loss: float, norm: float) -> Tensors:
    """What a step is judged by; as `now`, not copied."""
    return now(trainer) | {"loss": np.array(loss), "norm": np.array(norm)}


def follow_reference(port: Trainer, references: References, steps: int) -> None:
    """Puts all trainers in the float64 reference's state after so many steps, rounded to the dtype they compute in."""
    reference, own = references
    dtype = next(iter(own.parameters.values())).dtype
    rounded = {name: t.to(dtype).contiguous() for name, t in now(reference).items()}
    for trainer in (port, own, reference):
        trainer.restore(rounded, rounded, steps)


def step_rows(
    setting: Setting,
    port: Trainer,
    references: References,
    steps: Iterable[Step],
    norms: Sequence[float | None] | None = None,
) -> list[Row]:
    """Parameters and moments after AdamW steps, norm and reported loss: for float32 and bfloat16.

    Judged after every single step, which begins from the float64 reference's state, gradients and loss: where a
    gradient is next to nothing Adam's step is its sign, on which roundings need not agree. `norms`: what each step's
    gradient is scaled to, None for what it is. All trainers begin where `port` stands, and end where its last step
    left it, so that `gradient_rows` can tell whether the graphs see the weights that AdamW has written: `restore` would
    round off the kernels' copies of them itself.
    """
    reference, own = references
    first, start = port.steps, now(port)
    comparison = Comparison("training", setting.dtype, start)
    for trainer in references:
        trainer.restore(start, start, first)
    stored = own.parameters["wte.weight"].dtype
    for done, ((batches, lr, port_lr), norm) in enumerate(zip(steps, norms or repeat(None)), first + 1):  # noqa: B905
        if done > first + 1:
            follow_reference(port, references, done - 1)
        reference.accumulate(setting.reference_batches(batches))
        loss, gradients = reference.mean_gradients()
        if norm is not None:
            factor = norm / global_norm(gradients)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
            reference.load_gradients(loss, gradients)
        own.load_gradients(loss, gradients)
        count = len(batches)
        totals = {name: (g * count).to(stored).contiguous() for name, g in gradients.items()}
        port.load_gradients(loss * count, totals, count)
        expected = outcome(reference, loss, reference.update(lr))
        comparison.add(expected, outcome(port, *port.update(port_lr)), outcome(own, loss, own.update(lr)))
    end = now(port)
    for trainer in references:
        trainer.restore(end, end, port.steps)
    return comparison.rows({"loss": (ROUNDING, ONE_NUMBER)})


def free_running_rows(
    setting: Setting, port: Trainer, references: References, steps: Iterable[Step], again: bool = False
) -> list[Row]:
    """The same as `step_rows`, but judged once, after all steps, of which each trainer takes its own: for float64.

    How far roundings carry there is how far apart PyTorch ends from nudged weights. `again`: the port too starts from
    nudged weights, several times, because how far it came the first time may be chance.
    """
    reference, own = references
    first, start = port.steps, state(port)
    reference.restore(start, start, first)
    taken = []
    for batches, lr, port_lr in steps:
        taken.append((batches, lr, port_lr))
        loss, norm = reference.step(setting.reference_batches(batches), lr)
    expected = outcome(reference, loss, norm)

    def end(trainer: AnyTrainer, start: Mapping[str, Any]) -> Tensors:
        trainer.restore(start, start, first)
        for batches, lr, port_lr in taken:
            loss, norm = trainer.step(batches, port_lr if trainer is port else lr)
        return {name: torch.as_tensor(value).clone() for name, value in outcome(trainer, loss, norm).items()}

    weights = {name: start[name].cpu().numpy() for name in port.parameters}
    ends = [end(own, start | nudged(weights, seed)) for seed in range(NUDGES)]
    starts = [start | nudged(weights, NUDGES + seed) for seed in range(NUDGES)] if again else [start]
    comparison = Comparison("training", setting.dtype, start)
    for beginning in starts:
        comparison.add(expected, end(port, beginning), *ends)
    follow_reference(port, references, reference.steps)
    return comparison.rows()


def not_finite_rows(port: Trainer) -> list[Row]:
    """A loss and a norm that are not finite, each by itself: the port has to report them as they are, and to update
    nothing. Leaves the port as it was.
    """
    before, steps, rows = state(port), port.steps, list[Row]()
    gradients = {name: torch.zeros_like(before[name]) for name in parameter_shapes(port.model.config)}
    for which, value in (("loss", math.inf), ("loss", math.nan), ("norm", math.inf), ("norm", math.nan)):
        given = {"loss": 1.5, "norm": 2.0} | {which: value}
        gradients["ln_f.bias"][-1] = given["norm"]
        port.load_gradients(given["loss"], gradients)
        reported, after = port.update(1e-3), now(port)
        right = np.array_equal(reported, (given["loss"], given["norm"]), equal_nan=True) and port.steps == steps
        right = right and all(torch.equal(before[name], after[name]) for name in before)
        error = 0.0 if right else math.inf
        rows.append(Row("training", f"{which} {value}", error, error, 1.0, None, 0.0, NOT_FINITE))
        if not right:
            port.restore(before, before, steps)
    return rows
