"""What every command line of the project shares: one-sentence errors, and progress that also reads well in a pipe."""

import argparse
import errno
import importlib.metadata
import io
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from data.interrupt import catch_interrupts, leave


class InputError(Exception):
    """Bad input, in one sentence: what was wrong, where, and what to do next. Commands end with it and exit code 2."""


class Stopped(KeyboardInterrupt):
    """A signal has asked the program to end, of which something has been said. It ends with 128 and its number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Lost(Exception):
    """Another rank of the job is gone, in one sentence. Commands end with it and exit code 1."""


REMEDIES = {  # of what the system refuses
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or name a folder on another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "mend the permissions, or name another folder"),
    errno.ENOENT: "see whether that path is right",
    errno.ENOTDIR: "a part of that path is a file; name another folder",
    errno.EISDIR: "name a file",
}
# on a GPU and in PyTorch it is a RuntimeError that says so
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)
PACKAGES = ("tinygrad", "torch", "triton", "transformers", "tokenizers", "tiktoken", "numpy")  # that compute or read


def interpreter() -> str:
    """How to call the Python that runs, as the user can type it here."""
    return program(os.path.abspath(sys.executable), "python")


def program(path: str, name: str) -> str:
    """How to call the program at `path`: by its name where that is it, else by the path, relative where it is below
    here.
    """
    here = os.getcwd()
    if shutil.which(name) == path:
        return name
    return shlex.quote(os.path.relpath(path, here) if path.startswith(os.path.join(here, "")) else path)


def runnable(text: str) -> str:
    """`text` with every `python -m` in it as the user can type it here."""
    return re.sub(r"(?<![\w./-])python -m ", lambda _: f"{interpreter()} -m ", text)


def command(module: str, *arguments: object) -> str:
    """A command of this project as the user can type it here, its arguments quoted."""
    return f"{interpreter()} -m {shlex.join([module, *map(str, arguments)])}"


def counted(count: float, noun: str) -> str:
    """1 rank; 2 ranks; 2 processes."""
    plural = f"{noun}{'es' if noun.endswith('s') else 's'}"
    return f"{count} {noun if count == 1 else plural}"


def versions() -> dict[str, str]:
    """Of this project, of Python, and of the packages that decide what is computed, where they are installed."""
    from data.runs.revision import revision

    found = {"gpt2-parity": f"commit {revision()['commit'] or 'unknown'}", "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class Version(argparse.Action):
    """--version: prints `versions()` and ends."""

    def __call__(self, *_: Any) -> NoReturn:
        print(*(f"{name} {version}" for name, version in versions().items()), sep="\n")
        sys.exit(0)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a bad option is an `InputError` (one sentence) instead of a page of usage.

    `prog` and `epilog` hold commands that begin with `python -m`; they are shown as the user can type them.
    """

    def __init__(self, prog: str, epilog: str | None = None, **settings: Any):
        super().__init__(prog=runnable(prog), epilog=epilog and runnable(epilog), **settings)
        self.add_argument(
            "--version",
            action=Version,
            nargs=0,
            default=argparse.SUPPRESS,
            help="show the versions of Python and of packages",
        )

    def parse_args(self, given: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Raises `InputError` for bad options, and for an argument that is not UTF-8."""
        words = sys.argv[1:] if given is None else given
        for word in words:
            try:
                word.encode()
            except UnicodeEncodeError:
                self.error(f"the argument {os.fsencode(word)!r} is not UTF-8; set a UTF-8 locale, or rename the file")
        return super().parse_args(words)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def integer(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return parse


def real(
    above: float, below: float = math.inf, *, closed: bool = True, most: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a number from `above` (itself too, if `closed`) to below `below`, or to `most`."""

    def parse(text: str) -> float:
        # float takes more: 1_000, and the digits of every script
        plain = re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text)
        value = float(text) if plain else math.nan
        if not above <= value < below or (value == above and not closed) or value > most:
            least = f"of at least {above}" if closed else f"above {above}"
            end = f" and below {below}" * (below < math.inf) + f" and at most {most}" * (most < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is not a number {least}{end}")
        return value

    return parse


def missing_extra(what: str, package: str, extra: str) -> InputError:
    """That `what` needs a package which only the optional dependencies `extra` bring, and how to install them here."""
    root = Path(__file__).parents[1]
    if (root / "Makefile").is_file() and Path(sys.prefix).resolve() == (root / ".venv").resolve():
        folder = "" if root == Path.cwd() else f" -C {shlex.quote(str(root))}"
        return InputError(f"{what} needs {package}; run `make{folder} extras`")
    install = f"{shlex.quote(sys.executable)} -m pip install '.[{extra}]'"
    return InputError(f"{what} needs {package}; run `{install}` in the project's folder")


def refuse_missing_folder(*files: Path | None) -> None:
    """Raises `InputError` where a file that is to be written cannot be: before the work, not after it."""
    for file in files:
        if file and file.is_dir():
            raise InputError(f"{file} is a folder; name a file to write")
        if file and not file.parent.is_dir():
            raise InputError(f"there is no folder {file.parent} to write {file.name} to; make it first")


def leave_lost_terminal() -> None:
    """Has stdout and stderr go nowhere where their terminal is gone, so that writing to them is no error."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def ending(e: BaseException, where: str = "") -> tuple[int, str] | None:
    """The exit code that an error ends a command with, and what is said of it on stderr: one sentence, or nothing. None
    for a fault of the program. `where` tells where memory ran out.
    """
    if isinstance(e, InputError):
        return 2, f"error: {runnable(str(e))}\n"
    if isinstance(e, Lost):
        return 1, f"error: {runnable(str(e))}\n"
    if isinstance(e, BrokenPipeError):  # the reader of our output went away (`| head`): nothing is left to say
        return 141, ""
    if isinstance(e, OSError) and e.errno in REMEDIES:
        place = f" at {e.filename}" if e.filename else ""
        return 2, f"error: {e.strerror}{place}; {REMEDIES[e.errno]}\n"
    if isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and OUT_OF_MEMORY.search(str(e))):
        less = "use a smaller model, or --batch-size (--grad-accum makes up for it)"
        return 2, f"error: out of memory{where}; {less}\n"
    if isinstance(e, Stopped):
        return 128 + e.number, ""
    return (130, "interrupted\n") if isinstance(e, KeyboardInterrupt) else None


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a command: exit code 0, 2 with one sentence on stderr for bad input, or 130 when interrupted.

    What stdout's encoding lacks is written as escapes (\\u2019), as Python does on stderr.
    """
    from data.ranks import wait_for_turn  # here, because it imports this

    a_program = catch_interrupts()  # and no function that a test calls
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        code = 0
    except (Exception, KeyboardInterrupt) as e:
        if a_program and isinstance(e, KeyboardInterrupt | Stopped):
            signal.signal(signal.SIGINT, leave)  # a second one does not wait for threads that are to end
        wait_for_turn()
        found = ending(e)
        if found is None:
            raise
        code, said = found
        if isinstance(e, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stderr.write(said)
    sys.exit(code)


class Progress(tqdm):
    """tqdm on a terminal; where stderr is no terminal (a pipe, CI), the same text as plain lines, ten seconds apart.

    `compiling` is how many of the first take far longer than those after them, because they compile: it says so, and
    leaves them out of the rate, and so of the time left. `part` is for what belongs to something longer that is shown
    too: it goes away when it ends, and in a pipe it is not there before it has lasted ten seconds.
    """

    def __init__(self, compiling: int = 0, part: bool = False, **kwargs: Any):
        self.plain, self.part, self.compiling, self.what = not sys.stderr.isatty(), part, compiling, kwargs.get("desc")
        self.compiled: tuple[float, float] | None = None  # how many were done when it had, and after how long
        super().__init__(
            mininterval=10 if self.plain else 0.1,
            dynamic_ncols=not self.plain,
            file=sys.stderr,
            leave=not part,
            delay=10 if self.plain and part else 0,
            **kwargs | ({"desc": f"{self.what} (compiling)"} if compiling else {}),
        )

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, n: float | None = 1) -> bool | None:
        if self.compiling and not self.compiled and not self.disable:
            done = self.n + (n or 0)
            if done - self.initial >= self.compiling:
                self.compiled = done, self.format_dict["elapsed"]
                self.set_description_str(f"{self.what}: ", refresh=False)
        return super().update(n)

    @property
    def format_dict(self) -> Any:
        """What the line says; where something compiles, with the rate since it had, and none before that."""
        found = super().format_dict
        if self.compiling:
            done, elapsed = self.compiled or (self.n, 0)
            found["rate"] = (self.n - done) / max(found["elapsed"] - elapsed, 1e-9)
        return found

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.plain:
            print(msg or str(self), file=sys.stderr, flush=True)
        else:
            super().display(msg, pos)

    def close(self) -> None:
        if self.plain and not self.disable:
            self.disable = True  # tqdm's own closing would leave an empty line
            self._decr_instances(self)  # type: ignore[attr-defined]  # frees its place on the screen for the next
            if not self.part:
                self.display()
        else:
            super().close()

    def line(self, text: str) -> None:
        """Prints a line on stdout, above the bar where there is one."""
        if self.plain:
            print(text, flush=True)
        else:
            self.write(text)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """tqdm's own printer redraws its line with carriage returns; closing a plain bar must not."""
        return tqdm.status_printer(file) if file.isatty() else lambda text: None
