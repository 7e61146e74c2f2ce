"""Before any test imports Triton: where there is no NVIDIA GPU, its kernels run in its interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
