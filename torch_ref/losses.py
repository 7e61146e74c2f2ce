"""The loss of each token of a text, by the reference. tinygrad_impl/losses.py is its port."""

from collections.abc import Iterable

import numpy as np
import torch

from data.evaluation.losses import Batch, loss_sums
from torch_ref.model import GPT2


class Evaluator:
    """Measures a model's losses, with matmuls in `autocast`, or None for the parameters' own dtype."""

    def __init__(self, model: GPT2, autocast: torch.dtype | None = None):
        self.model, self.autocast = model, autocast

    def sums(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """The sum of the losses, in nats, and of how many tokens it is."""
        return loss_sums(self.of_tokens, batches)

    @torch.no_grad()
    def of_tokens(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `data.evaluation.losses.TokenLosses`: the loss of each target, and whether it is the likeliest token."""
        device = self.model.wte.weight.device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            losses, likeliest = self.model.losses(torch.tensor(x, device=device), torch.tensor(y, device=device))
        return losses.cpu().numpy(), likeliest.cpu().numpy()
