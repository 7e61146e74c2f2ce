"""What an interpreter does not see: whether kernels compile, and fit into a multiprocessor's shared memory."""

import json
import os
import subprocess
import sys

import pytest

# Bytes that a program may have (CUDA C++ programming guide, "Technical Specifications per Compute Capability"), by
# compute capability: of an A100, an RTX 3090 (a 4090 has the same), an H100 and an RTX 5090.
LIMITS = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 120: 99 << 10}
SPILLED = 512  # bytes of a thread: sums of a tile that are kept in local memory, which makes a GEMM four times slower


# half a minute each, but for the first; `test_tiles_fit_the_gpu` works out what the tiles of the others take
@pytest.mark.parametrize("target", ["90 llir", *(pytest.param(str(other), marks=pytest.mark.slow) for other in LIMITS)])
def test_kernels_fit(target: str) -> None:
    capability, *stage = target.split()
    command = [sys.executable, "-m", "tinygrad_impl.kernels.tests.compiled", capability, *stage]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout)
    assert {name: shared for name, shared, _ in sizes if shared > LIMITS[int(capability)]} == {}
    assert {name: local for name, _, local in sizes if local >= SPILLED} == {}
    assert len(sizes) > 50
