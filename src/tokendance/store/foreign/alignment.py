"""What a sibling's text has in common with its master's, and what the master's KV is there.

    sibling   [ private ][ A ][ B ][ task ]          A at 9 and 30:  offset  9 - 30 = -21
    master    [ private ............. ][ A ][ B ][ task ]

Each common stretch is a `Match`. Values of the master can be taken as they are; its keys carry
their positions as rotations (RoPE, arXiv 2104.09864), so they are rotated by the match's offset.
Rotations are in half-split layout: component i turns with component i + rotated/2, where `rotated`
components of a head turn and the rest stay.

Whoever writes a diff and whoever reads it must find the same bits here, possibly on different
machines. So cosines and sines, which libraries round differently, are made once and kept
(`Turns`); what remains are products and sums of two float32, which IEEE 754 leaves no freedom in.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokendance.errors import CacheError
from tokendance.store.floats import KVArray, narrow, widen

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

_NO_SOURCE = -1
_INT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Match:
    """A stretch of text that a sibling has in common with its master.

    Attributes:
        sibling_start: position of its first token in the sibling.
        master_start: likewise in the master.
        length: tokens, at least one.
    """

    sibling_start: int
    master_start: int
    length: int

    @property
    def offset(self) -> int:
        """By how many positions the master's keys are to be rotated."""
        return self.sibling_start - self.master_start

    @property
    def num_bytes(self) -> int:
        """As three integers of 32 bits."""
        return 3 * _INT_BYTES


def check_matches(
    matches: Sequence[Match], num_tokens: int, master_tokens: int
) -> tuple[Match, ...]:
    """Bring matches into the order of the sibling.

    Several may point to the same tokens of the master: a text that the sibling has twice.

    Args:
        matches: in any order.
        num_tokens: of the sibling.
        master_tokens: of the master.

    Raises:
        CacheError: if one is empty or reaches beyond either text, or two overlap in the sibling.
    """
    ordered = tuple(sorted(matches, key=lambda match: match.sibling_start))
    for match in ordered:
        if (
            match.length < 1
            or not 0 <= match.sibling_start <= num_tokens - match.length
            or not 0 <= match.master_start <= master_tokens - match.length
        ):
            raise CacheError(
                f"{match} does not fit a sibling of {num_tokens} and a master of {master_tokens} "
                "tokens. Give matches of at least one token that lie within both."
            )
    for before, after in itertools.pairwise(ordered):
        if before.sibling_start + before.length > after.sibling_start:
            raise CacheError(
                f"{before} and {after} overlap in the sibling. "
                "Say of each of its tokens at most once where the master has it."
            )
    return ordered


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A sibling's tokens, cut into blocks; a block lies within one match or outside of all.

    Attributes:
        sources: int64 (n,), the master's token for each token; negative where it has none.
        match_of: int64 (n,), index of the match that a token is in; 0 where it is in none.
        block_starts: int64 (B,), ascending; each block ends where the next begins.
        block_of: int64 (n,), the block of each token.
    """

    sources: IntArray
    match_of: IntArray
    block_starts: IntArray
    block_of: IntArray


def cut_blocks(num_tokens: int, matches: Sequence[Match], block_tokens: int) -> Cut:
    """Cut a sibling into blocks of up to `block_tokens`, beginning anew at each match and gap.

    Args:
        num_tokens: of the sibling.
        matches: as `check_matches` returns them.
        block_tokens: at least 1.
    """
    sources = np.full(num_tokens, _NO_SOURCE, np.int64)
    match_of = np.zeros(num_tokens, np.int64)
    edges = {0, num_tokens}
    for index, match in enumerate(matches):
        start, end = match.sibling_start, match.sibling_start + match.length
        sources[start:end] = np.arange(match.master_start, match.master_start + match.length)
        match_of[start:end] = index
        edges |= {start, end}
    starts = [
        block
        for start, end in itertools.pairwise(sorted(edges))
        for block in range(start, end, block_tokens)
    ]
    block_starts = np.array(starts, np.int64)
    lengths = np.diff(block_starts, append=num_tokens)
    return Cut(sources, match_of, block_starts, np.repeat(np.arange(len(starts)), lengths))


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """The rotation by each match's offset, for layers of one set of frequencies.

    Attributes:
        cos: float32 (matches, rotated / 2).
        sin: likewise.
    """

    cos: FloatArray
    sin: FloatArray

    @classmethod
    def of(cls, matches: Sequence[Match], inv_freq: FloatArray) -> "Turns":
        """Make them; angles are formed in float64, as float32 loses digits at high positions.

        Args:
            matches: of a sibling, in order.
            inv_freq: (rotated / 2,), radians per position.
        """
        offsets = np.array([match.offset for match in matches], np.float64)
        angles = offsets[:, None] * inv_freq.astype(np.float64)
        return cls(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))

    @property
    def num_bytes(self) -> int:
        """Of both tables."""
        return self.cos.nbytes + self.sin.nbytes


def from_master(rows: KVArray, cut: Cut, tokens: IntArray, turns: Turns | None) -> KVArray:
    """Take the master's KV for tokens of a sibling. The result for a token is the same in any call.

    Args:
        rows: (tokens of the master, KVH, D), its keys or values in a layer.
        cut: of the sibling.
        tokens: (r,), of the sibling, all of which have sources.
        turns: rotates keys; None for values.

    Returns:
        (r, KVH, D) of the same dtype, a copy.
    """
    sources = cut.sources[tokens]
    taken: KVArray = rows[sources]
    if turns is None:
        return taken
    # Keys that stay where they are keep their bits; a rotation by 0 would lose signs of zeros.
    moved = np.flatnonzero(sources != tokens)
    match = cut.match_of[tokens[moved]]
    cos, sin = turns.cos[match, None], turns.sin[match, None]  # (moved, 1, rotated / 2)
    half = cos.shape[-1]
    turning = widen(taken[moved, :, : 2 * half])
    first, second = turning[..., :half], turning[..., half:]
    with np.errstate(over="ignore", invalid="ignore"):  # of keys that were not finite before
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    # Which of two NaN a sum keeps depends on how it was compiled: make them all alike.
    np.copyto(turned, np.nan, where=np.isnan(turned))
    taken[moved, :, : 2 * half] = narrow(turned, rows.dtype)
    return taken
