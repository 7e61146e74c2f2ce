"""GPT-2 weights as numpy arrays, in Hugging Face's format: from the hub, a folder or a run, and back to a folder.

A checkpoint folder holds config.json and model.safetensors (or shards of it and their index), and `transformers` loads
what `save` writes, the tokenizer with it. Pickles are never read: they can run code. Where a folder has SHA256SUMS
(`sha256sum --check` reads it), what is loaded has to agree with it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as serialize

from data.checkpoints.config import GPT2Config, from_hf, parameter_shapes, to_hf
from data.cli import InputError
from data.files import atomic_write, sync_folder
from data.text.tokenizer import FILES, OTHER_FILES, Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUMS = "SHA256SUMS"
SUMS_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]+)\n")
HUB_TIMEOUT = 5  # seconds to wait for the hub, before the cache is taken or an error says so

# safetensors' names of the element types that numpy has; BF16, which numpy has not, is widened on reading.
DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"},
}


def load(name_or_folder: str | Path) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """The configuration and the weights of a hub model (`gpt2`), a checkpoint folder, or a run's latest checkpoint.

    The arrays have the names, the order and the shapes of `parameter_shapes`; float16, float32 and float64 stay what
    they are, bfloat16 comes as float32. Raises `InputError` when there is no such model, when it is not a GPT-2, and
    when its files are missing, damaged, or do not belong together.
    """
    folder = resolve(name_or_folder)
    if (folder / SUMS).exists():
        verify(folder, CONFIG, WEIGHTS, *summed(folder, FILES))
    config = read_config(folder)
    weights: dict[str, np.ndarray] = {}
    for name, array in read_weights(folder).items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, which old files carry along
            continue
        bare = name.removeprefix("transformer.")
        if bare in weights:
            raise InputError(f"{folder}: both {bare} and transformer.{bare} are there; keep one of them")
        weights[bare] = array
    head = weights.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in weights and not np.array_equal(head, weights["wte.weight"], equal_nan=True):
        raise InputError(f"{folder}: lm_head.weight differs from wte.weight; choose weights whose head is tied")
    refuse_misfits(config, weights, folder)
    return config, {name: weights[name] for name in parameter_shapes(config)}


def save(
    folder: str | Path, config: GPT2Config, arrays: Mapping[str, np.ndarray], tokenizer: Tokenizer | None = None
) -> None:
    """Writes `arrays`, named and shaped as `parameter_shapes(config)`, `config`, and the files of `tokenizer` (None: of
    none) to `folder`, making it if need be.

    Each file is whole or not there. Raises `InputError` when the arrays are not the configuration's.
    """
    folder = Path(folder)
    refuse_misfits(config, arrays, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{folder} is a file; name another folder") from None
    sync_folder(folder.parent)
    # transformers before version 5 refuses a file without this note on its format
    write_safetensors(folder / WEIGHTS, {name: arrays[name] for name in parameter_shapes(config)}, {"format": "pt"})
    with atomic_write(folder / CONFIG, "w") as f:
        ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot} if tokenizer else {}
        f.write(json.dumps(to_hf(config) | ends, indent=2) + "\n")
    for name, text in tokenizer.files().items() if tokenizer else ():
        with atomic_write(folder / name) as f:
            f.write(text.encode())


def write_sums(folder: Path) -> None:
    """Writes the SHA-256 of every file in `folder` to SHA256SUMS there."""
    lines = []
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as f:
            lines.append(f"{hashlib.file_digest(f, 'sha256').hexdigest()}  {path.name}\n")
    with atomic_write(folder / SUMS, "w") as f:
        f.writelines(lines)


def verify(folder: Path, *names: str) -> None:
    """Raises `InputError` unless the files of these names, or all that SHA256SUMS lists, are what it says."""
    if fault := damage(folder, *names):
        raise InputError(f"{fault}; {remedy(folder)}")


def summed(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that SHA256SUMS lists."""
    lines = SUMS_LINE.findall((folder / SUMS).read_text(encoding="utf-8", errors="replace"))
    return [name for name in names if name in {listed for _, listed in lines}]


def damage(folder: Path, *names: str) -> str | None:
    """What is wrong with the files that `verify` looks at, in words; None if nothing is."""
    try:
        content = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return f"{folder} is no whole checkpoint ({SUMS} is missing)"
    if not re.fullmatch(f"({SUMS_LINE.pattern})+", content):
        return f"{folder / SUMS} is damaged"
    sums = {name: digest for digest, name in SUMS_LINE.findall(content)}
    for name in names or sums:
        try:
            with open(folder / name, "rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
        except FileNotFoundError:
            return f"{folder / name} is missing"
        if digest != sums.get(name):
            return f"{folder / name} is damaged (its SHA-256 is not the one in {SUMS})"
    return None


def remedy(folder: Path) -> str:
    """What to do about a damaged checkpoint: take the newest good one of its run, if there is one."""
    others = (other for other in reversed(checkpoints(folder.parent)) if other != folder)
    good = next((other for other in others if not damage(other)), None)
    return f"the newest good checkpoint of the run is {good}, pass that" if good else "download or copy it again"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder of them, by their steps."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{1,18}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def resolve(name_or_folder: str | Path) -> Path:
    """The local folder that holds a checkpoint, given that folder, a run's folder, or a hub name, which is downloaded.

    A run's folder stands for its latest checkpoint, the one that `checkpoints/latest` names. Raises `InputError` when
    there is no such folder or model, or the hub cannot be reached and its cache lacks the model.
    """
    text = str(name_or_folder)
    folder = Path(text)
    if not os.path.isdir(folder):  # unlike Path.is_dir, also where the name is too long to be one
        if os.path.isfile(folder):
            raise InputError(f"{text} is a file; pass the folder that holds it")
        if isinstance(name_or_folder, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
            raise InputError(f"there is no folder {text}; pass a checkpoint's folder or a hub name such as gpt2")
        return download(text)
    if (folder / "checkpoints").is_dir():
        return latest_checkpoint(folder)
    return folder


def latest_checkpoint(run: Path) -> Path:
    """The checkpoint folder that `run`/checkpoints/latest names. Raises `InputError` when it names none."""
    latest = run / "checkpoints" / "latest"
    if not checkpoints(latest.parent):
        raise InputError(f"{run} has no checkpoint yet ({latest} is missing); train further or pass another folder")
    name = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if latest.parent / name not in checkpoints(latest.parent):
        raise InputError(
            f"{latest} does not name a checkpoint beside it ({name[:40]!r}); {remedy(latest.parent / 'latest')}"
        )
    return latest.parent / name


def download(name: str) -> Path:
    """The folder of the hub model `name` in Hugging Face's cache, brought up to date where the hub can be reached.

    Raises `InputError` when the hub has no such model, or cannot be reached and the cache does not have it.
    """
    unreachable = None
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)  # asked first, because snapshot_download itself waits for ever
    except HFValidationError:
        raise InputError(f"{name!r} is neither a folder nor a name that the hub could have; pass one of them") from None
    except RepositoryNotFoundError:  # also what the hub says of a model that asks for a login
        raise InputError(f"there is no folder {name}, and the hub has no public model {name}; check the name") from None
    except Exception as e:  # the errors are those of the hub's HTTP library, which has changed before
        unreachable = e
    try:
        patterns = [CONFIG, "model*.safetensors", INDEX, *FILES, *OTHER_FILES]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=unreachable is not None))
    except Exception as e:
        if isinstance(e, OSError) and e.errno:  # of this machine, such as no room for the cache
            raise
        reason = f"{unreachable or e}".strip().partition("\n")[0]
        raise InputError(
            f"there is no folder {name}, the hub's cache lacks that model, and the hub cannot be reached ({reason}); "
            "pass a local folder or `--init random` instead"
        ) from None


def read_config(folder: Path) -> GPT2Config:
    """The configuration in `folder`/config.json. Raises `InputError` when it is missing, damaged, or no GPT-2's."""
    return from_hf(read_json(folder / CONFIG), folder / CONFIG)


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of `folder`'s model.safetensors, or of the shards in its index, under the names in the files.

    Raises `InputError` when there is neither, or when one of the files is missing or damaged.
    """
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)
    index = folder / INDEX
    if not index.exists():
        if any(folder.glob("pytorch_model*.bin")):
            raise InputError(
                f"{folder} has its weights as a pickle (pytorch_model.bin), which is never loaded because it can run "
                "code; convert it: load it with transformers and call save_pretrained"
            )
        raise InputError(f"{folder} has neither {WEIGHTS} nor {INDEX}; pass the folder of a whole checkpoint")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; download or copy it again")
    shards = sorted(set(weight_map.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]:
        raise InputError(f"{index} names {outside[0]!r}, which is no .safetensors file beside it; copy it again")
    weights: dict[str, np.ndarray] = {}
    for shard in shards:
        tensors = read_safetensors(folder / shard)
        if wrong := tensors.keys() ^ {name for name in weight_map if weight_map[name] == shard}:
            raise InputError(f"{folder / shard} and {INDEX} disagree on {listing(wrong)}; download or copy them again")
        weights |= tensors
    return weights


def refuse_misfits(config: GPT2Config, arrays: Mapping[str, np.ndarray], where: Path) -> None:
    """Raises `InputError`, naming the tensors, unless `arrays` are floats with the names and shapes of `config`."""
    shapes = parameter_shapes(config)
    if missing := [name for name in shapes if name not in arrays]:
        raise InputError(f"{where}: {listing(missing)} missing; the weights are not those of this {CONFIG}")
    if extra := arrays.keys() - shapes.keys():
        raise InputError(f"{where}: {listing(extra)} not part of the model; the weights are not those of this {CONFIG}")
    if other := [name for name in shapes if arrays[name].shape != shapes[name]]:
        first = other[0]
        raise InputError(
            f"{where}: weights of another size, {first} is {list(arrays[first].shape)} where {CONFIG} makes it "
            f"{list(shapes[first])} ({len(other)} such tensors); pair the weights with their own {CONFIG}"
        )
    if other := [name for name in shapes if arrays[name].dtype.kind != "f"]:
        first = other[0]
        raise InputError(f"{where}: {first} is of type {arrays[first].dtype}; choose weights stored as floats")


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, by name, in numpy's type for it; bfloat16 is widened, exactly, to float32.

    Raises `InputError` when the file is missing, damaged, or holds a type that numpy has not.
    """
    try:
        tensors = deserialize(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; download or copy it again") from None
    except SafetensorError as e:
        raise InputError(f"{path} is damaged ({e}); download or copy it again") from None
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] == "BF16":  # the upper half of a float32
            array = (np.frombuffer(tensor["data"], "<u2").astype("<u4") << 16).view("<f4")
        elif tensor["dtype"] in DTYPES:
            array = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
        else:
            raise InputError(f"{path}: {name!r} is of type {tensor['dtype']}; choose weights stored as floats")
        try:
            arrays[name] = array.reshape(tensor["shape"])
        except ValueError as e:  # an empty tensor may claim dimensions that numpy cannot have
            raise InputError(f"{path} is damaged ({name!r}: {e}); download or copy it again") from None
    return arrays


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes named arrays and `metadata` to a safetensors file that is whole or not there.

    Takes as much memory again as the arrays: the library's own writing to a file neither syncs it nor reports a full
    disk as an OSError.
    """
    # contiguous, because the library writes memory as it lies
    rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with atomic_write(path) as f:
        f.write(serialize(rows, metadata))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError` when the file is missing or does not hold one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}; pass the folder of a whole checkpoint") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is damaged ({e}); download or copy it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged (no JSON object); download or copy it again")
    return value


def listing(names: Iterable[str]) -> str:
    """A few of the names, quoted (a file may hold any), for an error."""
    few = sorted(map(repr, names))
    return ", ".join(few[:3]) + (f" and {len(few) - 3} more" if len(few) > 3 else "")
