"""Datasets of the Hugging Face hub, through `huggingface_hub`: which files they have for a split, and these files.

What a dataset's card declares under `configs` decides; without that, the words `train`, `validation`, `test` (and the
like) in the names of its files, as in folders. A dataset that has no files that can be read here is taken from
`refs/convert/parquet`, where the hub keeps a copy of every public one. Files are downloaded one by one, as they are
read.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from data.cli import InputError
from data.text.records import READERS, suffix_of

T = TypeVar("T")

HUB_TIMEOUT = 10  # seconds
CONVERTED = "refs/convert/parquet"
NAME = re.compile(r"[\w.-]+/[\w.-]+(:.+)?")  # of a dataset, and of one of its configurations
WORDS = {
    "train": ("train", "training"),
    "valid": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


class HubError(InputError):
    """The hub does not answer, or not now: what was done so far is worth keeping."""


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset, at a revision that never changes."""

    repo: str
    revision: str
    name: str
    size: int  # bytes

    def download(self) -> Path:
        """Its local copy. Raises `HubError` where it cannot be fetched."""
        return download(self.repo, self.name, self.revision)


def download(repo: str, name: str, revision: str | None = None) -> Path:
    """The local copy of a file of a dataset, fetched when the cache lacks it; a broken download resumes."""
    where: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    try:
        return Path(hf_hub_download(repo, name, local_files_only=True, **where))
    except LocalEntryNotFoundError:
        pass
    try:
        # One question with a short wait first: without an answer, `hf_hub_download` goes on asking for minutes.
        get_hf_file_metadata(hf_hub_url(repo, name, **where), timeout=HUB_TIMEOUT)
        return Path(hf_hub_download(repo, name, **where))
    except Exception as e:  # the hub client passes on the errors of whichever HTTP and transfer libraries it has
        raise _refusal(f"{repo}/{name}", e) from None


def _refusal(what: str, error: Exception) -> InputError:
    """What to say of an error of the hub client's. One of this machine, such as a full disk, is raised as it is."""
    if isinstance(error, GatedRepoError):
        return InputError(f"{what} is only for those whom the hub lets read it; ask there, then run `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"{what} is no public dataset of the Hugging Face hub either; check its name")
    if isinstance(error, OSError) and error.errno:
        raise error
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return HubError(
        f"the Hugging Face hub cannot be reached for {what} ({reason}); "
        "try again, or pass a local .txt or .jsonl file, or `stories`, which needs no download"
    )


def dataset_files(source: str, split: str) -> tuple[list[HubFile], list[str]]:
    """The files of the `split` ("train" or "valid") of dataset `OWNER/NAME[:CONFIG]`; of "valid", maybe none. And the
    names of those that are left out, as they are named by no split where others are.

    Raises `InputError` where it has several configurations and none was chosen, and where it has nothing to read.
    """
    repo, _, chosen = source.partition(":")
    configs, sizes, revision = _configurations(repo)
    if chosen not in configs and (chosen or len(configs) > 1):
        names = [f"{repo}:{name}" for name in configs]
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        fault = f"has no configuration {chosen}" if chosen else "has several configurations"
        raise InputError(f"the dataset {repo} {fault}; choose one of {listed}")
    splits = configs[chosen] if chosen else next(iter(configs.values()))
    return [HubFile(repo, revision, name, sizes[name]) for name in splits.get(split, [])], splits.get("", [])


def _configurations(repo: str) -> tuple[dict[str, dict[str, list[str]]], dict[str, int], str]:
    """For each configuration the files of each split, all of one format; the files' sizes in bytes; the revision."""
    for revision in (None, CONVERTED):
        try:
            info = HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT)
        except RevisionNotFoundError:
            break
        except Exception as e:  # as in `download`
            raise _refusal(f"{repo}, which is no file or folder here,", e) from None
        sizes = {
            file.rfilename: file.size or 0
            for file in info.siblings or []
            if suffix_of(file.rfilename) and Path(file.rfilename).name not in NO_DATA
        }
        card = info.card_data.to_dict() if info.card_data else {}
        if revision == CONVERTED:
            declared = {name.split("/")[0]: None for name in sizes if name.count("/") > 1}
            configs = {config: splits_of(n for n in sorted(sizes) if n.startswith(f"{config}/")) for config in declared}
        elif isinstance(card.get("configs"), list):
            configs = {str(one.get("config_name")): _declared(one, sorted(sizes)) for one in card["configs"]}
        else:
            configs = {"default": splits_of(sorted(sizes))}
        configs = {config: _of_one_format(splits) for config, splits in configs.items() if splits.get("train")}
        if configs:
            return configs, sizes, info.sha or "main"
    raise InputError(f"the dataset {repo} has no training text in a format that can be read ({', '.join(READERS)})")


def _declared(config: dict[str, Any], names: list[str]) -> dict[str, list[str]]:
    """The files of each split, as an entry of a card's `configs` has them."""
    files, folder = config.get("data_files"), str(config.get("data_dir", "")).strip("/")
    names = [name for name in names if not folder or name.startswith(f"{folder}/")]
    if not files:
        return splits_of(names)
    splits: dict[str, list[str]] = {}
    for entry in files if isinstance(files, list) else [files]:
        split, patterns = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            path = f"{folder}/{pattern}".strip("/").removeprefix("./")
            found = [name for name in names if _glob(path).fullmatch(name)]
            splits.setdefault(split_of(str(split)) or str(split), []).extend(found)
    if "train" not in splits and len(splits) == 1:
        return {"train": next(iter(splits.values()))}  # whatever its name
    return splits


def _glob(pattern: str) -> re.Pattern[str]:
    """A pattern of paths: `*` and `?` stay within a folder, `**` does not; a folder stands for all that is in it."""
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(tokens.get(part) or re.escape(part) for part in parts) + "(?:/.*)?")


def split_of(name: str) -> str | None:
    """The split that a name speaks of, by the words in it, the last of which counts; None where there is none."""
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        for split, words in WORDS.items():
            if word in words:
                return split
    return None


def splits_of(files: Iterable[T], name: Callable[[T], str] = str) -> dict[str, list[T]]:
    """The files of each split ("train", "valid", "test"), by the words in their names, and under "" those of none.

    All are "train" where none is named so, or no other is named by a split.
    """
    files = list(files)
    splits: dict[str, list[T]] = {}
    for file in files:
        splits.setdefault(split_of(name(file)) or "", []).append(file)
    return splits if "train" in splits and splits.keys() & {"valid", "test"} else {"train": files}


def _of_one_format(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """Of the same text in several formats, the one that is preferred."""
    suffix = min((suffix_of(name) for name in splits["train"]), key=lambda suffix: [*READERS].index(str(suffix)))
    return {split: [name for name in names if suffix_of(name) == suffix] for split, names in splits.items()}
