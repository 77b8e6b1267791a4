"""Choosing what computes attention."""

from collections.abc import Sequence

import torch

from tokendance.attention.interface import Backend, LayerKind
from tokendance.attention.names import AttentionName
from tokendance.attention.reference import ReferenceBackend
from tokendance.attention.torch_backend import TorchBackend
from tokendance.errors import ConfigError

try:
    from tokendance.attention import native_backend
except ImportError as error:  # installed where there was no compiler
    WHY_NOT_NATIVE: str | None = str(error)
else:
    WHY_NOT_NATIVE = None

# Lowest compute capability for which the Triton kernels are compiled in tests.
_MIN_CAPABILITY = (8, 0)


def make_backend(
    layers: Sequence[LayerKind],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    name: AttentionName = "auto",
) -> Backend:
    """Make a backend for a model's layers; see `BackendFactory`.

    The name "auto" takes the first of native, triton and torch that can serve.

    Raises:
        ConfigError: if that backend cannot serve.
    """
    if name in ("auto", "native"):
        reason = _why_not_native(head_dim, device, dtype)
        if reason is None:
            return native_backend.NativeBackend(layers, head_dim, device, dtype)
        if name == "native":
            raise ConfigError(
                f"The native attention kernel cannot be used: {reason} Use attention='auto'; "
                "`tokendance doctor` says what is there."
            )
    if name in ("auto", "triton"):
        reason = _why_not_triton(head_dim, device, dtype)
        if reason is None:
            from tokendance.attention.triton_backend import TritonBackend

            return TritonBackend(layers, head_dim, device, dtype)
        if name == "triton":
            raise ConfigError(f"Triton's attention cannot be used: {reason} Use attention='auto'.")
    factory = ReferenceBackend if name == "reference" else TorchBackend
    return factory(layers, head_dim, device, dtype)


def _why_not_native(head_dim: int, device: torch.device, dtype: torch.dtype) -> str | None:
    if WHY_NOT_NATIVE is not None:
        return f"{WHY_NOT_NATIVE}."
    if not native_backend.can_serve(head_dim, device, dtype):
        return f"it has none for heads of {head_dim} in {dtype} on {device}."
    return None


def _why_not_triton(head_dim: int, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it is for GPUs, not for {device}."
    try:
        from tokendance.attention import triton_backend
    except ImportError as error:
        return f"{error}. Install triton."
    if not triton_backend.can_serve(head_dim, dtype):
        return f"it has no kernel for heads of {head_dim} in {dtype}."
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return "its kernels are for NVIDIA GPUs of compute capability 8.0 or higher."
    return None


def as_native(backend: Backend) -> "native_backend.NativeBackend | None":
    """The native backend, if it is one."""
    if native_is_there() and isinstance(backend, native_backend.NativeBackend):
        return backend
    return None


def native_is_there() -> bool:
    """Whether the native kernel was built with the package."""
    return WHY_NOT_NATIVE is None
