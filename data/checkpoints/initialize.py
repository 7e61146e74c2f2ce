"""Random weights to begin training from, the same for both implementations."""

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from data.checkpoints.config import GPT2Config, parameter_shapes


def initial_weights(config: GPT2Config, seed: int, initializer_range: float = 0.02) -> dict[str, np.ndarray]:
    """float32 arrays by name, as GPT-2 and `transformers` initialise them (Radford et al. 2019, section 2.3).

    Matrices are normal with a standard deviation of `initializer_range`, those that end in the residual stream
    (`c_proj`) of that over sqrt(2 n_layer); biases are 0 and layer-norm gains 1.
    """
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 2:
            share = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
            arrays[name] = random.standard_normal(shape, np.float32) * np.float32(initializer_range / share)
        else:
            arrays[name] = np.full(shape, 1.0 if name.endswith(".weight") else 0.0, np.float32)
    return arrays


@contextmanager
def shared_weights(config: GPT2Config, seed: int) -> Iterator[str]:
    """The name of a file with `initial_weights`, made once for all processes of this host: 1.5B take a minute to make.

    `weights_in` reads it, here and in other processes, while this lasts. It has no place in a folder, so that nothing
    of it is left on the disk, however this process ends.
    """
    with tempfile.TemporaryFile() as file:
        for array in initial_weights(config, seed).values():
            file.write(array.tobytes())
        file.flush()
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


def weights_in(file: str, config: GPT2Config) -> dict[str, np.ndarray]:
    """What `shared_weights` wrote: float32 arrays by name, read from the file as they are used."""
    flat, arrays, start = np.memmap(file, np.float32, "c"), dict[str, np.ndarray](), 0
    for name, shape in parameter_shapes(config).items():
        arrays[name] = np.asarray(flat[start : start + math.prod(shape)]).reshape(shape)
        start += math.prod(shape)
    return arrays
