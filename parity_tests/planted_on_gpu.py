"""`python -m parity_tests.planted_on_gpu`: bugs in kernels that only a GPU of Hopper can compute.

Each test is a process of its own, since a process that has used CUDA cannot be forked.
"""

import subprocess
import sys
import time

from data.cli import ArgumentParser, InputError, Progress, run
from parity_tests.catalogue import Row, hopper_attention, pingpong
from parity_tests.planted import PATIENCE, conclude, copied_tree, planted_source, write_source

PLANTED: list[Row] = [*pingpong.PLANTED, *hopper_attention.PLANTED]


def outcome(tree: str, *tests: str) -> str:
    """What became of the tests: "passed", "failed", or "skipped" if none ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "failed"
    if done.returncode in (4, 5):
        raise LookupError(f"there is none of the tests {tests}")
    return "failed" if done.returncode else "passed" if " passed" in done.stdout else "skipped"


def main() -> None:
    parser = ArgumentParser(
        prog="python -m parity_tests.planted_on_gpu",
        description="Plant bugs in the kernels for NVIDIA's Hopper (H100, H200), one by one, and run the test that has "
        "to catch each, on that GPU. Exit code 0 if all are caught, 1 if not.",
        epilog="example: python -m parity_tests.planted_on_gpu --only bias",
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="only bugs with these words in their name")
    args = parser.parse_args()
    rows: list[Row] = [row for row in PLANTED if args.only in row[0]]
    if not rows:
        raise InputError(f"no bug has {args.only!r} in its name; give another --only")
    started, survived = time.perf_counter(), 0
    with copied_tree() as tree, Progress(total=len(rows), desc="planted", unit="bug") as progress:
        whole = outcome(str(tree), *sorted({row[4] for row in rows}))
        if whole == "skipped":
            raise InputError("this needs a GPU of Hopper (H100, H200), and there is none; run it where there is one")
        if whole == "failed":
            raise InputError("the tests fail without any bug; run `make test-gpu` to see which")
        for row in rows:
            path = tree / row[1]
            original = path.read_text(encoding="utf-8")
            write_source(path, planted_source(row))
            if outcome(str(tree), row[4]) != "failed":
                survived += 1
                progress.line(f"NOT CAUGHT: {row[0]} ({row[1]}), by {row[4]}")
            write_source(path, original)
            progress.update()
    conclude(len(rows), survived, time.perf_counter() - started)


if __name__ == "__main__":
    run(main)
