"""How every command ends, and how it shows its progress."""

import argparse
import errno
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from data.cli import (
    ArgumentParser,
    InputError,
    Progress,
    Stopped,
    command,
    integer,
    missing_extra,
    real,
    refuse_missing_folder,
    run,
)

Ended = tuple[int, str, str]


def raising(e: BaseException) -> Callable[[], None]:
    def main() -> None:
        print("begun")
        raise e

    return main


@pytest.fixture
def end(capsys: pytest.CaptureFixture[str]) -> Callable[[BaseException | None], Ended]:
    def end(e: BaseException | None) -> Ended:
        with pytest.raises(SystemExit) as ended:
            run(raising(e) if e else lambda: None)
        assert isinstance(ended.value.code, int)
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return end


def test_success(end: Callable[[BaseException | None], Ended]) -> None:
    assert end(None) == (0, "", "")


def test_bad_input_is_one_sentence(end: Callable[[BaseException | None], Ended]) -> None:
    assert end(InputError("it is bad; mend it")) == (2, "begun\n", "error: it is bad; mend it\n")


def test_interrupted(end: Callable[[BaseException | None], Ended]) -> None:
    assert end(KeyboardInterrupt()) == (130, "begun\n", "interrupted\n")
    assert end(Stopped(15)) == (143, "begun\n", "")


@pytest.mark.parametrize("e", [MemoryError(), MemoryError("x"), RuntimeError("CUDA Error 2, Out of Memory")])
def test_out_of_memory_is_one_sentence(e: Exception, end: Callable[[BaseException | None], Ended]) -> None:
    code, _, err = end(e)
    assert code == 2
    assert err.startswith("error: out of memory")
    assert len(err.splitlines()) == 1


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a fault"):
        run(raising(RuntimeError("a fault")))


@pytest.mark.parametrize(
    ("numbers", "remedy"),
    [
        ((errno.ENOSPC, errno.EDQUOT), "free some space, or name a folder on another disk"),
        ((errno.EACCES, errno.EPERM, errno.EROFS), "mend the permissions, or name another folder"),
        ((errno.ENOTDIR,), "a part of that path is a file; name another folder"),
        ((errno.EISDIR,), "name a file"),
    ],
)
def test_the_disks_refusals_are_one_sentence(
    numbers: tuple[int, ...], remedy: str, end: Callable[[BaseException | None], Ended]
) -> None:
    for number in numbers:
        code, _, err = end(OSError(number, os.strerror(number), "some/file"))
        assert (code, err) == (2, f"error: {os.strerror(number)} at some/file; {remedy}\n")
        assert end(OSError(number, os.strerror(number)))[2] == f"error: {os.strerror(number)}; {remedy}\n"


@pytest.mark.parametrize("e", [OSError(errno.EIO, "broken"), ValueError("a fault of ours")])
def test_faults_of_the_program_are_not_hidden(e: Exception) -> None:
    with pytest.raises(type(e)):
        run(raising(e))


@pytest.mark.parametrize("length", ["1", "100_000"])  # what fits a buffer fails only when that is flushed
def test_a_closed_pipe_ends_quietly(length: str) -> None:
    program = """
        import sys
        from data.cli import run
        def main():
            print("begun", flush=True)
            sys.stdin.read()  # until the reader is gone
            print("more" * LENGTH)
        run(main)
    """
    command = [sys.executable, "-c", textwrap.dedent(program).replace("LENGTH", length)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"begun\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_bad_option_names_the_help() -> None:
    parser = ArgumentParser(prog="python -m it")
    parser.add_argument("--steps", type=integer(1))
    with pytest.raises(InputError, match=r"^argument --steps: 0 is not .* at least 1; see `.*python -m it --help`$"):
        parser.parse_args(["--steps", "0"])


def test_whole_numbers() -> None:
    assert [integer(-2)(text) for text in ("-2", "0", "007", "999999999999999999")] == [-2, 0, 7, 10**18 - 1]


@pytest.mark.parametrize("text", ["1", "-5", "2.0", "2e3", " 3", "3\n", "1_000", "٣", "", "x", "9" * 5000])
def test_what_is_no_whole_number_of_at_least_two(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 2"):
        integer(2)(text)


@pytest.mark.parametrize("text", ["1", "9" * 19, "-1"])
def test_a_whole_number_too_small_or_of_nineteen_digits_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=rf"^{text} is not a whole number of at least 2$"):
        integer(2)(text)
    assert integer(2)("2") == 2


def test_real_numbers_at_their_bounds() -> None:
    """The lower bound belongs to them where they are closed, the upper one never, and infinity is below none."""
    assert real(0.5, 2)("0.5") == 0.5
    assert real(0.5, 2, closed=False)("0.50001") == 0.50001
    assert real(-3)("1e300") == 1e300
    for text, closed, sentence in [
        ("2", True, "2 is not a number of at least 0.5 and below 2"),
        ("0.49", True, "0.49 is not a number of at least 0.5 and below 2"),
        ("0.5", False, "0.5 is not a number above 0.5 and below 2"),
        ("2", False, "2 is not a number above 0.5 and below 2"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError) as e:
            real(0.5, 2, closed=closed)(text)
        assert str(e.value) == sentence


def test_real_numbers() -> None:
    assert [real(0)(text) for text in ("0", "1e-3", "5.", ".5", "+2E1")] == [0, 1e-3, 5, 0.5, 20]
    assert real(0, 1)("0.999") == 0.999
    assert real(0, closed=False)("1e-9") == 1e-9
    assert real(0, most=1)("1") == 1


@pytest.mark.parametrize("text", ["-0.1", "1", "nan", "inf", "-inf", "", "x", "0_0", "０", "0 ", ".", "0e"])
def test_what_is_no_number_from_zero_to_below_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number of at least 0 and below 1$"):
        real(0, 1)(text)


@pytest.mark.parametrize("text", ["0", "-1", "inf"])
def test_what_is_no_number_above_zero(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number above 0$"):
        real(0, closed=False)(text)


def test_progress_off_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=3, desc="reading", unit="file") as progress:
        for _ in range(3):
            progress.update()
    err = capsys.readouterr().err
    assert "\r" not in err
    assert err.endswith("\n")
    lines = err.splitlines()
    assert all(line.startswith("reading: ") for line in lines)
    assert "100%" in lines[-1]
    assert len(lines) == 2  # its beginning and its end, with less than ten seconds between them


class Clock:
    """The time that the bars see."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    monkeypatch.setattr(Progress, "monitor_interval", 0)  # no thread that draws them too
    return clock


def test_plain_lines_are_ten_seconds_apart(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    with Progress(total=100, desc="reading") as progress:
        for seconds in (9.95, 10.05, 19, 20.2):
            clock.now = 1000 + seconds
            progress.update()
            seen.append(capsys.readouterr().err.count("\n"))
    assert seen == [1, 1, 0, 1]  # the first is of its beginning
    last = capsys.readouterr().err
    assert last.count("\n") == 1
    assert "4/100" in last


def test_what_compiles_is_left_out_of_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """It says so as long as it does; the rate is that of what comes after."""
    with Progress(total=10, initial=1, desc="reading", compiling=2, unit="file") as progress:
        for seconds in (30, 30, 10.5, 5, 6):
            clock.now += seconds
            progress.update()
    lines = [re.sub(r"\|.*\|", "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "reading (compiling):  10% 1/10 [00:00<?, ?file/s]",
        "reading (compiling):  20% 2/10 [00:30<?, ?file/s]",
        "reading:  30% 3/10 [01:00<?, ?file/s]",
        "reading:  40% 4/10 [01:10<01:03, 10.50s/file]",
        "reading:  60% 6/10 [01:21<00:28,  7.17s/file]",
        "reading:  60% 6/10 [01:21<00:28,  7.17s/file]",
    ]
    assert list(Progress(iterable=[3, 4], total=2, desc="reading", compiling=1, disable=True)) == [3, 4]
    assert capsys.readouterr().err == ""


def test_a_part_of_something_longer(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe it is there only where it lasts; on a terminal it goes away."""

    def shown(seconds: float) -> str:
        for _ in Progress(iterable=range(3), total=3, desc="reading", part=True):
            clock.now += seconds
        return capsys.readouterr().err

    assert shown(3) == ""
    assert [line.count("2/3") for line in shown(6).splitlines()] == [1]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert re.fullmatch(r"(\rreading: .*)+\r +\r?", shown(1))


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_of_text_goes_to_stdout(
    terminal: bool, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Progress(total=2, desc="reading") as progress:
        progress.line("step 1")
        out, err = capsys.readouterr()
        assert out == "step 1\n"
        assert ("\r" in err) == terminal  # the bar makes room for it, and is drawn again
        progress.update()


def test_a_disabled_bar_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=2, disable=True) as progress:
        progress.update()
        progress.line("text")
    assert capsys.readouterr() == ("text\n", "")


def test_a_terminal_sees_each_tenth_of_a_second(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    seen = []
    with Progress(total=100, desc="reading") as progress:
        capsys.readouterr()
        for seconds in (0.05, 0.15, 0.2, 0.27):
            clock.now = 1000 + seconds
            progress.update()
            seen.append(capsys.readouterr().err.count("reading"))
    assert seen == [0, 1, 0, 1]


def test_progress_on_a_terminal_redraws_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(total=1, desc="reading") as progress:
        progress.update()
    assert "\rreading" in capsys.readouterr().err


def test_progress_ends_once_also_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=2, desc="reading")

    def fail() -> None:
        with progress:
            progress.update()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "1/2" in lines[-1]


def test_a_file_needs_a_folder(tmp_path: Path) -> None:
    refuse_missing_folder(None, Path("here.json"), tmp_path / "there.json")
    with pytest.raises(InputError, match=r"^there is no folder .*/nowhere to write x\.json to; make it first$"):
        refuse_missing_folder(None, tmp_path / "nowhere" / "x.json")
    with pytest.raises(InputError, match="is a folder; name a file to write"):
        refuse_missing_folder(tmp_path)


def shown(lines: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """What a command that runs these lines comes to, in an environment."""
    program = f"from data.cli import *\ndef main():\n{textwrap.indent(lines, '    ')}\nrun(main)"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=os.environ | environment, check=False
    )


@pytest.mark.parametrize(("encoding", "seen"), [("latin-1", b"\xe9 \\u2019\n"), ("ascii", b"\\xe9 \\u2019\n")])
def test_what_stdout_cannot_encode_is_escaped(encoding: str, seen: bytes) -> None:
    ended = shown("print('\u00e9 \u2019')", PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, seen, b"")


def test_an_argument_that_is_not_utf8_is_refused() -> None:
    program = "from data.cli import *\nrun(ArgumentParser('python -m x').parse_args)"
    ended = subprocess.run([sys.executable, "-c", program, b"\xff"], capture_output=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"error: the argument b'\\xff' is not UTF-8; ")


@pytest.mark.parametrize("place", ["here", "below", "elsewhere", "with space", "on the path"])
def test_commands_are_printed_as_they_can_be_typed(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"with space": tmp_path / "a b", "elsewhere": tmp_path / "other"}
    python = folders.get(place, tmp_path / "here") / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path if place == "below" else tmp_path / "here")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(python.parent) if place == "on the path" else "/nowhere")
    typed = {"here": ".venv/bin/python", "below": "here/.venv/bin/python", "on the path": "python"}
    expected = typed.get(place, f"'{python}'" if place == "with space" else str(python))
    assert command("tinygrad_impl.train", "--resume", Path("runs/my run")) == (
        f"{expected} -m tinygrad_impl.train --resume 'runs/my run'"
    )
    assert ArgumentParser("python -m data", "example: python -m data x").prog == f"{expected} -m data"


def test_errors_have_commands_as_they_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[BaseException | None], Ended]
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/python3")
    assert end(InputError("bad; `python -m data.x`"))[2] == "error: bad; `/opt/python3 -m data.x`\n"


def test_what_installs_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """make in a clone's environment, which has the versions that were tried; else pip."""
    root = Path(__file__).parents[2]
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    monkeypatch.chdir(root)
    assert str(missing_extra("it", "lm_eval", "evaluate")) == "it needs lm_eval; run `make extras`"
    monkeypatch.chdir(tmp_path)
    assert str(missing_extra("it", "lm_eval", "evaluate")) == f"it needs lm_eval; run `make -C {root} extras`"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert "-m pip install '.[evaluate]'` in the project's folder" in str(missing_extra("it", "lm_eval", "evaluate"))


def test_every_command_has_its_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ArgumentParser("python -m x").parse_args(["--version"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert lines[0].startswith("gpt2-parity commit ")
    assert lines[1] == f"python {platform.python_version()}"
    assert f"tinygrad {importlib.metadata.version('tinygrad')}" in lines
