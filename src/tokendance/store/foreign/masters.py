"""Choosing the master of a group of caches: the one that is kept whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokendance.errors import CacheError
from tokendance.store.dense import DenseCache
from tokendance.store.foreign.alignment import FloatArray, Match
from tokendance.store.foreign.diffs import BLOCK_TOKENS, encode_diff

Align = Callable[[int, int], Sequence[Match]]
"""Says what two caches have in common, by their indexes: the sibling's, then the master's."""


@dataclass(frozen=True, slots=True)
class MasterScore:
    """What it would mean to make one cache of a group the master.

    Attributes:
        deviation: mean of `CacheDiff.deviation` over the siblings that have text in common with
            it; infinite if none has.
        num_bytes: of the master and all diffs.
    """

    deviation: float
    num_bytes: int


@dataclass(frozen=True, slots=True)
class MasterChoice:
    """Which cache of a group to keep whole, by either measure.

    Attributes:
        scores: of each cache as master.
        least_deviation: index of the one that the others are nearest to, as the paper chooses.
            How much they have in common with it does not count.
        least_bytes: index of the one with which the group takes least memory.
    """

    scores: tuple[MasterScore, ...]
    least_deviation: int
    least_bytes: int


def choose_master(
    caches: Sequence[DenseCache],
    align: Align,
    inv_freq: Sequence[FloatArray],
    *,
    threshold: float = 0.0,
    block_tokens: int = BLOCK_TOKENS,
) -> MasterChoice:
    """Try each cache of a group as master of the others. Of equals the first is chosen.

    It encodes every pair and keeps none of the diffs: the square of the group's size in work.

    Args:
        caches: of one model.
        align: the matches of a pair.
        inv_freq: see `encode_diff`, likewise the others.
        threshold: bytes depend on it, deviations do not.
        block_tokens: likewise.

    Raises:
        CacheError: for an empty group, or if `encode_diff` refuses a pair.
        ConfigError: as `encode_diff`.
    """
    if not caches:
        raise CacheError("There is no cache to choose from. Give at least one.")
    scores: list[MasterScore] = []
    for candidate, master in enumerate(caches):
        deviations: list[float] = []
        num_bytes = sum(layer.num_bytes for layer in master)
        for index, sibling in enumerate(caches):
            if index == candidate:
                continue
            diff = encode_diff(
                sibling,
                master,
                align(index, candidate),
                inv_freq,
                threshold=threshold,
                block_tokens=block_tokens,
            )
            num_bytes += diff.num_bytes
            if diff.deviation is not None:
                deviations.append(diff.deviation)
        deviation = float(np.mean(deviations)) if deviations else np.inf
        scores.append(MasterScore(deviation, num_bytes))
    indexes = range(len(scores))
    return MasterChoice(
        tuple(scores),
        min(indexes, key=lambda index: scores[index].deviation),
        min(indexes, key=lambda index: scores[index].num_bytes),
    )
