"""The list of commands."""

import importlib.util
from pathlib import Path

from data.cli import versions
from data.testing import call
from tinygrad_impl.__main__ import COMMANDS, main


def test_every_command_is_listed_and_exists(tmp_path: Path) -> None:
    ended = call(main, cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [line.partition("  ")[0].split()[-1] for line in lines[: len(COMMANDS)]] == list(COMMANDS)
    assert lines[len(COMMANDS) + 1 :] == [f"{name} {version}" for name, version in versions().items()]
    assert not [module for module in COMMANDS if importlib.util.find_spec(module) is None]
    assert ended.out.startswith("python -m tinygrad_impl.train ")
    assert {"tinygrad_impl.evaluate", "torch_ref.evaluate"} <= {*COMMANDS}
