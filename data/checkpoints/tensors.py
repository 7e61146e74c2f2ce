"""Files of named arrays in the safetensors format, and JSON objects: read with one-sentence errors, written whole."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from data.cli import InputError
from data.files import atomic_write

# safetensors' names of the element types that numpy has, in the order in which its files have tensors of them (the
# widest first, so that each lies at a multiple of its size); BF16, which numpy has not, is widened on reading.
DTYPES = {
    **{"U64": "<u8", "I64": "<i8", "F64": "<f8"},
    **{"F32": "<f4", "U32": "<u4", "I32": "<i4"},
    **{"F16": "<f2", "U16": "<u2", "I16": "<i2"},
    **{"I8": "i1", "U8": "u1", "BOOL": "?"},
}
PIECE = 1 << 24  # bytes that are hashed and written at a time


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


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> str:
    """Writes named arrays and `metadata` to a safetensors file that is whole or not there. Returns its SHA-256.

    The bytes are the library's. Its own writing to a file neither syncs it nor reports a full disk as an OSError, and
    its bytes in memory would take as much again as the arrays, and keep other threads waiting while they are made.
    """
    # contiguous and little-endian, because memory is written as it lies
    rows = {name: np.asarray(a, a.dtype.newbyteorder("<"), order="C") for name, a in arrays.items()}
    kinds = {np.dtype(kind): name for name, kind in DTYPES.items()}
    order = sorted(rows, key=lambda name: (list(kinds).index(rows[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        begin, end = end, end + rows[name].nbytes
        shape = list(rows[name].shape)
        header[name] = {"dtype": kinds[rows[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    words += b" " * (-len(words) % 8)
    head = np.frombuffer(len(words).to_bytes(8, "little") + words, np.uint8)
    sha256 = hashlib.sha256()
    with atomic_write(path) as f:
        for row in (head, *(rows[name].reshape(-1).view(np.uint8) for name in order)):
            for at in range(0, len(row), PIECE):
                piece = row[at : at + PIECE].data
                sha256.update(piece)
                f.write(piece)
    return sha256.hexdigest()


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
