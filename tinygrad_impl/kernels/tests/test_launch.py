"""How a kernel becomes a program of tinygrad's: its tensors, sizes and names, and what the GPU is told."""

import pickle
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tinygrad import Tensor, dtypes
from tinygrad.engine.realize import runtime_cache
from tinygrad.runtime import ops_cuda
from tinygrad.uop.ops import Ops, UOp

from data.cli import InputError
from tinygrad_impl import compilers
from tinygrad_impl.kernels.tests.support import DEVICE  # first: it readies Triton's interpreter

from tinygrad_impl.kernels import GPU, launch  # isort: skip
from tinygrad_impl.kernels.launch import Binary, Compiled, Launch  # isort: skip


GPU_90 = GPU(90, 132)
TENSORS = "CUDA" if DEVICE == "cuda" else "CPU"


class Kernel:
    """Stands for what triton.jit makes."""

    __name__ = "add_kernel"
    arg_names = ("out", "parts", "x", "B", "K", "EARLY")


add_kernel = Kernel()  # by this name other processes find it
CONSTANTS = {"K": 7, "EARLY": True, "B": 3, "OTHER": 5}
ADD = Launch(add_kernel, (6, 2), CONSTANTS, warps=8, stages=3, flops=50, bytes=70, descriptors=12, groups=(0, 3, 0))


def placeholders(*types: Any) -> tuple[UOp, ...]:
    return tuple(UOp.placeholder((4,), dtype, i) for i, dtype in enumerate(types))


ARGS = placeholders(dtypes.float32, dtypes.bfloat16, dtypes.int32, dtypes.int64, dtypes.float64, *[dtypes.uint8] * 2)


def test_name() -> None:
    """The kernel's own without its ending, and its sizes in one order, whatever order they were given in."""
    assert ADD.name == "add_3_7"
    assert (
        Launch(Kernel(), (1,), {"V": 2, "T": 4, "H": 5, "D": 6, "M": 1, "N": 8, "R": 9, "C": 3}).name
        == "add_4_5_6_1_8_9_3_2"
    )


def test_waits() -> None:
    assert ADD.waits
    assert not Launch(Kernel(), (1,), {"EARLY": False}).waits
    assert not Launch(Kernel(), (1,), {"K": 1}).waits


def test_arguments() -> None:
    """In groups where parameters are tuples, also of one tensor; else one by one."""
    assert ADD.arguments([*"abcde"]) == ["a", ("b", "c", "d"), "e"]
    assert Launch(Kernel(), (1,), {}, groups=(1, 0, 2)).arguments([*"abcd"]) == [("a",), "b", ("c", "d")]
    assert Launch(Kernel(), (1,), {}).arguments([*"abc"]) == ["a", "b", "c"]


def test_wrap() -> None:
    uop = launch.wrap(GPU_90, ADD, 2, ARGS)
    info, sink = uop.arg, uop.src[0]
    assert (info.name, info.global_size, info.local_size) == ("add_3_7", (6, 2, 1), (256, 1, 1))
    assert (info.globals, info.ins) == (tuple(range(7)), tuple(range(7)))
    assert info.outs == (0, 1, 5)  # and the first scratch
    assert (sink.arg.name, sink.arg.estimates.ops, sink.arg.estimates.mem, sink.arg.estimates.lds) == (
        "add_3_7",
        50,
        70,
        70,
    )
    assert len(sink.src) == len(ARGS)
    source = next(u for u in uop.src if u.op is Ops.SOURCE)
    for other in (Launch(Kernel(), (6, 3), CONSTANTS), Launch(Kernel(), (6, 2), CONSTANTS | {"K": 8})):
        assert launch.wrap(GPU_90, other, 2, ARGS).key != uop.key
    assert "'K': 7" in source.arg


class Loaded:
    """Stands for tinygrad's CUDAProgram."""

    prg, other = "function", "anything else"

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args, options


def compiled(
    kernel: Launch, scratch: int, monkeypatch: pytest.MonkeyPatch, capability: int = 90, warps: int | None = None
) -> tuple[Any, list[Any]]:
    """A kernel that has been compiled, and what the driver is told when it is loaded."""
    told: list[Any] = []

    def set_attribute(*given: Any) -> int:
        told.append(given)
        return 0

    def runtime(obj: Any) -> Loaded:
        told.append((obj.name, obj.lib))
        return Loaded()

    monkeypatch.setattr(ops_cuda, "check", lambda code: told.append(("check", code)))
    monkeypatch.setattr(ops_cuda.cuda, "cuFuncSetAttribute", set_attribute)
    device = SimpleNamespace(renderer=SimpleNamespace(target=SimpleNamespace(arch="sm_90")), runtime=runtime)
    monkeypatch.setattr(launch, "Device", {"GPU": device})
    future: Future[Binary] = Future()
    warps = kernel.warps if warps is None else warps
    future.set_result(Binary("entry", f"sm_{capability}", b"code", "assembly", warps, 1234, scratch))
    return Compiled(kernel, future, "GPU", launch.wrap(GPU_90, kernel, 2, ARGS)), told


def test_it_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is first asked for, with all the shared memory that it takes."""
    program, told = compiled(ADD, 640, monkeypatch)
    assert told == []
    assert program(1, 2, wait=True) == ((1, 2), {"wait": True})
    assert program.other == "anything else"
    assert program.smem == 1234
    attribute = ops_cuda.cuda.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert told == [("entry", b"code"), ("function", attribute, 1234), ("check", 0)]


def test_for_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is given the assembly, which ends with a 0, and what is compiled for that is another program."""
    program, told = compiled(ADD, 640, monkeypatch, capability=80)
    program()
    assert told[0] == ("entry", b"assembly\0")
    assert launch.wrap(GPU(80, 132), ADD, 2, ARGS).key != launch.wrap(GPU_90, ADD, 2, ARGS).key


def test_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's word for it would not tell what to do; what else it refuses goes by as it is."""
    for error, expected, said in (("INVALID_IMAGE", InputError, "rm -r "), ("OUT_OF_MEMORY", RuntimeError, "MEMORY")):
        program, _ = compiled(ADD, 640, monkeypatch)

        def refuse(obj: Any, error: str = error) -> None:
            raise RuntimeError(f"module load failed with status code 200: CUDA_ERROR_{error}")

        monkeypatch.setattr(launch.Device["GPU"], "runtime", refuse)
        with pytest.raises(expected, match=said):
            program()


@pytest.mark.parametrize(("descriptors", "scratch"), [(3, 385), (0, 1)])
def test_more_scratch_than_it_gets(descriptors: int, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Launch(Kernel(), (1,), CONSTANTS, descriptors=descriptors)
    program, _ = compiled(kernel, scratch, monkeypatch)
    with pytest.raises(AssertionError):
        program()


def test_warps_of_a_kernel_in_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that its first warps give work to are threads of a program too."""
    kernel = Launch(Kernel(), (1,), CONSTANTS, warps=4, workers=8)
    assert launch.wrap(GPU_90, kernel, 2, ARGS).arg.local_size == (384, 1, 1)
    assert compiled(kernel, 0, monkeypatch, warps=12)[0].smem == 1234
    with pytest.raises(AssertionError):
        compiled(kernel, 0, monkeypatch, warps=8)[0]()


def test_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for its tensors' dtypes and the device's architecture, by another process."""
    asked: list[Any] = []
    compiled(ADD, 0, monkeypatch)

    def compile_kernel(*given: Any) -> Any:
        asked.append(given)
        metadata = SimpleNamespace(name="entry", num_warps=8, shared=1234, global_scratch_size=640)
        return SimpleNamespace(metadata=metadata, asm={"cubin": b"code", "ptx": "assembly"})

    def in_a_compiler(*given: Any) -> Any:
        function, *args = pickle.loads(pickle.dumps(given))
        return pickle.loads(pickle.dumps(function(*args)))

    monkeypatch.setattr(launch, "compile_kernel", compile_kernel)
    monkeypatch.setattr(compilers, "in_a_compiler", in_a_compiler)
    uop = launch.program(GPU_90, ADD, 2, "GPU", *ARGS)
    assert launch.program(GPU_90, ADD, 2, "GPU", *ARGS) is uop
    made, binary = runtime_cache[uop.key, "GPU"], Binary("entry", "sm_90", b"code", "assembly", 8, 1234, 640)
    assert (made.kernel, made.device, made.uop, made.binary.result()) == (ADD, "GPU", uop, binary)
    types = dtypes.float32, dtypes.bfloat16, dtypes.int32, dtypes.int64, dtypes.float64
    assert asked == [(ADD, types, "sm_90")]
    older = launch.program(GPU(80, 132), ADD, 2, "GPU", *ARGS)
    assert (older.key != uop.key, runtime_cache[older.key, "GPU"].binary.result()) == (
        True,
        replace(binary, arch="sm_80"),
    )
    assert [arch for *_, arch in asked] == ["sm_90", "sm_80"]
    assert asked[1:] == [(ADD, types, "sm_80")]
    other = Launch(Kernel(), (6, 2), CONSTANTS | {"K": 8}, warps=8, stages=3, flops=50, bytes=70, groups=(0, 3, 0))
    assert launch.program(GPU_90, other, 2, "GPU", *ARGS) is not uop


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error comes back from the other process, which Triton's own, that need arguments, would not."""

    class Failed(Exception):
        def __init__(self, what: str, where: int):
            super().__init__(f"{what} at {where}")

    def compile_kernel(*given: Any) -> Any:
        raise Failed("a wrong shape", 3)

    monkeypatch.setattr(launch, "compile_kernel", compile_kernel)
    with pytest.raises(RuntimeError, match=r"add_kernel of .*'K': 7.*Failed: a wrong shape at 3") as found:
        launch.compile_named(*launch.named(ADD), (), "sm_90")
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)


def test_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 bytes for each of a program's tensor descriptors, and one byte where it has none."""
    found: list[tuple[int, ...]] = []

    def program(gpu: GPU, kernel: Launch, outs: int, device: str, *args: UOp) -> UOp:
        found.append(tuple(arg.max_numel() for arg in args[-2:]))
        return args[0].sink()

    monkeypatch.setattr(launch, "program", program)
    for kernel in (ADD, Launch(Kernel(), (6, 2), CONSTANTS)):
        launch.launch(GPU_90, kernel, [Tensor.invalids(4, device=TENSORS)], Tensor.zeros(4, device=TENSORS))
    assert found == [(12 * 128 * 12, 1), (1, 1)]
