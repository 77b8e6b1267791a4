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
    """A session as it is now, to be made durable; `StoredSession` is what becomes of it."""

    key: SessionKey  # its place
    round: int  # number of its next round
    state: bytes  # what it needs to go on, besides KV
    caches: Mapping[str, SpokenCache]  # by agent; as much of each as has KV is stored
    shared_segments: Collection[TokenIds]  # int32 each; agents may read them again elsewhere
    salt: Salt  # of its prompts
    ttl_s: float | None = None  # seconds after which it may be removed; None: never by itself
