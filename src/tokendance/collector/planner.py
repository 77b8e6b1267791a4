"""The planner: the collector as an engine uses it, over one index and with one policy."""

from collections.abc import Sequence
from dataclasses import replace

from tokendance.collector.correction import CorrectionPolicy
from tokendance.collector.owners import Start, order_starts
from tokendance.collector.plan import RequestPlan, ReuseRules, plan_request
from tokendance.collector.sources import KVIndex, usable_sources
from tokendance.rounds.segments import EncodedPrompt
from tokendance.store.entries import RoundId


class Planner:
    """Says in which order the requests of a round start, and what each takes and computes."""

    def __init__(
        self, index: KVIndex, policy: CorrectionPolicy, *, prefix: bool, segments: bool
    ) -> None:
        """Plan over an index.

        With `prefix`, equal beginnings are reused; without it nothing is reused or published. With
        `segments`, shared segments are reused wherever they stand.
        """
        self._index = index
        self._policy = policy
        self._prefix = prefix
        self._segments = segments

    def order(self, prompts: Sequence[EncodedPrompt], round_id: RoundId) -> list[Start]:
        """Choose the order in which prompts of a round start, so that little is computed twice."""
        shared = [prompt.shared_segments() for prompt in prompts]
        known = {
            segment.hash
            for segments in shared
            for (_, segment), sources in zip(
                segments, usable_sources(segments, self._index, round_id), strict=True
            )
            if sources
        }
        sizes = [[(part.hash, len(part)) for _, part in segments] for segments in shared]
        return order_starts(sizes, known)

    def rules(
        self, *, in_round: bool, isolated: bool, publishes: bool, owns_order: bool
    ) -> ReuseRules:
        """What a request may take and leave; the arguments are a request's (`engine.request`)."""
        return ReuseRules(
            prefix=self._prefix and not isolated,
            segments=self._segments and in_round and not isolated,
            publish=self._prefix and publishes,
            owns_order=owns_order,
        )

    def plan(
        self, prompt: EncodedPrompt, max_new_tokens: int, rules: ReuseRules, round_id: RoundId
    ) -> RequestPlan:
        """Plan a request; see `plan_request`."""
        return plan_request(prompt, max_new_tokens, self._index, self._policy, rules, round_id)


def alone(rules: ReuseRules) -> ReuseRules:
    """The same rules for a request that takes nothing: reading KV of others keeps their pages."""
    return replace(rules, prefix=False, segments=False)
