"""What is joined, and that what is not is computed all the same: with the right gradients, whatever stands next to it."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from tinygrad import Tensor
from tinygrad.uop.ops import Ops, PatternMatcher, UOp

import tinygrad_impl.functional as F
import torch_ref.model
from data.checkpoints.config import GPT2Config
from parity_tests.weights import random_weights
from tinygrad_impl.kernels.fused import Fused
from tinygrad_impl.kernels.tests.support import THIS_GPU, relative_error
from tinygrad_impl.model import GPT2, MLP
from tinygrad_impl.trainer import Trainer

from tinygrad_impl.kernels import joins  # isort: skip: after the support

pytestmark = pytest.mark.usefixtures("device")

STRICT, LOOSE = Fused(THIS_GPU, strict=True), Fused(THIS_GPU)
X = np.array([[1, 2, 3, 1]], np.int32)
Y = np.array([[2, 3, -100, 4]], np.int32)


def config_of(layers: int) -> GPT2Config:
    return GPT2Config(vocab_size=40, n_positions=8, n_embd=64, n_layer=layers, n_head=2)


def loss_of(model: GPT2) -> Tensor:
    _, loss = model(Tensor(X), Tensor(Y))
    assert loss is not None
    return loss


def nodes(*tensors: Tensor) -> Counter[str]:
    """How many there are, by name."""
    graph = UOp.sink(*(t.uop for t in tensors))
    return Counter(uop.tag for uop in graph.toposort() if uop.op is Ops.FUNCTION and uop.tag)


def joined(*tensors: Tensor) -> Counter[str]:
    return nodes(*map(Tensor, joins.joined(UOp.sink(*(t.uop for t in tensors))).src))
