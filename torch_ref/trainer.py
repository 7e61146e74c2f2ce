"""One training step: accumulated gradients, clipping by global norm, AdamW. tinygrad_impl/trainer.py is its port."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data.checkpoints.config import GPT2Config
from torch_ref.model import GPT2


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
    ):
        self.model = GPT2(config, arrays).to(device)
        self.forward = torch.compile(self.model) if compile else self.model
        self.parameters = dict(self.model.named_parameters())
        self.clip, self.autocast, self.device = clip, autocast, device
        self.steps, self.loss = 0, 0.0
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim == 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters.values() if p.ndim != 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)

    def step(self, batches: Sequence[tuple[np.ndarray, np.ndarray]], lr: float) -> tuple[float, float]:
        """One update from micro-batches (x, y) of integers (B, T). Returns their mean loss and the gradient's norm,
        both from before the update, the norm from before clipping. If one of them is not finite, nothing is updated.
        """
        return self.accumulate(batches), self.update(lr)

    def accumulate(self, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
        """Leaves the gradients of the batches' mean loss, which it returns, in the parameters."""
        self.optimizer.zero_grad()
        self.loss = 0.0
        for x, y in batches:
            with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
                _, loss = self.forward(torch.tensor(x, device=self.device), torch.tensor(y, device=self.device))
            (loss / len(batches)).backward()
            self.loss += loss.item() / len(batches)
        return self.loss

    def mean_gradients(self) -> tuple[float, dict[str, torch.Tensor]]:
        """The mean loss and its gradients, as `accumulate` left them: the parameters' own, by name, not copies."""
        return self.loss, {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def load_gradients(self, loss: float, gradients: Mapping[str, Any]) -> None:
        """As if `accumulate` had found this mean loss and copies of these gradients of it: arrays of numpy or torch,
        shaped like the parameters, of any float dtype, which are rounded to the parameters'.
        """
        self.loss = loss
        for name, p in self.parameters.items():
            p.grad = torch.empty_like(p.data).copy_(torch.as_tensor(gradients[name]))

    def update(self, lr: float) -> float:
        """AdamW's step from the gradients, clipped, if they and the loss are finite. Returns their norm from before."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip).item()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(self.loss + norm):
            self.optimizer.step()
            self.steps += 1
        return norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        """The mean loss a token in nats, over batches (x, y) of `loader.windows`; its exp is the perplexity."""
        total, tokens = 0.0, 0
        for x, y in batches:
            with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
                _, loss = self.model(torch.tensor(x, device=self.device), torch.tensor(y, device=self.device))
            count = int((y >= 0).sum())
            total += loss.item() * count
            tokens += count
        return total / tokens

    def moments(self) -> dict[str, torch.Tensor]:
        """AdamW's state but for the number of steps: exp_avg.NAME and exp_avg_sq.NAME, shaped like parameter NAME."""
        return {
            f"{moment}.{name}": self.optimizer.state[p].get(moment, torch.zeros_like(p.data))  # before the first step
            for moment in ("exp_avg", "exp_avg_sq")
            for name, p in self.parameters.items()
        }

    def restore(self, arrays: Mapping[str, Any], moments: Mapping[str, Any], steps: int) -> None:
        """Goes on from copies of these parameters and `moments()`, of `steps` steps; arrays of numpy or torch."""
        self.steps = steps
        for name, p in self.parameters.items():
            p.data.copy_(torch.as_tensor(arrays[name]))
            self.optimizer.state[p] = {
                moment: torch.empty_like(p.data).copy_(torch.as_tensor(moments[f"{moment}.{name}"]))
                for moment in ("exp_avg", "exp_avg_sq")
            } | {"step": torch.tensor(float(steps))}
