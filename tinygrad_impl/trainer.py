"""One training step: accumulated gradients, clipping by global norm, AdamW. torch_ref/trainer.py is its reference."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from tinygrad import Tensor, nn

from data.checkpoints.config import GPT2Config
from tinygrad_impl.backend import Backend, Plain
from tinygrad_impl.flat import Flat
from tinygrad_impl.internals import captured_at_once, contents, overwrite
from tinygrad_impl.model import GPT2


def learning_rate(step: int, steps: int, peak: float, minimum: float, warmup: int) -> float:
    """The rate of step 0 ... steps - 1: up in a line over `warmup` steps, then down a cosine that ends in `minimum`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """GPT-2 and its AdamW (Loshchilov & Hutter 2019, decoupled weight decay; matrices decay, vectors don't).

    `arrays` are the parameters by name; parameters, gradients and moments keep their dtype throughout. `clip` bounds
    the global norm of the gradients. `backend` computes (backend.py); `self.backend` is bound to the parameters.
    """

    def __init__(
        self,
        config: GPT2Config,
        arrays: Mapping[str, np.ndarray],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        backend: Backend | None = None,
    ):
        self.model = GPT2(config, arrays)
        self.parameters = nn.state.get_state_dict(self.model)
        self.betas, self.eps, self.weight_decay, self.clip = betas, eps, weight_decay, clip
        shapes = {name: p.shape for name, p in self.parameters.items()}
        self.weights, self.exp_avg, self.exp_avg_sq, self.gradients = (
            Flat(shapes, self.model.wte.weight.dtype) for _ in range(4)
        )
        for name, p in self.parameters.items():
            overwrite(self.weights[name], arrays[name])
            p.replace(self.weights[name])
        self.backend = (backend or Plain()).bind(self.weights)
        self.steps = self.count = 0
        self._inputs: dict[str, Tensor] = {}
        self.dtype = arrays["wte.weight"].dtype
        self.loss = Tensor.zeros(dtype=self.model.wte.weight.dtype).contiguous().realize()
        # Four compiled graphs for any number of micro-batches. They take tensors: a Python number would be frozen.
        graphs = self.first, self.further, self.squares, self.adamw
        self._first, self._further, self._squares, self._adamw = map(captured_at_once, graphs)

    def step(self, batches: Sequence[tuple[np.ndarray, np.ndarray]], lr: float) -> tuple[float, float]:
        """One update from micro-batches (x, y) of integers (B, T). Returns their mean loss and the gradient's norm,
        both from before the update, the norm from before clipping. If one of them is not finite, nothing is updated.
        """
        self.accumulate(batches)
        return self.update(lr)

    def accumulate(self, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Leaves the sums of the batches' losses and gradients in `loss` and `gradients`, and in `count` how many."""
        self.count = len(batches)
        (x, y), *more = batches
        self._first(self._input("x", x), self._input("y", y))
        for x, y in more:
            self._further(self._input("x", x), self._input("y", y))

    def mean_gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """The mean loss and its gradients, as `accumulate` left them: copies, shaped like the parameters, by name, in
        the arrays' dtype.
        """
        gradients = {name: total.numpy() / self.count for name, total in self.gradients.items()}
        return float(self.loss.numpy() / self.count), gradients

    def load_gradients(self, loss: float, gradients: Mapping[str, np.ndarray], count: int = 1) -> None:
        """As if `accumulate` had found this mean loss and these mean gradients in `count` micro-batches: arrays shaped
        like the parameters, of any float dtype, in which they are multiplied by `count` before they are rounded.
        """
        self.count = count
        overwrite(self.loss, np.array(loss * count, self.dtype))
        for name, total in self.gradients.items():
            overwrite(total, (gradients[name] * count).astype(self.dtype, copy=False))

    def update(self, lr: float) -> tuple[float, float]:
        """AdamW's step from the means, clipped, if they are finite. Returns the mean loss, and the norm from before."""
        squares = contents(self._squares()).astype(np.float64)
        loss, norm = float(squares[0]) / self.count, math.sqrt(squares[1:].sum()) / self.count
        if not math.isfinite(loss + norm):
            return loss, norm
        self.steps += 1
        beta1, beta2 = self.betas
        scale = min(self.clip / (norm + 1e-6), 1.0) / self.count  # torch.nn.utils.clip_grad_norm_
        rest = scale - float(self.dtype.type(scale))  # its rounding, which all gradients would have in common
        scalars = [scale, rest, lr, 1 - beta1**self.steps, 1 - beta2**self.steps]  # in Python's float64
        self._adamw(self._input("scalars", np.array(scalars, self.dtype)))
        return loss, norm

    def first(self, x: Tensor, y: Tensor) -> None:
        """Makes the loss and gradients of (x, y) the totals."""
        self.backend.write(*self._totals(x, y))

    def further(self, x: Tensor, y: Tensor) -> None:
        """Adds the loss and gradients of (x, y) to the totals."""
        Tensor.realize(*(total.assign(total + new) for total, new in zip(*self._totals(x, y), strict=True)))

    def _totals(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The totals, and what (x, y) contributes to them."""
        _, loss = self.model(x, y)
        assert loss is not None
        [loss] = self.backend.lower(loss, loss_of=self.model.config)
        gradients = self.backend.gradient(loss, list(self.parameters.values()))
        return [self.loss, *self.gradients.values()], [loss, *gradients]

    def squares(self) -> Tensor:
        """The totals' loss, and sums of the gradients' squares, a few hundred of each: (1 + all of them,).

        `update` adds them up in float64: the norm's rounding would be in every clipped gradient.
        """
        squares = self.backend.squares(self.gradients)
        return self.loss.reshape(1).cat(*squares).realize()

    def adamw(self, scalars: Tensor) -> None:
        """AdamW's step; scalars: the totals' factor and the rest of it, learning rate, 1 - beta1^t, 1 - beta2^t."""
        decays = {name: self.weight_decay if p.ndim == 2 else 0.0 for name, p in self.parameters.items()}
        state = self.weights, self.exp_avg, self.exp_avg_sq, self.gradients
        self.backend.adamw(state, scalars, decays, self.betas, self.eps)

    def moments(self) -> dict[str, np.ndarray]:
        """AdamW's state but for `steps`, copied: exp_avg.NAME and exp_avg_sq.NAME, shaped like parameter NAME."""
        state = {f"exp_avg.{name}": t for name, t in self.exp_avg.items()}
        state |= {f"exp_avg_sq.{name}": t for name, t in self.exp_avg_sq.items()}
        return {name: t.numpy().copy() for name, t in state.items()}

    def restore(self, arrays: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], steps: int) -> None:
        """Goes on from these parameters and `moments()`, of `steps` steps, in the buffers that the graphs know."""
        self.steps = steps
        for name, p in self.parameters.items():
            for t, array in (
                (p, arrays[name]),
                (self.exp_avg[name], moments[f"exp_avg.{name}"]),
                (self.exp_avg_sq[name], moments[f"exp_avg_sq.{name}"]),
            ):
                overwrite(t, array.astype(self.dtype, copy=False))
        self.backend.refresh()

    def _input(self, name: str, array: np.ndarray) -> Tensor:
        """A tensor with what array has, the same for every array of this name: a new one takes tinygrad far longer."""
        tensor = self._inputs.get(name)
        if tensor is None or tensor.shape != array.shape:
            tensor = self._inputs[name] = Tensor(array).realize()
        else:
            overwrite(tensor, array)
        return tensor
