"""What is stored of sessions, as the disk tier takes it and hands it over."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType

import numpy as np
import numpy.typing as npt

from tokendance.errors import InputError
from tokendance.rounds.segments import TokenIds

MAX_NAME = 256
FileId = NewType("FileId", int)
Extents = npt.NDArray[np.int64]
"""Ranges of files, (n, 3): file, first row, number of rows; in the order of the tokens."""


@dataclass(frozen=True, slots=True)
class SessionKey:
    """A session's place: names are free text and never become a path."""

    tenant: str  # "" where there are no tenants
    name: str  # 1 to 256 characters

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"A session's name is a {type(self.name).__name__}. Give a text.")
        try:
            self.name.encode()
        except UnicodeError:
            raise InputError(
                "A session's name holds half a character, or one that this terminal's locale does "
                "not have. Use another name, or another locale, like LC_ALL=C.UTF-8."
            ) from None
        if not 1 <= len(self.name) <= MAX_NAME or not self.name.isprintable():
            raise InputError(
                f"A session's name has 1 to {MAX_NAME} printable characters, and this one has "
                f"{len(self.name)}, or others. Use another."
            )


@dataclass(frozen=True, slots=True, eq=False)
class CacheRecord:
    """What is stored of one agent's cache.

    Attributes:
        token_ids: int32, what the agent has read and said, as far as its KV is stored.
        num_exact: length of the beginning that is what the model computes for these very tokens.
        num_prompt: length of the prompt, which is known by itself, too: an answer may be told
            otherwise than it was generated.
        extents: where the KV of these tokens is.
    """

    token_ids: TokenIds
    num_exact: int
    num_prompt: int
    extents: Extents


@dataclass(frozen=True, slots=True, eq=False)
class SegmentRecord:
    """What is stored of a shared segment, for agents whose next prompts have it elsewhere."""

    cache: CacheRecord  # its tokens; never exact for anybody
    run: int  # segments of one number were computed in one context
    index: int  # among the segments of its run
    num_rounds: int  # in which it has been reused


@dataclass(frozen=True, slots=True, eq=False)
class StoredSession:
    """A session as it is on disk."""

    key: SessionKey  # its place
    round: int  # number of its next round
    state: bytes  # what it needs to go on, as its owner wrote it
    caches: Mapping[str, CacheRecord]  # by agent
    segments: tuple[SegmentRecord, ...]  # that its agents share
    used_s: float  # seconds since 1970 when it was last written
    ttl_s: float | None  # seconds after which it may be removed; None: never by itself


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """What a session takes on disk."""

    files: int
    stored_rows: int  # tokens in these files
    dense_rows: int  # tokens of one full cache for each agent
    num_bytes: int  # of the files


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was written: what, and what follows; and which file, if any."""

    text: str
    file: FileId | None = None
