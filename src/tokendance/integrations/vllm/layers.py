"""How the attention layers of a vLLM model rotate, and which windows they have."""

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from tokendance.attention.interface import LayerKind
from tokendance.attention.rope import Rope, RopeLayout


def find_layer_kinds(model: nn.Module) -> dict[str, LayerKind]:
    """Rotation and window of each attention layer, by vLLM's name of it.

    A layer's rotation is that of its sibling in the same module, which all of vLLM's models that
    rotate name `rotary_emb`. A layer without one has no entry.
    """
    kinds: dict[str, LayerKind] = {}
    for module in model.modules():
        rotary = getattr(module, "rotary_emb", None)
        attention = getattr(module, "attn", None)
        if rotary is None or not isinstance(attention, Attention):
            continue
        layout = RopeLayout.HALVES if rotary.is_neox_style else RopeLayout.INTERLEAVED
        rope = Rope(rotary._compute_inv_freq(rotary.base).float().cpu(), layout)
        # One object for all layers that rotate alike: its tables are made once a step.
        known = (kind.rope for kind in kinds.values() if _are_equal(kind.rope, rope))
        window = getattr(attention, "sliding_window", None)
        kinds[attention.layer_name] = LayerKind(next(known, rope), window)
    return kinds


def _are_equal(one: Rope, other: Rope) -> bool:
    return one.layout is other.layout and torch.equal(one.inv_freq, other.inv_freq)
