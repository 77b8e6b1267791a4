"""What prefix caching alone would compute for the same prompts: counted, not run."""

from collections.abc import Sequence

import numpy as np

from tokendance.collector.correction import NO_CORRECTION
from tokendance.collector.placement import ReuseRules, draft_placement, place
from tokendance.rounds.segments import TokenIds, build_prompt, make_salt
from tokendance.store.entries import RoundId
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder

_RULES = ReuseRules(prefix=True, segments=False, leave=True)
_SALT = make_salt("estimate")
_ROUND = RoundId(0)


class PrefixEstimate:
    """Counts the prompt tokens that an engine with prefix caching would compute.

    It plays the prompts through the engine's own prefix index, with memory enough never to evict
    and with prompts of one round sharing their common beginnings at once: the best that prefix
    caching can do.
    """

    def __init__(self, page_size: int = 16, max_tokens: int = 2**22) -> None:
        """Make an empty cache for `max_tokens` tokens, in blocks of `page_size`."""
        self._store = KVStore(max_tokens // page_size, page_size, max_reuse_rounds=1)

    def add_round(self, prompts: Sequence[tuple[TokenIds, Sequence[int]]]) -> int:
        """Play a round; each prompt comes with its answer's token ids. Return tokens computed."""
        computed = 0
        placements = []
        for token_ids, answer in prompts:
            prompt = build_prompt([(token_ids, False)], _SALT)
            draft = draft_placement(
                prompt, len(answer) + 1, self._store, NO_CORRECTION, _RULES, _ROUND
            )
            placement = place(prompt, draft, self._store, _RULES, _ROUND)
            assert placement is not None, "the estimate's cache is full"
            computed += len(placement.compute)
            placements.append((token_ids, answer, placement))
        for token_ids, answer, placement in placements:
            tokens = np.concatenate([token_ids, np.array(answer[:-1], np.int32)])
            self._store.put_prefix(tokens, placement.slots[: len(tokens)], _SALT, len(tokens))
            self._store.pool.release(placement.pages, Holder.REQUEST)
        return computed
