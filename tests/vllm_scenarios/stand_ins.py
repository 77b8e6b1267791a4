"""What a machine without a GPU lacks, for vLLM to be run as if it were one."""

import itertools
import sys
import types
from collections import Counter
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

capability = 90
"""Compute capability of the GPU that vLLM finds, times 10."""

attended: Counter[str] = Counter()
"""Calls of FlashAttention, by the kind of its metadata; and steps that our kernels took."""


def triton_driver() -> None:
    """vLLM looks for a driver of Triton, and there is none for CPUs: kernels are interpreted."""
    import triton.backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)


def cuda_platform() -> None:
    """Have vLLM find an NVIDIA GPU from now on: what it has imported took the machine for a CPU."""
    sys.modules.setdefault("vllm._C_stable_libtorch", types.ModuleType("vllm._C_stable_libtorch"))
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Cuda(CudaPlatformBase):  # type: ignore[misc]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            del device_id
            return DeviceCapability(*divmod(capability, 10))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"GPU {device_id}"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            del device_id
            return 80 * 2**30

        @classmethod
        def device_count(cls) -> int:
            return 1

    cpu, gpu = vllm.platforms.current_platform, Cuda()
    vllm.platforms._current_platform = gpu
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get("current_platform") is cpu:
            names["current_platform"] = gpu


def flash_attention() -> None:
    """FlashAttention in plain torch; and the CPU's worker attends by the GPU's backend."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from tokendance.attention.triton_backend import TritonBackend

    import_module("tokendance.integrations.vllm.cpu_worker")  # it registers its own
    FlashAttentionImpl.forward = _forward
    FlashAttentionImpl.do_kv_cache_update = _update
    prepare = TritonBackend.prepare

    def count(backend: TritonBackend, batch: Any) -> None:
        attended["ours"] += 1
        prepare(backend, batch)

    TritonBackend.prepare = count  # type: ignore[method-assign, assignment]
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.GPUsOnCPU")


def _forward(
    impl: Any,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    metadata: Any,
    output: Tensor,
    *_: Any,
) -> Tensor:
    del layer, key, value
    if metadata is None:
        return output.fill_(0)
    attended[type(metadata).__name__] += 1
    group = impl.num_heads // impl.num_kv_heads
    starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    for index, (begin, end) in enumerate(itertools.pairwise(starts)):
        pages = metadata.block_table[index, : -(-lengths[index] // kv_cache.shape[2])].long()
        memory = kv_cache[pages].transpose(0, 1).flatten(1, 2)[:, : lengths[index]]
        keys, values = memory.repeat_interleave(group, 0).chunk(2, dim=-1)
        position = torch.arange(lengths[index])
        output[begin:end] = torch.nn.functional.scaled_dot_product_attention(
            query[begin:end].transpose(0, 1),
            keys,
            values,
            attn_mask=position <= position[lengths[index] - (end - begin) :, None],
            scale=impl.scale,
        ).transpose(0, 1)
    return output


def _update(
    impl: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
) -> None:
    del impl, layer
    rows = torch.nonzero(slots >= 0).flatten()  # others fill a graph
    pages, places = slots[rows] // kv_cache.shape[2], slots[rows] % kv_cache.shape[2]
    kv_cache[pages, :, places] = torch.cat((key[rows], value[rows]), dim=-1)


def __getattr__(name: str) -> Any:
    # Made when vLLM asks for it: the classes of vLLM cannot be loaded before all is in its place.
    if name != "GPUsOnCPU":
        raise AttributeError(name)
    from tokendance.integrations.vllm.cuda_attention import RoundAttentionBackend

    class GPUsOnCPU(RoundAttentionBackend):
        @staticmethod
        def get_name() -> str:
            return "CPU_ATTN"

    return GPUsOnCPU
