"""Compiles all kernels for an NVIDIA GPU that need not be there: `python -m tinygrad_impl.kernels.tests.compiled 86`.
With `llir` after it, up to LLVM's code: Triton has then checked everything and placed what is in shared memory, and
half of the work, which is that of LLVM and ptxas, is left out.

Prints, as JSON, how many bytes of shared memory each takes, and of local memory a thread, where registers are spilled
to. It is a process of its own: the tests' interprets kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from tinygrad import dtypes
from tinygrad.dtype import DType

from data.checkpoints.config import PRESETS
from tinygrad_impl.kernels import GPU, adamw, attention, cross_entropy, decode, embedding, layer_norm, matmul
from tinygrad_impl.kernels.fused import TOGETHER
from tinygrad_impl.kernels.joins import LAYERS
from tinygrad_impl.kernels.launch import DESCRIPTOR, Launch, compile_kernel

DTYPES = {"b": dtypes.bfloat16, "f": dtypes.float32, "d": dtypes.float64, "i": dtypes.int32, "l": dtypes.int64}
CONFIG = PRESETS["gpt2"]
B, T, H, C, V = 32, 1024, CONFIG.n_head, CONFIG.n_embd, CONFIG.vocab_size
R, PADDED = B * T, 50304


def training(gpu: GPU) -> Iterator[tuple[Launch, str]]:
    """Kernels with the dtypes of their tensors: what they write, what they read."""
    yield matmul.forward(gpu, R, C, 3 * C), "b bbf"
    yield matmul.forward(gpu, R, 4 * C, C), "b bbf"
    yield matmul.forward(gpu, R, C, 4 * C, gelu=True), "bb bbf"
    yield matmul.input_gradient(gpu, R, C, 3 * C), "b bb"
    yield matmul.input_gradient(gpu, R, C, C), "b bb"
    yield matmul.input_gradient(gpu, R, 4 * C, C, gelu=True), "bf bbb" if matmul.keeps_gelu(gpu, 4 * C) else "bbf bbb"
    yield matmul.input_gradient(gpu, R, 4096, 1024, gelu=True), "bbf bbb"
    if gpu.has_copy_engine:
        for rows, width, layers in ((R, C, LAYERS), (2 * R, 1280, 1)):
            sizes = layers * [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
            yield matmul.weight_gradients(gpu, rows, sizes), layers * "ffff" + layers * "bbbbbbbb"
    else:
        yield matmul.weight_gradient(gpu, R, C, 4 * C), "f bb"
    yield matmul.head(gpu, R, C, PADDED), "b bb"
    yield matmul.head_input_gradient(gpu, R, C, PADDED), "b bb"
    yield matmul.head_weight_gradient(gpu, R, C, PADDED, V), "f bb"
    yield matmul.head_weight_gradient(gpu, R, C, PADDED, V, R, add=True), "f bb"
    yield matmul.parts_of_column_sums(R, C, 64), "f f"
    layer = [(396, C, 3), (512, 3 * C, 1), (396, C, 3), (256, 4 * C, 1)]
    yield matmul.column_sums([*LAYERS * layer, (396, C, 3)]), (8 * LAYERS + 3) * "f" + (4 * LAYERS + 1) * "f"
    hopper = attention.fits_hopper(gpu, T, C // H)
    yield attention.forward(gpu, B, T, H, C // H), "bfi b" if hopper else "bf b"
    yield attention.query_gradient(gpu, B, T, H, C // H), "bff bbbf"
    if hopper:
        yield attention.hopper_gradient(gpu, B, T, H), "bfffi bbbf"
    yield attention.key_gradient(gpu, B, T, H, C // H), "bf bbff"
    yield layer_norm.forward(R, C, 1e-5, True), "fbff fbff"
    yield layer_norm.forward(R, C, 1e-5, False), "bff fff"
    yield from [(layer_norm.backward(gpu, R, width, True), "fbbf bffffff") for width in (C, 1600)]
    yield cross_entropy.forward(R, V, PADDED, -100), "fb if"
    yield cross_entropy.of_tokens(R, V, PADDED, -100), "fib i"
    to_keys, to_order = embedding.sort(R)
    runs, rest = embedding.sums(R, C)
    yield from [(to_keys, "i i"), (to_order, "i i"), (runs, "ff iif"), (rest, "f fii")]
    yield adamw.step([C * C, C], [0, C * C], [0.1, 0.0], [0, None], 0.9, 0.95, 1e-8), "fffb ff"
    yield adamw.squares(C * C), "f f"
    yield adamw.adding(TOGETHER * [C]), TOGETHER * "f" + TOGETHER * "f"
    yield adamw.rounding(C * C), "b f"


def generating(gpu: GPU) -> Iterator[tuple[Launch, str]]:
    for rows, tokens in ((1, 1), (4, 1), (64, 1), (4, 64)):
        k = decode.Launches(gpu, CONFIG, rows, tokens, V)
        yield from [(k.embed, "fff iiff"), (k.qkv, "bbb fffffbfi"), (k.attention, "b bbbi"), (k.project, "fff bbff")]
        yield from [(k.expand, "b fffffbf"), (k.contract, "fff bbff"), (k.head, "flf fffffb")]
    for activation in ("gelu", "relu"):
        variant = replace(CONFIG, activation_function=activation)
        yield decode.Launches(gpu, variant, 4, 1, V).expand, "b fffffbf"
    yield from [(k.greedy, "iiiif lf"), (k.sort, "ld fld"), (k.draw, "iiiif lflddd")]


def up_to_llir(*asked: Any) -> Any:
    """Triton's hook: the later stages give nothing. Asked for no stages, it says how such kernels are called in
    Triton's cache.
    """
    if not asked:
        return "llir", "llir"

    def nothing(source: Any, metadata: dict[str, Any]) -> bytes:
        metadata["name"] = ""
        return b""

    _, stages, *_ = asked
    stages |= {"ptx": nothing, "cubin": nothing}


def local_memory(cubin: bytes) -> int:
    """Bytes of a thread's, as NVIDIA's cuobjdump reads it, which Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return max(map(int, re.findall(r"STACK:(\d+)", said.stdout + said.stderr)))


def memory(capability: int) -> list[tuple[str, int, int]]:
    """Of each kernel for that compute capability, its name and bytes."""
    gpu = GPU(capability, multiprocessors=132)

    def compiled(kernel: Launch, letters: str) -> tuple[str, int, int]:
        types: tuple[DType, ...] = tuple(DTYPES[letter] for letter in letters.replace(" ", ""))
        made = compile_kernel(kernel, types, f"sm_{capability}")
        assert made.metadata.global_scratch_size <= DESCRIPTOR * kernel.descriptors, kernel.name
        assert made.metadata.maxnreg == kernel.registers, kernel.name
        cubin = made.asm["cubin"]
        return kernel.name, made.metadata.shared, local_memory(cubin) if cubin else 0

    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda pair: compiled(*pair), [*training(gpu), *generating(gpu)]))


if __name__ == "__main__":
    if "llir" in sys.argv[2:]:
        triton.knobs.runtime.add_stages_inspection_hook = up_to_llir
        triton.knobs.cache.dir = f"{triton.knobs.cache.dir}-llir"  # Triton 3.6 would take its results for whole ones
    print(json.dumps(memory(int(sys.argv[1]))))
