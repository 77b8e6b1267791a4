"""A fidelity target: how much to correct each reuse, by what has been measured of the model.

A target picks the cheapest correction that met it in the smallest cell of the model's table that
covers the reuse. Where none did, or the reuse lies outside what was measured, the request computes.
What is measured is a mean over agents and tokens: a single agent may be farther away.
"""

from dataclasses import dataclass
from typing import Self

from tokendance.collector.correction import Edges, Mask, Reuse
from tokendance.errors import ConfigError
from tokendance.fidelity.shipped import known_table
from tokendance.fidelity.table import Cell, FidelityTable
from tokendance.rounds.segments import Segment


@dataclass(frozen=True, slots=True)
class FidelityTarget:
    """A correction policy that keeps the KL divergence of each reuse below a target."""

    kl: float  # nats per token of the answer
    table: FidelityTable  # what corrections achieve

    def __post_init__(self) -> None:
        if not self.kl > 0:
            raise ConfigError(f"The fidelity target is {self.kl}. Give a KL divergence above 0.")

    @classmethod
    def read(cls, kl: str, model: str, precision: str) -> Self:
        """Make a target from the number in its spec and what was measured of a model.

        For the arguments see `known_table`.

        Raises:
            ConfigError: if nothing was measured, or either cannot be used.
        """
        try:
            number = float(kl)
        except ValueError as error:
            raise ConfigError(
                f"The fidelity target is {kl!r}. Give a KL divergence, as in target:0.01."
            ) from error
        table = known_table(model, precision)
        if table is None:
            raise ConfigError(
                "A fidelity target needs a measured table. Run `tokendance calibrate MODEL` with "
                "the same model and dtype."
            )
        return cls(number, table)

    @property
    def spec(self) -> str:
        """As "target:0.01"."""
        return f"target:{self.kl}"

    def choose(self, reuse: Reuse, segment: Segment, num_read: int) -> Mask | None:
        """Choose by the cheapest correction that met the target; None where none did."""
        edges = self.edges_for(reuse)
        return None if edges is None else edges.choose(reuse, segment, num_read)

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
