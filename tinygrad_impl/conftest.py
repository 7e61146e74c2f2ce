"""Before any test imports Triton: where there is no NVIDIA GPU, its kernels run in its interpreter."""

import ctypes
import os

try:
    found = ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
except OSError:  # no driver
    found = False
if not found:
    os.environ["TRITON_INTERPRET"] = "1"
