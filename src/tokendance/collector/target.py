"""A fidelity target: how much to correct each reuse, by what is known of it before the pass.

How far a reused run strays depends on whether the request has its blocks in the owner's order, on
how much text differs before them, and on how many there are. `tokendance calibrate` measures that
for a model, cell by cell:

    in order   up to tokens before   up to blocks   KL after correcting (first, last) of each block
    yes        250                   4              (0, 0) 0.004   (2, 1) 0.0011   (8, 1) 0.0007
    no         1000                  16             (0, 0) 0.21    (2, 1) 0.12     (8, 1) 0.09

A target picks the cheapest correction that met it in the smallest cell that covers the reuse.
Where none did, or the reuse lies outside what was measured, the request computes. What is measured
is a mean over agents and tokens: a single agent may be farther away.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tokendance.collector.correction import NO_CORRECTION, Edges, Mask, Reuse
from tokendance.errors import ConfigError
from tokendance.rounds.segments import Segment

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """KL divergence after a correction.

    Attributes:
        first: tokens corrected at the beginning of each segment.
        last: tokens corrected at its end.
        kl: nats per token of the answer, mean over agents, the worst of the workloads.
    """

    first: int
    last: int
    kl: float


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured for reuses up to a size.

    Attributes:
        in_order: see `Reuse`.
        num_before: at most.
        num_blocks: at most.
        measured: any number of corrections.
    """

    in_order: bool
    num_before: int
    num_blocks: int
    measured: tuple[Measured, ...]

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
    """What `tokendance calibrate` has measured of a model.

    Attributes:
        model: its name.
        dtype: that it ran in, as the command line spells it.
        cells: in any order.
    """

    model: str
    dtype: str
    cells: tuple[Cell, ...]

    def to_json(self) -> str:
        """Write it down."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1)

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
            raise ConfigError(f"A fidelity target needs a measured table. {again}") from error
        except ValueError as error:
            raise ConfigError(f"The table {path} is not JSON: {error}. {again}") from error
        try:
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']!r}, not {FORMAT}")
            cells = tuple(_read_cell(cell) for cell in document["cells"])
            return cls(str(document["model"]), str(document["dtype"]), cells)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"The table {path} cannot be used: {error!r}. {again}") from error


def _read_cell(cell: Mapping[str, Any]) -> Cell:
    return Cell(
        bool(cell["in_order"]),
        int(cell["num_before"]),
        int(cell["num_blocks"]),
        tuple(
            Measured(int(one["first"]), int(one["last"]), float(one["kl"]))
            for one in cell["measured"]
        ),
    )


@dataclass(frozen=True, slots=True)
class FidelityTarget:
    """A correction policy that keeps the KL divergence of each reuse below a target.

    That is a mean over agents and tokens, as measured: one of them may be farther away.

    Attributes:
        kl: nats per token of the answer.
        table: what corrections achieve.
    """

    kl: float
    table: FidelityTable

    def __post_init__(self) -> None:
        if not self.kl > 0:
            raise ConfigError(f"The fidelity target is {self.kl}. Give a KL divergence above 0.")

    @classmethod
    def read(cls, kl: str, path: Path) -> Self:
        """Make a target from the number in its spec and a table on disk.

        Raises:
            ConfigError: if either cannot be used.
        """
        try:
            number = float(kl)
        except ValueError as error:
            raise ConfigError(
                f"The fidelity target is {kl!r}. Give a KL divergence, as in target:0.01."
            ) from error
        return cls(number, FidelityTable.read(path))

    @property
    def spec(self) -> str:
        """As "target:0.01"."""
        return f"target:{self.kl}"

    def choose(self, reuse: Reuse, segment: Segment) -> Mask | None:
        """Choose by the cheapest correction that met the target; None where none did."""
        edges = self.edges_for(reuse)
        return None if edges is None else edges.choose(reuse, segment)

    def layout(self, segment: Segment) -> Mask:
        """Store apart what the largest reuse in order corrects for which there is a correction.

        A mirror that corrects as much reads the run as one piece, the others read pieces of it.
        """
        in_order = (cell for cell in self.table.cells if cell.in_order)
        by_size = sorted(in_order, key=Cell.size, reverse=True)
        edges = next(filter(None, map(self._cheapest, by_size)), NO_CORRECTION)
        return edges.layout(segment)

    def edges_for(self, reuse: Reuse) -> Edges | None:
        """The correction that a reuse gets; None if its request has to compute."""
        covering = [cell for cell in self.table.cells if cell.covers(reuse)]
        return self._cheapest(min(covering, key=Cell.size)) if covering else None

    def _cheapest(self, cell: Cell) -> Edges | None:
        good = [measured for measured in cell.measured if measured.kl <= self.kl]
        if not good:
            return None
        cheapest = min(good, key=lambda measured: (measured.first + measured.last, measured.kl))
        return Edges(cheapest.first, cheapest.last)
