"""Correction policies: which tokens of a reused segment are computed afresh.

A policy decides before the forward pass, by a segment's tokens and by what is known of the whole
reuse. An owner asks it, too, of the reuse that a mirror with a prompt like its own would have, and
stores its run as [common | corrected], so that mirrors read the first part as one piece. A mirror
that corrects other tokens reads more pieces.

Every policy has a spec, such as "edges:3+1", by which the command line and reports name it.
`read_correction` makes a policy from a spec.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from tokendance.errors import ConfigError
from tokendance.rounds.segments import Segment

Mask = npt.NDArray[np.bool_]

NO_OPENING = 2**40
"""So many tokens that no opening reaches behind them."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """What is known of a request's reuse before the pass.

    Attributes:
        in_order: all its reused segments are of one run, in the owner's order.
        num_before: private tokens before the first of them, in its own prompt or in the owner's,
            whichever are more.
        num_blocks: shared segments that it reuses.
        num_tokens: tokens of those segments.
        num_inherited: how many of those segments stand in a beginning that holds KV of another
            context. They were corrected when they were read first, and are read as they are.
        isolated: it guards its private text, so what it reads may have been computed without any
            text before it.
        goes_on: its beginning, which is not computed again, holds KV of another context.
    """

    in_order: bool
    num_before: int
    num_blocks: int
    num_tokens: int
    num_inherited: int = 0
    isolated: bool = False
    goes_on: bool = False


@runtime_checkable
class CorrectionPolicy(Protocol):
    """Chooses which tokens of reused segments are computed afresh. Immutable."""

    @property
    def spec(self) -> str:
        """Name of the policy, with its numbers."""
        ...

    def choose(self, reuse: Reuse, segment: Segment, num_read: int) -> Mask | None:
        """Choose the tokens of one segment that a mirror computes afresh.

        Args:
            reuse: all that the mirror's request reuses.
            segment: one of those.
            num_read: tokens that the request reuses between its beginning, which is not computed
                again, and the segment; below 0 where the beginning ends within it. `NO_OPENING` for
                what is no part of any opening.

        Returns:
            Bool (tokens of the segment,), true where the mirror computes afresh. None if no
            correction is enough for this reuse: the request then reuses nothing out of context.
        """
        ...


def stored_apart(policy: CorrectionPolicy, reuse: Reuse, segment: Segment) -> Mask:
    """Choose the tokens of a segment that its owner stores apart, behind the common ones.

    They are those that a mirror with a prompt like the owner's computes afresh, wherever the
    segment stands; none if that one would reuse nothing.

    Args:
        policy: of the engine.
        reuse: what such a mirror would reuse.
        segment: one of those.

    Returns:
        Bool (tokens of the segment,), true where the token is stored apart.
    """
    mask = policy.choose(reuse, segment, NO_OPENING)
    return np.zeros(len(segment), np.bool_) if mask is None else mask


@dataclass(frozen=True, slots=True)
class Edges:
    """Corrects the first tokens of each segment, its last ones, and the opening.

    The tokens that open a block depend most on what stands before it; EPIC (arXiv 2410.15332)
    recomputes 16 of them, for blocks that were computed alone. The token that ends a block, a line
    break most often, gathers what stands before it, and what comes after reads it there. Computed
    afresh, it buys more than a further token at the beginning, most of all in another order than
    the owner's (`docs/log.md`).

    The opening is what a mirror reads first of all that it reuses anew, behind its own last words
    most often. Where what stands before was itself reused, it is worth more than all edges
    (`docs/log.md`). It is not stored apart: what is left of the common tokens is one piece.
    """

    first: int  # how many at the beginning
    last: int  # how many at the end
    opening: int = 0  # how many of all that is reused anew, of one segment or of several

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0 or self.opening < 0:
            raise ConfigError(
                f"Correction cannot have edges of the first {self.first} and the last {self.last} "
                f"tokens, and an opening of {self.opening}. Give numbers, 0 or more."
            )

    @property
    def spec(self) -> str:
        """As "edges:3+1", "first:4", "none", or with an opening as "opening:32+3+1"."""
        if self.opening:
            return f"opening:{self.opening}+{self.first}+{self.last}"
        if self.last:
            return f"edges:{self.first}+{self.last}"
        return f"first:{self.first}" if self.first else "none"

    def choose(self, reuse: Reuse, segment: Segment, num_read: int) -> Mask:
        """Choose the first and the last tokens, and those of the opening, whatever the reuse."""
        del reuse
        indices = np.arange(len(segment))
        first = max(self.first, self.opening - num_read)
        return (indices < first) | (indices >= len(segment) - self.last)


@dataclass(frozen=True, slots=True)
class CorrectAll:
    """Corrects every token: the exact result, by the same path as the other policies."""

    @property
    def spec(self) -> str:
        """It is "all"."""
        return "all"

    def choose(self, reuse: Reuse, segment: Segment, num_read: int) -> Mask:
        """Choose every token."""
        del reuse, num_read
        return np.ones(len(segment), np.bool_)


NO_CORRECTION = Edges(0, 0)
"""Reuse every token as its owner computed it: the cheapest policy, and the least faithful."""
USUAL_EDGES = Edges(3, 1)
"""What "edges" is without numbers."""
DEFAULT_CORRECTION = "balanced"
"""Spec of the policy that engines take unless told (`fidelity/balanced.py`)."""

_BY_NAME: Mapping[str, CorrectionPolicy] = MappingProxyType(
    {
        "edges": USUAL_EDGES,
        "first-k": Edges(4, 0),
        "epic": Edges(16, 0),
        "none": NO_CORRECTION,
        "all": CorrectAll(),
    }
)

SpecReader = Callable[[str], CorrectionPolicy]


def read_correction(spec: str, others: Mapping[str, SpecReader] | None = None) -> CorrectionPolicy:
    """Make the policy of a spec; the `spec` of that policy reads as the same policy again.

    Args:
        spec: as "edges:3+1", "first:4" or "opening:32+3+1"; "edges" and "first-k" take their usual
            numbers.
        others: readers of policies that this file does not know, by their whole spec, or by its
            beginning up to a colon; each is given what stands behind that.

    Raises:
        ConfigError: for a spec that nobody reads.
    """
    if spec in _BY_NAME:
        return _BY_NAME[spec]
    if match := re.fullmatch(r"edges:(\d+)\+(\d+)", spec):
        return Edges(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"first:(\d+)", spec):
        return Edges(int(match[1]), 0)
    if match := re.fullmatch(r"opening:(\d+)(?:\+(\d+)\+(\d+))?", spec):
        return Edges(int(match[2] or 0), int(match[3] or 0), int(match[1]))
    others = others or {}
    name, colon, value = spec.partition(":")
    if name + colon in others:
        return others[name + colon](value)
    known = (f"{other}N" if other.endswith(":") else other for other in others)
    specs = [*_BY_NAME, "edges:3+1", "first:4", "opening:32+3+1", *known]
    raise ConfigError(f"There is no correction {spec!r}. Use one like {', '.join(specs)}.")
