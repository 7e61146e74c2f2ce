"""Starting a command on several GPUs of this host, by torchrun's own launcher: `--gpus N|all`.

torchrun is PyTorch's, and starts one process for each GPU. Whoever knows it starts it himself.
"""

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from data.cli import InputError, Lost, command, counted, interpreter, leave_lost_terminal, program
from data.gpu import gpus, numbered
from data.ranks import Place, place, quieten_pytorch, rank_device, shared_out, started_with_others

OPTION = "--gpus"
GIVEN = "GPT2_GPUS"  # the variable that tells processes started for --gpus its value
LAST = "GPT2_LAST_WORDS"  # and this the file with what `launch` says when it is asked to stop
UNTRAINED = "stopped before training began; nothing was changed"


def count(text: str) -> str:
    """An argparse type: how many GPUs, or all there are."""
    if text != "all" and not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of GPUs from 1 on nor `all`")
    return text if text == "all" else str(int(text))


def processes(wanted: str, device: str | None) -> int:
    """How many processes `--gpus WANTED --device DEVICE` asks for. Raises `InputError` where they cannot be had."""
    if started_with_others():
        raise InputError(f"{OPTION} starts the processes itself, and here torchrun or srun has; leave {OPTION} out")
    name, number = numbered(device) if device else ("CUDA", None)
    if number is not None:
        raise InputError(f"{OPTION} takes the first GPUs, so it goes without --device {device}; leave out one of them")
    if name == "CPU":
        if wanted == "all":
            raise InputError(f"{OPTION} all counts GPUs; with --device CPU give the number of processes")
        return int(wanted)
    if name != "CUDA":
        raise InputError(f"{OPTION} is for NVIDIA's GPUs, and for --device CPU; leave it out with --device {device}")
    found = len(gpus())
    if not found:
        raise InputError(
            f"{OPTION} {wanted} finds no GPU here; leave it out"
            + (f", or try several processes on CPUs: --device CPU {OPTION} {wanted}" if wanted != "all" else "")
        )
    if wanted == "all":
        return found
    if int(wanted) > found:
        raise InputError(f"there {are(found)} here, fewer than {OPTION} {wanted}; give {OPTION} {found}")
    return int(wanted)


def are(count: int) -> str:
    """That there are so many GPUs."""
    return f"{'is' if count == 1 else 'are'} {counted(count, 'GPU')}"


def place_process(module: str, argv: Sequence[str], given: Mapping[str, Any], otherwise: str = "") -> str | None:
    """The device that this process is to open; None: the best there is. `otherwise`: that of ranks without --device.

    With --gpus it starts `python -m module` with these arguments on each of them, and this process ends with that. A
    rank is shown its own GPU, or given its share of the cores. What it says is said once for a host.
    """
    device: str | None = given.get("device")
    if "gpus" in given:
        launch(module, argv, given["gpus"], device or otherwise or None, given.get("timeout", 600), UNTRAINED)
    here = place()
    if here:
        device = rank_device(device or otherwise or None, here)
    if not given.get("quiet") and (here is None or here.rank == 0):
        if here:
            print(shared_out(here, device or ""))
        print("opening the device, the data and the weights", flush=True)
    return device


def note_idle_gpus(given: Mapping[str, Any], device: str) -> None:
    """Tells of GPUs that training on `device` leaves idle, unless one was asked for."""
    if device != "CUDA" or place() or given.get("quiet") or "gpus" in given or ":" in given.get("device", ""):
        return
    if (found := len(gpus())) > 1:
        print(f"note: this host has {found} GPUs, and training uses one of them; {OPTION} all uses them all")


def launch(module: str, argv: Sequence[str], wanted: str, device: str | None, timeout: float, last: str = "") -> None:
    """Runs `python -m module` with these arguments in as many processes as asked for, and ends this one with their
    exit code; returns where that is one process, which then is this.

    timeout: the seconds that they may take to save, once asked to stop. `last` is said when this process is asked to
    stop, unless they have called `leave_last_words`. Raises `Lost` where one was killed and none has told.
    """
    size = processes(wanted, device)
    if size == 1:
        return
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(timeout)))
    quieten_pytorch()
    logging.disable(logging.ERROR)  # a rank tells what is wrong; not torchrun as well
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=f"{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    with NamedTemporaryFile("w+") as words:
        os.environ |= {GIVEN: wanted, LAST: words.name}
        leave_last_words(last)
        try:
            elastic_launch(config, sys.executable)("-m", module, *without_option(argv))
        except ChildFailedError as e:
            rank, failure = e.get_first_failure()
            # below 0: the signal that killed it, for which torchrun ends the others; who tells of it ends otherwise
            if all(other.exitcode < 0 for other in e.failures.values()):
                raise Lost(killed(rank, failure.pid, -failure.exitcode, command(module, *argv))) from None
            sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
        except SignalException as e:
            leave_lost_terminal()
            sys.stderr.write(words.read())
            sys.exit(128 + e.sigval)
        finally:
            del os.environ[GIVEN], os.environ[LAST]
    sys.exit(0)


def killed(rank: int, pid: int, number: int, again: str) -> str:
    """That a signal has killed a rank before it could be missed by the others."""
    name = signal.Signals(number).name if number in [*signal.Signals] else f"signal {number}"
    reason = " (dmesg tells if memory ran out)" if number == signal.SIGKILL else ""
    return f"rank {rank} (process {pid}) was killed by {name}{reason}; start the job again with `{again}`"


def leave_last_words(sentence: str) -> None:
    """What `launch` is to say when it is asked to stop, instead of what it was to say before; of one of its ranks."""
    if LAST in os.environ:
        with suppress(OSError):
            Path(os.environ[LAST]).write_text(f"{sentence}\n" if sentence else "")


def with_option() -> list[str]:
    """What goes with the command of a process that `launch` has started: --gpus as it was given."""
    return [OPTION, os.environ[GIVEN]] if GIVEN in os.environ else []


def command_as_started(module: str, *arguments: object) -> str:
    """The command that runs `python -m module` with these arguments in as many processes as this one is of, started as
    it was: by --gpus, by torchrun or by srun.
    """
    here = place()
    if here is None or GIVEN in os.environ:
        return command(module, *arguments, *with_option())
    on_each = "  # on each host" if here.local_size < here.size else ""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"{torchrun(module, here)} {shlex.join(map(str, arguments))}{on_each}"
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        nodes = os.environ.get("SLURM_STEP_NUM_NODES", "1")
        return f"srun --nodes {nodes} --ntasks {here.size} {command(module, *arguments)}"
    return f"{command(module, *arguments)}  # as each of the {here.size} ranks"


def torchrun(module: str, here: Place) -> str:
    """The command that started this rank, up to the module; as far as that can be known."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        words = words[: words.index(module) + 1]
    except (OSError, ValueError):
        return f"torchrun --nproc-per-node {here.local_size} -m {module}"
    if Path(words[1]).name == "torchrun":  # a script, which the kernel has Python run
        return f"{program(words[1], 'torchrun')} {shlex.join(words[2:])}"
    return f"{interpreter()} {shlex.join(words[1:])}"


def without_option(argv: Sequence[str]) -> list[str]:
    """The arguments but for --gpus and its value, which are for the one process that starts the others."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(OPTION)
    return parser.parse_known_args(argv)[1]
