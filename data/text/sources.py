"""Where text comes from: a SOURCE names a stream of documents, read in constant memory.

stories          a small language written by `data.text.stories`: no download, the default
tinystories      TinyStoriesV2-GPT4 from the Hugging Face hub (Eldan & Li 2023, arXiv 2305.07759)
tinystories-v1   the first TinyStories, from the same place
OWNER/NAME       any dataset of the hub, with `:CONFIG` where it has several configurations
FILE             a text in one of the formats of `data.text.formats` and `data.text.records`, packed or not
FOLDER           all such files in it, and in its folders, sorted by name
"PATTERN"        all such files of these names (`*`, `?`, `**`), sorted by name
FILE,FILE,...    several of these three, one after the other; names with commas in them stay whole

Where files of a folder or pattern, or of a dataset, are named by the split `train`, and others by `validation` or
`test`, only those of `train` are trained on, and those of `validation` are the validation text. A note names the files
that say no split, which are left out then.
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.cli import InputError
from data.text import stories
from data.text.formats import AS_GIVEN, Chunk, Chunks, Piece, Place, Reading, extra
from data.text.hub import NAME, HubFile, dataset_files, download, splits_of
from data.text.records import READERS, suffix_of

FORMATS = f"{', '.join(READERS)}, or all but .parquet with .gz or .zst behind it"
ACCEPTED = (
    "`stories`, `tinystories`, `tinystories-v1`, OWNER/NAME of a dataset on the Hugging Face hub, "
    f"or files, folders and quoted patterns of {FORMATS}"
)

STORIES = {"train": (0, 8_000_000), "valid": (1, 400_000)}  # split: seed, characters (3.65 to a token)

HUB_REPO = "roneneldan/TinyStories"
HUB_FILES = {
    "tinystories": {"train": "TinyStoriesV2-GPT4-train.txt", "valid": "TinyStoriesV2-GPT4-valid.txt"},
    "tinystories-v1": {"train": "TinyStories-train.txt", "valid": "TinyStories-valid.txt"},
}


OF_OTHERS = ("meta.json", "checkpoint.json", "config.json", "run.json")  # of prepared data (or half), a model, a run


@dataclass(frozen=True)
class File:
    """A file of a source: its `size` in bytes as it is stored, the `identity` of its content, and how it is read."""

    size: int
    identity: str
    read: Callable[[Place], Chunks]


@dataclass(frozen=True)
class Stream:
    """A readable stream of documents, of one file after the other; `name` and `notes` are for people."""

    name: str
    files: tuple[File, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes, as the files are stored."""
        return sum(file.size for file in self.files)

    @property
    def identity(self) -> str:
        """What tells its content from any other."""
        return "\n".join(file.identity for file in self.files)

    def chunks(self, start: Place | None = None) -> Chunks:
        """The documents in order, without surrounding white space, empty ones left out; a few at a time.

        With each few comes the place where the next begin: from there as `start`, the same pieces follow. A document
        longer than `data.text.formats.LONGEST_PIECE` comes in pieces, so that memory stays bounded whatever the file.

        Raises `InputError` for bytes that are no UTF-8, for what is damaged or no text of its format, and at the end
        where there was no document at all.
        """
        start = start or Place()
        empty = start == Place()
        for i in range(start.file, len(self.files)):
            before = sum(file.size for file in self.files[:i])
            for pieces, end, counts in self.files[i].read(start if i == start.file else Place()):
                empty = empty and not pieces
                yield Chunk(pieces, end._replace(file=i, done=before + end.done), counts)
        if empty:
            raise InputError(f"{self.name} holds no document; give a source with some text in it")


def stream(source: str, split: str, how: Reading = AS_GIVEN) -> Stream | None:
    """The `split` ("train" or "valid") of `source`; None for the "valid" of one that has none of its own.

    Raises `InputError` for an unknown or unreadable source, and where the hub cannot be reached.
    """
    if source == "stories":
        seed, size = STORIES[split]
        generator = Path(stories.__file__).read_bytes()  # a changed generator writes other stories
        identity = f"{seed} {size} {hashlib.sha256(generator).hexdigest()}"
        return Stream(f"stories (seed {seed})", (File(size, identity, partial(_generated, seed, size)),))
    if source in HUB_FILES:
        path = download(HUB_REPO, HUB_FILES[source][split])
        return Stream(f"{HUB_REPO}/{path.name}", (_local_file(path, how),))
    if is_dataset(source):
        found, left_out = dataset_files(source, split)
        files = tuple(_hub_file(file, how) for file in found)
        name = f"the {'validation' if split == 'valid' else split} split of {source}"
        return Stream(name, files, _of_no_split(source, left_out)) if files else None
    paths: list[Path] = []
    notes: tuple[str, ...] = ()
    for part in parts(source):
        found_here, of_part = _paths(part)
        splits, of_splits = _splits(part, found_here)
        paths += splits.get(split, [])
        notes += of_part + of_splits
    return Stream(source, tuple(_local_file(path, how) for path in paths), notes) if paths else None


def parts(source: str) -> list[str]:
    """The files, folders and patterns that a local source names. One that has commas in its name stays whole.

    Raises `InputError` where there is nothing before, between or after commas.
    """
    found, rest = [], source.split(",")
    while rest:
        together = (n for n in range(len(rest), 1, -1) if _is_there(",".join(rest[:n])))
        n = next(together, 1)
        found.append(",".join(rest[:n]))
        rest = rest[n:]
    if not all(part.strip() for part in found):
        fault = f"{source!r} has a comma with no name beside it" if len(found) > 1 else "an empty name is no source"
        raise InputError(f"{fault}; the sources are {ACCEPTED}")
    return found


def _is_there(name: str) -> bool:
    return os.path.exists(name) or (glob.has_magic(name) and any(glob.iglob(name, recursive=True)))


def _splits(source: str, paths: list[Path]) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """The files of each split of a part of a source, and notes on them. A single file is meant whatever its name."""
    if os.path.isfile(source):
        return {"train": paths}, ()
    splits = splits_of(paths, lambda path: str(path.relative_to(source) if path.is_relative_to(source) else path.name))
    left_out = splits.pop("", [])
    notes = tuple(f"{len(those)} file(s) of {source} are its {split} split" for split, those in splits.items())
    return splits, (*notes, *_of_no_split(source, [path.name for path in left_out])) if len(splits) > 1 else ()


def _of_no_split(source: str, names: list[str]) -> tuple[str, ...]:
    what = f"left out of {source}, as their names say no split and those of others do"
    return (f"{what}: {_listed(names)}",) if names else ()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def is_dataset(source: str) -> bool:
    """Whether it is the name of a dataset on the hub, rather than of something here."""
    return bool(NAME.fullmatch(source)) and not suffix_of(source) and not os.path.exists(source)


def is_text_folder(source: str) -> bool:
    """Whether it is a folder of texts, or of nothing that can be read, rather than one of prepared data, of a model or
    of a run, whole or damaged.
    """
    if not os.path.isdir(source) or any(os.path.isfile(Path(source, name)) for name in OF_OTHERS):
        return False
    names = [name for _, _, names in os.walk(source) for name in names]
    return any(map(suffix_of, names)) or not any(name.endswith(".bin") for name in names)


def _paths(source: str) -> tuple[list[Path], tuple[str, ...]]:
    """The files that a part of a local source names, and notes on what it leaves out."""
    path = Path(source)
    if path.is_file():
        if not suffix_of(source):
            raise InputError(f"{source!r} is not a source of text; the sources are {ACCEPTED}")
        return [path], ()
    if path.is_dir():
        if others := [name for name in OF_OTHERS if (path / name).is_file()]:
            raise InputError(f"{source} is no folder of texts: it has {others[0]}, as models, runs, prepared data do")
        found = sorted(
            Path(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if not any(part.startswith(".") for part in Path(folder, name).relative_to(path).parts)
        )
    elif glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(source, recursive=True) if os.path.isfile(name))
        if not found:
            raise InputError(f"no file matches {source}; the sources are {ACCEPTED}")
    elif suffix_of(source):
        raise InputError(f"there is no file {source}; the sources are {ACCEPTED}")
    else:
        raise InputError(f"{source!r} is not a source of text; the sources are {ACCEPTED}")
    readable = [path for path in found if suffix_of(path.name)]
    others = [path.name for path in found if not suffix_of(path.name)]
    if not readable:
        raise InputError(f"{source} holds no file in a format that can be read ({FORMATS})")
    return readable, (f"left out of {source}, as no text: {_listed(others)}",) if others else ()


def _local_file(path: Path, how: Reading) -> File:
    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"  # tells it from what it was before a change, too
    return _file(path.name, stat.st_size, identity, lambda: path, how)


def _hub_file(file: HubFile, how: Reading) -> File:
    return _file(file.name, file.size, f"{file.repo}@{file.revision}/{file.name}", file.download, how)


def _file(name: str, size: int, identity: str, fetch: Callable[[], Path], how: Reading) -> File:
    """A file that `fetch` brings here when it is read. Raises `InputError` where a package that it needs is missing."""
    suffix = suffix_of(name)
    assert suffix
    if suffix == ".parquet":
        extra("pyarrow", "parquet", name)
    if name.lower().endswith(".zst"):
        extra("zstandard", "zstd", name)
    return File(size, identity, lambda start: READERS[suffix](fetch(), start, how))


def _generated(seed: int, size: int, start: Place) -> Chunks:
    """Stories until `size` characters are reached (ASCII: as many bytes); the last one is whole."""
    tales = stories.stories(seed)
    end = 0
    while end < size:
        story = next(tales)
        end = min(end + len(story), size)  # the progress ends at `size`, not beyond
        if end > start.offset:
            yield Chunk([Piece(story)], Place(0, end, False, end), Counter())
