"""Which models the arithmetic of shared attention holds for.

It needs keys whose only trace of position is a rotation by fixed frequencies, and a plain softmax
over all earlier tokens or those within a window; both may differ from layer to layer. A model's
configuration says most of it; what it does not say is found by a probe: with attention switched
off, a token's query in any layer depends on the token and its position alone, so the queries of one
token at two positions must differ by exactly the rotation that we would apply.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokendance.attention.interface import LayerKind
from tokendance.attention.rope import Rope, RopeLayout
from tokendance.errors import UnsupportedModelError
from tokendance.models import hook

# Fixed frequencies: rotations add up. "longrope" is fixed below its original context length.
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
# What configurations of models with a state in place of a KV cache have.
_STATE_SPACE = (
    "mamba_d_state",
    "ssm_state_size",
    "state_size",
    "conv_kernel",
    "layers_block_type",
)
# So far that sets of frequencies differ that are alike but for their lowest, and not so far that
# single precision would not do; a prime, so that no rotation is whole turns.
_PROBE_OFFSET = 2003
# What a model may hand to attention without changing the arithmetic.
_HARMLESS_EXTRAS = {
    "position_ids",
    "use_cache",
    "is_causal",
    "output_attentions",
    "cache_position",
    "position_embeddings",
    "output_router_logits",
    "sliding_window",  # is attended to
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the engine needs to know of a model."""

    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # KVH
    head_dim: int  # D
    vocab_size: int  # number of logits
    max_context: int  # positions that the model was made for

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


def why_unsupported(config: Any) -> str | None:
    """Say from its configuration why a model cannot be used; None if nothing speaks against it."""
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model, and only decoders are served"
    if getattr(config, "text_config", None) is not None:
        return "it is a model of several modalities, and only text models are served"
    layer_types = set(getattr(config, "layer_types", None) or ())
    hybrid = layer_types - {"full_attention", "sliding_attention"}
    state_space = [name for name in _STATE_SPACE if getattr(config, name, None) is not None]
    if hybrid or state_space:
        which = ", ".join(sorted(hybrid) or state_space)
        return f"it has layers without a KV cache ({which}), which cannot be shared in place"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "it uses multi-head latent attention (MLA), whose cache holds no rotated keys"
    if getattr(config, "use_bidirectional_attention", False):
        return "its tokens attend to later ones, so nothing before them can be kept"
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return "it has no rotary position embedding (RoPE), so cached keys cannot change position"
    for kind in _rope_kinds(rope):
        if kind["rope_type"] not in _FIXED_ROPE_TYPES:
            return (
                f"its rotation ({kind['rope_type']}) changes with the length of the text, "
                "so rotations do not add up"
            )
    return None


def _rope_kinds(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """Rotations in a configuration: one, or one for each type of layer."""
    return [rope] if "rope_type" in rope else [kind for kind in rope.values() if kind]


def max_context(config: Any) -> int:
    """Positions that a model was made for, with one set of frequencies."""
    length = int(config.max_position_embeddings)
    for kind in _rope_kinds(config.rope_parameters):
        if kind["rope_type"] == "longrope":
            length = min(length, int(kind.get("original_max_position_embeddings", length)))
    return length


@dataclass(slots=True)
class _Probe(hook.LayerHook):
    """Records each layer's queries, keys and window, and answers zero."""

    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    extras: set[str] = field(default_factory=set)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        """See `hook.LayerHook`."""
        del scale
        self.queries[layer] = query.transpose(0, 1)
        self.keys[layer] = key.transpose(0, 1)
        self.windows[layer] = extra.get("sliding_window")
        self.extras |= {name for name, value in extra.items() if value is not None}
        return query.new_zeros(*query.shape[:2], value.shape[-1])


def probe(model: nn.Module, config: Any) -> tuple[ModelShape, tuple[LayerKind, ...]]:
    """Run two tokens through a model to see whether its arithmetic is the one we need.

    It is loaded with the attention `hook.ATTENTION_NAME`.

    Raises:
        UnsupportedModelError: with the reason.
    """
    device = next(model.parameters()).device
    recorder = _Probe()
    token = min(100, config.vocab_size - 1)
    try:
        logits = hook.forward(
            model,
            torch.tensor([token, token], device=device),
            torch.tensor([0, _probe_offset(config)], device=device),
            torch.tensor([1], device=device),
            recorder,
        )
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise refusal(f"its attention cannot be replaced ({error})") from error
    odd = sorted(recorder.extras - _HARMLESS_EXTRAS)
    if odd:
        raise refusal(f"its attention takes {', '.join(odd)}, which is not built yet")
    num_layers = int(config.num_hidden_layers)
    if sorted(recorder.keys) != list(range(num_layers)):
        raise refusal(
            f"attention can be replaced in only {len(recorder.keys)} of its {num_layers} layers"
        )
    shapes = {(*recorder.queries[i].shape, *recorder.keys[i].shape) for i in recorder.keys}
    if len(shapes) > 1:
        raise refusal("its layers have heads of different shapes")
    heads, _, head_dim, kv_heads, _, _ = shapes.pop()
    layers = _layers(model, config, recorder)
    return ModelShape(
        num_layers, heads, kv_heads, head_dim, int(logits.shape[-1]), max_context(config)
    ), layers


def _probe_offset(config: Any) -> int:
    return max(1, min(_PROBE_OFFSET, max_context(config) - 1))


def _layers(model: nn.Module, config: Any, recorder: _Probe) -> tuple[LayerKind, ...]:
    """What each layer has of its own; layers that are alike share one object."""
    offset = np.array([_probe_offset(config)])
    device = recorder.queries[0].device
    ropes = [(rope, rope.tables(offset, device)) for rope in _ropes(model)]
    kinds: dict[tuple[int, int | None], LayerKind] = {}
    layers = []
    for layer in sorted(recorder.queries):
        window = recorder.windows[layer]
        if window != _declared_window(config, layer):
            raise refusal(f"layer {layer} does not say which tokens its window hides")
        heads = (recorder.queries[layer], recorder.keys[layer])
        # The nearest: sets of frequencies may be alike but for the lowest.
        residuals = [max(_residual(part, *rope) for part in heads) for rope in ropes]
        index = int(np.argmin(residuals))
        # Rounding of the model's own dtype is allowed; another rotation is far beyond it.
        if residuals[index] > (1e-3 if heads[0].dtype == torch.float32 else 0.05):
            raise refusal("its queries and keys do not turn with position as RoPE says")
        layers.append(kinds.setdefault((index, window), LayerKind(ropes[index][0], window)))
    return tuple(layers)


def _declared_window(config: Any, layer: int) -> int | None:
    """The window of a layer, as the configuration has it."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer] != "sliding_attention":
        return None
    return int(window)


def _ropes(model: nn.Module) -> list[Rope]:
    """Rotations that a model's layers may have: its sets of frequencies, in each layout.

    They are kept on the CPU, where each step makes its tables: reading them from a GPU would wait
    for all that it has been given to do.
    """
    frequencies: list[Tensor] = []
    for name, buffer in model.named_buffers():
        own_name = name.rpartition(".")[2]
        # Of models that change frequencies with length, "original" keeps those of short texts.
        if not own_name.endswith("inv_freq") or "original" in own_name:
            continue
        if not any(torch.equal(buffer, other) for other in frequencies):
            frequencies.append(buffer)
    if not frequencies:
        raise refusal("no rotary frequencies were found in it")
    frequencies = [inv_freq.float().cpu() for inv_freq in frequencies]
    return [Rope(inv_freq, layout) for inv_freq in frequencies for layout in RopeLayout]


def _residual(heads: Tensor, rope: Rope, tables: tuple[Tensor, Tensor]) -> float:
    """How far the second token's heads (..., 2, D) are from the first's, rotated.

    In parts of the way from one to the other; infinite where the rotation is of other heads.
    """
    first, second = heads[:, :1].float(), heads[:, 1:].float()
    if not second.isfinite().all():
        return 0.0  # the numbers are wrong, not the rotation; runs report it
    moved = float((first - second).norm())
    if 2 * len(rope.inv_freq) > heads.shape[-1] or moved == 0:
        return math.inf
    return float((rope.rotate(first, tables) - second).norm()) / moved


def refusal(reason: str) -> UnsupportedModelError:
    """Make the error for a model that cannot be served."""
    return UnsupportedModelError(
        f"This model cannot be served: {reason}. "
        "Choose a decoder with plain RoPE, such as Llama, Qwen2, Qwen3, Mistral, Gemma 3 or Phi-3."
    )
