"""Hashes of grams: all windows of so many consecutive tokens."""

import secrets

import numpy as np
import numpy.typing as npt

from tokendance.rounds.segments import TokenIds

Hashes = npt.NDArray[np.uint64]

_ZERO = np.uint64(0)
_ONE = np.uint64(1)


class GramHasher:
    """Hashes all grams of a text: token ids become random numbers, the digits of a number mod 2^64.

    A rolling hash (Rabin and Karp, IBM Journal of Research and Development 31, 1987). The random
    numbers are drawn anew for each hasher, so nobody can write texts that collide. A collision does
    no harm beyond a needless cut: segments are identified by another hash.
    """

    def __init__(self, gram_size: int) -> None:
        self.gram_size = gram_size
        self._digits = np.zeros(0, np.uint64)  # of each token id, as far as they were needed
        self._base = np.uint64(secrets.randbits(64) | 1)
        self._inverse = np.uint64(pow(int(self._base), -1, 2**64))

    def hashes(self, token_ids: TokenIds) -> Hashes:
        """Hash the gram that begins at each position of int32 (n,) token ids; never 0.

        There are n - gram_size + 1, or none of a text shorter than a gram.
        """
        count = len(token_ids) - self.gram_size + 1
        if count <= 0:
            return np.zeros(0, np.uint64)
        powers = _powers(self._base, len(token_ids))
        sums = np.cumsum(self._digits_of(token_ids) * powers, dtype=np.uint64)
        sums = np.concatenate(([_ZERO], sums))
        windows = sums[self.gram_size :] - sums[: -self.gram_size]
        hashes: Hashes = np.maximum(windows * _powers(self._inverse, count), _ONE)
        return hashes

    def _digits_of(self, token_ids: TokenIds) -> Hashes:
        largest = int(token_ids.max())
        if largest >= len(self._digits):
            raw = secrets.token_bytes(8 * (largest + 1 - len(self._digits)))
            self._digits = np.concatenate((self._digits, np.frombuffer(raw, np.uint64)))
        digits: Hashes = self._digits[token_ids]
        return digits


def _powers(base: np.uint64, count: int) -> Hashes:
    """1, base, base^2, ...: `count` of them, modulo 2^64."""
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
