"""Compression of KV that is not read for a while: one byte per number instead of two or four.

As in KIVI (arXiv 2402.02750), numbers share a scale along the axis on which they are alike. In keys
a few channels are large at all tokens, so each channel has a scale of its own over the tokens of a
chunk. Values have no such channels, so each token has one of its own, in every head.

    x  ~  center + scale * code,     code in -127 ... 127,     |x - x'| <= scale / 2

The center is the middle of a group's range. Measured on SmolLM2-135M in float32, five prompts of
about 1070 tokens: root mean square of the error over that of the numbers, and mean KL divergence
(nats) of the next 25 tokens:

    keys      with centers 0.0030, without 0.0043      KL 0.00007, 0.00037
    values    with centers 0.0060, without 0.0073      KL without 0.00001

So keys have them: a channel that hardly turns with position has one sign throughout. Values do
without, as theirs would take 6% of memory for an error that is not felt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokendance.disk.floats import DTYPES, KVArray, largest, narrow, widen

CHUNK_TOKENS = 128

_MAX_CODE = 127


class NotFiniteError(ValueError):
    """Numbers are NaN or infinite, which no scale can hold."""


@dataclass(frozen=True, slots=True, eq=False)
class CompressedTensor:
    """Keys or values (n, KVH, D) in one byte per number.

    Attributes:
        codes: int8 (n, KVH, D), within -127 ... 127.
        scales: float32 (ceil(n / chunk_tokens), KVH, D or 1), one for each group.
        centers: float32, likewise; None if all are 0.
        chunk_tokens: consecutive tokens of a group.
        dtype: of what was compressed.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    centers: npt.NDArray[np.float32] | None
    chunk_tokens: int
    dtype: np.dtype[Any]

    def decompress(self) -> KVArray:
        """Return (n, KVH, D) in the original dtype.

        No number is farther from what it was than half the scale of its group, but for rounding to
        that dtype.
        """
        work = _work_dtype(self.dtype)
        numbers = self.codes.astype(work)
        numbers *= _spread(self.scales, self.chunk_tokens, len(numbers))
        if self.centers is not None:
            numbers += _spread(self.centers, self.chunk_tokens, len(numbers))
        limit = largest(self.dtype)  # scales are rounded up, which may carry the largest beyond
        np.clip(numbers, -limit, limit, out=numbers)
        return narrow(numbers.astype(np.float32, copy=False), self.dtype)


def compress_keys(keys: KVArray, chunk_tokens: int = CHUNK_TOKENS) -> CompressedTensor:
    """Compress keys (n, KVH, D), each channel of each chunk of tokens by itself; n may be 0.

    It takes n KVH D + 8 ceil(n / chunk_tokens) KVH D bytes: in whole chunks of 128 tokens,
    1.88 times less than 16-bit numbers and 3.76 times less than float32. Fewer tokens to a chunk
    are nearer and take more.

    Raises:
        NotFiniteError: for numbers that are NaN or infinite.
        ValueError: for another shape or dtype, and for a chunk of no tokens.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, and has to be at least 1.")
    work = _checked("keys", keys)
    starts = np.arange(0, len(keys), chunk_tokens)
    highest = np.maximum.reduceat(work, starts, axis=0)
    lowest = np.minimum.reduceat(work, starts, axis=0)
    centers = (highest / 2 + lowest / 2).astype(np.float32)
    # As the center was rounded, one side can be longer than the other.
    reach = np.maximum(highest - centers, centers - lowest)
    return _compress(work, reach, centers, chunk_tokens, keys.dtype)


def compress_values(values: KVArray) -> CompressedTensor:
    """Compress values (n, KVH, D), each head of each token by itself; n may be 0.

    It takes n KVH (D + 4) bytes: with heads of 64, 1.88 times less than 16-bit numbers and 3.76
    times less than float32; with heads of 128, 1.94 and 3.88 times.

    Raises:
        NotFiniteError: for numbers that are NaN or infinite.
        ValueError: for another shape or dtype.
    """
    work = _checked("values", values)
    reach = np.abs(work).max(axis=2, keepdims=True)
    return _compress(work, reach, None, 1, values.dtype)


def _work_dtype(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """More digits than the data have, so that only the last rounding counts."""
    return np.float64 if dtype == np.float32 else np.float32


def _checked(name: str, numbers: KVArray) -> npt.NDArray[Any]:
    """Return a copy to work on; refuse what cannot be compressed."""
    if numbers.ndim != 3 or 0 in numbers.shape[1:] or numbers.dtype not in DTYPES:
        raise ValueError(
            f"The {name} are {numbers.dtype} {numbers.shape}, and have to be "
            f"(tokens, kv_heads, head_dim) in one of: {', '.join(DTYPES.values())}."
        )
    work = widen(numbers).astype(_work_dtype(numbers.dtype))
    if not np.isfinite(work).all():
        count = int(np.count_nonzero(~np.isfinite(work)))
        raise NotFiniteError(f"{count} of the {work.size} numbers of the {name} are not finite.")
    return work


def _spread(
    groups: npt.NDArray[np.float32], chunk_tokens: int, num_tokens: int
) -> npt.NDArray[np.float32]:
    """Give each token the numbers of its chunk."""
    if chunk_tokens == 1:
        return groups
    return np.repeat(groups, chunk_tokens, axis=0)[:num_tokens]


def _compress(
    work: npt.NDArray[Any],
    reach: npt.NDArray[Any],
    centers: npt.NDArray[np.float32] | None,
    chunk_tokens: int,
    dtype: np.dtype[Any],
) -> CompressedTensor:
    """Make codes of `work`, which is used up; `reach` is how far a group goes from its center."""
    exact = reach / _MAX_CODE
    scales = exact.astype(np.float32)
    # Rounded up, so that no code is beyond the last one.
    scales = np.where(scales < exact, np.nextafter(scales, np.float32(np.inf)), scales)
    steps = np.where(scales > 0, scales, 1)  # of a group of equal numbers all codes are 0
    if centers is not None:
        work -= _spread(centers, chunk_tokens, len(work))
    work /= _spread(steps, chunk_tokens, len(work))
    np.rint(work, out=work)
    np.clip(work, -_MAX_CODE, _MAX_CODE, out=work)  # the division rounds, too
    return CompressedTensor(work.astype(np.int8), scales, centers, chunk_tokens, dtype)
