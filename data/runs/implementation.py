"""What a training run needs of the implementation that computes it: PyTorch's, tinygrad's, or a test's."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.evaluation.subject import Subject
from data.text.sampling import Sampler

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, integers (B, T)


class Trainer(Protocol):
    """What the loop needs of torch_ref.trainer.Trainer and tinygrad_impl.trainer.Trainer."""

    steps: int
    model: Any

    def step(self, batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        """An update from this rank's micro-batches. The mean loss over all ranks, and the norm of the mean gradient."""

    def finite(self, batches: Sequence[Batch]) -> bool:
        """Whether this rank's own loss and gradient of these batches are finite."""


@dataclass(frozen=True)
class Implementation:
    """What computes a run, and with what."""

    package: str
    trainer: Trainer
    # copies of the parameters and of AdamW's moments, because they are written while training goes on; all ranks call
    # them, and those that pass False get {}
    arrays: Callable[[bool], dict[str, np.ndarray]]
    moments: Callable[[bool], dict[str, np.ndarray]]
    learning_rate: Callable[[int, int, float, float, int], float]
    evaluate: Callable[[Iterable[Batch]], tuple[float, int]]  # the sum of the losses, and of how many targets
    # a prompt with its continuation of at most so many tokens; the last is called after each of them
    continue_text: Callable[[str, int, Sampler, Callable[[], object]], str]
    device: str
    device_name: str  # the GPU's or the CPU's
    peak_flops: float | None = None  # a second
    kernels: str | None = None  # whose, where there is a choice
    compiling: int = 0  # how many of the first batches or tokens compile what the others use
    subject: Subject | None = None  # of evaluation
