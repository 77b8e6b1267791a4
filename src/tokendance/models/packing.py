"""Linear layers whose weights are laid out once, for the products of inference.

On a CPU torch hands the weight of a linear layer to oneDNN or MKL as it is, and each call pays for
that. Where this machine multiplies pairs of bfloat16, our own kernel does (`native/products.cpp`):
with SmolLM2's shapes on 2 cores of Zen 4 it takes 0.5 of oneDNN's time for 1 row, 0.65 for 10, 0.85
for 32, and 0.97 to 1 for 512 and more (docs/log.md); and what a row gives does not depend on the
rows beside it. Where there are AMX tiles, which are faster still for many rows, and else, a layer
is oneDNN's, packed: that makes bfloat16 products of 10 rows about 2 times faster than plain ones,
and float32 products of 1024 rows about 1.6 times. It is what torch.compile does to frozen weights.

Weights may also be kept in bytes, with a scale for each 64 inputs of an output; rows are then
rounded likewise while they are multiplied.
"""

import itertools
import os

import torch
from torch import Tensor, nn

from tokendance.attention.backends import native_is_there
from tokendance.errors import ConfigError
from tokendance.memory import empty_in_huge_pages
from tokendance.options import Weights

# For each number of rows that a layer has ever had, oneDNN and torch keep what they have prepared,
# 2 to 20 MiB for the layers of SmolLM2, up to 1024 things each. Prompts have all lengths, so a
# server grew by gigabytes. Preparing anew takes 3 ms a step.
_KEPT = "128"
_HOW_MANY_ARE_KEPT = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")

# Packing is made for a number of rows; this one was best over 1 to 1024 rows.
_ROWS_HINT = 1024


class OneDNNLinear(nn.Module):
    """A linear layer with its weight in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)
        self._bias = None if linear.bias is None else linear.bias.detach()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return int(self._packed.element_size()) * self.in_features * self.out_features

    def forward(self, rows: Tensor) -> Tensor:
        """Multiply (..., in_features) rows."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._packed, self._bias, "none", [], ""
        )
        return result


class NativeLinear(nn.Module):
    """A linear layer of our own kernel; its weight is in bfloat16, or in bytes."""

    def __init__(self, linear: nn.Linear, kernel: str, kind: str, memory: Tensor) -> None:
        """Pack a weight, on the CPU.

        Args:
            linear: of float32 or bfloat16.
            kernel: one of `_native.kernels()`.
            kind: how the weight is kept: "bfloat16" or "int8".
            memory: uint8, aligned to 64 bytes; as many bytes as `_native.packed_bytes` says.
        """
        from tokendance.attention import _native

        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.nbytes = memory.nbytes
        bias = None if linear.bias is None else linear.bias.detach().float()
        weight = linear.weight.detach().contiguous()
        self.packed = _native.PackedWeights(kernel, kind, weight, bias, memory)

    def forward(self, rows: Tensor) -> Tensor:
        """Multiply (..., in_features) rows, of float32 or bfloat16."""
        flat = rows.reshape(-1, self.in_features).contiguous()
        output = flat.new_empty(len(flat), self.out_features)
        self.packed.multiply(flat, output, torch.get_num_threads())
        return output.view(*rows.shape[:-1], self.out_features)


def pack_linear_layers(model: nn.Module, weights: Weights = "native") -> int:
    """Replace the linear layers of a model on a CPU, where that is faster; return how many.

    With weights "int8" all of them are replaced.

    Raises:
        ConfigError: if they cannot be kept in bytes here.
    """
    count = 0
    if weights == "int8":
        _require_bytes(model)
    if native_is_there():
        count += _pack_for_kernel(model, "int8" if weights == "int8" else "bfloat16")
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        count += _pack_for_onednn(model)
    return count


def _pack_for_kernel(model: nn.Module, kind: str) -> int:
    from tokendance.attention import _native

    kernel = _native.kernels()[0]
    layers = [
        (parent, name, layer)
        for parent, name, layer in _linear_layers(model)
        if kind == "int8" or _is_better(kernel, layer)
    ]
    sizes = [
        _native.packed_bytes(kernel, kind, layer.in_features, layer.out_features)
        for _, _, layer in layers
    ]
    if layers:
        # One piece for all: of pages of 2 MB, those of small layers would be half empty.
        memory = empty_in_huge_pages((sum(sizes),), torch.uint8, torch.device("cpu"))
        ends = itertools.accumulate(sizes)
        for (parent, name, layer), size, end in zip(layers, sizes, ends, strict=True):
            part = memory[end - size : end]
            setattr(parent, name, NativeLinear(layer, kernel, kind, part))
    return len(layers)


def _is_better(kernel: str, layer: nn.Linear) -> bool:
    """Whether our kernel multiplies a layer in its own dtype, and oneDNN has no better means."""
    from tokendance.attention import _native

    has_tiles: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    is_half = layer.weight.dtype == torch.bfloat16
    return is_half and not has_tiles and _native.has_pairs(kernel, layer.in_features)


def _pack_for_onednn(model: nn.Module) -> int:
    for variable in _HOW_MANY_ARE_KEPT:  # read when the first layer is packed
        os.environ.setdefault(variable, _KEPT)
    layers = list(_linear_layers(model))
    for parent, name, layer in layers:
        setattr(parent, name, OneDNNLinear(layer))
    return len(layers)


def _linear_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Plain linear layers that can be packed, each with its parent and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and _can_pack(child.weight)
    ]


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


def _require_bytes(model: nn.Module) -> None:
    """Refuse weights in bytes where our kernel cannot multiply them."""
    if not native_is_there():
        raise ConfigError(
            "Weights in int8 are multiplied by the native kernel, which is not there (tokendance "
            "doctor says why). Leave weights (--weights) out."
        )
    weight = next(model.parameters())
    if not _can_pack(weight):
        raise ConfigError(
            "Weights in int8 are for the CPU and a dtype of float32 or bfloat16, not for "
            f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}. Leave weights "
            "(--weights) out, or --dtype and --device."
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights that a model holds."""
    parameters = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    packed = (
        module.nbytes
        for module in model.modules()
        if isinstance(module, OneDNNLinear | NativeLinear)
    )
    return sum(parameters.values()) + sum(packed)
