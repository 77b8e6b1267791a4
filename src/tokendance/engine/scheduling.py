"""Scheduling policies: in which order requests take of a step's tokens, and how much of each.

And how many there are to take, where a step must not take long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tokendance.engine.request import Request

SlotFlags = npt.NDArray[np.bool_]

# Of a pass that must not take long: fewer tokens cost hardly less, since all weights are read.
_LEAST_TOKENS = 32
_MOST_TOKENS = 2**20
_FIRST_GUESS = 64


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
            allocation = request.allocation
            assert allocation is not None
            is_ready = ready[allocation.slots[: int(positions[-1]) + 1]]
            is_ready[positions] = True
            for lent in allocation.lent:
                if not ready[lent.text].all():
                    is_ready[lent.end :] = False
            blocked = np.flatnonzero(~is_ready)
            if len(blocked):
                positions = positions[: np.searchsorted(positions, blocked[0])]
        return Chunk(positions, len(positions))


class Pace:
    """How many tokens a pass may compute to take about so long, as the passes before it tell.

    Attributes:
        pass_s: seconds that it may take.
        num_tokens: that it may compute.
    """

    def __init__(self) -> None:
        """Begin with a guess."""
        self.pass_s = 0.0
        self.num_tokens = _FIRST_GUESS

    def note(self, num_tokens: int, seconds: float, beside_s: float = 0.0) -> None:
        """Learn from a pass; from one that is an exception no more than a factor of two.

        Args:
            num_tokens: that it computed.
            seconds: that it took.
            beside_s: that was done around it. Others wait for that, too, so a pass takes less by
                it, but half of its time at least.
        """
        wanted_s = max(self.pass_s - beside_s, self.pass_s / 2)
        if 2 * num_tokens < self.num_tokens:
            # What a small pass takes is to read the weights, so it says little of larger ones: only
            # that they take too long, if it does.
            if seconds > wanted_s:
                self.num_tokens = max(num_tokens, _LEAST_TOKENS, self.num_tokens // 2)
            return
        wanted = num_tokens * wanted_s / max(seconds, 1e-6)
        wanted = min(max(wanted, self.num_tokens / 2), 2 * self.num_tokens)
        self.num_tokens = min(max(int(wanted), _LEAST_TOKENS), _MOST_TOKENS)
