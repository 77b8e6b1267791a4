"""What a session hands to the tier: what its agents have read and said."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tokendance.disk.records import SessionKey
from tokendance.rounds.segments import Salt, TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class SpokenCache:
    """What an agent has read and said, all of which may have KV."""

    token_ids: TokenIds  # prompt and answer
    num_prompt: int  # length of the prompt

    @classmethod
    def of(cls, prompt: TokenIds, answer: Sequence[int]) -> "SpokenCache":
        """Put an answer behind its prompt."""
        return cls(np.concatenate([prompt, np.array(answer, np.int32)]), len(prompt))


@dataclass(frozen=True, slots=True, eq=False)
class SessionSnapshot:
    """A session as it is now, to be made durable; `StoredSession` is what becomes of it.

    Attributes:
        key: its place.
        round: number of its next round.
        state: what it needs to go on, besides KV.
        caches: by agent; as much of each as has KV is stored.
        shared_segments: int32 token ids of segments that agents may read again elsewhere.
        salt: of its prompts.
        ttl_s: seconds after which it may be removed; None: never by itself.
    """

    key: SessionKey
    round: int
    state: bytes
    caches: Mapping[str, SpokenCache]
    shared_segments: Collection[TokenIds]
    salt: Salt
    ttl_s: float | None = None
