"""Rotary position embedding (RoFormer, arXiv 2104.09864): rotating by a difference of positions.

Models rotate queries and keys themselves. What is added here is the rotation of a query that is
rotated already, by an offset. Scaling factors of the model's tables (YaRN) are in its queries
and keys already, so the offset's rotation has none.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class RopeLayout(Enum):
    """Which two components of a head form a pair that is rotated."""

    HALVES = "halves"  # (i, i + rotary_dim / 2)
    INTERLEAVED = "interleaved"  # (2i, 2i + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """The rotation of a model's heads.

    Attributes:
        inv_freq: float32 (rotary_dim / 2,), radians per position; `rotary_dim` components of a
            head are rotated, the rest stay as they are.
        layout: how they pair up.
    """

    inv_freq: Tensor
    layout: RopeLayout = RopeLayout.HALVES

    def tables(
        self, offsets: npt.NDArray[np.integer], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines for a rotation by each of `offsets` positions.

        Angles are formed in float64: at thousands of positions float32 has lost the digits.

        Returns:
            Two float32 tensors (len(offsets), rotary_dim / 2).
        """
        # On the CPU, as not every device has float64.
        angles = (
            torch.from_numpy(offsets.astype(np.float64))[:, None] * self.inv_freq.cpu().double()
        )
        return angles.cos().float().to(device), angles.sin().float().to(device)

    def rotate(self, heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate heads by the offsets of `tables`.

        Args:
            heads: (..., R, D).
            tables: from `tables()`, for R offsets.

        Returns:
            The same shape and dtype; the arithmetic is float32.
        """
        cos, sin = tables
        rotary_dim = 2 * cos.shape[-1]
        rotary = heads[..., :rotary_dim].float()
        if self.layout is RopeLayout.HALVES:
            first, second = rotary.chunk(2, dim=-1)
        else:
            first, second = rotary[..., 0::2], rotary[..., 1::2]
        pairs = (first * cos - second * sin, second * cos + first * sin)
        if self.layout is RopeLayout.HALVES:
            result = torch.cat(pairs, dim=-1)
        else:
            result = torch.stack(pairs, dim=-1).flatten(-2)
        result = result.to(heads.dtype)
        if rotary_dim == heads.shape[-1]:
            return result
        return torch.cat([result, heads[..., rotary_dim:]], dim=-1)


class OffsetTables:
    """The tables of some offsets, made once for each rotation that needs them."""

    def __init__(self, offsets: npt.NDArray[np.integer], device: torch.device) -> None:
        """Keep the offsets; see `Rope.tables`."""
        self._offsets = offsets
        self._device = device
        self._made: dict[Rope, tuple[Tensor, Tensor]] = {}

    def of(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """The tables of a rotation."""
        if rope not in self._made:
            self._made[rope] = rope.tables(self._offsets, self._device)
        return self._made[rope]
