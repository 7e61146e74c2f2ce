"""What is compared: one model's weights in a dtype, with PyTorch and tinygrad each on their device, and the batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tinygrad.dtype import dtypes

import tinygrad_impl.model
import tinygrad_impl.trainer
import torch_ref.trainer
from data.checkpoints.config import GPT2Config, parameter_shapes
from data.text.loader import IGNORED
from parity_tests.edges import Flow, flow_in_tinygrad, flow_in_torch
from tinygrad_impl.backend import Backend, Plain

NUDGES = 8  # sets of nudged weights: how far PyTorch's results scatter over them shows how well conditioned they are
REFERENCE_TOKENS = 1024  # at a time, or on a GPU as many as fit into this memory, or into a quarter of the GPU's,
REFERENCE_BYTES = 10 << 30  # if these are more: a small model's kernels take longer to start than to compute
# of these edges the kernels store bfloat16, to which PyTorch's autocast rounds them when its matmuls read them
ROUNDED = (
    "ln_1",
    "ln_2",
    "ln_f",
    "c_attn.input",
    "c_fc.input",
)

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, (B, T) each
References = tuple[torch_ref.trainer.Trainer, torch_ref.trainer.Trainer]  # in float64, and in the port's dtype


class Setting:
    """The model's weights, the dtype, where PyTorch and tinygrad compute, and on which backend tinygrad does.

    Raises `ValueError` if `arrays` are not the parameters of `config`'s model.
    """

    def __init__(
        self,
        config: GPT2Config,
        arrays: Mapping[str, np.ndarray],
        dtype: str,
        device: str,
        backend: Backend | None = None,
    ):
        if arrays.keys() != parameter_shapes(config).keys():
            raise ValueError("the arrays are not the model's parameters")
        self.config, self.dtype = config, dtype
        self.backend = backend or Plain(dtypes.bfloat16 if dtype == "bfloat16" else None)
        self.exact = {name: array.astype(np.float64) for name, array in arrays.items()}
        stored = np.float64 if dtype == "float64" else np.float32
        self.arrays = {name: array.astype(stored, copy=False) for name, array in arrays.items()}
        self.torch_device = "cuda" if device == "CUDA" else "cpu"
        self.torch_autocast = torch.bfloat16 if dtype == "bfloat16" else None

    def references(self, **options: Any) -> References:
        """PyTorch's trainers: the float64 reference, and one that computes in the port's dtype."""
        make = torch_ref.trainer.Trainer
        reference = make(self.config, self.exact, device=self.torch_device, **options)
        own = make(self.config, self.arrays, device=self.torch_device, autocast=self.torch_autocast, **options)
        return reference, own

    def trainer(self, **options: Any) -> tinygrad_impl.trainer.Trainer:
        """tinygrad's trainer."""
        return tinygrad_impl.trainer.Trainer(self.config, self.arrays, backend=self.backend, **options)

    def model(self) -> tinygrad_impl.model.GPT2:
        """tinygrad's model."""
        return tinygrad_impl.model.GPT2(self.config, self.arrays)

    def reference_batches(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Micro-batches of the same mean loss for the float64 reference, of few rows each, since float64 takes several
        times the memory that training does. Not where some rows score fewer targets than others: these would weigh too
        much in a mean of means.
        """
        if len({int(count) for _, y in batches for count in (y != IGNORED).sum(1)}) > 1:
            return batches
        found = []
        for x, y in batches:
            B, T = x.shape
            rows = max(n for n in range(1, B + 1) if B % n == 0 and n * T <= max(T, self.reference_tokens(T)))
            found += [(x[i : i + rows], y[i : i + rows]) for i in range(0, B, rows)]
        return found

    def reference_tokens(self, T: int) -> int:
        """How many tokens of windows of T the float64 reference takes at a time."""
        if self.torch_device != "cuda":
            return REFERENCE_TOKENS
        c = self.config
        of_layer = 10 * c.n_embd + 6 * c.inner + 3 * c.n_head * T  # numbers that are kept of a token for its gradient
        memory = min(REFERENCE_BYTES, torch.cuda.get_device_properties(0).total_memory // 4)
        return max(REFERENCE_TOKENS, memory // (8 * (c.n_layer * of_layer + 4 * c.vocab_size)))

    def reference_flow(self, batch: Batch) -> Flow:
        """The float64 reference's activations and gradients at every edge."""
        return flow_in_torch(self.config, self.exact, *batch, device=self.torch_device)

    def flows(self, batch: Batch, fed: Flow | None = None, nudges: int = 0) -> tuple[Flow, Flow, list[Flow]]:
        """The flows of the float64 reference, of tinygrad, and of PyTorch in tinygrad's dtype: one from the weights as
        they are, or one from each of `nudges` sets of nudged weights. `fed`: as in `edges.flow_in_torch`.
        """
        common: Any = {"device": self.torch_device, "fed": fed}
        reference = flow_in_torch(self.config, self.exact, *batch, **common)
        port = flow_in_tinygrad(self.config, self.arrays, *batch, self.backend, fed)
        weights = [nudged(self.arrays, seed) for seed in range(nudges)] or [self.arrays]
        own = [flow_in_torch(self.config, w, *batch, self.torch_autocast, **common) for w in weights]
        for flow in own if self.backend.name == "fused" else ():
            for name in flow.values:
                if name.endswith(ROUNDED):
                    flow.values[name] = torch.tensor(flow.values[name]).bfloat16().double().numpy()
        return reference, port, own


def nudged(arrays: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Every number replaced by the next one that its dtype has, above or below it at random."""
    random = np.random.default_rng(seed)
    ends = np.array([-np.inf, np.inf])
    return {n: np.nextafter(a, random.choice(ends.astype(a.dtype), a.shape)) for n, a in arrays.items()}


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
