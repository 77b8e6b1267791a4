"""Scheduling policies: in which order requests take of a step's tokens, and how much of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokendance.engine.request import Request

SlotFlags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """What a request computes in a step.

    Attributes:
        positions: int64, ascending; empty for nothing.
        cost: of the step's token budget.
    """

    positions: npt.NDArray[np.int64]
    cost: int


class SchedulingPolicy(Protocol):
    """Divides the tokens of a step. Changes nothing."""

    def order(self, running: Sequence[Request]) -> Sequence[Request]:
        """Say who takes first.

        Args:
            running: in the order of admission.
        """
        ...

    def chunk(
        self, request: Request, budget: int, *, is_first_prompt: bool, ready: SlotFlags
    ) -> Chunk:
        """Say what a request takes.

        Args:
            request: that runs.
            budget: tokens that are left in this step, at least one.
            is_first_prompt: whether no prompt has taken anything of this step yet.
            ready: by slot, whether its KV is computed, or will be in this step.
        """
        ...


class DecodingFirst:
    """Answers before prompts, then the order of admission.

    Those that have said least come before the others, so that none waits for ever where the budget
    is small. A prompt goes as far as the KV that it reads is computed, or is about to be in the
    same pass: its owner was admitted before it.
    """

    def order(self, running: Sequence[Request]) -> Sequence[Request]:
        """See `SchedulingPolicy`."""
        return sorted(running, key=lambda r: (not r.is_decoding, len(r.generated)))

    def chunk(
        self, request: Request, budget: int, *, is_first_prompt: bool, ready: SlotFlags
    ) -> Chunk:
        """See `SchedulingPolicy`."""
        del is_first_prompt
        positions = request.next_positions(budget)
        if not request.is_decoding and len(positions):
            assert request.allocation is not None
            is_ready = ready[request.allocation.slots[: int(positions[-1]) + 1]]
            is_ready[positions] = True
            blocked = np.flatnonzero(~is_ready)
            if len(blocked):
                positions = positions[: np.searchsorted(positions, blocked[0])]
        return Chunk(positions, len(positions))
