"""How requests of the baseline are planned and scheduled: cached segments are copied."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tokendance.collector.correction import NO_CORRECTION
from tokendance.collector.owners import Start
from tokendance.collector.plan import RequestPlan, ReuseRules, Role
from tokendance.collector.planner import Planner
from tokendance.collector.sources import KVIndex
from tokendance.engine.request import Request
from tokendance.engine.scheduling import Chunk, DecodingFirst, SlotFlags
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.entries import RoundId

RECOMPUTED_SHARE = 0.15


def num_recomputed(num_copied: int) -> int:
    """How many of the tokens that are copied are recomputed: 15%, as CacheBlend has it."""
    return math.ceil(RECOMPUTED_SHARE * num_copied)


class PicPlanner(Planner):
    """Plans copies in place of shared reading.

        position  0         16      24                     64        72
                  |=========|#######|sssssssssssssss|OOOOOOOOO|########|______|
                  prefix     own     copied          owned     own      answer

    What is recomputed is known in the pass only, so nothing is corrected or laid out before.
    """

    def __init__(self, index: KVIndex) -> None:
        super().__init__(index, NO_CORRECTION, prefix=True, segments=True)

    def order(self, prompts: Sequence[EncodedPrompt], round_id: RoundId) -> list[Start]:
        """Whoever comes first computes."""
        del round_id
        return [Start(index) for index in range(len(prompts))]

    def plan(
        self, prompt: EncodedPrompt, max_new_tokens: int, rules: ReuseRules, round_id: RoundId
    ) -> RequestPlan:
        """Plan a request: what it would read in place, it copies."""
        rules = replace(rules, fresh_end=1, owns_order=False)
        plan = super().plan(prompt, max_new_tokens, rules, round_id)
        num_copied = int(np.count_nonzero(plan.roles == Role.REUSED))
        recomputed = num_recomputed(num_copied)
        return replace(
            plan,
            roles=np.where(plan.roles == Role.REUSED, np.int8(Role.COPIED), plan.roles),
            num_reused=plan.num_reused - recomputed,
            num_corrected=plan.num_corrected + recomputed,
        )


class WholePrompts(DecodingFirst):
    """From the first token that is copied on, a prompt is computed in one pass.

    Which of its tokens to recompute is chosen among all. What is dropped in the second layer costs
    next to nothing of the budget.
    """

    def chunk(
        self, request: Request, budget: int, *, is_first_prompt: bool, ready: SlotFlags
    ) -> Chunk:
        """See `SchedulingPolicy`."""
        chunk = super().chunk(request, budget, is_first_prompt=is_first_prompt, ready=ready)
        allocation = request.allocation
        assert allocation is not None
        copied = np.flatnonzero(allocation.copied_from >= 0)
        next_positions = request.next_positions(budget)
        if request.is_decoding or len(copied) == 0 or len(next_positions) == 0:
            return chunk
        if next_positions[-1] < copied[0]:
            return chunk
        if next_positions[0] < copied[0]:
            before = chunk.positions[chunk.positions < copied[0]]
            return Chunk(before, len(before))
        rest = allocation.compute[request.num_computed :]
        cost = len(rest) - len(copied) + num_recomputed(len(copied))
        is_ready = ready[allocation.slots[: len(request.prompt)]]
        is_ready[rest] = True
        can_copy = is_ready.all() and ready[allocation.copied_from[copied]].all()
        if can_copy and (cost <= budget or is_first_prompt):
            return Chunk(rest, cost)
        return Chunk(rest[:0], 0)


class OnePromptAtATime(WholePrompts):
    """As an engine computes them that blends each request by itself."""

    def chunk(
        self, request: Request, budget: int, *, is_first_prompt: bool, ready: SlotFlags
    ) -> Chunk:
        """See `SchedulingPolicy`."""
        if not (is_first_prompt or request.is_decoding):
            return Chunk(np.empty(0, np.int64), 0)
        return super().chunk(request, budget, is_first_prompt=is_first_prompt, ready=ready)
