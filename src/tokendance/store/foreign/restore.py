"""Reading diffs back: layer by layer, so that no dense copy of a whole sibling comes to be.

`restore_layers` fills two buffers in turn, as the paper's Fused Diff Restore does (arXiv
2604.03143): while the caller uses one layer, a thread prepares the next in the other buffer.

    caller   | wait 0 | use 0 (a) | use 1 (b) | use 2 (a) |
    worker   | fill a | fill b    | fill a    | fill b    |

`restore_into` writes one layer straight to where the caller wants it.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from tokendance.errors import CacheError
from tokendance.store.dense import (
    DenseCache,
    LayerKV,
    check_cache,
    check_tensor,
    describe,
    same_heads,
)
from tokendance.store.floats import KVArray
from tokendance.store.foreign.alignment import Cut, Turns, check_matches, cut_blocks, from_master
from tokendance.store.foreign.diffs import CacheDiff, TensorDiff

# Tokens that are taken from the master at once: so few that the steps of rotating them stay in
# the processor's cache.
_CHUNK_TOKENS = 256


def restore_layers(diff: CacheDiff, master: DenseCache) -> Generator[LayerKV, None, None]:
    """Restore a sibling layer by layer, through two buffers that are used in turn.

    Args:
        diff: of the sibling.
        master: the cache that it was encoded against, unchanged; another one of the same shapes
            cannot be told from it.

    Returns:
        Its layers, in order. The arrays of each are read-only and hold until the next is asked
        for. A caller that stops early may `close()` the generator; it waits for the thread.

    Raises:
        CacheError: at once, if the master's shapes cannot be those of the diff's master.
    """
    check_cache("master", master)
    if len(master) != len(diff.layers):
        raise CacheError(
            f"The diff has {len(diff.layers)} layers and the master {len(master)}. "
            "Give the master that the diff was encoded against."
        )
    for index, layer in enumerate(master):
        _check_master(diff, index, layer)
    return _restore_layers(diff, master)


def _restore_layers(diff: CacheDiff, master: DenseCache) -> Generator[LayerKV, None, None]:
    num_tokens = diff.num_tokens
    cut = cut_blocks(num_tokens, diff.matches, diff.block_tokens)
    slots = np.arange(num_tokens)
    room = max(num_tokens * layer.keys[0].size for layer in master)
    buffers = [np.empty((2, room), master[0].keys.dtype) for _ in range(2)]

    def fill(index: int) -> LayerKV:
        shape = (num_tokens, *master[index].keys.shape[1:])
        keys, values = (
            flat[: num_tokens * shape[1] * shape[2]].reshape(shape) for flat in buffers[index % 2]
        )
        _apply(diff, index, master[index], cut, keys, values, slots)
        for array in (keys, values):
            array.setflags(write=False)  # of this view only
        return LayerKV(keys, values)

    with ThreadPoolExecutor(1, "restore") as worker:
        following = worker.submit(fill, 0)
        for index in range(1, len(diff.layers) + 1):
            layer = following.result()
            # The caller is done with the other buffer, or it would not have asked for this layer.
            if index < len(diff.layers):
                following = worker.submit(fill, index)
            yield layer


def restore_into(
    diff: CacheDiff,
    layer: int,
    master: LayerKV,
    keys: KVArray,
    values: KVArray,
    slots: npt.NDArray[np.integer],
) -> None:
    """Write one layer of a sibling into memory of the caller. Other slots are left alone.

    Args:
        diff: of the sibling.
        layer: which.
        master: that layer of the cache that the diff was encoded against. If it lies in the same
            memory, `slots` must not be its own.
        keys: (S, KVH, D), any strides; written.
        values: likewise.
        slots: (n,), distinct, where each token of the sibling goes.

    Raises:
        CacheError: before anything is written, if arrays or slots do not fit.
    """
    if not 0 <= layer < len(diff.layers):
        raise CacheError(f"The diff has layers 0 to {len(diff.layers) - 1}, and not {layer}.")
    _check_master(diff, layer, master)
    for name, memory in (("keys", keys), ("values", values)):
        check_tensor(name, memory)
        if not same_heads(memory, master.keys) or not memory.flags.writeable:
            raise CacheError(
                f"The memory for {name} is {describe(memory)}, for a layer of "
                f"{describe(master.keys)}. Give a writable array with its heads and dtype."
            )
    num_slots = min(len(keys), len(values))
    if (
        slots.shape != (diff.num_tokens,)
        or ((slots < 0) | (slots >= num_slots)).any()
        or len(np.unique(slots)) < len(slots)
    ):
        raise CacheError(
            f"{slots.size} slots are given for {diff.num_tokens} tokens, in memory of {num_slots}. "
            "Give a slot of its own to each token."
        )
    cut = cut_blocks(diff.num_tokens, diff.matches, diff.block_tokens)
    _apply(diff, layer, master, cut, keys, values, slots)


def _check_master(diff: CacheDiff, index: int, master: LayerKV) -> None:
    if not same_heads(diff.layers[index].keys.rows, master.keys):
        raise CacheError(
            f"Layer {index} of the master is {describe(master.keys)}, and the diff's rows are "
            f"{describe(diff.layers[index].keys.rows)}. "
            "Give the master that the diff was encoded against."
        )
    check_matches(diff.matches, diff.num_tokens, master.num_tokens)


def _apply(
    diff: CacheDiff,
    index: int,
    master: LayerKV,
    cut: Cut,
    keys: KVArray,
    values: KVArray,
    slots: npt.NDArray[np.integer],
) -> None:
    layer = diff.layers[index]
    _apply_tensor(layer.keys, master.keys, cut, layer.turns, keys, slots)
    _apply_tensor(layer.values, master.values, cut, None, values, slots)


def _apply_tensor(
    diff: TensorDiff,
    master: KVArray,
    cut: Cut,
    turns: Turns | None,
    memory: KVArray,
    slots: npt.NDArray[np.integer],
) -> None:
    is_stored = diff.stored[cut.block_of]
    memory[slots[is_stored]] = diff.rows
    taken = np.flatnonzero(~is_stored)
    for start in range(0, len(taken), _CHUNK_TOKENS):
        tokens = taken[start : start + _CHUNK_TOKENS]
        memory[slots[tokens]] = from_master(master, cut, tokens, turns)
