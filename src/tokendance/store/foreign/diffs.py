"""Diffs against caches that were not made by us.

An engine that keeps one dense KV cache per agent holds nearly the same KV many times over. As in
the paper TokenDance (arXiv 2604.03143, Diff-Aware Storage and Fused Diff Restore), one cache, the
master, is kept whole; of the others, its siblings, only those blocks are kept in which they differ.

    sibling   [private......][A..........][B.......][task]
    blocks    |ssss|ssss|ss  |....|.s..|..|....|..s.|ssss|     s: stored, of this layer's keys

What is common is said by the caller (`alignment.Match`); all else is stored. In what is common, a
block of a layer's keys or values is stored if it deviates too far from the master's, whose keys
are rotated to the sibling's positions first. The deviation of a block is

    largest |sibling - master| of its elements / root mean square of the sibling's elements in it

so that no element that is read back is farther off than `threshold` times that root mean square.
With threshold 0 every block is stored that differs in any bit, and nothing is lost at all.

(TokenDance's own engine needs none of this: it reads shared KV in place. See docs/attention.md.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokendance.errors import CacheError, ConfigError
from tokendance.store.dense import DenseCache, check_cache, check_same_model, describe
from tokendance.store.floats import KVArray, bits_of, widen
from tokendance.store.foreign.alignment import (
    Cut,
    FloatArray,
    Match,
    Turns,
    check_matches,
    cut_blocks,
    from_master,
)

BLOCK_TOKENS = 32
"""As in the paper."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorDiff:
    """Keys or values of one layer, where they are not the master's.

    Attributes:
        stored: bool (B,), which blocks are stored.
        rows: (r, KVH, D), the tokens of these blocks, in order; read-only.
    """

    stored: npt.NDArray[np.bool_]
    rows: KVArray

    @property
    def num_bytes(self) -> int:
        """Stored."""
        return self.stored.nbytes + self.rows.nbytes

    def dense_bytes(self, num_tokens: int) -> int:
        """What all tokens would take."""
        heads: int
        size: int
        _, heads, size = self.rows.shape
        return num_tokens * heads * size * self.rows.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class LayerDiff:
    """One layer.

    Attributes:
        keys: rotated to the sibling's positions.
        values: with blocks of their own.
        turns: rotate the master's keys; layers that rotate alike share one object.
    """

    keys: TensorDiff
    values: TensorDiff
    turns: Turns


@dataclass(frozen=True, slots=True, eq=False)
class CacheDiff:
    """A sibling's cache, as what its master does not have. It is of no use without that master.

    Attributes:
        num_tokens: of the sibling.
        matches: what it has in common with the master, in order.
        block_tokens: most tokens of a block.
        threshold: largest deviation of a block that is not stored; 0: none at all.
        layers: in order.
        deviation: how far the master is from the sibling where their text is common, whether or
            not a block is stored: root mean square of the differences over that of the sibling,
            both over keys or values of a layer, and then the mean over all of them. None where
            nothing is common.
    """

    num_tokens: int
    matches: tuple[Match, ...]
    block_tokens: int
    threshold: float
    layers: tuple[LayerDiff, ...]
    deviation: float | None

    @property
    def num_bytes(self) -> int:
        """Stored: blocks, which they are, matches (three 32-bit integers each) and rotations."""
        turns = {id(layer.turns): layer.turns.num_bytes for layer in self.layers}
        blocks = sum(layer.keys.num_bytes + layer.values.num_bytes for layer in self.layers)
        return blocks + sum(turns.values()) + sum(match.num_bytes for match in self.matches)

    @property
    def dense_bytes(self) -> int:
        """What the sibling's keys and values would take without a master."""
        tensors = [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.dense_bytes(self.num_tokens) for tensor in tensors)


def encode_diff(
    sibling: DenseCache,
    master: DenseCache,
    matches: Sequence[Match],
    inv_freq: Sequence[FloatArray],
    *,
    threshold: float = 0.0,
    block_tokens: int = BLOCK_TOKENS,
) -> CacheDiff:
    """Encode a cache as a diff against another. Changes neither, and keeps no reference to them.

    Args:
        sibling: n tokens.
        master: of the same model, of any length.
        matches: what they have in common, in any order.
        inv_freq: for each layer float32 (rotated / 2,), radians per position; empty for a layer
            that does not rotate.
        threshold: deviation up to which a block is taken from the master; see the module.
        block_tokens: most tokens of a block.

    Raises:
        CacheError: if the caches, matches or frequencies do not fit together.
        ConfigError: for a threshold or block size that cannot be.
    """
    if not (0 <= threshold < np.inf):
        raise ConfigError(
            f"threshold is {threshold}. Give a finite number that is not negative; 0 loses nothing."
        )
    if block_tokens < 1:
        raise ConfigError(f"block_tokens is {block_tokens}. Give at least 1.")
    check_cache("sibling", sibling)
    check_cache("master", master)
    check_same_model(sibling, master)
    _check_frequencies(inv_freq, sibling)
    num_tokens = sibling[0].num_tokens
    ordered = check_matches(matches, num_tokens, master[0].num_tokens)
    cut = cut_blocks(num_tokens, ordered, block_tokens)

    turns: dict[bytes, Turns] = {}
    layers: list[LayerDiff] = []
    deviations: list[float] = []
    for own, other, frequencies in zip(sibling, master, inv_freq, strict=True):
        kind = frequencies.tobytes()
        if kind not in turns:
            turns[kind] = Turns.of(ordered, frequencies)
        keys = _encode_tensor(own.keys, other.keys, cut, turns[kind], threshold)
        values = _encode_tensor(own.values, other.values, cut, None, threshold)
        layers.append(LayerDiff(keys.diff, values.diff, turns[kind]))
        deviations += [keys.deviation, values.deviation]
    deviation = float(np.mean(deviations)) if ordered else None
    return CacheDiff(num_tokens, ordered, block_tokens, threshold, tuple(layers), deviation)


def _check_frequencies(inv_freq: Sequence[FloatArray], cache: DenseCache) -> None:
    if len(inv_freq) != len(cache):
        raise CacheError(
            f"There are frequencies for {len(inv_freq)} layers, and the caches have {len(cache)}. "
            "Give one array for each layer, empty for one that does not rotate."
        )
    for index, (frequencies, layer) in enumerate(zip(inv_freq, cache, strict=True)):
        if (
            frequencies.ndim != 1
            or frequencies.dtype != np.float32
            or 2 * len(frequencies) > layer.keys.shape[2]
            or not np.isfinite(frequencies).all()
        ):
            raise CacheError(
                f"The frequencies of layer {index} are {describe(frequencies)}, for keys of "
                f"{describe(layer.keys)}. Give finite float32 numbers, at most half of head_dim."
            )


class _Encoded(NamedTuple):
    diff: TensorDiff
    deviation: float  # root mean square, relative, over all that is common


def _encode_tensor(
    sibling: KVArray, master: KVArray, cut: Cut, turns: Turns | None, threshold: float
) -> _Encoded:
    """Encode keys or values (tokens, KVH, D) of one layer; `turns` for keys only."""
    num_tokens = len(sibling)
    common = np.flatnonzero(cut.sources >= 0)
    own, taken = sibling[common], from_master(master, cut, common, turns)
    # For each token of the sibling; those without a source are in blocks of their own.
    differs = np.ones(num_tokens, np.bool_)
    differs[common] = (bits_of(own) != bits_of(taken)).any(axis=(1, 2))
    squares = np.zeros(num_tokens)
    worst = np.full(num_tokens, np.inf)
    with np.errstate(invalid="ignore"):  # NaN, and infinite minus infinite: not near, so stored
        wide = widen(own)
        squares[common] = np.square(wide, dtype=np.float64).sum(axis=(1, 2))
        difference = np.subtract(wide, widen(taken), dtype=np.float64)
        worst[common] = np.abs(difference).max(axis=(1, 2), initial=0.0)
        deviation = _ratio(float(np.square(difference).sum()), float(squares.sum()))

        stored = np.logical_or.reduceat(differs, cut.block_starts)
        if threshold > 0:
            sizes = np.bincount(cut.block_of) * (sibling.shape[1] * sibling.shape[2])
            rms = np.sqrt(np.add.reduceat(squares, cut.block_starts) / sizes)
            block_worst = np.maximum.reduceat(worst, cut.block_starts)
            stored &= ~(np.isfinite(block_worst) & (block_worst <= threshold * rms))
    rows = sibling[stored[cut.block_of]]
    for array in (stored, rows):
        array.setflags(write=False)
    return _Encoded(TensorDiff(stored, rows), deviation)


def _ratio(difference: float, whole: float) -> float:
    """Root of a ratio of sums of squares; infinite where it is none."""
    if difference == 0:
        return 0.0
    ratio = difference / whole if whole > 0 else np.inf
    return float(np.sqrt(ratio)) if np.isfinite(ratio) else np.inf
