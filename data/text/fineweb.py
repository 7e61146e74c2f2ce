"""FineWeb in GPT-2's tokens, as the Hugging Face hub has it: `fineweb10B`, or the first of its shards, `fineweb10B:8`.

The files have llm.c's form (`data.text.token_files`). They stay in the hub's cache: the folder to train on has links.
"""

import os
import re
import shutil
from pathlib import Path

from data.cli import InputError, Progress
from data.files import locked
from data.text.hub import download

REPO = "kjj0/fineweb10B-gpt2"
SOURCE = re.compile(rf"(?:fineweb10B|{re.escape(REPO)})(?::(.*))?")
SHARDS = 103
SHARD_GB = 0.2  # 100 million tokens


def is_fineweb(source: str) -> bool:
    return bool(SOURCE.fullmatch(source))


def fineweb(source: str) -> Path:
    """A folder in runs/data with the validation shard and the training shards that `source` names.

    What the hub's cache lacks is downloaded, file by file; where that was stopped, it goes on with the file that is not
    whole. Raises `InputError` for a number of shards that there are not, and where the hub cannot be reached.
    """
    match = SOURCE.fullmatch(source)
    assert match
    number = SHARDS if match[1] is None else int(match[1]) if re.fullmatch("[0-9]{1,3}", match[1]) else 0
    if not 1 <= number <= SHARDS:
        raise InputError(f"{source}: there are {SHARDS} training shards; give 1 to {SHARDS}, as in `fineweb10B:8`")
    folder = Path("runs", "data", f"fineweb10B-{number}")
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, number + 1))]
    folder.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"waiting for {{}}, which is getting {source}"
    with locked(folder.with_name(f"{folder.name}.lock"), lambda other: print(waiting.format(other), flush=True)):
        if all((folder / name).is_file() for name in names):
            return folder
        size = f"{len(names)} files of {SHARD_GB} GB, {SHARD_GB * len(names):.1f} GB in all"
        print(f"getting {source} from the hub, {size}, unless its cache has them", flush=True)
        files = [download(REPO, name) for name in Progress(iterable=names, desc=source, unit="file")]
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, file in zip(names, files, strict=True):
            os.symlink(file.absolute(), partial / name)
        shutil.rmtree(folder, ignore_errors=True)  # its links are broken
        os.rename(partial, folder)
    return folder
