"""vLLM's attention by our kernels, over vLLM's pages, where they lie.

A page is laid out with tokens outermost: keys and values of a token side by side, head by head. So
the slots of all pages have one stride, and vLLM's copies of whole blocks still work.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from tokendance.attention.backends import make_backend
from tokendance.attention.interface import Backend, LayerKind
from tokendance.errors import UnsupportedModelError
from tokendance.integrations.vllm import step


@dataclass(slots=True, eq=False)
class Metadata:
    """What layers are told of a step."""

    num_actual_tokens: int
    backend: Backend | None  # None: a warm-up, which attends to nothing


class SharedInPlaceBackend(AttentionBackend):  # type: ignore[misc]
    """Tells vLLM what our kernels can do; on a CPU it stands in for vLLM's own, of its name."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """The name of the entry of vLLM's registry that it takes."""
        return "CPU_ATTN"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Any, as far as vLLM goes."""
        del kv_cache_spec
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Multiples of 16 up to 256."""
        return list(range(16, 257, 16))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks outermost; what is inside of them is ours."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """A window is a bound on what a row sees."""
        return True

    @staticmethod
    def get_impl_cls() -> type["SharedInPlaceImpl"]:
        """What attends."""
        return SharedInPlaceImpl

    @staticmethod
    def get_builder_cls() -> type["MetadataBuilder"]:
        """What plans a step."""
        return MetadataBuilder


def number_layers(vllm_config: Any, names: list[str]) -> list[LayerKind]:
    """Tell each layer's attention its index, and find what kinds of layers these are.

    Raises:
        UnsupportedModelError: if there are layers that do not rotate, or that vLLM plans apart.
    """
    if set(names) != set(step.layer_kinds):
        raise UnsupportedModelError(
            "TokenDance serves models whose layers all attend alike, and rotate what they attend "
            f"to: vLLM plans {len(names)} layers at once, and {len(step.layer_kinds)} rotate. "
            "Start vLLM without TOKENDANCE=1."
        )
    context = vllm_config.compilation_config.static_forward_context
    for index, name in enumerate(names):
        context[name].impl.index = index
    return [step.layer_kinds[name] for name in names]


def refuse_other_attention(
    *,
    alibi_slopes: object,
    logits_soft_cap: float | None,
    kv_sharing_target_layer_name: str | None,
    sinks: object,
    attn_type: str,
) -> None:
    """Refuse layers that do not attend as our kernels do, whatever vLLM asks an `AttentionImpl`.

    Raises:
        NotImplementedError: says what it is.
    """
    refused = {
        "ALiBi": alibi_slopes is not None,
        "a soft cap of its logits": bool(logits_soft_cap),
        "KV that layers share": kv_sharing_target_layer_name is not None,
        "attention sinks": sinks is not None,
        f"attention of the kind {attn_type}": attn_type != AttentionType.DECODER,
    }
    for what, is_there in refused.items():
        if is_there:
            raise NotImplementedError(
                f"TokenDance serves no model with {what}. Start vLLM without TOKENDANCE=1."
            )


class MetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Plans a step, once for all layers."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._layer_names = layer_names
        self._backend: Backend | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        """Plan the step that the runner has left."""
        del common_prefix_len, fast_build
        batch, step.current = step.current, None
        num_tokens = common_attn_metadata.num_actual_tokens
        if batch is None:
            return Metadata(num_tokens, None)
        assert batch.num_rows == num_tokens, "a step has other tokens than its requests"
        if self._backend is None:
            kinds = number_layers(self.vllm_config, self._layer_names)
            spec = self.kv_cache_spec
            self._backend = make_backend(kinds, spec.head_size, self.device, spec.dtype, "auto")
        self._backend.prepare(batch)
        return Metadata(num_tokens, self._backend)


class SharedInPlaceImpl(AttentionImpl):  # type: ignore[misc]
    """A layer's attention.

    Attributes:
        index: of the layer; the builder sets it.
    """

    index: int

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **_: Any,
    ) -> None:
        refuse_other_attention(
            alibi_slopes=alibi_slopes,
            logits_soft_cap=logits_soft_cap,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            sinks=sinks,
            attn_type=attn_type,
        )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, float(scale)
        self.kv_cache_dtype, self.sliding_window = kv_cache_dtype, sliding_window
        self._pages: Tensor | None = None  # vLLM's, and views of them:
        self._memory: tuple[Tensor, Tensor]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys and values into their slots, and attend.

        Args:
            layer: vLLM's.
            query: (tokens, H, D).
            key: (tokens, KVH, D).
            value: likewise.
            kv_cache: all pages of the layer.
            attn_metadata: of the step.
            output: (tokens, H D), written.
            output_scale: not supported, like the next.
            output_block_scale: see `output_scale`.
        """
        del layer
        assert output_scale is None
        assert output_block_scale is None
        if attn_metadata is None or attn_metadata.backend is None:
            return output
        n, heads, size = attn_metadata.num_actual_tokens, self.num_kv_heads, self.head_size
        if kv_cache is not self._pages:
            self._pages = kv_cache
            memory = kv_cache.view(-1, heads, 2 * size).transpose(0, 1)
            self._memory = memory[..., :size], memory[..., size:]
        if len(query) != n:
            query, key, value, output = query[:n], key[:n], value[:n], output[:n]
        attn_metadata.backend.attend(
            self.index,
            query,
            key,
            value,
            *self._memory,
            self.scale,
            output.view(n, -1, size),
        )
        return output
