"""The planner: the collector as an engine uses it, over one index and with one policy."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tokendance.collector.co_owners import cached_pages, with_co_owners
from tokendance.collector.correction import CorrectionPolicy, Reuse, stored_apart
from tokendance.collector.neutral import neutral_runs
from tokendance.collector.owners import Lenders, Start, order_starts
from tokendance.collector.plan import RequestPlan, ReuseRules, plan_request
from tokendance.collector.sources import KVIndex, usable_sources
from tokendance.rounds.segments import EncodedPrompt, Segment, SegmentHash
from tokendance.store.entries import RoundId

# What all who guard their text read is not worth a request of its own if it is shorter.
_LEAST_NEUTRAL_TOKENS = 16


class Planner:
    """Says in which order the requests of a round start, and what each takes and computes."""

    def __init__(
        self,
        index: KVIndex,
        policy: CorrectionPolicy,
        *,
        prefix: bool,
        segments: bool,
        owners: int = 1,
    ) -> None:
        """Plan over an index.

        With `prefix`, equal beginnings are reused; without it nothing is reused or published. With
        `segments`, shared segments are reused wherever they stand; so many agents own a run
        together, at most.
        """
        self._owners = owners
        self._index = index
        self._policy = policy
        self._prefix = prefix
        self._segments = segments

    def order(self, prompts: Sequence[EncodedPrompt], round_id: RoundId) -> list[Start]:
        """Choose the order in which prompts of a round start, so that little is computed twice."""
        shared = [prompt.shared_segments() for prompt in prompts]
        known = {
            segment.hash
            for prompt, segments in zip(prompts, shared, strict=True)
            for (_, segment), sources in zip(
                segments, usable_sources(prompt, segments, self._index, round_id), strict=True
            )
            if sources
        }
        sizes = [[(part.hash, len(part)) for _, part in segments] for segments in shared]
        return with_co_owners(order_starts(sizes, known), prompts, known, self._owners)

    def neutral_prompts(
        self,
        guarded: Sequence[EncodedPrompt],
        others: Sequence[EncodedPrompt],
        round_id: RoundId,
    ) -> list[EncodedPrompt]:
        """Make the prompts of neutral owners for requests of a round that guard their text.

        Args:
            guarded: prompts of those.
            others: of the round, which start before and compute what is shared with them.
            round_id: of the round.
        """
        if not self._segments:
            return []
        known = {segment.hash for prompt in others for _, segment in prompt.shared_segments()}
        missing: list[list[SegmentHash]] = []
        by_hash: dict[SegmentHash, Segment] = {}
        for prompt in guarded:
            shared = prompt.shared_segments()
            sources = usable_sources(prompt, shared, self._index, round_id)
            lacking = [
                segment
                for (_, segment), found in zip(shared, sources, strict=True)
                if not found and segment.hash not in known
            ]
            missing.append([segment.hash for segment in lacking])
            by_hash |= {segment.hash: segment for segment in lacking}
        runs = [[by_hash[name] for name in run] for run in neutral_runs(missing)]
        return [
            EncodedPrompt(tuple(run), guarded[0].salt)
            for run in runs
            if self._num_reusable(run) >= _LEAST_NEUTRAL_TOKENS
        ]

    def _num_reusable(self, run: Sequence[Segment]) -> int:
        """Tokens of a neutral owner's run that most mirrors will not compute afresh."""
        reuse = Reuse(True, 0, len(run), sum(map(len, run)), isolated=True)
        return sum(
            int(np.count_nonzero(~stored_apart(self._policy, reuse, segment))) for segment in run
        )

    def rules(
        self,
        *,
        in_round: bool,
        isolated: bool,
        publishes: bool,
        owns_order: bool,
        guarded: bool = False,
        lenders: Lenders | None = None,
    ) -> ReuseRules:
        """What a request may take and leave; the arguments are a request's (`engine.request`)."""
        return ReuseRules(
            prefix=self._prefix and not isolated,
            segments=self._segments and in_round and not isolated,
            publish=self._prefix and publishes,
            owns_order=owns_order,
            guarded=guarded,
            lenders=lenders,
        )

    def plan(
        self, prompt: EncodedPrompt, max_new_tokens: int, rules: ReuseRules, round_id: RoundId
    ) -> RequestPlan:
        """Plan a request; see `plan_request`."""
        return plan_request(prompt, max_new_tokens, self._index, self._policy, rules, round_id)

    def is_cached(self, text: EncodedPrompt) -> bool:
        """Whether a round may reuse the KV of all of a text, from its beginning."""
        return cached_pages(text, self._index) is not None


def alone(rules: ReuseRules) -> ReuseRules:
    """The same rules for a request that takes nothing: reading KV of others keeps their pages."""
    return replace(rules, prefix=False, segments=False)
