"""Attention on NVIDIA GPUs: vLLM's FlashAttention, and our Triton kernels where KV is shared.

A step in which nobody reads KV of others goes to FlashAttention untouched: its metadata, its call.
In a step with mirrors our kernels attend for all of its requests, with one launch a layer and one
that merges. They read vLLM's pages where they lie, whatever their layout, and each key once for the
queries of all its readers, which are turned by their offsets. FlashAttention could read a run at an
offset only from pages of its own, without gaps, which would be a copy of it for each round. vLLM
writes new keys and values by itself in both cases, before attention, where its block tables say.

vLLM replays CUDA graphs of the pieces between attention, which is a splitting operation of its
compiled model and is launched by the host in each step. So tasks, ranges and memory may be others
in each step; what graphs read (positions, `model_state.py`) lies where it was captured. A graph of
a whole step would attend as in the step that it was captured in: the plug-in switches these off.

The host waits for no device here. A step's plan is made from what the scheduler has sent, and goes
there in one copy, with the first layer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from tokendance.attention.triton_backend import TritonBackend
from tokendance.integrations.vllm import step
from tokendance.integrations.vllm.attention import number_layers, refuse_other_attention


@dataclass(kw_only=True)
class RoundMetadata(FlashAttentionMetadata):  # type: ignore[misc]
    """What layers are told of a step with mirrors.

    Attributes:
        num_rows: tokens of the step; vLLM may add others, for graphs of fixed sizes.
        backend: it has taken the step.
    """

    num_rows: int
    backend: TritonBackend


class RoundAttentionBackend(FlashAttentionBackend):  # type: ignore[misc]
    """FlashAttention, as far as vLLM goes, without KV in 8 bits."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The name of the entry of vLLM's registry that it takes."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["RoundAttentionImpl"]:
        """What attends."""
        return RoundAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["RoundMetadataBuilder"]:
        """What plans a step."""
        return RoundMetadataBuilder


class RoundMetadataBuilder(FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """Plans a step, once for all layers."""

    _cudagraph_support = AttentionCGSupport.NEVER  # of whole steps: PIECEWISE is what remains

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._backend: TritonBackend | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        """Plan the step that the runner has left, if somebody reads KV of others in it."""
        batch, step.current = step.current, None
        if batch is None or not any(request.reads_others for request in batch.requests):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self._backend is None:
            kinds = number_layers(self.vllm_config, self.layer_names)
            spec = self.kv_cache_spec
            self._backend = TritonBackend(kinds, spec.head_size, self.device, spec.dtype)
        self._backend.prepare(batch)
        # Fast: without the schedule of FlashAttention's kernel, which does not run.
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build=True)
        return RoundMetadata(**vars(metadata), num_rows=batch.num_rows, backend=self._backend)


class RoundAttentionImpl(FlashAttentionImpl):  # type: ignore[misc]
    """A layer's attention.

    Attributes:
        index: of the layer; the builder sets it.
    """

    index: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_other_attention(
            alibi_slopes=self.alibi_slopes,
            logits_soft_cap=self.logits_soft_cap,
            kv_sharing_target_layer_name=self.kv_sharing_target_layer_name,
            sinks=self.sinks,
            attn_type=self.attn_type,
        )
        self._pages: Tensor | None = None  # vLLM's, and views of them:
        self._memory: tuple[Tensor, Tensor]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend to pages that have the step's keys and values already.

        Args:
            layer: vLLM's.
            query: (tokens, H, D).
            key: (tokens, KVH, D).
            value: likewise.
            kv_cache: all pages of the layer, (pages, KVH, page size, 2 D), in any order in memory.
            attn_metadata: of the step.
            output: (tokens, H, D), written.
            output_scale: not supported, like the next.
            output_block_scale: see `output_scale`.
        """
        if not isinstance(attn_metadata, RoundMetadata):
            return super().forward(  # type: ignore[no-any-return]
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        assert output_scale is None
        assert output_block_scale is None
        n, size = attn_metadata.num_rows, self.head_size
        if kv_cache is not self._pages:
            self._pages = kv_cache
            memory = kv_cache.transpose(0, 1)
            self._memory = memory[..., :size], memory[..., size:]
        if len(query) != n:
            query, output_rows = query[:n], output[:n]
        else:
            output_rows = output
        attn_metadata.backend.read(
            self.index,
            query,
            *self._memory,
            self.scale,
            output_rows,
        )
        return output
