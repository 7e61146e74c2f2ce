"""Models of the Hugging Face hub, by name: the folder of its cache that holds one, brought up to date."""

import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from data.checkpoints.tensors import listing
from data.cli import InputError
from data.text.tokenizer import FILES, OTHER_FILES

TIMEOUT = 5  # seconds to wait for the hub, before the cache is taken or an error says so
SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def download(name: str) -> Path:
    """The folder of the hub model `name` in Hugging Face's cache, brought up to date where the hub can be reached.

    Of a model that has both, it gets safetensors and no pickle. Raises `InputError` when the hub has no such model, or
    it has no weights that could be read, or the hub cannot be reached and the cache does not have it.
    """
    unreachable, patterns = None, SAFETENSORS + PICKLES
    try:
        # asked first, because snapshot_download itself waits for ever
        files = [file.rfilename for file in HfApi().model_info(name, timeout=TIMEOUT).siblings or []]
        patterns = weights_among(files, name)
    except InputError:
        raise
    except HFValidationError:
        raise InputError(f"{name!r} is neither a folder nor a name that the hub could have; pass one of them") from None
    except RepositoryNotFoundError:  # also what the hub says of a model that asks for a login
        raise InputError(f"there is no folder {name}, and the hub has no public model {name}; check the name") from None
    except Exception as e:  # the errors are those of the hub's HTTP library, which has changed before
        unreachable = e
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["config.json", *patterns, *FILES, *OTHER_FILES],
                local_files_only=unreachable is not None,
            )
        )
    except Exception as e:
        if isinstance(e, OSError) and e.errno:  # of this machine, such as no room for the cache
            raise
        reason = f"{unreachable or e}".strip().partition("\n")[0]
        raise InputError(
            f"there is no folder {name}, the hub's cache lacks that model, and the hub cannot be reached ({reason}); "
            "check the name, or pass the folder of a model"
        ) from None


def weights_among(files: list[str], name: str) -> list[str]:
    """The patterns of a model's weights, given all its files. Raises `InputError` where there are none to be read."""
    top = [file for file in files if "/" not in file]
    if "config.json" in top:
        for patterns in (SAFETENSORS, PICKLES):
            if any(fnmatch.filter(top, pattern) for pattern in patterns):
                return patterns
    raise InputError(
        f"the hub's {name} has no config.json with model.safetensors or pytorch_model.bin beside it, but "
        f"{listing(files) or 'nothing'}; choose another, or `hf download {name}` and pass the folder that has them"
    )
