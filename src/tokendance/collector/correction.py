"""Correction policies: which tokens of a shared segment a mirror computes afresh.

A policy knows a segment's tokens and nothing else, so that the positions are known before the
forward pass and are the same for every mirror; a run can then be stored as
[common | corrected] and mirrors read the first part as one piece.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from tokendance.errors import ConfigError
from tokendance.rounds.segments import TokenIds

Mask = npt.NDArray[np.bool_]

DEFAULT_FIRST_K = 4  # where only the first tokens are corrected
EPIC_FIRST_K = 16
"""What EPIC (arXiv 2410.15332) computes afresh of each block."""


class CorrectionPolicy(Protocol):
    """Chooses the corrected tokens of a segment."""

    @property
    def name(self) -> str:
        """The policy as the command line spells it."""
        ...

    def corrected(self, token_ids: TokenIds) -> Mask:
        """Return bool of the shape of `token_ids`: true where a mirror computes afresh."""
        ...


@dataclass(frozen=True, slots=True)
class FirstK:
    """The first k tokens of each segment.

    The tokens that open a block depend most on what stands before it. EPIC (arXiv 2410.15332)
    recomputes them too, for blocks that were computed alone; with a master in context four are
    enough (`docs/benchmarks.md`).
    """

    k: int = DEFAULT_FIRST_K

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ConfigError(f"first-k is {self.k}. Give a number of tokens, 0 or more.")

    @property
    def name(self) -> str:
        """The policy as the command line spells it."""
        return "first-k"

    def corrected(self, token_ids: TokenIds) -> Mask:
        """Mark the first k tokens."""
        return np.arange(len(token_ids)) < self.k


@dataclass(frozen=True, slots=True)
class Edges:
    """The first tokens of each segment, and the last ones.

    The token that ends a block, a line break most often, gathers what stands before it, and what
    comes after reads it there. Computed afresh, it buys more than a further token at the
    beginning, most of all in another order than the owner's (`docs/log.md`).
    """

    first: int = 3
    last: int = 1

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0:
            raise ConfigError(
                f"The edges are {self.first} and {self.last} tokens. Give numbers, 0 or more."
            )

    @property
    def name(self) -> str:
        """The policy as the command line spells it."""
        return "edges"

    def corrected(self, token_ids: TokenIds) -> Mask:
        """Mark the first and the last tokens."""
        places = np.arange(len(token_ids))
        return (places < self.first) | (places >= len(token_ids) - self.last)


@dataclass(frozen=True, slots=True)
class NoCorrection:
    """Reuse every token as the owner computed it: the cheapest, and the least faithful."""

    @property
    def name(self) -> str:
        """The policy as the command line spells it."""
        return "none"

    def corrected(self, token_ids: TokenIds) -> Mask:
        """Mark nothing."""
        return np.zeros(len(token_ids), np.bool_)


@dataclass(frozen=True, slots=True)
class CorrectAll:
    """Compute every token afresh: the exact result, by the same path as the others."""

    @property
    def name(self) -> str:
        """The policy as the command line spells it."""
        return "all"

    def corrected(self, token_ids: TokenIds) -> Mask:
        """Mark everything."""
        return np.ones(len(token_ids), np.bool_)


CorrectionName = Literal["first-k", "edges", "epic", "none", "all"]
CORRECTIONS: tuple[CorrectionName, ...] = get_args(CorrectionName)


def make_correction(name: str, first_k: int = DEFAULT_FIRST_K) -> CorrectionPolicy:
    """Make a policy from its name.

    Raises:
        ConfigError: for a name that is not in `CORRECTIONS`, or a negative `first_k`.
    """
    match name:
        case "first-k":
            return FirstK(first_k)
        case "edges":
            return Edges()
        case "epic":
            return FirstK(EPIC_FIRST_K)
        case "none":
            return NoCorrection()
        case "all":
            return CorrectAll()
        case _:
            raise ConfigError(f"There is no correction {name!r}. Use one of {CORRECTIONS}.")
