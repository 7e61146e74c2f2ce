"""One training step: accumulated gradients, clipping by global norm, AdamW. tinygrad_impl/trainer.py is its port."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data.checkpoints.config import GPT2Config
from data.ranks import ALONE, Ranks
from torch_ref.losses import Evaluator
from torch_ref.model import GPT2

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, integers (B, T)
MOMENTS = ("exp_avg", "exp_avg_sq")  # PyTorch's names


def learning_rate(step: int, steps: int, peak: float, minimum: float, warmup: int) -> float:
    """The rate of step 0 ... steps - 1: up in a line over `warmup` steps, then down a cosine that ends in `minimum`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """GPT-2 and its AdamW (Loshchilov & Hutter 2019, decoupled weight decay; matrices decay, vectors don't).

    `arrays` are the parameters by name. `autocast` is the dtype of matmuls, or None for the parameters' own;
    parameters, gradients and moments keep the arrays' dtype throughout. `clip` bounds the global norm of the gradients.
    `compile` puts torch.compile before the model.

    Where several `ranks` train together, each has a trainer from the same arguments and computes the gradients of
    micro-batches of its own, as many as the others, of one size; their mean over ranks, in `reduce_dtype`
    (float32: the parameters' own), is what AdamW goes by. With `zero` each parameter has its AdamW on one rank, which
    sends it to the others after the step (ZeRO-1; Rajbhandari et al. 2020); without, on all of them. Methods that send
    something, as they say, have to be called on all ranks.
    """

    def __init__(
        self,
        config: GPT2Config,
        arrays: Mapping[str, np.ndarray],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        autocast: torch.dtype | None = None,
        device: str = "cpu",
        compile: bool = False,
        ranks: Ranks = ALONE,
        zero: bool = True,
        reduce_dtype: str = "float32",
    ):
        self.model = GPT2(config, arrays).to(device)
        self.forward = torch.compile(self.model) if compile else self.model
        self.parameters = dict(self.model.named_parameters())
        self.clip, self.autocast, self.device = clip, autocast, device
        self.steps, self.loss = 0, 0.0
        self.ranks, self.zero, self.reduce_dtype = ranks, zero and ranks.size > 1, reduce_dtype
        self.owners = owners({name: p.numel() for name, p in self.parameters.items()}, ranks.size)
        # what this rank's AdamW updates
        self.own = {n: p for n, p in self.parameters.items() if not self.zero or self.owners[n] == ranks.rank}
        groups = [
            {"params": [p for p in self.own.values() if p.ndim == 2], "weight_decay": weight_decay},
            {"params": [p for p in self.own.values() if p.ndim != 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)

    def step(self, batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        """One update from this rank's micro-batches (x, y) of integers (B, T). Returns the mean loss of all ranks' and
        the norm of its gradient, both from before the update, the norm from before clipping. If one of them is not
        finite, nothing is updated, on no rank. Sends.
        """
        return self.accumulate(batches), self.update(lr)

    def accumulate(self, batches: Sequence[Batch]) -> float:
        """Leaves the gradients of the mean loss of all ranks' batches, which it returns, in the parameters. Sends."""
        self._accumulate_own(batches)
        if self.ranks.size > 1:
            self._average()
        return self.loss

    def _accumulate_own(self, batches: Sequence[Batch]) -> None:
        """The same of this rank's batches alone."""
        self.model.zero_grad()  # not the optimizer's, which has not all parameters
        self.loss = 0.0
        for x, y in batches:
            with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
                # what is not kept of it are the logits, which would take up their memory until the gradients are there
                loss = self.forward(torch.tensor(x, device=self.device), torch.tensor(y, device=self.device))[1]
            (loss / len(batches)).backward()
            self.loss += loss.item() / len(batches)

    def _average(self) -> None:
        """Makes the loss and its gradients their means over ranks."""
        self.loss = float(self.ranks.numbers(self.loss).mean())
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        for work in [self.ranks.average(gradient, self.reduce_dtype) for gradient in gradients]:
            work.wait()

    def finite(self, batches: Sequence[Batch]) -> bool:
        """Whether the loss of this rank's own batches and the norm of its gradient are finite: where those of all
        ranks' are not, this tells which ranks they are not finite on. The gradients of before are lost.
        """
        self._accumulate_own(batches)
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.parameters.values() if p.grad is not None)
        return math.isfinite(self.loss + norm.item())

    def mean_gradients(self) -> tuple[float, dict[str, torch.Tensor]]:
        """The mean loss and its gradients, as `accumulate` left them: the parameters' own, by name, not copies; whole
        and the same on all ranks.
        """
        return self.loss, {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def load_gradients(self, loss: float, gradients: Mapping[str, Any]) -> None:
        """As if `accumulate` had found this mean loss and copies of these gradients of it: arrays of numpy or torch,
        shaped like the parameters, of any float dtype, which are rounded to the parameters'. Nothing is
        sent: on all ranks they have to be the same.
        """
        self.loss = loss
        for name, p in self.parameters.items():
            p.grad = torch.empty_like(p.data).copy_(torch.as_tensor(gradients[name]))

    def update(self, lr: float) -> float:
        """AdamW's step from the gradients, clipped, if they and the loss are finite. Returns their norm from before.
        Sends.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip).item()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(self.loss + norm):
            self.optimizer.step()
            self.steps += 1
            self._share({name: p.data for name, p in self.parameters.items()})
        return norm

    def _share(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes each tensor what it is on the rank whose AdamW has the parameter of that name."""
        if self.zero:
            for work in [self.ranks.share(tensor, self.owners[name]) for name, tensor in tensors.items()]:
                work.wait()

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """The sum of the losses in nats of all targets in batches (x, y) of `loader.windows`, and how many there are:
        of this rank's, nothing is sent. Their quotient is the mean loss a token; its exp is the perplexity.
        """
        return Evaluator(self.model, self.autocast).sums(batches)

    def arrays(self, keep: bool = True) -> dict[str, np.ndarray]:
        """The parameters by name, copied; {} where they are not to be kept."""
        return self.model.arrays() if keep else {}

    def moments(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """AdamW's state but for the number of steps: exp_avg.NAME and exp_avg_sq.NAME, shaped like parameter NAME, not
        copied; on the host, where they come from several ranks. {} where they are not to be kept. Sends.
        """
        found = {}
        for moment in MOMENTS:
            for name, p in self.parameters.items():
                tensor = self.optimizer.state.get(p, {}).get(moment, torch.zeros_like(p.data))  # before the first step
                self._share({name: tensor})
                if keep:  # one at a time: a GPU may not have room for the moments of all ranks
                    found[f"{moment}.{name}"] = tensor.cpu() if self.zero else tensor
        return found

    def restore(self, arrays: Mapping[str, Any], moments: Mapping[str, Any], steps: int) -> None:
        """Goes on from copies of these parameters and `moments()`, whole on every rank, of `steps` steps; arrays of
        numpy or torch.
        """
        self.steps = steps
        for name, p in self.parameters.items():
            p.data.copy_(torch.as_tensor(arrays[name]))
        for name, p in self.own.items():
            self.optimizer.state[p] = {
                moment: torch.empty_like(p.data).copy_(torch.as_tensor(moments[f"{moment}.{name}"]))
                for moment in MOMENTS
            } | {"step": torch.tensor(float(steps))}


def owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which of so many ranks has a parameter's AdamW, by name, from how many elements each parameter has: the largest
    goes first, and each to the rank that has the fewest elements so far.
    """
    held, owner = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owner[name] = held.index(min(held))
        held[owner[name]] += sizes[name]
    return owner
