"""How processes that train together are started, and what each of them gets of the machine."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data.gpu
import data.launch
import data.ranks
from data.cli import InputError, Lost, interpreter
from data.launch import (
    command_as_started,
    launch,
    leave_last_words,
    note_idle_gpus,
    place_process,
    processes,
    without_option,
)
from data.ranks import Place, first_host, meeting_point, place, rank_device, wait_for_turn
from data.runs.global_batch import accumulated
from data.runs.options import parse, parser

EXAMPLES = Path(__file__).parents[1] / "runs" / "examples"
SET_BY_OTHERS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SET_BY_OTHERS, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    with_gpus(monkeypatch, 0)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(data.gpu, "installed", lambda: count)


def slurm(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    """The environment of rank 6, the third of four on the second host of a step."""
    default = {"PROCID": 6, "STEP_NUM_TASKS": 7, "LOCALID": 2, "NODEID": 1, "STEP_TASKS_PER_NODE": "4,3"}
    default |= {"JOB_ID": 77, "STEP_ID": 1, "STEP_NODELIST": "gpu3,gpu4"}
    for name, value in (default | values).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes("3", "CPU") == 3
    with_gpus(monkeypatch, 4)
    assert [processes(wanted, device) for wanted, device in (("2", None), ("all", "cuda"), ("4", "CUDA"))] == [2, 4, 4]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,-1,0")
    assert processes("all", None) == 2


@pytest.mark.parametrize(
    ("installed", "wanted", "device", "words"),
    [
        (0, "2", None, "finds no GPU here; leave it out, or try several processes on CPUs: --device CPU --gpus 2"),
        (0, "all", None, "finds no GPU here; leave it out"),
        (1, "2", None, "there is 1 GPU here, fewer than --gpus 2; give --gpus 1"),
        (2, "3", None, "there are 2 GPUs here, fewer than --gpus 3; give --gpus 2"),
        (4, "2", "cuda:1", "without --device cuda:1; leave out one of them"),
        (4, "all", "CPU", "with --device CPU give the number of processes"),
        (4, "2", "METAL", "leave it out with --device METAL"),
    ],
)
def test_processes_that_cannot_be_had(
    installed: int, wanted: str, device: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, installed)
    with pytest.raises(InputError, match=re.escape(words)):
        processes(wanted, device)


def test_processes_that_others_have_started_start_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="leave --gpus out"):
        processes("2", "CPU")


@pytest.mark.parametrize("text", ["0", "-1", "some", "1.5", "", "٣"])
def test_what_is_no_number_of_gpus(text: str) -> None:
    with pytest.raises(InputError, match=r"argument --gpus: .*is neither a number of GPUs from 1 on nor `all`"):
        parse(parser("python -m it", "it"), [f"--gpus={text}"])


def test_the_option_is_not_passed_on() -> None:
    words = ["--out", "r", "--gpus", "2", "--data", "a", "b", "--quiet"]
    assert without_option(words) == ["--out", "r", "--data", "a", "b", "--quiet"]
    assert without_option(["--gpus=all", "--steps", "3"]) == ["--steps", "3"]


def test_one_process_is_this_one() -> None:
    assert launch("it", [], "1", "CPU", 600) is None  # type: ignore[func-returns-value]


def launched(monkeypatch: pytest.MonkeyPatch, codes: dict[int, int], ranks: Callable[[], None] = lambda: None) -> Any:
    """What a job started with whose ranks ended with these codes, in this order, after doing `ranks`."""
    import torch.distributed.launcher.api as api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    started: list[Any] = []

    def started_with(config: Any, entrypoint: str) -> Any:
        def run(*words: str) -> None:
            started.extend([config.nproc_per_node, entrypoint, *words])
            ranks()
            if codes:
                raise ChildFailedError("it", {rank: ProcessFailure(rank, 70 + rank, codes[rank], "") for rank in codes})

        return run

    monkeypatch.setattr(api, "elastic_launch", started_with)
    monkeypatch.setattr("logging.disable", lambda level: None)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    launch("a.module", ["--gpus", "3", "--steps", "5"], "3", "CPU", 600, "nothing was done")
    return started


@pytest.mark.parametrize(("codes", "code"), [({1: 2}, 2), ({0: 130}, 130), ({1: -9, 0: 1}, 1), ({}, 0)])
def test_the_exit_code_of_a_job(codes: dict[int, int], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third a rank has told that another was killed."""
    with pytest.raises(SystemExit) as ended:
        launched(monkeypatch, codes)
    assert ended.value.code == code


def test_the_option_is_not_passed_on_to_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "exit", lambda code: None)
    assert launched(monkeypatch, {}) == [3, sys.executable, "-m", "a.module", "--steps", "5"]


@pytest.mark.parametrize(
    ("number", "by"), [(9, "SIGKILL (dmesg tells if memory ran out)"), (15, "SIGTERM"), (40, "signal 40")]
)
def test_a_rank_that_is_killed_before_the_others_miss_it(number: int, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    again = f"start the job again with `{interpreter()} -m a.module --gpus 3 --steps 5`"
    with pytest.raises(Lost) as lost:
        launched(monkeypatch, {2: -number, 0: -15, 1: -15})
    assert str(lost.value) == f"rank 2 (process 72) was killed by {by}; {again}"


@pytest.mark.parametrize(
    ("last", "said"), [(None, "nothing was done\n"), ("it goes on with it", "it goes on with it\n"), ("", "")]
)
def test_a_job_that_is_asked_to_stop(
    last: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was last left to its launcher is said; nothing, once the ranks speak themselves."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def stopped() -> None:
        if last is not None:
            leave_last_words("something longer that it said before")
            leave_last_words(last)
        raise SignalException("it", signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        launched(monkeypatch, {}, stopped)
    assert ended.value.code == 143
    assert capsys.readouterr().err == said
    assert "GPT2_LAST_WORDS" not in os.environ


def test_the_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: kept.append(cores))
    for local_rank in range(2):
        assert rank_device("cpu", Place(2 + local_rank, 4, local_rank, 2)) == "CPU"
    assert rank_device(None, Place(5, 8, 5, 8)) == "CPU"
    assert kept == [[2, 3], [5, 7], [3]]


def test_each_rank_has_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 4)
    assert rank_device(None, Place(4, 7, 1, 4)) == "CUDA"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,4,2,0")
    assert rank_device("CUDA", Place(5, 7, 2, 4)) == "CUDA"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(
    ("installed", "device", "words"),
    [
        (2, None, "this host has 2 GPUs for 3 processes; start 2 on it (torchrun --nproc-per-node 2), or give"),
        (0, "CUDA", "this host has no GPU for its 3 processes; give --device CPU"),
        (4, "CUDA:1", "there is no --device CUDA:1; give --device CUDA"),
        (4, "METAL", "not on METAL; give --device CPU"),
    ],
)
def test_devices_that_ranks_cannot_have(
    installed: int, device: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, installed)
    with pytest.raises(InputError, match=re.escape(words)):
        rank_device(device, Place(0, 3, 0, 3))


def test_a_task_that_srun_shows_one_gpu_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert rank_device(None, Place(6, 7, 2, 3)) == "CUDA"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_what_is_said_of_ranks_and_of_idle_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_gpus(monkeypatch, 4)
    for given in ({}, {"quiet": True}, {"gpus": "1"}, {"device": "cuda:1"}):
        note_idle_gpus(given, "CUDA")
    note_idle_gpus({}, "CPU")
    said = "note: this host has 4 GPUs, and training uses one of them; --gpus all uses them all\n"
    assert capsys.readouterr().out == said
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    note_idle_gpus({}, "CUDA")
    assert place_process("it", [], {"device": "CPU"}) == "CPU"
    assert capsys.readouterr().out.startswith("4 ranks, 2 of them on this host, on CPUs, 4 cores each\nopening ")
    monkeypatch.setenv("RANK", "1")
    place_process("it", [], {"device": "CPU"})
    assert capsys.readouterr().out == ""


RANK = {"RANK": 4, "WORLD_SIZE": 6, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 3}
TORCHRUN = ["/bin/python", "/there/torchrun", "--nnodes", "2", "-m", "it", "--out", "a"]


def test_the_command_that_goes_on_starts_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(parent: list[str] | None = None) -> str:
        monkeypatch.setattr(Path, "read_text", lambda file: "\0".join([*(parent or ["/sbin/init"]), ""]))
        return command_as_started("it", "--resume", "a run")

    python = interpreter()
    plain = f"{python} -m it --resume 'a run'"
    assert found() == plain
    slurm(monkeypatch, STEP_NUM_NODES=2)
    assert found() == f"srun --nodes 2 --ntasks 7 {plain}"
    for name, value in RANK.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert found(TORCHRUN) == "/there/torchrun --nnodes 2 -m it --resume 'a run'  # on each host"
    module = ["/bin/python", "-m", "torch.distributed.run", *TORCHRUN[2:]]
    assert found(module) == f"{python} -m torch.distributed.run --nnodes 2 -m it --resume 'a run'  # on each host"
    assert found() == "torchrun --nproc-per-node 3 -m it --resume 'a run'  # on each host"
    monkeypatch.setenv("GPT2_GPUS", "all")
    assert found() == f"{plain} --gpus all"


def test_pytorch_is_quiet_before_it_is_imported() -> None:
    """Its C++ would tell of a host that does not answer, too."""
    code = "import os, sys, torch_ref; print(os.environ['TORCH_CPP_LOG_LEVEL'], 'torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, env={}, text=True) == "FATAL False\n"


def test_tasks_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch)
    assert place() == Place(rank=6, size=7, local_rank=2, local_size=3)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert place() == Place(rank=6, size=7, local_rank=2, local_size=4)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert place() is None
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("SLURM_NTASKS", "7")  # in a script of sbatch's, of the tasks to come
    assert place() is None


def test_torchrun_under_srun_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch)
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert place() == Place(rank=1, size=4, local_rank=1, local_size=2)


@pytest.mark.parametrize(
    "changed",
    [{"LOCALID": "x"}, {"STEP_NUM_TASKS": "x"}, {"STEP_TASKS_PER_NODE": "4"}, {"STEP_TASKS_PER_NODE": "4(2),1"}],
)
def test_what_srun_does_not_say(changed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, **changed)
    with pytest.raises(
        InputError, match=r"srun sets SLURM_PROCID, .* and here are SLURM_PROCID=6, .*; start this with srun"
    ):
        place()


def test_where_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="MASTER_ADDR=None and MASTER_PORT=None; export the host of rank 0"):
        meeting_point()
    slurm(monkeypatch)
    host, port = meeting_point()
    assert host == "gpu3"
    assert 20000 <= port < 30000
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    assert meeting_point()[1] != port
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "80")
    assert meeting_point() == ("here", 80)
    monkeypatch.setenv("MASTER_PORT", "80000")
    with pytest.raises(InputError, match="MASTER_PORT=80000"):
        meeting_point()


def test_the_first_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [first_host(hosts) for hosts in ("gpu7", "gpu7,gpu1", "", "gpu[07-09,12]")] == ["gpu7", "gpu7", None, None]
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[07-09]" ] && echo gpu07\necho gpu08\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    assert first_host("gpu[07-09]") == "gpu07"


def test_the_first_rank_of_a_host_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(data.ranks.time, "sleep", slept.append)
    wait_for_turn()
    monkeypatch.setenv("RANK", "4")
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        wait_for_turn()
    assert slept == [data.ranks.TURN]


@pytest.mark.parametrize("file", sorted(EXAMPLES.iterdir()), ids=lambda file: file.name)
def test_the_examples(file: Path, tmp_path: Path) -> None:
    """What they start, where these programs only print their arguments: it has these options, and a run of its own."""
    programs = {"srun": 'printf "%s\\n" "$@"', ".venv/bin/torchrun": 'printf "%s\\n" .venv/bin/torchrun "$@"'}
    programs |= {"nvidia-smi": "printf 'GPU\\nGPU\\nGPU\\nGPU\\n'", "scontrol": "printf 'gpu7\\ngpu8\\n'"}
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4077", "SLURM_JOB_NODELIST": "gpu[7-8]", "SLURM_CPUS_PER_TASK": "8"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **job}
    of_slurm = file.suffix == ".sbatch"
    cases = [([], "runs/4077"), (["runs/b"], "runs/b")] if of_slurm else [(["gpu7", "runs/a"], "runs/a")]
    for arguments, run in cases:
        words = subprocess.run(
            ["bash", file, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        module = words.index("tinygrad_impl.train")
        given = parse(parser("python -m tinygrad_impl.train", "tinygrad"), words[module + 1 :])
        assert str(given["out"]) == run
        assert given["resume_if_any"]
        assert (given["preset"], given["data"]) == ("gpt2", "tinystories")
        assert accumulated(given["global_batch_tokens"], 1024, given["batch_size"], 8) == (16, 32)
        if ".venv/bin/torchrun" in words:
            from torch.distributed.run import get_args_parser

            started = get_args_parser().parse_args(words[words.index(".venv/bin/torchrun") + 1 :])
            assert (started.nnodes, started.module, started.nproc_per_node) == ("2", True, "4")
            assert started.training_script == "tinygrad_impl.train"
            assert started.rdzv_endpoint == ("gpu7:24077" if of_slurm else "gpu7:29500")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """As a user starts them: the launcher, two processes, and an error in one of them."""
    (tmp_path / "it.py").write_text(
        textwrap.dedent("""
            import sys
            from data.cli import InputError, run
            from data.launch import launch
            from data.ranks import joined, place
            def main():
                if not place():
                    launch("it", sys.argv[1:], "2", "CPU", 600)
                with joined("CPU", 60) as ranks:
                    found = ranks.gather(ranks.rank)
                    if ranks.rank == 0:
                        print(found, sys.argv[1:], flush=True)
                    ranks.barrier()
                    if ranks.rank == 1 and "fail" in sys.argv:
                        raise InputError("rank 1 fails; mend it")
                    ranks.barrier()
            run(main)
        """)
    )
    for words, code, err in (["fail"], 2, "error: rank 1 fails; mend it\n"), (["well"], 0, ""):
        result = subprocess.run(
            [sys.executable, "-m", "it", "--gpus", "2", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stdout, result.stderr) == (code, f"[0, 1] {words}\n", err)
