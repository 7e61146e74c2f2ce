"""Bugs in what GPUs before Hopper compute, and in `--arch`, by which a newer one computes it in their stead."""

from parity_tests.catalogue import Row
from parity_tests.catalogue.kernels import ATTENTION, ATTENTIONS, BACKEND, CHOICES, GPU, GPUS, LAUNCH, LAUNCHES, MATMULS

POINTERS = "tinygrad_impl/kernels/pointers.py"
BENCH, PORT, BENCHES = "tinygrad_impl/bench.py", "tinygrad_impl/bench_port.py", "tinygrad_impl/tests/test_bench.py"
AS_ANOTHER = f"{BENCHES}::test_as_another_gpu"

PLANTED: list[Row] = [
    (
        "pointers: each part begins with the first rows",
        POINTERS,
        "first = part * steps * BK",
        "first = part * 0",
        f"{MATMULS}::test_weight_gradient[3-200-64-192-sm_80]",
    ),
    (
        "pointers: what is past the sum's last row is added",
        POINTERS,
        "deep = first + step * BK + k < K",
        "deep = first + step * BK + k < K + BK",
        f"{MATMULS}::test_weight_gradient[3-200-64-192-sm_80]",
    ),
    (
        "pointers: rows past the last count in the sums of a tile",
        POINTERS,
        "(m + rows < M)[:, None]",
        "(m + rows < M + BM)[:, None]",
        f"{MATMULS}::test_input_gradient[72-128-320-sm_80]",
    ),
    (
        "pointers: the second factor does not move on",
        POINTERS,
        "b_at += BK * b_step",
        "b_at += 0",
        f"{MATMULS}::test_forward[200-64-192-sm_80]",
    ),
    (
        "the two sums of attention's gradient are of different rows",
        ATTENTION,
        "attention_key_gradient: Tiles(0.5, 2, ",
        "attention_key_gradient: Tiles(0.5, 1, ",
        f"{ATTENTIONS}[2-70-3-32-16-sm_80]",
    ),
    (
        "an older GPU's machine code is loaded",
        LAUNCH,
        "if binary.arch == arch else",
        "if True else",
        f"{LAUNCHES}::test_for_an_older_gpu",
    ),
    (
        "assembly without its end",
        LAUNCH,
        '"ascii") + b"\\0"',
        '"ascii")',
        f"{LAUNCHES}::test_for_an_older_gpu",
    ),
    (
        "kernels of two GPUs are one",
        LAUNCH,
        "repr((gpu.arch, ",
        "repr((",
        f"{LAUNCHES}::test_for_an_older_gpu",
    ),
    (
        "kernels are compiled for Hopper",
        LAUNCH,
        "*named(kernel), types, gpu.arch)",
        '*named(kernel), types, "sm_90")',
        f"{LAUNCHES}::test_program",
    ),
    (
        "a newer GPU's kernels are not refused",
        GPU,
        '(a for a in PORTABLE if int(a.removeprefix("sm_")) < self.capability)',
        "PORTABLE",
        f"{GPUS}::test_another_in_its_stead",
    ),
    (
        "the multiprocessors that --arch names are left out",
        GPU,
        "int(count or self.multiprocessors)",
        "self.multiprocessors",
        f"{GPUS}::test_another_in_its_stead",
    ),
    (
        "an A100 has a gaming card's shared memory",
        GPU,
        "in (80, 87)",
        "in (87,)",
        f"{GPUS}::test_what_a_gpu_has",
    ),
    (
        "--arch is left out where there is no GPU",
        BACKEND,
        'if arch and device != "CUDA":',
        "if arch == device:",
        f"{CHOICES}::test_another_gpu_in_its_stead",
    ),
    (
        "--arch with kernels that cannot be becomes tinygrad's own",
        BACKEND,
        'if reason and (wanted == "fused" or arch):',
        'if reason and wanted == "fused":',
        f"{CHOICES}::test_another_gpu_in_its_stead",
    ),
    (
        "--arch does not reach the kernels",
        BACKEND,
        "gpu_of(device, arch)",
        "gpu_of(device)",
        f"{CHOICES}::test_another_gpu_in_its_stead",
    ),
    (
        "the ceiling of --arch is PyTorch's",
        BENCH,
        "ceiling |= product_ceiling(backend.gpu, device)",
        "product_ceiling(backend.gpu, device)",
        AS_ANOTHER,
    ),
    (
        "one GPU by itself is measured as it is",
        BENCH,
        '"arch": args.arch}',
        '"arch": None}',
        AS_ANOTHER,
    ),
    (
        "a process of its own forgets --arch",
        PORT,
        'bfloat16=dtype == "bfloat16", arch=arch)',
        'bfloat16=dtype == "bfloat16", arch=None)',
        AS_ANOTHER,
    ),
    (
        "a ceiling of one call instead of ten",
        PORT,
        "kernel.flops * CALLS",
        "kernel.flops",
        f"{MATMULS}::test_ceiling",
    ),
]
