"""Choosing what computes attention."""

from collections.abc import Sequence

import torch

from tokendance.attention.interface import Backend, LayerKind
from tokendance.attention.reference import ReferenceBackend
from tokendance.attention.torch_backend import TorchBackend
from tokendance.config import AttentionName
from tokendance.errors import ConfigError

try:
    from tokendance.attention.native_backend import NativeBackend, can_serve
except ImportError as error:  # installed where there was no compiler
    WHY_NOT_NATIVE: str | None = str(error)
else:
    WHY_NOT_NATIVE = None


def make_backend(
    layers: Sequence[LayerKind],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    name: AttentionName = "auto",
) -> Backend:
    """Make a backend for a model's layers; see `BackendFactory`.

    Args:
        layers: rotation and window of each.
        head_dim: D.
        device: where memory lies.
        dtype: of queries and memory.
        name: of a backend; "auto" takes the fastest that can serve.

    Raises:
        ConfigError: if that backend cannot serve.
    """
    if name == "reference":
        return ReferenceBackend(layers, head_dim, device, dtype)
    if name == "triton":
        return _triton_backend(layers, head_dim, device, dtype)
    served = native_is_there() and can_serve(head_dim, device, dtype)
    if name == "native" and not served:
        raise ConfigError(
            "The native attention kernel cannot be used: "
            + (WHY_NOT_NATIVE or f"it has none for heads of {head_dim} in {dtype} on {device}.")
            + " Use attention='auto'; `tokendance doctor` says what is there."
        )
    if name == "torch" or not served:
        return TorchBackend(layers, head_dim, device, dtype)
    return NativeBackend(layers, head_dim, device, dtype)


def _triton_backend(
    layers: Sequence[LayerKind], head_dim: int, device: torch.device, dtype: torch.dtype
) -> Backend:
    refused = "Triton's attention cannot be used"
    try:
        from tokendance.attention import triton_backend
    except ImportError as error:
        raise ConfigError(f"{refused}: {error}. Install triton, or use attention='auto'.") from None
    if device.type != "cuda" or not triton_backend.can_serve(head_dim, dtype):
        raise ConfigError(
            f"{refused}: it has no kernel for heads of {head_dim} in {dtype} on {device}. "
            "Use attention='auto'."
        )
    return triton_backend.TritonBackend(layers, head_dim, device, dtype)


def native_is_there() -> bool:
    """Whether the native kernel was built with the package."""
    return WHY_NOT_NATIVE is None
