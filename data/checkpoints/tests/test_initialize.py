import math

import numpy as np

from data.checkpoints.config import GPT2Config, parameter_shapes
from data.checkpoints.initialize import initial_weights

CONFIG = GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=8, n_head=4)


def test_values() -> None:
    arrays = initial_weights(CONFIG, 0)
    assert list(arrays) == list(parameter_shapes(CONFIG))
    for name, array in arrays.items():
        assert array.shape == parameter_shapes(CONFIG)[name]
        assert array.dtype == np.float32
        if array.ndim == 1:
            assert (array == (0 if name.endswith("bias") else 1)).all(), name
            continue
        deviation = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
        error = deviation / math.sqrt(2 * array.size)  # of a measured deviation
        assert abs(array.std() - deviation) < 5 * error, name
        assert abs(array.mean()) < 5 * deviation / math.sqrt(array.size), name
        assert 0.6 < (np.abs(array) < deviation).mean() < 0.76, name  # normal: 0.683


def test_the_seed_decides() -> None:
    first, again, other = (initial_weights(CONFIG, seed) for seed in (3, 3, 4))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        if array.ndim == 2:
            assert not np.array_equal(array, other[name])


def test_no_two_matrices_are_alike() -> None:
    arrays = initial_weights(CONFIG, 0)
    assert not np.array_equal(arrays["h.0.attn.c_attn.weight"], arrays["h.1.attn.c_attn.weight"])


def test_the_numbers_are_numpys_in_the_models_order() -> None:
    """Which makes a run's first weights the same everywhere: one stream, matrix after matrix as they are listed."""
    for seed, scale in ((0, 0.02), (11, 0.5)):
        random = np.random.default_rng(seed)
        arrays = initial_weights(CONFIG, seed) if scale == 0.02 else initial_weights(CONFIG, seed, scale)
        for name, shape in parameter_shapes(CONFIG).items():
            if len(shape) == 2:
                deviation = scale / 4 if name.endswith("c_proj.weight") else scale  # 4: the root of 2 * 8 layers
                expected = random.standard_normal(shape, np.float32) * np.float32(deviation)
                np.testing.assert_array_equal(arrays[name], expected)
