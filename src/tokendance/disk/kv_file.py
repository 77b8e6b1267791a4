"""Files of KV: safetensors, written whole or not at all, and checked when they are read.

A file holds rows, one token each, that are never changed once they are written:

    positions      int32 (n,), position at which each row's key was rotated
    keys.0 ...     (KVH, n, D), a tensor per layer
    values.0 ...   likewise

or, where it was asked for, compressed to a byte per number (disk/compression.py):

    keys.0.codes, keys.0.scales, keys.0.centers, values.0.codes, values.0.scales, ...
    like           empty, of the dtype of what was compressed

bfloat16 travels as uint16. The checksum of a file is kept by whoever knows it (`disk/store.py`),
not in the file, so a file that was put in another's place is found, too.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tokendance.disk.compression import (
    CHUNK_TOKENS,
    CompressedTensor,
    NotFiniteError,
    compress_keys,
    compress_values,
)
from tokendance.disk.floats import DTYPES
from tokendance.disk.schema import storage_errors
from tokendance.errors import CorruptFileError
from tokendance.store.kv_rows import KVRows

_CHECKSUM_BYTES = 16
_TEMPORARY = ".tmp"
_SUFFIX = ".safetensors"
_NAME = re.compile(rf"[0-9a-f]{{32}}{re.escape(_SUFFIX)}({re.escape(_TEMPORARY)})?")


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that is on disk."""

    name: str  # in its folder
    num_rows: int  # tokens in it
    num_bytes: int
    checksum: bytes  # of its bytes


CompressedRows = list[tuple[CompressedTensor, CompressedTensor]]
"""Keys and values of each layer in a byte per number."""


def compress_rows(rows: KVRows) -> CompressedRows:
    """Compress each layer's keys and values.

    Raises:
        NotFiniteError: for numbers that are NaN or infinite.
    """
    return [
        (compress_keys(keys.swapaxes(0, 1)), compress_values(values.swapaxes(0, 1)))
        for keys, values in zip(rows.keys, rows.values, strict=True)
    ]


def decompress_rows(positions: npt.NDArray[np.int32], layers: CompressedRows) -> KVRows:
    """Make rows of what `compress_rows` made of them, as near as a byte per number is."""
    keys = np.stack([keys.decompress().swapaxes(0, 1) for keys, _ in layers])
    values = np.stack([values.decompress().swapaxes(0, 1) for _, values in layers])
    return KVRows(positions, keys, values)


def file_bytes(rows: KVRows) -> int:
    """Most bytes of a file of these rows: what is not compressed, and a line for each tensor."""
    return rows.num_bytes + 256 + 128 * 2 * len(rows.keys)


def write_rows(folder: Path, rows: KVRows, *, compressed: bool = False) -> WrittenFile:
    """Write rows into a new file, flushed to the disk before it gets its name.

    `flush_folder` makes the name last. Compressed, they have a byte per number; rows that hold
    infinities stay as they are.

    Raises:
        StoreError: if the disk is full or cannot be written; nothing is left behind then.
    """
    tensors = _plain_tensors(rows)
    if compressed:
        with contextlib.suppress(NotFiniteError):
            tensors = _compressed_tensors(rows)
    # safetensors writes an array's memory as it lies, whatever its strides say.
    content = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    name = secrets.token_hex(16) + _SUFFIX
    temporary = folder / (name + _TEMPORARY)
    with storage_errors(folder):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    return WrittenFile(name, len(rows), len(content), checksum_of(content))


def is_kv_name(name: str) -> bool:
    """Whether `write_rows` may have given a file this name, or its temporary one."""
    return _NAME.fullmatch(name) is not None


def flush_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_rows(folder: Path, file: WrittenFile) -> KVRows:
    """Read a file and check every byte of it.

    Raises:
        CorruptFileError: if it is missing, or not what was written.
    """
    path = folder / file.name
    try:
        if not is_kv_name(file.name):  # the index is another's, or damaged
            raise OSError(errno.EINVAL, "it is not named as such files are")
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened:
            content = opened.read()
    except OSError as error:
        raise CorruptFileError(
            f"{path} cannot be read: {error.strerror}. What it held is computed again."
        ) from error
    if len(content) != file.num_bytes or checksum_of(content) != file.checksum:
        raise CorruptFileError(
            f"{path} is damaged: its content is not what was written. What it held is computed "
            "again."
        )
    try:
        rows = _rows_of(load(content))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is no file of KV ({type(error).__name__}). What it held is computed again."
        ) from error
    if rows.keys.dtype not in DTYPES or len(rows) != file.num_rows:
        raise CorruptFileError(f"{path} holds something else. What it held is computed again.")
    return rows


def _plain_tensors(rows: KVRows) -> dict[str, npt.NDArray[Any]]:
    tensors: dict[str, npt.NDArray[Any]] = {"positions": rows.positions}
    for layer in range(len(rows.keys)):
        tensors[f"keys.{layer}"] = rows.keys[layer]
        tensors[f"values.{layer}"] = rows.values[layer]
    return tensors


def _compressed_tensors(rows: KVRows) -> dict[str, npt.NDArray[Any]]:
    like = np.empty(0, rows.keys.dtype)
    tensors: dict[str, npt.NDArray[Any]] = {"positions": rows.positions, "like": like}
    for layer, compressed in enumerate(compress_rows(rows)):
        for name, tensor in zip(("keys", "values"), compressed, strict=True):
            tensors[f"{name}.{layer}.codes"] = tensor.codes
            tensors[f"{name}.{layer}.scales"] = tensor.scales
            if tensor.centers is not None:
                tensors[f"{name}.{layer}.centers"] = tensor.centers
    return tensors


def _rows_of(tensors: Mapping[str, npt.NDArray[Any]]) -> KVRows:
    """Make rows of a file's tensors, compressed or not."""
    positions = tensors["positions"]
    if "like" not in tensors:
        layers = range((len(tensors) - 1) // 2)
        keys = np.stack([tensors[f"keys.{layer}"] for layer in layers])
        values = np.stack([tensors[f"values.{layer}"] for layer in layers])
        return KVRows(positions, keys, values)
    dtype = tensors["like"].dtype
    compressed: CompressedRows = []
    for layer in range((len(tensors) - 2) // 5):
        codes, scales, centers = (
            tensors[f"keys.{layer}.{part}"] for part in ("codes", "scales", "centers")
        )
        of_keys = CompressedTensor(codes, scales, centers, CHUNK_TOKENS, dtype)
        codes, scales = (tensors[f"values.{layer}.{part}"] for part in ("codes", "scales"))
        compressed.append((of_keys, CompressedTensor(codes, scales, None, 1, dtype)))
    return decompress_rows(positions, compressed)


def checksum_of(content: bytes) -> bytes:
    """BLAKE2b of a file's bytes."""
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).digest()
