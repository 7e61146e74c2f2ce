"""One training step: accumulated gradients, clipping by global norm, AdamW. torch_ref/trainer.py is its reference.

On several ranks each computes the gradients of its own micro-batches. They are averaged over ranks once an update, a
bucket (flat.py) as soon as the last micro-batch's backward pass has all of it, while that goes on to the others.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from tinygrad import Tensor, nn
from tinygrad.device import Buffer
from tinygrad.dtype import DType, to_dtype

from data.checkpoints.config import GPT2Config, parameter_shapes
from data.ranks import ALONE, Ranks
from tinygrad_impl.backend import Backend, Part, Plain
from tinygrad_impl.exchange import Exchange
from tinygrad_impl.flat import REST, Bucket, Flat, zeros
from tinygrad_impl.internals import called_after, captured_at_once, contents, memory_of, overwrite, part_of
from tinygrad_impl.model import GPT2

Batch = tuple[np.ndarray, np.ndarray]


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

    With several `ranks`, all call the same methods, each with its own micro-batches, equally many of one shape.
    Gradients are sent in `reduce_dtype`. `zero`: each rank has and updates only its part of AdamW's moments, and of the
    weights that kernels read in bfloat16 (ZeRO-1, Rajbhandari et al. 2020); without it each does all of AdamW.
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
        ranks: Ranks = ALONE,
        zero: bool = True,
        reduce_dtype: str = "float32",
    ):
        self.betas, self.eps, self.weight_decay, self.clip = betas, eps, weight_decay, clip
        self.ranks, self.dtype = ranks, arrays["wte.weight"].dtype
        # this rank updates the rank-th of so many equal parts of each bucket
        self.rank, self.shards = (ranks.rank, ranks.size) if zero else (0, 1)

        shapes, dtype = parameter_shapes(config), to_dtype(self.dtype.name)
        self.gradients = Flat(shapes, dtype, ranks=ranks.size)
        backend = backend or Plain()
        read = [bucket.name for bucket in self.gradients.buckets if backend.reads(bucket)]
        self.weights = Flat(shapes, dtype, ranks=ranks.size, held=None if self.shards == 1 else read)
        # the model's parameters are this memory; `_put` writes the arrays to it
        of_memory: dict[str, Any] = {name: tensor.uop for name, tensor in self.weights.items()}
        self.model = GPT2(config, of_memory)
        self.parameters = nn.state.get_state_dict(self.model)
        self.backend = backend.bind(self.weights, ranks.size)
        self.parts = [self._part(bucket, dtype) for bucket in self.gradients.buckets]
        as_read = {}  # the weights in the dtype in which kernels read them
        for bucket in self.gradients.buckets:
            kept = self.backend.kept(bucket)
            as_read[bucket.name] = self.weights.memory[bucket.name] if kept is None else kept
        self.exchange = Exchange(ranks, self.gradients.memory, as_read, self.shards > 1, reduce_dtype)

        self.steps = self.count = 0
        self._inputs: dict[str, Tensor] = {}
        self.loss = zeros(1, dtype).reshape(())
        # Compiled graphs for any number of micro-batches. They take tensors: a Python number would be frozen.
        self.arena: list[Buffer] = []  # of all graphs, which never run at the same time
        captured = partial(captured_at_once, arena=self.arena)
        # Until the totals of layers are written, activations lie there; not in padding, which stays 0, nor in the rest,
        # of which the embedding's is begun first.
        lent = [self.gradients[name] for bucket in self.gradients.buckets[:-1] for name in bucket.starts]
        self._first, self._only = (captured(partial(self.first, send=send), lent=lent) for send in (False, True))
        self._further, self._last = (captured(partial(self.further, send=send)) for send in (False, True))
        graphs = self.squares, self.adamw, self.refresh_copies, self.refresh_tables
        self._squares, self._adamw, self._refresh_copies, self._refresh_tables = map(captured, graphs)
        self._put(arrays)

    def _part(self, bucket: Bucket, dtype: DType) -> Part:
        """What this rank updates of a bucket, and its memory."""
        size = bucket.size // self.shards

        def own(memory: Tensor) -> Tensor:
            return memory if self.shards == 1 else part_of(memory, self.rank * size, size)

        held = self.weights.memory.get(bucket.name)
        parameters = zeros(size, dtype) if held is None else own(held)
        moments = zeros(size, dtype), zeros(size, dtype)
        gradients = own(self.gradients.memory[bucket.name])
        return Part(bucket, bucket.segments(self.rank, self.shards), self.shards == 1, parameters, *moments, gradients)

    def step(self, batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        """One update from micro-batches (x, y) of integers (B, T). Returns their mean loss and the gradient's norm,
        both from before the update, the norm from before clipping. If one of them is not finite, nothing is updated.
        """
        self.accumulate(batches)
        return self.update(lr)

    def accumulate(self, batches: Sequence[Batch], send: bool = True) -> None:
        """Leaves the sums of the batches' losses and gradients in `loss` and `gradients`, and in `count` how many.

        On several ranks the gradients are on their way to becoming the means over ranks, unless `send` is False.
        """
        self.exchange.wait_for_gradients()  # of before, which are in the same memory
        self.count = len(batches)
        for i, (x, y) in enumerate(batches, 1):
            if send and self.ranks.size > 1 and i == len(batches):
                graph = self._only if i == 1 else self._last
            else:
                graph = self._first if i == 1 else self._further
            graph(self._input("x", x), self._input("y", y))

    def mean_loss(self) -> float:
        """The mean loss that `accumulate` left; on several ranks the mean over all of them."""
        return float(self.ranks.numbers(float(contents(self.loss)) / self.count).mean())

    def mean_gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """The mean loss and its gradients, as `accumulate` left them: copies, shaped like the parameters, by name, in
        the arrays' dtype. On several ranks the means over all of them.
        """
        self.exchange.complete_gradients()
        gradients = {name: contents(total) / self.count for name, total in self.gradients.items()}
        return self.mean_loss(), gradients

    def load_gradients(self, loss: float, gradients: Mapping[str, Any], count: int = 1) -> None:
        """As if `accumulate` had found this loss and these gradients, sums over `count` micro-batches: arrays of numpy
        or torch, contiguous, shaped like the parameters and of their dtype. Nothing is sent.
        """
        self.exchange.wait_for_gradients()
        self.count = count
        overwrite(self.loss, np.array(loss, self.dtype))
        for name, total in self.gradients.items():
            overwrite(total, gradients[name])

    def finite(self, batches: Sequence[Batch]) -> bool:
        """Whether the loss and the gradients of this rank's own micro-batches are finite; computed again, not sent."""
        self.accumulate(batches, send=False)
        return all(np.isfinite(contents(t)).all() for t in (self.loss, *self.gradients.memory.values()))

    def update(self, lr: float) -> tuple[float, float]:
        """AdamW's step from the means, clipped, if they are finite. Returns the mean loss, and the norm from before."""
        self.exchange.wait_for_gradients()
        found = self._squares()
        of_all = contents(found) if self.ranks.size == 1 else self.ranks.gather_parts(memory_of(found))
        squares = of_all.reshape(self.ranks.size, -1).astype(np.float64)  # (ranks, 1 + sums)
        loss = float(squares[:, 0].mean()) / self.count
        norm = math.sqrt(squares[: self.shards, 1:].sum()) / self.count
        if not math.isfinite(loss + norm):
            return loss, norm
        self.steps += 1
        beta1, beta2 = self.betas
        scale = min(self.clip / (norm + 1e-6), 1.0) / self.count  # torch.nn.utils.clip_grad_norm_
        rest = scale - float(self.dtype.type(scale))  # its rounding, which all gradients would have in common
        scalars = [scale, rest, lr, 1 - beta1**self.steps, 1 - beta2**self.steps]  # in Python's float64
        self._adamw(self._input("scalars", np.array(scalars, self.dtype)))
        self.exchange.wait_for_weights(self._gathered)
        return loss, norm

    def _gathered(self, bucket: str) -> None:
        """All parts of a bucket's weights are here."""
        if bucket == REST and self.backend.name == "fused":
            self._refresh_tables()

    def first(self, x: Tensor, y: Tensor, send: bool = False) -> None:
        """Makes the loss and gradients of (x, y) the totals."""
        totals, values = self._totals(x, y)
        self._realize(self.backend.written(totals, values), send)

    def further(self, x: Tensor, y: Tensor, send: bool = False) -> None:
        """Adds the loss and gradients of (x, y) to the totals."""
        totals, values = self._totals(x, y)
        self._realize(self.backend.added(totals, values), send)

    def _realize(self, totals: Sequence[Tensor], send: bool) -> None:
        """Computes the totals. Each bucket of gradients is sent as soon as it is there."""
        loss, *found = totals
        gradients = dict(zip(self.gradients, found, strict=True))
        if send:
            for bucket in self.gradients.buckets:
                average = partial(self.exchange.average, bucket.name)
                after = called_after([gradients[n] for n in bucket.starts], "average", average)
                gradients |= zip(bucket.starts, after, strict=True)
        Tensor.realize(loss, *gradients.values())

    def _totals(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The totals, and what (x, y) contributes to them."""
        _, loss = self.model(x, y)
        assert loss is not None
        [loss] = self.backend.lower(loss, loss_of=self.model.config)
        gradients = self.backend.gradient(loss, list(self.parameters.values()))
        return [self.loss, *self.gradients.values()], [loss, *gradients]

    def squares(self) -> Tensor:
        """The totals' loss, and sums of the squares of the gradients that this rank updates, a few hundred of each
        bucket: (1 + all of them,).

        `update` adds them up in float64: the norm's rounding would be in every clipped gradient.
        """
        return self.loss.reshape(1).cat(*self.backend.squares(self.parts)).realize()

    def adamw(self, scalars: Tensor) -> None:
        """AdamW's step; scalars: the totals' factor and the rest of it, learning rate, 1 - beta1^t, 1 - beta2^t."""
        decays = {name: self.weight_decay if p.ndim == 2 else 0.0 for name, p in self.parameters.items()}
        for part in reversed(self.parts):  # the embeddings first, which take longest to gather
            written = self.backend.adamw(part, self.rank, scalars, decays, self.betas, self.eps)
            if self.shards > 1:
                written = called_after(written, "gather", partial(self.exchange.gather, part.bucket.name))
            Tensor.realize(*written)

    def refresh_copies(self) -> None:
        """Rounds off all weights that kernels read in bfloat16."""
        self.backend.refresh()

    def refresh_tables(self) -> None:
        """Rounds off the weights that kernels read as they are too."""
        self.backend.refresh(buckets=False)

    def arrays(self, keep: bool = True) -> dict[str, np.ndarray]:
        """The parameters by name, copied. All ranks take part; those that do not `keep` them get none."""
        return self._by_name([self.weights.memory.get(p.bucket.name, p.parameters) for p in self.parts], "", keep)

    def moments(self, keep: bool = True) -> dict[str, np.ndarray]:
        """AdamW's state but for `steps`, copied: exp_avg.NAME and exp_avg_sq.NAME, shaped like parameter NAME. All
        ranks take part, as in `arrays`.
        """
        found = self._by_name([part.exp_avg for part in self.parts], "exp_avg.", keep)
        return found | self._by_name([part.exp_avg_sq for part in self.parts], "exp_avg_sq.", keep)

    def _by_name(self, memory: Sequence[Tensor], prefix: str, keep: bool) -> dict[str, np.ndarray]:
        """What is in the memory of each bucket, or in each rank's part of it, shaped like the parameters, by name."""
        found = {}
        for part, kept in zip(self.parts, memory, strict=True):
            bucket = part.bucket
            whole = kept.numel() == bucket.size
            flat = contents(kept) if whole else self.ranks.gather_parts(memory_of(kept), keep)
            for name, start in bucket.starts.items() if keep else ():
                found[name] = flat[start : start + bucket.sizes[name]].reshape(self.parameters[name].shape)
        return {f"{prefix}{name}": found[name] for name in self.parameters if keep}

    def memory(self) -> dict[str, Any]:
        """Where the parameters, the moments (exp_avg.NAME and exp_avg_sq.NAME) and the totals of the gradients
        (total.NAME) lie, shaped like the parameters: `internals.memory_of`. Not with ZeRO, where a rank has parts.
        """
        assert self.shards == 1, "this rank has only a part"
        found = {name: self.weights[name] for name in self.parameters}
        for part in self.parts:
            for name in part.bucket.starts:
                found[f"exp_avg.{name}"] = self._place(part.exp_avg, part.bucket, name)
                found[f"exp_avg_sq.{name}"] = self._place(part.exp_avg_sq, part.bucket, name)
        found |= {f"total.{name}": total for name, total in self.gradients.items()}
        return {name: memory_of(tensor) for name, tensor in found.items()}

    def _place(self, memory: Tensor, bucket: Bucket, name: str) -> Tensor:
        """A parameter's part of what is in the order of a bucket."""
        return part_of(memory, bucket.starts[name], bucket.sizes[name]).reshape(self.parameters[name].shape)

    def restore(self, arrays: Mapping[str, Any], moments: Mapping[str, Any], steps: int) -> None:
        """Goes on from these parameters and `moments()`, of `steps` steps, in the buffers that the graphs know: arrays
        of numpy or torch, of any float dtype; those on the GPU contiguous and of the parameters' dtype. Every rank is
        given all of them.
        """
        self.steps = steps
        self.exchange.wait_for_gradients()
        self._put(arrays)
        for part in self.parts:
            for moment, memory in (("exp_avg", part.exp_avg), ("exp_avg_sq", part.exp_avg_sq)):
                self._write(memory, part.bucket, {name: moments[f"{moment}.{name}"] for name in part.bucket.starts})

    def _put(self, arrays: Mapping[str, Any]) -> None:
        """Writes the parameters, and has the backend keep what it keeps of them."""
        for part in self.parts:
            self._write(self.weights.memory.get(part.bucket.name, part.parameters), part.bucket, arrays)
        if self.shards == 1 and self.backend.name == "fused":
            self._refresh_copies()
        elif self.shards > 1:
            self.backend.round_off(self.parts, self.rank)
            for part in reversed(self.parts):
                self.exchange.gather(part.bucket.name)
            self.exchange.wait_for_weights(self._gathered)

    def _write(self, memory: Tensor, bucket: Bucket, arrays: Mapping[str, Any]) -> None:
        """Writes arrays, shaped like the parameters, to the memory of a bucket, or of this rank's part of it."""
        if memory.numel() < bucket.size:
            overwrite(memory, self._own(bucket.flatten(arrays, self.dtype)))
            return
        for name in bucket.starts:
            on_gpu = hasattr(arrays[name], "__cuda_array_interface__")
            array = arrays[name] if on_gpu else np.asarray(arrays[name], self.dtype)
            overwrite(self._place(memory, bucket, name), array)

    def _own(self, flat: np.ndarray) -> np.ndarray:
        """This rank's part of a bucket."""
        return flat.reshape(self.shards, -1)[self.rank]

    def _input(self, name: str, array: np.ndarray) -> Tensor:
        """A tensor with what array has, the same for every array of this name: a new one takes tinygrad far longer."""
        tensor = self._inputs.get(name)
        if tensor is None or tensor.shape != array.shape:
            tensor = self._inputs[name] = Tensor(array).realize()
        else:
            overwrite(tensor, array)
        return tensor
