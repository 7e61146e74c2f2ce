"""`python -m parity_tests.mutation`: would the tests notice a mistake? Changes a place of the source, and runs tests.

The changes are those of cosmic-ray (https://cosmic-ray.readthedocs.io): an operator, a comparison or a number is
replaced, a loop left out, a decorator removed. Each is judged by the tests that run its line, as coverage.py's contexts
tell, the fastest first, and then by the others that run its file. A pytest run takes no start-up time, because it is
forked from a process that has imported PyTorch and tinygrad already.

Every result is kept in .mutants/results.jsonl, under the content of the changed file: the same command goes on where it
was stopped, and a file that changed is tested anew.
"""

import ast
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.cli import ArgumentParser, InputError, Progress, integer, refuse_missing_folder, run
from data.files import atomic_write
from parity_tests.planted import PACKAGES, ROOT, Server, servers, write_source

FOLDER = ROOT / ".mutants"
NO_PRODUCT = re.compile(r"/tests/|/test_|/conftest\.py|/testing\.py|/catalogue/|parity_tests/mutation\.py")
PATIENCE = 45.0  # seconds of tests, as they took before, that are run on a mutant at most
SLACK = 30.0  # seconds that tests may take longer than three times what they took before: then the mutant hangs

LineTests = dict[str, dict[int, list[str]]]  # by file and line, the tests that run it


@dataclass(frozen=True)
class Mutant:
    """One place of a file, what is done to it, and how to do it again: cosmic-ray's operator and which occurrence."""

    file: str
    line: int
    column: int
    function: str
    operator: str
    occurrence: int
    source: str  # the SHA-256 of the file

    @property
    def key(self) -> str:
        return f"{self.source}:{self.operator}:{self.occurrence}"


def product_files(root: Path = ROOT) -> list[str]:
    """The Python files that users run, relative to `root`."""
    found = (path.relative_to(root).as_posix() for package in PACKAGES for path in (root / package).rglob("*.py"))
    return sorted(name for name in found if not NO_PRODUCT.search(f"/{name}"))


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where type annotations begin and end: a change there would only break the import."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.expr):
                found.append(
                    (
                        (annotation.lineno, annotation.col_offset),
                        (annotation.end_lineno or 0, annotation.end_col_offset or 0),
                    )
                )
    return found


def places(file: str, source: str) -> Iterator[list[Mutant]]:
    """Every place of a file that cosmic-ray can change, with the alternatives for it."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.ast.ast_query import ASTQuery
    from cosmic_ray.plugins import get_operator, operator_names

    nodes, digest, typed = (
        list(ast_nodes(get_ast(source))),
        hashlib.sha256(source.encode()).hexdigest(),
        annotations(source),
    )
    alike = defaultdict(list)  # operators that change the same places: from Add to Sub, from Add to Mul, ...
    for operator in operator_names():
        if not get_operator(operator).arguments():  # others need to be told a variable's name
            replaced = re.match(r".*(BinaryOperator|ComparisonOperator)_[A-Z][a-zA-Z]*_", operator)
            alike[replaced[0] if replaced else operator].append(operator)
    for operators in alike.values():
        finder, found, occurrence = get_operator(operators[0])(), defaultdict[tuple[int, int], list[Mutant]](list), 0
        for node in nodes:
            for (line, column), _ in finder.mutation_positions(node):
                if not any(begin <= (line, column) < end for begin, end in typed):
                    function = ASTQuery(node).get_definition_name() or ""
                    found[line, column] += [
                        Mutant(file, line, column, function, operator, occurrence, digest) for operator in operators
                    ]
                occurrence += 1
        yield from found.values()


def sampled(count: int, seed: int, only: str = "", root: Path = ROOT) -> list[Mutant]:
    """`count` mutants of what users run, of which no two change the same place in the same way. Whether one is drawn
    depends on the seed and on its own file, so that a change of another file leaves it in the sample.
    """
    drawn = []
    for file in product_files(root):
        if only in file:
            for place in places(file, (root / file).read_text(encoding="utf-8")):
                name = f"{seed}:{place[0]}"
                mutant = random.Random(name).choice(place)
                drawn.append((hashlib.sha256(name.encode()).hexdigest(), mutant))
    return [mutant for _, mutant in sorted(drawn, key=lambda pair: pair[0])[:count]]


def changed(mutant: Mutant, source: str) -> str | None:
    """The source with the mutant in it; None where nothing can be changed."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    result = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    return None if result is None or result == source else str(result)


def difference(old: str, new: str) -> list[str]:
    """The lines that differ, as they were (-) and as they are (+)."""
    pairs = [pair for pair in zip(old.splitlines(), new.splitlines(), strict=False) if pair[0] != pair[1]]
    return [f"{sign} {line.strip()}" for pair in pairs for sign, line in zip("-+", pair, strict=True)]


# --- which tests run which line ------------------------------------------------------------------------------------


def measured(tests: Sequence[str], quiet: bool = False) -> tuple[LineTests, dict[str, float]]:
    """Which tests of `make test` run which line, and the seconds that each takes; from .mutants, if they are known for
    the tests and sources as they are now.
    """
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*")):
        if path.suffix in (".py", ".c") and path.is_file():
            digest.update(path.read_bytes())
    digest.update(" ".join(tests).encode())
    folder = FOLDER / f"coverage-{digest.hexdigest()[:16]}"
    if not (folder / "durations.json").exists():
        print(f"running the tests once, to see which lines each runs: {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "rc").write_text(
            "[run]\nparallel = true\nconcurrency = multiprocessing,thread\npatch = subprocess\nsigterm = true\n"
            f"source_dirs =\n{''.join(f'    {ROOT / package}{chr(10)}' for package in PACKAGES)}"
            "omit =\n    */tests/*\n    */test_*\n    */conftest.py\n"
            f"context = ${{PYTEST_CURRENT_TEST-}}\ndata_file = {folder / 'data'}\n"
        )
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-m", "not slow"]
        command += ["-p", "no:cacheprovider", "-p", "parity_tests.mutation", "--cov", f"--cov-config={folder / 'rc'}"]
        command += ["--cov-context=test", "--cov-report=", *tests]
        environment = os.environ | {"COVERAGE_FILE": str(folder / "data"), "MUTATION_DURATIONS": str(folder)}
        environment |= {"OMP_NUM_THREADS": "1", "PARALLEL": "0"}
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr).returncode
        if code > 1:
            raise InputError(f"the tests cannot be run (pytest ended with {code}); see above")
    return line_tests(folder), json.loads((folder / "durations.json").read_text())


def line_tests(folder: Path) -> LineTests:
    """Reads the contexts that coverage.py wrote. A process that a test starts has that test as its context."""
    from coverage import CoverageData

    combined = CoverageData(str(folder / "combined"))
    if not (folder / "combined").exists():
        for path in sorted(folder.glob("data*")):
            other = CoverageData(str(path))
            other.read()
            combined.update(other)
        combined.write()
    combined.read()
    found: LineTests = {}
    for file in combined.measured_files():
        with contextlib.suppress(ValueError):  # a copy of a file elsewhere
            lines = combined.contexts_by_lineno(file)
            name = Path(file).relative_to(ROOT).as_posix()
            found[name] = {line: sorted({*map(test_of, contexts)} - {""}) for line, contexts in lines.items()}
    return found


def test_of(context: str) -> str:
    """The pytest node of a context; "FILE::" where a fixture ran the line, which all tests of the file may share."""
    in_process = re.fullmatch(r"(?:import\|)?(.+)\|(setup|run|teardown)", context)
    in_another = re.fullmatch(r"(.+) \((setup|call|teardown)\)", context)
    if not (found := in_process or in_another):
        return ""  # while pytest looked for tests
    node, phase = found.groups()
    return f"{node.partition('::')[0]}::" if phase == "setup" else node


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of pytest: adds up the seconds of each test."""
    SECONDS[report.nodeid] += report.duration
    if report.failed:
        FAILED.add(report.nodeid)


def pytest_sessionfinish(session: Any) -> None:
    """As a plugin of pytest: writes them down, in the process that hears of all tests."""
    if "MUTATION_DURATIONS" in os.environ and not hasattr(session.config, "workerinput"):
        passed = {test: seconds for test, seconds in SECONDS.items() if test not in FAILED}
        Path(os.environ["MUTATION_DURATIONS"], "durations.json").write_text(json.dumps(passed))


SECONDS: dict[str, float] = defaultdict(float)
FAILED: set[str] = set()  # as they are, under coverage.py: they judge no mutant


def judges(mutant: Mutant, lines: LineTests, seconds: dict[str, float]) -> list[str]:
    """The tests to run on a mutant: those that run its line, then those that run its file, the fastest first: as
    many as take no longer than `PATIENCE` together.
    """
    of_file = lines.get(mutant.file, {})
    direct = expanded(of_file.get(mutant.line, []), seconds)
    others = expanded({test for tests in of_file.values() for test in tests}, seconds)
    chosen, total = list[str](), 0.0
    for test in [*direct, *(test for test in others if test not in set(direct))]:
        if total + seconds[test] <= PATIENCE or not chosen:
            chosen.append(test)
            total += seconds[test]
    return chosen


def expanded(tests: Iterable[str], seconds: dict[str, float]) -> list[str]:
    """All tests that the names stand for: those of the fastest files first, as a file's tests share what takes long."""
    names = set(tests)
    files = {name for name in names if name.endswith("::")}
    chosen = [test for test in seconds if test in names or f"{test.partition('::')[0]}::" in files]
    of_file = defaultdict[str, float](float)
    for test, taken in seconds.items():
        of_file[test.partition("::")[0]] += taken
    return sorted(chosen, key=lambda test: (of_file[test.partition("::")[0]], seconds[test]))


# --- running them -----------------------------------------------------------------------------------------------------


def tried(mutant: Mutant, server: Server, lines: LineTests, seconds: dict[str, float]) -> dict[str, Any]:
    """The result of a mutant: killed (and by which test), survived, or no test (none runs its file)."""
    started, path = time.perf_counter(), server.tree / mutant.file
    original = path.read_text(encoding="utf-8")
    new = changed(mutant, original)
    result = asdict(mutant) | {"key": mutant.key, "diff": difference(original, new or original), "by": ""}
    tests = judges(mutant, lines, seconds)
    if new is None:
        outcome = "nothing to change"
    elif not tests:
        outcome = "no test"
    else:
        write_source(path, new)
        try:
            reply = server.run(tests, 3 * sum(seconds[test] for test in tests) + SLACK)
        finally:
            write_source(path, original)
        outcome = "survived" if reply["code"] == 0 else "killed"
        result["by"] = reply["by"] or ("" if reply["code"] == 0 else "an import that fails")
    return result | {"outcome": outcome, "tests": len(tests), "seconds": round(time.perf_counter() - started, 1)}


def results() -> dict[str, dict[str, Any]]:
    """What is known of mutants, by their keys."""
    file = FOLDER / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return {row["key"]: row for row in rows}


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m parity_tests.mutation",
        description="Change the source in one place at a time and see whether a test of `make test` fails.",
        epilog='example: make mutants ARGS="--sample 200 --seed 1"',
    )
    parser.add_argument("--sample", type=integer(1), default=200, metavar="N", help="how many mutants (200)")
    parser.add_argument("--seed", type=integer(0), default=1, metavar="N", help="which ones (1)")
    parser.add_argument("--only", default="", metavar="WORDS", help="of files with these words in their path")
    parser.add_argument("--jobs", type=integer(1), default=os.cpu_count() or 1, metavar="N", help="at once")
    parser.add_argument("--retry", action="store_true", help="try those again that survived, after a test was added")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result there")
    return parser


def main() -> None:
    args = parser().parse_args()
    try:
        import cosmic_ray  # noqa: F401
        import coverage  # noqa: F401
    except ImportError:
        raise InputError("this needs cosmic-ray and pytest-cov; run it with `make mutants`") from None
    refuse_missing_folder(args.json)
    sample = sampled(args.sample, args.seed, args.only)
    if not sample:
        raise InputError(f"no source file has {args.only!r} in its path; give another --only")
    lines, seconds = measured([])
    known = results()
    again = ("survived", "no test") if args.retry else ()
    todo = [m for m in sample if m.key not in known or known[m.key]["outcome"] in again]
    FOLDER.mkdir(exist_ok=True)
    with (
        servers(min(args.jobs, max(1, len(todo)))) as free,
        ThreadPoolExecutor(args.jobs) as threads,
        Progress(total=len(sample), initial=len(sample) - len(todo), desc="mutants", unit="mutant") as progress,
        open(FOLDER / "results.jsonl", "a", encoding="utf-8") as f,
    ):

        def work(mutant: Mutant) -> dict[str, Any]:
            server = free.get()
            try:
                return tried(mutant, server, lines, seconds)
            finally:
                free.put(server)

        for result in threads.map(work, todo):
            known[result["key"]] = result
            f.write(json.dumps(result) + "\n")
            f.flush()
            if result["outcome"] != "killed":
                progress.line(described(result))
            progress.update()
    found = [known[m.key] for m in sample]
    print(f"\n{summary(found)}")
    if args.json:
        with atomic_write(args.json, "w") as out:
            out.write(json.dumps(found, indent=1) + "\n")


def described(result: dict[str, Any]) -> str:
    where = f"{result['file']}:{result['line']} {result['function']}"
    return "\n    ".join([f"{result['outcome']}: {where} ({result['operator'].rpartition('/')[2]})", *result["diff"]])


def summary(found: Sequence[dict[str, Any]]) -> str:
    """Counts by folder."""
    folders = defaultdict(list)
    for result in found:
        if result["outcome"] != "nothing to change":
            folders[result["file"].rpartition("/")[0]].append(result["outcome"])
    rows = [f"{'folder':28} {'mutants':>7} {'killed':>7} {'survived':>8} {'no test':>7}"]
    total = [outcome for outcomes in folders.values() for outcome in outcomes]
    for folder, outcomes in [*sorted(folders.items()), ("all", total)]:
        counts = [outcomes.count(outcome) for outcome in ("killed", "survived", "no test")]
        share = f"{counts[0] / len(outcomes):8.1%}" if outcomes else ""
        rows.append(f"{folder:28} {len(outcomes):7} {counts[0]:7} {counts[1]:8} {counts[2]:7} {share}")
    return "\n".join(rows)


if __name__ == "__main__":
    run(main)
