"""Files of KV: safetensors, written whole or not at all, and checked when they are read.

A file holds rows, one token each, that are never changed once they are written:

    positions      int32 (n,), position at which each row's key was rotated
    keys.0 ...     (KVH, n, D), a tensor per layer
    values.0 ...   likewise

bfloat16 travels as uint16. The checksum of a file is kept by whoever knows it (`store/disk.py`),
not in the file, so a file that was put in another's place is found, too.
"""

import contextlib
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tokendance.errors import CorruptFileError, StoreError

_CHECKSUM_BYTES = 16
TEMPORARY = ".tmp"
SUFFIX = ".safetensors"
# What keys and values may be made of: numpy's name of each, for the sizes that KV has.
_KINDS = ("uint16", "float16", "float32")


@dataclass(frozen=True, slots=True, eq=False)
class KVRows:
    """KV of some tokens, apart from any memory.

    Attributes:
        positions: int32 (n,).
        keys: (L, KVH, n, D); uint16 holds bfloat16.
        values: likewise.
    """

    positions: npt.NDArray[np.int32]
    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_bytes(self) -> int:
        """Of keys, values and positions."""
        return int(self.keys.nbytes + self.values.nbytes + self.positions.nbytes)


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that is on disk.

    Attributes:
        name: in its folder.
        num_rows: tokens in it.
        num_bytes: its size.
        checksum: of its bytes.
    """

    name: str
    num_rows: int
    num_bytes: int
    checksum: bytes


def write_rows(folder: Path, rows: KVRows) -> WrittenFile:
    """Write rows into a new file, flushed to the disk before it gets its name.

    Args:
        folder: to write into; `flush_folder` makes the name last.
        rows: to write.

    Raises:
        StoreError: if the disk is full or cannot be written; nothing is left behind then.
    """
    tensors = {"positions": rows.positions}
    for layer in range(len(rows.keys)):
        tensors[f"keys.{layer}"] = np.ascontiguousarray(rows.keys[layer])
        tensors[f"values.{layer}"] = np.ascontiguousarray(rows.values[layer])
    content = save(tensors)
    name = secrets.token_hex(16) + SUFFIX
    temporary = folder / (name + TEMPORARY)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / name)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(
            f"{folder} cannot be written: {error.strerror}. What was stored before is unharmed; "
            "make room, or give --store another folder."
        ) from error
    return WrittenFile(name, len(rows), len(content), checksum_of(content))


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
        content = path.read_bytes()
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
        tensors = load(content)
        layers = range((len(tensors) - 1) // 2)
        rows = KVRows(
            tensors["positions"],
            np.stack([tensors[f"keys.{layer}"] for layer in layers]),
            np.stack([tensors[f"values.{layer}"] for layer in layers]),
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is no file of KV ({type(error).__name__}). What it held is computed again."
        ) from error
    if str(rows.keys.dtype) not in _KINDS or len(rows) != file.num_rows:
        raise CorruptFileError(f"{path} holds something else. What it held is computed again.")
    return rows


def checksum_of(content: bytes) -> bytes:
    """BLAKE2b of a file's bytes."""
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).digest()
