"""Weights that torch.save pickled (nanoGPT's ckpt.pt, pytorch_model.bin): PyTorch converts them in another process.

Pickles can run code. `torch.load(weights_only=True)` reads tensors and plain values alone, and refuses all else.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from data.cli import InputError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
OF_FOLDERS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "ckpt.pt")  # as they are called where they are alone
ROOT = Path(__file__).parents[2]


def is_pickle(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.is_file()


def within(folder: Path) -> Path | None:
    """The pickle of the weights in a folder that has them in no other form."""
    if any(folder.glob("model*.safetensors")):
        return None
    return next((folder / name for name in OF_FOLDERS if (folder / name).is_file()), None)


def convert(pickled: Path, out: Path) -> None:
    """Writes the weights of a pickle, or of the shards that an index of pickles lists, to the folder `out` as
    safetensors with their config.json. Raises `InputError` when it cannot be read as a GPT-2.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError(f"{pickled} is a pickle, which PyTorch has to convert; `pip install torch`")
    command = [sys.executable, "-m", "torch_ref.convert", str(pickled.absolute()), "--out", str(out.absolute())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    *_, last = done.stderr.splitlines() or [""]
    if done.returncode == 2 and last.startswith("error: "):
        raise InputError(last.removeprefix("error: "))
    if done.returncode:
        raise InputError(
            f"{pickled} could not be converted ({last or f'exit code {done.returncode}'}); download it again"
        )
    print(done.stderr, end="", file=sys.stderr)  # its notes
