"""Segments: immutable runs of token ids, known by the hash of their content."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NewType, TypeVar

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]

SegmentHash = NewType("SegmentHash", bytes)
ChainHash = NewType("ChainHash", bytes)
Salt = NewType("Salt", bytes)
Page = TypeVar("Page")

_DIGEST_BYTES = 16


def make_salt(*names: str) -> Salt:
    """Hash what must never share KV (model, tokenizer, tenant) into one key.

    The boundaries of names count: "ab", "c" differs from "a", "bc".
    """
    digest = hashlib.blake2b(digest_size=32)
    for name in names:
        raw = name.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return Salt(digest.digest())


def hash_segment(token_ids: TokenIds, salt: Salt) -> SegmentHash:
    """Hash a segment by its content alone, wherever it stands."""
    return SegmentHash(_digest(token_ids.tobytes(), salt))


def hash_chain(parent: ChainHash | None, token_ids: TokenIds, salt: Salt) -> ChainHash:
    """Hash a block of a prompt together with everything before it."""
    return ChainHash(_digest((parent or b"") + token_ids.tobytes(), salt))


def _digest(data: bytes, salt: Salt) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=salt).digest()


def as_token_ids(values: Iterable[int]) -> TokenIds:
    """Copy token ids into a read-only int32 array."""
    array = np.fromiter(values, dtype=np.int32)
    array.setflags(write=False)
    return array


class PrefixHashes:
    """Hashes of the beginnings of a sequence of tokens, cut into pages, each computed once.

    The hash of a beginning is that of its last page together with the hash of all before it, so
    two sequences have it in common exactly if they begin with the same tokens.
    """

    def __init__(self, token_ids: TokenIds, salt: Salt) -> None:
        """Hash `token_ids`, int32, when asked to."""
        self.token_ids = token_ids
        self._salt = salt
        self._hashes: dict[tuple[int, int], ChainHash] = {}  # by page size and length

    def of(self, length: int, page_size: int) -> ChainHash:
        """Hash the first `length` tokens, at least one, in pages of `page_size`."""
        if (page_size, length) in self._hashes:
            return self._hashes[page_size, length]
        last = (length - 1) // page_size * page_size
        first = last
        while first > 0 and (page_size, first) not in self._hashes:
            first -= page_size
        parent = self._hashes.get((page_size, first))
        for start in range(first, last + 1, page_size):
            stop = min(start + page_size, length)
            parent = hash_chain(parent, self.token_ids[start:stop], self._salt)
            self._hashes[page_size, stop] = parent
        assert parent is not None
        return parent

    def match(self, page_size: int, look_up: Callable[[ChainHash], Page | None]) -> list[Page]:
        """Find the longest known beginning, page by page.

        A page that ends a text may be short, and is the last then.
        """
        pages: list[Page] = []
        for start in range(0, len(self.token_ids), page_size):
            longest = min(start + page_size, len(self.token_ids))
            for stop in range(longest, start, -1):
                page = look_up(self.of(stop, page_size))
                if page is not None:
                    pages.append(page)
                    break
            if page is None or stop < start + page_size:
                break
        return pages

    def extended(self, more: Sequence[int]) -> "PrefixHashes":
        """The same with more tokens behind; what was hashed is not hashed again."""
        longer = PrefixHashes(
            np.concatenate([self.token_ids, np.array(more, np.int32)]), self._salt
        )
        longer._hashes = dict(self._hashes)
        return longer


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of token ids in a prompt."""

    token_ids: TokenIds  # read-only, at least one
    shared: bool  # what this prompt says of the segment: other prompts may have it too
    hash: SegmentHash  # of the content, salted

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """One agent's ordered segments, as token ids.

    Attributes:
        segments: in the order that the model reads them.
        salt: what the hashes were made with; prompts of different salts never share.
        token_ids: int32, all segments in a row.
        starts: position of the first token of each segment.
        prefix_hashes: of its beginnings; computed when somebody looks for them, and kept.
    """

    segments: tuple[Segment, ...]
    salt: Salt
    token_ids: TokenIds = field(init=False)
    starts: tuple[int, ...] = field(init=False)
    prefix_hashes: PrefixHashes = field(init=False)

    def __post_init__(self) -> None:
        arrays = [segment.token_ids for segment in self.segments]
        token_ids = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
        token_ids.setflags(write=False)
        ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        object.__setattr__(self, "token_ids", token_ids)
        object.__setattr__(self, "prefix_hashes", PrefixHashes(token_ids, self.salt))
        object.__setattr__(self, "starts", (0, *ends[:-1].tolist()) if arrays else ())

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_public(self) -> int:
        """Tokens before its first private segment."""
        starts = (
            start for start, part in zip(self.starts, self.segments, strict=True) if not part.shared
        )
        return next(starts, len(self))

    def keep_hashes(self, known: PrefixHashes) -> None:
        """Go on with what was hashed of the same tokens before they were cut."""
        object.__setattr__(self, "prefix_hashes", known)

    def shared_segments(self) -> list[tuple[int, Segment]]:
        """Position and segment of each shared one, in order."""
        return [
            (start, segment)
            for start, segment in zip(self.starts, self.segments, strict=True)
            if segment.shared
        ]


def build_prompt(contents: Sequence[tuple[TokenIds, bool]], salt: Salt) -> EncodedPrompt:
    """Make a prompt of segments with these contents, `(token_ids, shared)`.

    Private neighbours become one segment; empty contents vanish.
    """
    merged: list[tuple[TokenIds, bool]] = []
    for token_ids, shared in contents:
        if len(token_ids) == 0:
            continue
        if merged and not shared and not merged[-1][1]:
            merged[-1] = (np.concatenate([merged[-1][0], token_ids]), False)
        else:
            merged.append((token_ids, shared))
    for token_ids, _ in merged:
        token_ids.setflags(write=False)
    return EncodedPrompt(
        tuple(Segment(ids, shared, hash_segment(ids, salt)) for ids, shared in merged), salt
    )


def build_prompt_at(
    token_ids: TokenIds, shared: Iterable[tuple[int, int]], salt: Salt
) -> EncodedPrompt:
    """Make a prompt whose shared segments are these ranges of positions (begin, end), in order."""
    contents: list[tuple[TokenIds, bool]] = []
    done = 0
    for begin, end in shared:
        contents.append((token_ids[done:begin], False))
        contents.append((token_ids[begin:end], True))
        done = end
    return build_prompt([*contents, (token_ids[done:], False)], salt)
