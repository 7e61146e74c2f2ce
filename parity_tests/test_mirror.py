"""The port can be read against the reference, line by line, and neither package leans on the other's framework."""

import ast
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def functions(path: str) -> dict[str, list[ast.FunctionDef]]:
    """The functions of each class of a file, in order; those outside classes are under ""."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    groups = {node.name: node.body for node in body if isinstance(node, ast.ClassDef)}
    return {
        name: [node for node in nodes if isinstance(node, ast.FunctionDef)]
        for name, nodes in (groups | {"": body}).items()
    }


def signature(function: ast.FunctionDef) -> str:
    returns = ast.unparse(function.returns) if function.returns else None
    name = {"forward": "__call__"}.get(function.name, function.name)  # how torch spells it
    return f"{name}({ast.unparse(function.args)}) -> {returns}"


def test_models_define_the_same() -> None:
    reference, port = (functions(f"{package}/model.py") for package in ("torch_ref", "tinygrad_impl"))
    assert list(port) == list(reference)
    for name in reference:
        for ours, theirs in zip_longest(port[name], reference[name]):
            assert ours, f"only torch_ref has {name}.{theirs.name}"
            assert theirs, f"only tinygrad_impl has {name}.{ours.name}"
            assert signature(ours) == signature(theirs), name


def test_trainers_define_the_same() -> None:
    reference, port = (functions(f"{package}/trainer.py") for package in ("torch_ref", "tinygrad_impl"))
    steps = [next(f for f in file["Trainer"] if f.name == "step") for file in (reference, port)]
    assert signature(steps[0]) == signature(steps[1])
    for file in (reference, port):  # the proof calls these of both
        names = {f.name for f in file["Trainer"]}
        assert {"accumulate", "mean_gradients", "load_gradients", "update", "moments", "restore"} <= names
    rates = [next(f for f in file[""] if f.name == "learning_rate") for file in (reference, port)]
    assert ast.unparse(rates[0]) == ast.unparse(rates[1])  # plain Python, so the same to the letter


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.partition(".")[0])
    return modules


@pytest.mark.parametrize(
    ("package", "foreign", "exceptions"),
    [
        ("torch_ref", {"tinygrad", "tinygrad_impl", "parity_tests"}, {}),
        ("tinygrad_impl", {"torch", "torch_ref", "transformers", "parity_tests"}, {"train.py": {"parity_tests"}}),
    ],
)
def test_packages_stand_alone(package: str, foreign: set[str], exceptions: dict[str, set[str]]) -> None:
    """Neither imports the other, its framework or the tests. The program that trains in tinygrad is the one exception:
    it puts trainer and parity gate together.
    """
    files = [path for path in (ROOT / package).rglob("*.py") if "tests" not in path.parts]
    assert ROOT / package / "model.py" in files
    found = {path.relative_to(ROOT / package).as_posix(): imported(path) & foreign for path in files}
    assert {file: modules for file, modules in found.items() if modules} == exceptions


def test_training_without_the_gate_needs_no_torch() -> None:
    """Nor what draws its pictures, which is loaded with the first of them."""
    code = "import sys, tinygrad_impl.train; sys.exit(not {'torch', 'matplotlib'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
