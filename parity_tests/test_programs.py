"""Every program can be called as the README does."""

import runpy

import pytest

PROGRAMS = ["data.text.prepare", "data.text.bench_data", "data.runs.report", "torch_ref.train", "parity_tests"]
PROGRAMS += [f"tinygrad_impl.{name}" for name in ("train", "generate", "compare", "bench")]
PROGRAMS += [f"parity_tests.{name}" for name in ("bench_generation", "mutants", "planted", "mutation")]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", PROGRAMS)
def test_help(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    assert f"python -m {module} " in capsys.readouterr().out
