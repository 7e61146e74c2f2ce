"""GPT-2 weights as numpy arrays, in Hugging Face's format: from the hub, a folder or a run, and back to a folder.

A checkpoint folder holds config.json and model.safetensors (or shards of it and their index), and `transformers` loads
what `save` writes, the tokenizer with it. Pickles are converted (pickles.py). Where a folder has SHA256SUMS, what is
loaded has to agree with it (sums.py).
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.checkpoints import pickles
from data.checkpoints.config import GPT2Config, from_hf, parameter_shapes, to_hf
from data.checkpoints.hub import download
from data.checkpoints.sums import SUMS, checkpoints, remedy, summed, verify
from data.checkpoints.tensors import listing, read_json, read_safetensors, write_safetensors
from data.cli import InputError
from data.files import atomic_write, sync_folder
from data.text.tokenizer import FILES, Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WHOLE = "pass the folder of a run or of a whole checkpoint"
WRAPPERS = re.compile(r"((_orig_mod|module|model|transformer)\.)+")  # of torch.compile, DDP, Lightning, Hugging Face


def load(name_or_folder: str | Path) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """The configuration and the weights of a hub model (`gpt2`), a checkpoint folder, a run's latest checkpoint, or a
    pickle of torch.save (`ckpt.pt`), which needs PyTorch.

    The arrays have the names, the order and the shapes of `parameter_shapes`; float16, float32 and float64 stay what
    they are, bfloat16 comes as float32. Raises `InputError` when there is no such model, when it is not a GPT-2, and
    when its files are missing, damaged, or do not belong together.
    """
    folder = resolve(name_or_folder)
    given = Path(name_or_folder)
    if pickled := given if pickles.is_pickle(given) else pickles.within(folder):
        with tempfile.TemporaryDirectory() as converted:
            pickles.convert(pickled, Path(converted))
            return read_model(Path(converted))
    if (folder / SUMS).exists():
        parts = sorted(path.name for path in folder.glob("model*.safetensors*"))
        verify(folder, CONFIG, *(parts or [WEIGHTS]), *summed(folder, FILES))
    return read_model(folder)


def read_model(folder: Path) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """What `load` gives of a folder of safetensors, whatever its SHA256SUMS says."""
    config = read_config(folder)
    return config, model_weights(config, read_weights(folder), folder)


def model_weights(config: GPT2Config, arrays: Mapping[str, np.ndarray], where: Path) -> dict[str, np.ndarray]:
    """The parameters of `config`'s model, named as `parameter_shapes` names them and in that order, from arrays as
    others name them: within what wrapped the model, with the causal mask, with the tied head or it alone.

    Raises `InputError`, which begins with `where`, when they are not that model's.
    """
    weights: dict[str, np.ndarray] = {}
    full_names: dict[str, str] = {}
    for name, array in arrays.items():
        bare = name[match.end() :] if (match := WRAPPERS.match(name)) else name
        if bare.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, which old files carry along
            continue
        if bare in weights:
            both = sorted([full_names[bare], name], key=len)
            raise InputError(f"{where}: both {both[0]} and {both[1]} are there; keep one of them")
        weights[bare], full_names[bare] = array, name
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        head = weights.pop("lm_head.weight")
        if not np.array_equal(head, weights.setdefault("wte.weight", head), equal_nan=True):
            raise InputError(
                f"{where}: lm_head.weight differs from wte.weight, and {CONFIG} says that they are one; "
                "choose weights whose head is tied, or set tie_word_embeddings to false"
            )
    refuse_misfits(config, weights, where)
    return {name: weights[name] for name in parameter_shapes(config)}


def save(
    folder: str | Path, config: GPT2Config, arrays: Mapping[str, np.ndarray], tokenizer: Tokenizer | None = None
) -> dict[str, str]:
    """Writes `arrays`, named and shaped as `parameter_shapes(config)`, `config`, and the files of `tokenizer` (None: of
    none) to `folder`, making it if need be. Returns the SHA-256 of the file of weights, by its name.

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
    weights = {name: arrays[name] for name in parameter_shapes(config)}
    digest = write_safetensors(folder / WEIGHTS, weights, {"format": "pt"})
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot} if tokenizer else {}
    beside = {CONFIG: json.dumps(to_hf(config) | ends, indent=2) + "\n"}
    if tokenizer:
        beside |= tokenizer.files(config.n_positions)
        beside["generation_config.json"] = json.dumps(generation_settings(config, tokenizer), indent=2) + "\n"
    for name, text in beside.items():
        with atomic_write(folder / name) as f:
            f.write(text.encode())
    return {WEIGHTS: digest}


def generation_settings(config: GPT2Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a generation_config.json: `transformers` stops at the end of a text and of the context, and draws
    none of the tokens by which a vocabulary was padded.
    """
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    padding = list(range(tokenizer.vocab_size, config.vocab_size))
    return ends | {"max_length": config.n_positions} | ({"suppress_tokens": padding} if padding else {})


def resolve(name_or_folder: str | Path) -> Path:
    """The local folder that holds a checkpoint, given that folder, a run's folder, or a hub name, which is downloaded.

    A run's folder stands for its latest checkpoint; its files `checkpoints/latest` and `checkpoints/best` for the one
    that they name; and a file of weights for the folder that it is in. Raises `InputError` when there is no such folder
    or model, or the hub cannot be reached and its cache lacks the model.
    """
    text = str(name_or_folder)
    path = Path(text)
    if os.path.isfile(path):  # unlike Path.is_file, also where the name is too long to be one
        if names_checkpoint(path):
            return named_checkpoint(path)
        if pickles.is_pickle(path) or path.name in (CONFIG, WEIGHTS, INDEX):
            return path.parent
        raise InputError(f"{text} is a file; pass the folder that holds {CONFIG} and the weights as {WEIGHTS}")
    if not os.path.isdir(path):
        others = "" if isinstance(name_or_folder, Path) else ", or a hub name such as gpt2"
        if path.suffix in (".safetensors", *pickles.SUFFIXES):
            raise InputError(f"there is no file {text}; pass the folder of a run or of a checkpoint{others}")
        if isinstance(name_or_folder, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
            raise InputError(f"there is no folder {text}; pass the folder of a run or of a checkpoint{others}")
        return download(text)
    if (path / "checkpoints").is_dir() or (path / "run.json").is_file():
        return latest_checkpoint(path)
    if names_checkpoint(path / "latest"):
        return named_checkpoint(path / "latest")
    return path


def latest_checkpoint(run: Path) -> Path:
    """The checkpoint folder that `run`/checkpoints/latest names. Raises `InputError` when it names none."""
    return named_checkpoint(run / "checkpoints" / "latest")


def names_checkpoint(file: Path) -> bool:
    """Whether it is a run's file that names a checkpoint."""
    return file.parent.name == "checkpoints" and file.name in ("latest", "best") and file.is_file()


def named_checkpoint(file: Path) -> Path:
    """The checkpoint folder that `file`, a run's checkpoints/latest or best, names. Raises `InputError` when it names
    none.
    """
    if not checkpoints(file.parent):
        run = file.parent.parent
        raise InputError(f"{run} has no checkpoint yet ({file} is missing); train further or pass another folder")
    name = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    if file.parent / name not in checkpoints(file.parent):
        raise InputError(f"{file} does not name a checkpoint beside it ({name[:40]!r}); {remedy(file)}")
    return file.parent / name


def read_config(folder: Path) -> GPT2Config:
    """The configuration in `folder`/config.json. Raises `InputError` when it is missing, damaged, or no GPT-2's."""
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder} has no {CONFIG}; {WHOLE}")
    return from_hf(read_json(folder / CONFIG), folder / CONFIG)


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of `folder`'s model.safetensors, or of the shards in its index, under the names in the files.

    Raises `InputError` when there is neither, or when one of the files is missing or damaged.
    """
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)
    index = folder / INDEX
    if not index.exists():
        raise InputError(f"{folder} has neither {WEIGHTS} nor {INDEX}; {WHOLE}")
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


def refuse_damaged(model: object, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises `InputError` for weights that are not all numbers: all that is computed of them would be made up."""
    for name, array in arrays.items():
        if broken := int(array.size - np.isfinite(array).sum()):
            raise InputError(
                f"{model}: of the {array.size:,} values of {name}, NaN or infinity: {broken:,}; these weights are "
                "damaged; give others, such as an earlier checkpoint"
            )
