"""Where we enter a model: the attention function registered with transformers.

A model calls it in each layer with that layer's rotated queries and keys. It passes them on to
whatever `LayerHook` the forward call was given as the keyword argument `tokendance`. A fused layer
(`models/fused.py`) calls that hook itself.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

if TYPE_CHECKING:  # it may not be built
    from tokendance.attention.native_backend import Place

ATTENTION_NAME = "tokendance"


class LayerHook(Protocol):
    """Stands in for the attention of every layer during one forward call."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        """Attend in one layer.

        Args:
            layer: index of the layer.
            query: (T, H, D), rotated; like the next, in any layout whose D is contiguous.
            key: (T, KVH, D), rotated.
            value: (T, KVH, D).
            scale: of the scores.
            extra: keyword arguments of the model's own making, such as a sliding window.

        Returns:
            (T, H, D).
        """

    def place(self, layer: int) -> "Place | None":
        """Where native code finds what a layer attends to; None: `attend` has to be called.

        Native code then computes all of the layer: it writes the new keys and values, too, and
        neither `attend` nor the layer's parts are called. The plan is that of the pass's rows.
        """
        del layer
        return None


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of N texts of a length, each to itself, by torch's own means.

    Args:
        query: (N, T, H, D), rotated.
        key: (N, T, KVH, D), rotated.
        value: likewise.
        scale: of the scores.
        window: a token sees so many, itself included; None: all before it.

    Returns:
        (N, T, H, D).
    """
    length = query.shape[1]
    mask = None
    if window is not None and window < length:
        at = torch.arange(length, device=query.device)
        distance = at[:, None] - at
        mask = (distance >= 0) & (distance < window)
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    output: Tensor = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2)


class PlainAttention(LayerHook):
    """A `LayerHook` for one text, in plain torch; no layer has a window."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        """See `LayerHook`."""
        del layer, extra
        return attend_plainly(query[None], key[None], value[None], scale)[0]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tokendance: LayerHook | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form that transformers calls."""
    del attention_mask, dropout
    if tokendance is None:
        raise RuntimeError("the model dropped the keyword argument 'tokendance' on its way")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    output = tokendance.attend(int(module.layer_idx), query, key, value, scale, extra)  # type: ignore[arg-type]
    return output.unsqueeze(0), None


def _no_mask(*args: object, **kwargs: object) -> None:
    """Mask function in the form that transformers calls: the plan knows who sees what."""
    del args, kwargs


def register() -> None:
    """Make the attention function known to transformers. May be called many times."""
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def forward(
    model: nn.Module, token_ids: Tensor, positions: Tensor, logit_rows: Tensor, hook: LayerHook
) -> Tensor:
    """Run a packed batch through a model.

    Args:
        model: a causal language model loaded with the attention `ATTENTION_NAME`.
        token_ids: int64 (T,).
        positions: int64 (T,).
        logit_rows: int64 (R,), the rows whose logits are wanted.
        hook: what attends.

    Returns:
        Logits (R, vocabulary), in the model's dtype.
    """
    with torch.inference_mode():
        result = model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logit_rows,
            tokendance=hook,
        )
    logits: Tensor = result.logits[0]
    return logits
