"""Dense KV caches as other engines make them: for each layer all keys and all values of a text.

    n   tokens of a cache        KVH  key/value heads        D  head size

The number of heads and their size may differ from layer to layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokendance.errors import CacheError
from tokendance.store.floats import DTYPES, KVArray


@dataclass(frozen=True, slots=True, eq=False)
class LayerKV:
    """Keys and values of one layer.

    Attributes:
        keys: (n, KVH, D), each rotated to its token's position, which is its index.
        values: likewise, of the same dtype, one of `floats.DTYPES`.

    Raises:
        CacheError: if the arrays do not fit together.
    """

    keys: KVArray
    values: KVArray

    def __post_init__(self) -> None:
        for name, array in (("keys", self.keys), ("values", self.values)):
            check_tensor(name, array)
        if self.keys.shape != self.values.shape or self.keys.dtype != self.values.dtype:
            raise CacheError(
                f"A layer has keys of {describe(self.keys)} and values of {describe(self.values)}. "
                "Give both in one shape (tokens, kv_heads, head_dim) and one dtype."
            )

    @property
    def num_tokens(self) -> int:
        """Of the cache: n."""
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return self.keys.nbytes + self.values.nbytes


DenseCache = Sequence[LayerKV]
"""The layers of a model, in order."""


def check_tensor(name: str, array: KVArray) -> None:
    """Refuse what is no tensor of KV.

    Args:
        name: what the message calls it.
        array: to be (n, KVH, D) in one of `floats.DTYPES`.

    Raises:
        CacheError: if it is not.
    """
    if array.ndim != 3 or 0 in array.shape[1:]:
        raise CacheError(
            f"The {name} are {describe(array)}. "
            "Give them as (tokens, kv_heads, head_dim), with at least one head of size one."
        )
    if array.dtype not in DTYPES:
        raise CacheError(
            f"The {name} are {describe(array)}. Give them as one of: {', '.join(DTYPES.values())}."
        )


def check_cache(name: str, cache: DenseCache) -> None:
    """Refuse a cache whose layers are not those of one text.

    Raises:
        CacheError: if it has no layers, or they differ in tokens or dtype.
    """
    if not cache:
        raise CacheError(f"The {name} has no layers. Give one LayerKV for each layer of the model.")
    for index, layer in enumerate(cache):
        if layer.num_tokens != cache[0].num_tokens or layer.keys.dtype != cache[0].keys.dtype:
            raise CacheError(
                f"Layer {index} of the {name} is {describe(layer.keys)} and its first is "
                f"{describe(cache[0].keys)}. Give all layers with the same tokens and dtype."
            )


def check_same_model(sibling: DenseCache, master: DenseCache) -> None:
    """Refuse caches that cannot come from one model.

    Raises:
        CacheError: if they differ in layers, heads or dtype.
    """
    if len(sibling) != len(master):
        raise CacheError(
            f"The sibling has {len(sibling)} layers and the master {len(master)}. "
            "Give two caches of the same model."
        )
    for index, (one, other) in enumerate(zip(sibling, master, strict=True)):
        if not same_heads(one.keys, other.keys):
            raise CacheError(
                f"In layer {index} the sibling is {describe(one.keys)} and the master "
                f"{describe(other.keys)}. Give two caches of the same model, in one dtype."
            )


def same_heads(one: KVArray, other: KVArray) -> bool:
    """Whether two tensors agree in all but the number of tokens."""
    return one.shape[1:] == other.shape[1:] and one.dtype == other.dtype


def describe(array: KVArray) -> str:
    """Shape and dtype, for messages."""
    dtype = DTYPES.get(np.dtype(array.dtype), str(array.dtype))
    return f"{dtype} {tuple(array.shape)}"
