"""The decoder of tinygrad's CPU device: a kernel in C (decode.c) that computes the whole model for a few tokens.

In the comments N is the number of rows of a batch, R how many tokens are computed at once; the rest is as in model.py.
"""

import ctypes
from collections.abc import Iterator

import numpy as np
from tinygrad import Tensor, nn
from tinygrad.helpers import ceildiv

from data.checkpoints.config import GPT2Config
from data.text.sampling import Sampler, probability
from tinygrad_impl.cpu import c_source
from tinygrad_impl.internals import c_function, in_parallel, memory_of
from tinygrad_impl.model import GPT2

ROWS = 64  # tokens at once: more would not be faster, since the weights are then read seldom enough
DEEP = 128  # products of a sum
PHASE = 16  # integers of a phase

# the fields of decode.c's structs, all of eight bytes
LAYER = [f"{name}.{kind}" for name in ("ln_1", "attn.c_attn", "attn.c_proj") for kind in ("weight", "bias")]
LAYER += [f"{name}.{kind}" for name in ("ln_2", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")]
POINTERS = ["layers", "wte", "wpe", "ln_f_weight", "ln_f_bias", "head", "tokens", "positions", "texts", "starts"]
POINTERS += ["x", "h", "y", "inner", "sums", "scores", "logits", "phases", "erfc", "sched_yield"]


class Given(ctypes.Structure):
    """What decode.c is given."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [("R", ctypes.c_long), ("G", ctypes.c_long)]


class CPUDecoder:
    """The decoder of a model in float32 or float64, in the memory of the CPU: keys and values of N rows."""

    def __init__(self, model: GPT2, N: int, V: int):
        config, tensors = model.config, nn.state.get_state_dict(model)
        Tensor.realize(*tensors.values())
        weights = {name: memory_of(tensor) for name, tensor in tensors.items()}  # not copied
        C, inner, dtype = config.n_embd, config.inner, weights["wte.weight"].dtype
        self.N, self.V, self.P, self.dtype = N, V, config.n_positions, dtype
        cache = np.zeros((config.n_layer, 2, N, C * self.P), dtype)  # keys and values, each (N, H, P, D)
        layers = list[list[int]]()
        for i, kept in enumerate(cache):
            arrays = [*(weights[f"h.{i}.{name}"] for name in LAYER), *kept]
            layers.append([array.ctypes.data for array in arrays])
        sums = max(ceildiv(C, DEEP) * max(3 * C, inner), ceildiv(inner, DEEP) * C)
        work = {"x": C, "h": C, "y": C, "inner": inner, "sums": sums, "scores": config.n_head * self.P}
        self.memory = {name: np.empty(ROWS * size, dtype) for name, size in work.items()}
        self.memory |= {"wte": weights["wte.weight"], "wpe": weights["wpe.weight"]}
        self.memory |= {"ln_f_weight": weights["ln_f.weight"], "ln_f_bias": weights["ln_f.bias"]}
        self.memory |= {"head": weights.get("lm_head.weight", weights["wte.weight"])}
        self.memory |= {"layers": np.array(layers, np.uint64)}
        self.memory |= {"phases": np.zeros((2 + 8 * config.n_layer, PHASE), np.int64)}
        self.given = Given(**{name: array.ctypes.data for name, array in self.memory.items()})
        for name in ("erfc", "sched_yield"):
            setattr(self.given, name, ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p))
        self.model, self.cache = model, cache  # whoever has addresses keeps what lies there
        self.function = c_function("decode", source(config, V, dtype))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self._compute(tokens, lengths, None)

    def draw(
        self, tokens: np.ndarray, lengths: np.ndarray, most: int, sampler: Sampler
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        logits = np.empty((self.N, self.V), self.dtype)
        self._compute(tokens[:, None], lengths, logits)
        drawn = sampler(logits)
        yield drawn, np.array([probability(*row) for row in zip(logits, drawn, strict=True)])

    def _compute(self, tokens: np.ndarray, lengths: np.ndarray, logits: np.ndarray | None) -> None:
        """Adds tokens (N, T) to the cache. With logits (N, V), where T is 1, puts there what they give."""
        positions = lengths[:, None] + np.arange(tokens.shape[1])
        texts, nth = np.nonzero(positions < self.P)  # what is past the last position is padding
        for start in range(0, len(texts), ROWS):
            at = texts[start : start + ROWS], nth[start : start + ROWS]
            rows, starts = np.unique(at[0], return_index=True)
            given = {"tokens": tokens[at], "positions": positions[at], "texts": rows, "starts": [*starts, len(at[0])]}
            arrays = {name: np.array(array, np.int32) for name, array in given.items()}  # kept until the end
            for name, array in arrays.items():
                setattr(self.given, name, array.ctypes.data)
            self.given.R, self.given.G = len(at[0]), len(rows)
            self.given.logits = None if logits is None else logits[start:].ctypes.data
            self.memory["phases"][:] = 0
            in_parallel(self.function, ctypes.addressof(self.given))


def source(config: GPT2Config, V: int, dtype: np.dtype) -> str:
    """decode.c for a model, of whose tokens the first V have logits."""
    sizes = {"LAYERS": config.n_layer, "C": config.n_embd, "H": config.n_head, "P": config.n_positions, "V": V}
    sizes |= {"INNER": config.inner, "DEEP": DEEP}
    words: dict[str, str | int] = {"T": {4: "float", 8: "double"}[dtype.itemsize], "NAME": "decode", **sizes}
    words |= {"EPS": repr(config.layer_norm_epsilon), "ACTIVATION": config.activation_function}
    return c_source("decode.c", words)
