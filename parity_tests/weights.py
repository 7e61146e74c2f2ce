"""Random weights to prove parity on: ordinary ones, and ones with the oddities that trained GPT-2 has."""

import math

import numpy as np

from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights

OUTLIER = 50.0


def random_weights(config: GPT2Config, seed: int, initializer_range: float = 0.02) -> dict[str, np.ndarray]:
    """float32 arrays by name. No bias is 0 and no gain 1: those would hide that one is left out."""
    random = np.random.default_rng((seed, 1))
    arrays = initial_weights(config, seed, initializer_range)
    for name, array in arrays.items():
        if array.ndim == 1:
            arrays[name] = array + 0.1 * random.standard_normal(array.shape, np.float32)
    return arrays


def hard_weights(config: GPT2Config, seed: int) -> dict[str, np.ndarray]:
    """float32 arrays by name, with numbers of very different sizes in one sum, where a careless formula loses digits.

    As in the published weights, a few channels of the residual stream are far larger than the others, and so is the
    whole stream at position 0; layer-norm gains go from hundredths to tens, and biases are far from 0.
    """
    random = np.random.default_rng((seed, 2))
    arrays = initial_weights(config, seed)
    outliers = random.choice(config.n_embd, max(1, config.n_embd // 32), replace=False)
    for name, array in arrays.items():
        if name.endswith(".bias"):
            array[:] = random.standard_normal(array.shape, np.float32)
        elif array.ndim == 1:
            array[:] = np.exp(random.uniform(math.log(0.05), math.log(10), array.shape))
            array[outliers] = OUTLIER
    arrays["wpe.weight"][0] *= OUTLIER
    for name in ("wte.weight", "wpe.weight"):
        arrays[name][:, outliers] *= OUTLIER
    return arrays
