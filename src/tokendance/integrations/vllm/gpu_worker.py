"""vLLM's GPU worker with rounds, for the V2 model runner."""

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from tokendance.integrations.vllm.worker import RoundWorkerMixin

# Whoever imports this file attends by ours, if the plug-in has chosen it.
register_backend(
    AttentionBackendEnum.CUSTOM,
    "tokendance.integrations.vllm.cuda_attention.RoundAttentionBackend",
)

# A row of a step has a result for each read group that it is in, rarely more than these.
_RESULTS_PER_ROW = 4


def bytes_of_results(config: Any) -> int:
    """Memory for the results that our kernels merge, in a step as large as vLLM allows.

    Args:
        config: a `vllm.config.VllmConfig`, complete.
    """
    model = config.model_config
    heads = model.get_num_attention_heads(config.parallel_config)
    rows = config.scheduler_config.max_num_batched_tokens
    floats = heads * (model.get_head_size() + 1)  # and a log-sum-exp
    return int(4 * floats * rows * _RESULTS_PER_ROW)


class RoundWorker(RoundWorkerMixin, Worker):  # type: ignore[misc]
    """The worker, which leaves memory for our kernels."""

    def determine_available_memory(self) -> int:
        """Bytes for KV; see vLLM's, which measures a step without mirrors."""
        available = int(super().determine_available_memory())
        if self.cache_config.kv_cache_memory_bytes is not None:  # said by the user
            return available
        return available - bytes_of_results(self.vllm_config)
