"""The reference alone: against Hugging Face's GPT-2, and its trainer's and generation's own promises."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data.checkpoints.checkpoint import load
from data.checkpoints.config import GPT2Config
from data.text.loader import IGNORED
from data.text.tokenizer import EOT
from torch_ref.generate import generate
from torch_ref.model import GPT2
from torch_ref.testing import Scripted, hugging_face, save_small_gpt2
from torch_ref.trainer import Trainer

Checkpoint = tuple[GPT2Config, dict[str, np.ndarray]]


def random_batch(B: int, T: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (B, T), int32; every fifth target is ignored."""
    rows = np.random.default_rng(seed).integers(0, EOT + 1, (B, T + 1)).astype(np.int32)
    x, y = rows[:, :-1].copy(), rows[:, 1:].copy()
    y.flat[3::5] = IGNORED
    return x, y


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_small_gpt2(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load(folder)


@torch.no_grad()
def test_logits_are_those_of_hugging_face(folder: Path, checkpoint: Checkpoint) -> None:
    config, arrays = checkpoint
    x, _ = random_batch(2, config.n_positions, seed=0)
    model = GPT2(config, {name: array.astype(np.float64) for name, array in arrays.items()})
    ours, loss = model(torch.tensor(x))
    theirs = hugging_face(folder, torch.float64)(torch.tensor(x, dtype=torch.long)).logits
    assert loss is None
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-13


def test_compiled_is_the_same(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        calls.append(graph)
        return graph

    plain = Trainer(*checkpoint)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))  # the default needs a C++ compiler
    compiled = Trainer(*checkpoint, compile=True)
    for step in range(2):
        batches = [random_batch(2, 16, seed=step)]
        assert compiled.step(batches, 1e-3) == pytest.approx(plain.step(batches, 1e-3), rel=1e-6)
    assert len(calls) == 1  # one graph, without a break


def test_bfloat16_autocast(checkpoint: Checkpoint) -> None:
    """Products in bfloat16, which keeps 8 bits, move the loss by less than one rounding; what is kept stays float32."""
    batches = [random_batch(2, 32, seed=0)]
    trainer = Trainer(*checkpoint, autocast=torch.bfloat16)
    loss, _ = trainer.step(batches, 1e-3)
    expected, _ = Trainer(*checkpoint).step(batches, 1e-3)
    print(f"loss in bfloat16 {loss}, in float32 {expected}, relative error {abs(loss - expected) / expected:.1e}")
    assert 0 < abs(loss - expected) / expected < 2**-8
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
    moments = trainer.optimizer.state.values()
    assert {moment[name].dtype for moment in moments for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_cuda_is_the_same(checkpoint: Checkpoint) -> None:
    ours, theirs = Trainer(*checkpoint, device="cuda"), Trainer(*checkpoint)
    for step in range(2):
        batches = [random_batch(2, 32, seed=step)]
        assert ours.step(batches, 1e-3) == pytest.approx(theirs.step(batches, 1e-3), rel=1e-4)


def test_only_matrices_decay(checkpoint: Checkpoint) -> None:
    trainer = Trainer(*checkpoint, weight_decay=0.3)
    names = {parameter: name for name, parameter in trainer.parameters.items()}
    decays = {names[p]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    matrices = ("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight")
    assert decays == {name: 0.3 if name.endswith(matrices) else 0.0 for name in trainer.parameters}


def test_generation_ends_before_end_of_text(checkpoint: Checkpoint) -> None:
    script = [[5, 6], [EOT, 7], [8, 9], [10, EOT]]  # and no fifth: both rows have ended
    assert generate(GPT2(*checkpoint), [[1, 2, 3], [4]], 40, Scripted(script), eot=EOT) == [[5], [6, 7, 9]]
