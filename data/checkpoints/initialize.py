"""Random weights to begin training from, the same for both implementations."""

import math

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
