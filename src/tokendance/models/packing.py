"""Linear layers whose weights lie as oneDNN wants them.

On a CPU, torch hands the weight of a linear layer to oneDNN or MKL as it is, and each call pays for
that: measured on SmolLM2's shapes, packing them once makes bfloat16 products of 10 rows about 2
times faster, and float32 products of 1024 rows about 1.6 times (docs/log.md). It is what
torch.compile does to frozen weights; the operations are torch's own.
"""

import os

import torch
from torch import Tensor, nn

# For each number of rows that a layer has ever had, oneDNN and torch keep what they have prepared,
# 2 to 20 MiB for the layers of SmolLM2, up to 1024 things each. Prompts have all lengths, so a
# server grew by gigabytes. Preparing anew takes 3 ms a step.
_KEPT = "128"
_HOW_MANY_ARE_KEPT = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")

# Packing is made for a number of rows; this one was best over 1 to 1024 rows.
_ROWS_HINT = 1024


class PackedLinear(nn.Module):
    """A linear layer for inference, with its weight in oneDNN's own layout."""

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


def pack_linear_layers(model: nn.Module) -> int:
    """Replace the linear layers of a model on a CPU, where torch can; return how many."""
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return 0
    for variable in _HOW_MANY_ARE_KEPT:  # read when the first layer is packed
        os.environ.setdefault(variable, _KEPT)
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and _can_pack(child.weight):
                setattr(module, name, PackedLinear(child))
                count += 1
    return count


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights that a model holds."""
    parameters = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    packed = (module.nbytes for module in model.modules() if isinstance(module, PackedLinear))
    return sum(parameters.values()) + sum(packed)


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
