"""Fidelity tables that come with the package, and what they say of models that have none.

They were made by `fidelity/calibrate.py` in bfloat16, of private texts of 250 and 1000 tokens. The
dtype changes the KL of reuse little: that of bfloat16 itself is 0.001.
"""

import logging
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokendance.errors import ConfigError
from tokendance.fidelity.table import Cell, FidelityTable, Measured, table_path

log = logging.getLogger("tokendance.fidelity")

_FOLDER = Path(__file__).parent / "tables"
# By the alias of a model, after which its table is called: its name in hubs, without the owner's.
_HUB_NAMES = {"smollm2-135m": "smollm2-135m-instruct", "gemma3-270m": "gemma-3-270m-it"}
# Behind an alias, in the name of a folder that has the converted checkpoint.
_VERSION = re.compile(r"-\d+(\.\d+)+")


def best_table(model: str, precision: str) -> FidelityTable:
    """The best that is known of a model: measured here, or elsewhere, or of other models.

    For the arguments see `known_table`.
    """
    try:
        table = known_table(model, precision)
    except ConfigError as error:
        log.warning("%s Until then what comes with the package is used.", error)
        table = shipped_table(model)
    return table or cautious_table()


def known_table(model: str, precision: str) -> FidelityTable | None:
    """What was measured of a model here, or what comes with the package; None if nothing was.

    Args:
        model: its name as the user gave it: an alias, a hub id or a folder.
        precision: of its weights, see `LoadedModel.precision`.

    Raises:
        ConfigError: if what was measured here cannot be read.
    """
    path = table_path(model, precision)
    return FidelityTable.read(path) if path.exists() else shipped_table(model)


def shipped_table(model: str) -> FidelityTable | None:
    """The table that comes with the package for a model of this name, if there is one.

    It may be an alias, a folder of a converted checkpoint, or end like the name in a hub.
    """
    name = Path(model).name.casefold()
    for alias, hub_name in _HUB_NAMES.items():
        version = name.removeprefix(alias)
        if alias == model or name == hub_name or (version != name and _VERSION.fullmatch(version)):
            return _read(alias)
    return None


@cache
def cautious_table() -> FidelityTable:
    """The farthest from full computation that any of the tables is, cell by cell, `pic` too."""
    alike: dict[tuple[bool, int, int], list[Cell]] = {}
    tables = list(map(_read, _HUB_NAMES))
    for table in tables:
        for cell in table.cells:
            # Texts are not of the same length to the token with every tokenizer.
            size = round(math.log2(cell.num_before))
            alike.setdefault((cell.in_order, size, cell.num_blocks), []).append(cell)
    cells = tuple(map(_worst, alike.values()))
    return FidelityTable("any model", "any dtype", tables[0].block_tokens, cells)


def _worst(cells: Sequence[Cell]) -> Cell:
    """One cell of some that are alike but for the model."""
    return Cell(
        cells[0].in_order,
        min(cell.num_before for cell in cells),
        cells[0].num_blocks,
        tuple(
            Measured(one.first, one.last, max(each.kl for each in (one, *others)))
            for one, *others in zip(*(cell.measured for cell in cells), strict=True)
        ),
        max(cell.pic for cell in cells),
    )


@cache
def _read(alias: str) -> FidelityTable:
    return FidelityTable.read(_FOLDER / f"{alias}.json")
