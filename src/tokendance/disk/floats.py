"""Numbers of KV as numpy arrays: float32, float16, and bfloat16, which numpy does not know.

A bfloat16 is the upper half of a float32, and is kept as a uint16 of those bits. Arithmetic is done
on float32 copies (`widen`), and what comes out is rounded back (`narrow`).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

KVArray = npt.NDArray[Any]
"""An array of one of `DTYPES`."""

BFLOAT16 = np.dtype(np.uint16)
DTYPES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    BFLOAT16: "bfloat16 as uint16",
}
_LARGEST_BFLOAT16 = float(np.array(0x7F7F0000, np.uint32).view(np.float32))


def widen(numbers: KVArray) -> npt.NDArray[np.float32]:
    """Return the numbers in float32, exactly. Of a float32 array it returns the array itself."""
    if numbers.dtype == BFLOAT16:
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32, copy=False)


def narrow(numbers: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> KVArray:
    """Round float32 to one of `DTYPES`: to the nearest, halves to even.

    What is too large becomes infinite, and NaN stays NaN.
    """
    if dtype != BFLOAT16:
        with np.errstate(over="ignore"):
            return numbers.astype(dtype, copy=False)
    bits = numbers.view(np.uint32)
    # Carries into the upper half above the middle, and at the middle if the upper half is odd.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = np.isnan(numbers)
    # The carry would make infinity or zero of some NaN; cut off instead, with the quiet bit set.
    rounded[nan] = (bits[nan] >> 16).astype(np.uint16) | np.uint16(0x0040)
    return rounded


def largest(dtype: np.dtype[Any]) -> float:
    """The largest finite number of one of `DTYPES`."""
    return _LARGEST_BFLOAT16 if dtype == BFLOAT16 else float(np.finfo(dtype).max)
