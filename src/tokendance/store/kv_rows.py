"""KV of some tokens, on its way between memories."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class KVRows:
    """KV of some tokens, apart from any memory."""

    positions: npt.NDArray[np.int32]  # int32 (n,)
    keys: npt.NDArray[Any]  # (L, KVH, n, D); uint16 holds bfloat16
    values: npt.NDArray[Any]  # likewise

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_bytes(self) -> int:
        """Of keys, values and positions."""
        return int(self.keys.nbytes + self.values.nbytes + self.positions.nbytes)
