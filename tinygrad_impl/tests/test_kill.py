"""The short form of `python -m tinygrad_impl.tests.kill`, for jobs of two ranks."""

import subprocess
import sys

import pytest

from tinygrad_impl.tests.kill import ROOT


@pytest.mark.slow
def test_jobs_that_are_killed_lose_nothing() -> None:
    words = ["--package", "torch_ref", "--ranks", "2", "--kills", "2", "--jobs", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "tinygrad_impl.tests.kill", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kills" in result.stdout
    assert " 0 faults" in result.stdout
