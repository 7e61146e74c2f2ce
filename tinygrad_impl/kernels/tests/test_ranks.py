"""A training step on several ranks: each has a part of the weights in float32, and the bfloat16 copies of all."""

import importlib
import os
from typing import Any

import numpy as np
import pytest

from data.checkpoints.config import GPT2Config
from data.ranks import Ranks
from data.tests.ranks import in_ranks
from parity_tests.weights import random_weights
from tinygrad_impl.device import open_device
from tinygrad_impl.kernels.tests.support import DEVICE

CONFIG = GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=1, n_head=2)
STEPS = 2


def trained(ranks: Ranks, zero: bool) -> dict[str, Any]:
    """Losses and norms of a few steps, the state after them, and what of each bucket a rank has."""
    os.environ["TRITON_INTERPRET"] = "1"  # of a process that has not imported Triton yet
    launch: Any = importlib.import_module("tinygrad_impl.kernels.launch")
    support: Any = importlib.import_module("tinygrad_impl.kernels.tests.support")
    launch.program = support.interpreted_program
    open_device("CPU")  # this process may have been forked from one that has not looked for a compiler
    from tinygrad_impl.kernels.fused import Fused
    from tinygrad_impl.trainer import Trainer

    trainer = Trainer(CONFIG, random_weights(CONFIG, 0, 0.2), backend=Fused(support.THIS_GPU), ranks=ranks, zero=zero)
    rows = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (STEPS, 4, 2, 9), np.int32)
    share = 4 // ranks.size
    said = []
    for step in range(STEPS):
        own = rows[step, ranks.rank * share :][:share]
        said.append(trainer.step([(b[:, :-1].copy(), b[:, 1:].copy()) for b in own], 1e-2))
    copies = {name: copy.float().numpy() for name, copy in trainer.backend.copies.items()}  # type: ignore[attr-defined]
    sizes = {part.bucket.name: part.parameters.numel() / part.bucket.size for part in trainer.parts}
    held = set(trainer.weights.memory)
    return {"said": said, "state": trainer.arrays() | trainer.moments(), "copies": copies, "sizes": sizes, "held": held}


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="two ranks cannot share one GPU: they are interpreted where there is none")
def test_two_ranks_compute_what_one_does(device: None) -> None:
    one = in_ranks(1, trained, True)[0]
    for zero in (True, False):
        for found in in_ranks(2, trained, zero):
            assert set(found["sizes"].values()) == {0.5 if zero else 1.0}
            assert found["held"] == ({"rest"} if zero else {"h.0", "rest"})
            np.testing.assert_allclose(found["said"], one["said"], rtol=1e-6)
            for name, array in one["state"].items():
                error = np.linalg.norm(found["state"][name] - array) / np.linalg.norm(array)
                assert error < 1e-4, (zero, name, error)
            for name, copy in one["copies"].items():
                error = np.linalg.norm(found["copies"][name] - copy) / np.linalg.norm(copy)
                assert error < 1e-3, (zero, name, error)
