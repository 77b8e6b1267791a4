"""vLLM's CPU worker with rounds, and its V1 model runner with true positions.

The V2 runner gets them from `model_state.py`.
"""

from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from tokendance.integrations.vllm import step
from tokendance.integrations.vllm.contexts import Contexts
from tokendance.integrations.vllm.layers import find_layer_kinds
from tokendance.integrations.vllm.worker import RoundWorkerMixin

# The CPU platform knows one backend only, by this name. Whoever imports this file attends by ours.
register_backend(
    AttentionBackendEnum.CPU_ATTN, "tokendance.integrations.vllm.attention.SharedInPlaceBackend"
)


class RoundModelRunner(CPUModelRunner):  # type: ignore[misc]
    """The V1 runner with contexts beside its block tables."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load it, and find how its layers rotate."""
        super().load_model(*args, **kwargs)
        step.layer_kinds = find_layer_kinds(self.model)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """Allocate it, and an entry for each of its slots."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        (group,) = kv_cache_config.kv_cache_groups
        self._contexts = Contexts(kv_cache_config.num_blocks, group.kv_cache_spec.block_size)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        contexts = self._contexts
        contexts.forget(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            contexts.begin(new.req_id, getattr(new, "tokendance_reads", None))
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            contexts.restart(request_id)
        for request_id, token_ids in getattr(scheduler_output, "tokendance_whole", {}).items():
            contexts.begin(request_id, None)
            state = self.requests[request_id]
            state.prompt_token_ids, state.num_prompt_tokens = token_ids, len(token_ids)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> Any:
        # vLLM takes positions for numbers of tokens while it computes slots and lengths ...
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        taken = self._contexts.take(
            batch.req_ids,
            batch.num_computed_tokens_cpu[: batch.num_reqs],
            num_scheduled_tokens,
            batch.block_table[0].block_table.np,
            np.arange(batch.num_reqs),
        )
        # ... and they are true when it rotates. Drafts may reach beyond the context's end, which
        # vLLM counts from the own tokens; nobody takes them.
        if len(taken.rows):
            positions = np.minimum(taken.positions, self.max_model_len - 1)
            self.positions[torch.from_numpy(taken.rows)] = torch.from_numpy(positions)
        step.current = taken.batch
        return result


class RoundWorker(RoundWorkerMixin, CPUWorker):  # type: ignore[misc]
    """The CPU worker with that runner, or with the V2 runner."""

    def init_device(self) -> None:
        """Make the runner."""
        super().init_device()
        if type(self.model_runner) is CPUModelRunner:
            self.model_runner.__class__ = RoundModelRunner
