"""The fidelity table of a model: how far reuse strays from full computation after a correction.

How far a reused run strays depends on whether the request has its blocks in the owner's order, on
how much text differs before them, and on how many there are. `tokendance calibrate` measures that
for a model, cell by cell:

    in order   tokens before   blocks   KL after correcting (first, last) of each block
    yes        250             4        (0, 0) 0.03   (2, 1) 0.02   (8, 1) 0.02   pic 0.02
    no         1000            16       (0, 0) 0.07   (2, 1) 0.05   (8, 1) 0.04   pic 0.05

Tables lie in the cache folder, beside converted checkpoints, one for each model and dtype.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tokendance.cache import cache_folder
from tokendance.collector.correction import Reuse
from tokendance.errors import ConfigError

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Measured:
    """KL divergence after a correction."""

    first: int  # tokens corrected at the beginning of each segment
    last: int  # tokens corrected at its end
    kl: float  # nats per token of the answer, mean over agents, the worst of the workloads


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured for reuses up to a size."""

    in_order: bool  # see `Reuse`
    num_before: int  # at most
    num_blocks: int  # at most
    measured: tuple[Measured, ...]  # any number of corrections
    pic: float  # the same KL where requests recompute 15% of what they reuse, as CacheBlend has it

    def covers(self, reuse: Reuse) -> bool:
        """Whether a reuse is within what was measured."""
        return (
            self.in_order == reuse.in_order
            and reuse.num_before <= self.num_before
            and reuse.num_blocks <= self.num_blocks
        )

    def size(self) -> tuple[int, int]:
        """By which cells are compared: the text before first, then the blocks."""
        return self.num_before, self.num_blocks


@dataclass(frozen=True, slots=True)
class FidelityTable:
    """What `tokendance calibrate` has measured of a model."""

    model: str  # its name
    dtype: str  # that it ran in, as the command line spells it
    block_tokens: int  # of each shared block
    cells: tuple[Cell, ...]  # in any order

    def to_json(self) -> str:
        """Write it down."""
        return json.dumps({"format": _FORMAT} | asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table.

        Raises:
            ConfigError: if there is none, or it is not one of ours.
        """
        again = "Run `tokendance calibrate MODEL` with the same model and dtype."
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"The fidelity table {path} cannot be read: {error.strerror}. {again}"
            ) from error
        except ValueError as error:
            raise ConfigError(f"The table {path} is not JSON: {error}. {again}") from error
        try:
            if document["format"] != _FORMAT:
                raise ValueError(f"its format is {document['format']!r}, not {_FORMAT}")
            cells = tuple(_read_cell(cell) for cell in document["cells"])
            return cls(
                str(document["model"]), str(document["dtype"]), int(document["block_tokens"]), cells
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"The table {path} cannot be used: {error!r}. {again}") from error


def _read_cell(cell: Mapping[str, Any]) -> Cell:
    return Cell(
        bool(cell["in_order"]),
        int(cell["num_before"]),
        int(cell["num_blocks"]),
        tuple(
            Measured(int(measured["first"]), int(measured["last"]), float(measured["kl"]))
            for measured in cell["measured"]
        ),
        float(cell["pic"]),
    )


def table_path(model: str, dtype: str) -> Path:
    """Path of a model's table.

    The name holds what is harmless of the model's name (as the user gave it), and a digest of all
    of it, so that no name leads out of the folder and no two share a file.
    """
    name = os.path.realpath(model) if os.path.isdir(model) else model
    readable = re.sub(r"[^A-Za-z0-9-]+", "-", Path(name).name)[:40]
    digest = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
    return cache_folder() / "fidelity" / f"{readable}-{dtype}-{digest}.json"
