"""`python -m parity_tests.planted`: is every bug of the catalogue caught by the test that is to catch it?

The bugs are those of parity_tests/catalogue. Each is planted in a source file of a copy of the repository, so that it
acts in every process that a test starts. A pytest run takes no start-up time, because it is forked from a process that
has imported PyTorch and tinygrad already.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from data.cli import ArgumentParser, InputError, Progress, integer, run
from parity_tests.catalogue import Row

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "torch_ref", "tinygrad_impl", "parity_tests")
TABLES = (
    *("data", "tokenizers", "training", "programs", "pages", "weights", "kernels", "proof"),
    *("ranks", "ranks_reference", "launch", "evaluation", "serve", "texts", "publish", "cpu", "cpu_decode", "runs"),
    "arch",
)
LEFT_OUT = (".git", ".venv", ".mutants", "__pycache__", ".*_cache", "*.egg-info")
LEFT_OUT_AT_THE_TOP = ("runs", "build")  # what training and packaging write; data/runs is source
# the conftest first, which says whether Triton is to interpret its kernels: Triton has to know when it is imported
IMPORTS = (
    *("pytest", "tinygrad_impl.conftest", "numpy", "matplotlib.pyplot"),
    *("torch", "transformers", "tokenizers", "tinygrad", "triton"),
)
PATIENCE = 300.0  # seconds for a test, with its fixtures, on a busy machine


def catalogue() -> list[Row]:
    """The rows of all tables."""
    return [row for table in TABLES for row in importlib.import_module(f"parity_tests.catalogue.{table}").PLANTED]


def planted_source(row: Row) -> str:
    """The row's file with the bug in it. Raises `LookupError` unless the words stand there once: it has changed."""
    name, file, old, new, _ = row
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1 or old == new:
        raise LookupError(f"{name}: {file} has {source.count(old)} times {old!r}")
    return source.replace(old, new)


def left_out(folder: str, names: list[str]) -> set[str]:
    """As `shutil.copytree` asks: which of the names in a folder are not copied."""
    at_the_top = LEFT_OUT_AT_THE_TOP if Path(folder) == ROOT else ()
    return shutil.ignore_patterns(*LEFT_OUT, *at_the_top)(folder, names)


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of the repository in a folder of its own, with what is beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary, "repository")
        shutil.copytree(ROOT, tree, ignore=left_out)
        if (ROOT.parent / "shared").exists():  # real stories, which some tests read
            tree.with_name("shared").symlink_to(ROOT.parent / "shared")
        yield tree


class Server:
    """A process in a copy of the repository that has imported what takes long, and forks a pytest when asked."""

    def __init__(self, tree: Path, imports: Sequence[str] = IMPORTS):
        self.tree = tree
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PARALLEL": "0",
            "PYTHONPATH": str(tree),
        }
        environment |= {"TMPDIR": str(tree.parent)}
        command = [sys.executable, "-c", "from parity_tests.planted import serve; serve()", *imports]
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, tests: Sequence[str], timeout: float) -> dict[str, Any]:
        """pytest's exit code (None if it took longer than `timeout` seconds) and the first test that failed."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps({"tests": tests, "timeout": timeout}), file=self.process.stdin, flush=True)
        return dict(json.loads(self.process.stdout.readline()))


def serve() -> None:
    """The server process: reads each request as a line of JSON, and answers it with one."""
    for module in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            __import__(module)
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]  # they are to be imported with the mutant in them
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for request in sys.stdin:
        asked = json.loads(request)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            forked(asked["tests"], writing)
        os.close(writing)
        print(json.dumps(awaited(child, reading, asked["timeout"])), file=replies, flush=True)


def forked(tests: list[str], writing: int) -> None:
    """In the child: runs pytest on the tests, up to the first that fails, and ends the process."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))  # a mutant may ask for endless memory
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.path.insert(0, os.getcwd())
    import pytest

    class Failed:
        name = ""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                self.name = self.name or report.nodeid

    failed = Failed()
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov"]
    try:
        code = int(pytest.main([*options, *tests], plugins=[failed]))
    except BaseException:
        code = 1
    os.write(writing, json.dumps({"code": code, "by": failed.name}).encode())
    os._exit(0)


def awaited(child: int, reading: int, timeout: float) -> dict[str, Any]:
    """The child's result, or why there is none: it did not end in time, or it crashed."""
    ready, _, _ = select.select([reading], [], [], timeout)
    text = os.read(reading, 1 << 16) if ready else b""
    os.close(reading)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with all that it started
    os.waitpid(child, 0)
    if text:
        return dict(json.loads(text))
    return {"code": None, "by": "no end" if not ready else "a crash"}


@contextlib.contextmanager
def servers(count: int) -> Iterator["SimpleQueue[Server]"]:
    """`count` servers, each in a copy of the repository of its own."""
    queue: SimpleQueue[Server] = SimpleQueue()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            server = Server(stack.enter_context(copied_tree()))
            stack.callback(server.process.wait)
            stack.callback(server.process.kill)
            queue.put(server)
        yield queue


def write_source(path: Path, source: str) -> None:
    """Writes a Python file, and removes its bytecode, which Python might take for that of the new version."""
    path.write_text(source, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


def caught(row: Row, server: Server) -> bool:
    """Whether the row's test fails with the bug planted. Raises `LookupError` where the test is not to be found."""
    name, file, _, _, test = row
    path = server.tree / file
    original = path.read_text(encoding="utf-8")
    write_source(path, planted_source(row))
    try:
        code = server.run([test], PATIENCE)["code"]
    finally:
        write_source(path, original)
    if code in (4, 5):  # pytest's, for a test that is not there, and for none
        raise LookupError(f"{name}: there is no test {test}")
    return bool(code != 0)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m parity_tests.planted",
        description="Plant the bugs of a catalogue in the source, one by one, and run the test that has to catch each. "
        "Exit code 0 if all are caught, 1 if not.",
        epilog="example: python -m parity_tests.planted --only sampling",
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="only bugs with these words in their name or file")
    parser.add_argument("--jobs", type=integer(1), default=os.cpu_count() or 1, metavar="N", help="at once")
    args = parser.parse_args()
    rows = [row for row in catalogue() if args.only in row[0] or args.only in row[1]]
    if not rows:
        raise InputError(f"no bug has {args.only!r} in its name or file; give another --only")
    started, survived = time.perf_counter(), 0
    with (
        servers(min(args.jobs, len(rows))) as free,
        ThreadPoolExecutor(args.jobs) as threads,
        Progress(total=len(rows), desc="planted", unit="bug") as progress,
    ):

        def work(row: Row) -> bool:
            server = free.get()
            try:
                return caught(row, server)
            finally:
                free.put(server)

        for row, was_caught in zip(rows, threads.map(work, rows), strict=True):
            if not was_caught:
                survived += 1
                progress.line(f"NOT CAUGHT: {row[0]} ({row[1]}), by {row[4]}")
            progress.update()
    conclude(len(rows), survived, time.perf_counter() - started)


def conclude(planted: int, survived: int, seconds: float) -> None:
    """Says how many bugs were caught, and ends the command with exit code 1 if not all were."""
    print(f"{planted} bugs planted, {planted - survived} caught ({seconds:.0f} s)")
    sys.stdout.flush()
    if survived:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
