"""Choosing what computes attention."""

from collections.abc import Sequence

import torch

from tokendance.attention.interface import Backend, LayerKind
from tokendance.attention.torch_backend import TorchBackend

try:
    from tokendance.attention.native_backend import NativeBackend, can_serve
except ImportError as error:  # installed where there was no compiler
    WHY_NOT_NATIVE: str | None = str(error)
else:
    WHY_NOT_NATIVE = None


def make_backend(
    layers: Sequence[LayerKind], head_dim: int, device: torch.device, dtype: torch.dtype
) -> Backend:
    """Make the fastest backend for a model's layers; see `BackendFactory`."""
    if WHY_NOT_NATIVE is None and can_serve(head_dim, device, dtype):
        return NativeBackend(layers, head_dim, device, dtype)
    return TorchBackend(layers, head_dim, device, dtype)
