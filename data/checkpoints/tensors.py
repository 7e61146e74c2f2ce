"""Files of named arrays in the safetensors format, and JSON objects: read with one-sentence errors, written whole."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as serialize

from data.cli import InputError
from data.files import atomic_write

# safetensors' names of the element types that numpy has; BF16, which numpy has not, is widened on reading.
DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"},
}


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
