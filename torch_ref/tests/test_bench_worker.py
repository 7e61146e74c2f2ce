"""PyTorch's part in a comparison of speed, on several ranks; tinygrad_impl/tests/test_bench.py tests it on one."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.checkpoints.config import GPT2Config
from data.checkpoints.initialize import initial_weights
from data.ranks import Ranks
from data.tests.ranks import in_ranks
from torch_ref.bench_worker import LR, Peer

CONFIG = GPT2Config(vocab_size=128, n_layer=1, n_head=2, n_embd=16, n_positions=16)
STEPS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """all.npy has batches of four windows, 0.npy the first two of each and 1.npy the others."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 4, 17), np.int32)
    tokens[:, :2] //= 4  # so that the two ranks' gradients are not alike
    for name, part in {"all": tokens, "0": tokens[:, :2], "1": tokens[:, 2:]}.items():
        np.save(tmp_path / f"{name}.npy", part)
    weights = initial_weights(CONFIG, 3).values()
    (tmp_path / "weights").write_bytes(b"".join(array.tobytes() for array in weights))
    return tmp_path


def asked(tokens: Path) -> dict[str, Any]:
    return {
        "config": asdict(CONFIG),
        "weights": str(tokens.with_name("weights")),
        "tokens": str(tokens),
        "dtype": "float32",
        "device": "cpu",
        "compile": False,
    }


def trained(ranks: Ranks, folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    peer = Peer(**asked(folder / f"{ranks.rank}.npy"), ranks=True)
    peer.run(STEPS)
    return peer.first_loss, peer.model.arrays()


def test_two_ranks_do_the_work_of_one_process(folder: Path) -> None:
    """The losses, each rank's of its own tokens, and the weights after some steps."""
    peer = Peer(**asked(folder / "all.npy"))
    peer.run(STEPS)
    (one, weights), (other, same) = in_ranks(2, trained, folder)
    assert one != other
    assert (one + other) / 2 == pytest.approx(peer.first_loss, rel=1e-6)
    for name, array in peer.model.arrays().items():
        np.testing.assert_allclose(weights[name], array, rtol=0, atol=LR / 10, err_msg=name)
        np.testing.assert_array_equal(weights[name], same[name], err_msg=name)


@pytest.mark.slow  # of processes that import PyTorch; quicker, the same without them is seen above
def test_processes_that_train_together(folder: Path) -> None:
    """As tinygrad_impl.bench starts and asks them, and as it ends them, by the end of stdin."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch_ref.bench_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | place | {"OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[2],
            )
        )
    for rank, process in enumerate(processes):
        assert process.stdin
        build = {"do": "build", "warm_up": 3, **asked(folder / f"{rank}.npy"), "ranks": True}
        process.stdin.write(f"{json.dumps(build)}\n{json.dumps({'do': 'run', 'steps': 2})}\n")
        process.stdin.close()
    for process in processes:
        assert process.stdout
        begun, turn = (json.loads(line) for line in process.stdout)
        assert len(begun["seconds"]) == 3
        assert len(turn["seconds"]) == 2
        assert begun["first_loss"] == turn["first_loss"] > 1
        assert process.wait(60) == 0
