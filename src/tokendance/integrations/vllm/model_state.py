"""The V2 model runner's state of its requests, with true positions and contexts.

The V2 runner asks a `ModelState` for whatever a model needs beside token ids. Ours gives the
positions, and leaves the step for attention (`step.py`), in the hook that is called with real steps
only. All on the host: what a step reads is known from numbers that the scheduler has sent, so no
device is waited for.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu import model_states
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from tokendance.integrations.vllm import step
from tokendance.integrations.vllm.contexts import Contexts
from tokendance.integrations.vllm.layers import find_layer_kinds


class RoundModelState(DefaultModelState):  # type: ignore[misc]
    """The state of requests that may read KV of others."""

    def __init__(self, vllm_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, model, *args, **kwargs)
        step.layer_kinds = find_layer_kinds(model)
        # One tensor for all steps: CUDA graphs read it where it lay when they were captured.
        self._positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=self.device)
        self._true: tuple[Tensor, Tensor] | None = None  # rows of mirrors, and their positions

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Allocate an entry for each slot; see vLLM's."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        (group,) = kv_cache_config.kv_cache_groups
        self._contexts = Contexts(kv_cache_config.num_blocks, group.kv_cache_spec.block_size)
        self._tables = _HostTables(block_tables)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Begin a request, also one that was preempted."""
        super().add_request(req_index, new_req_data)
        self._contexts.begin(new_req_data.req_id, getattr(new_req_data, "tokendance_reads", None))

    def remove_request(self, req_id: str) -> None:
        """Drop one."""
        super().remove_request(req_id)
        self._contexts.forget([req_id])

    def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        """Take a real step, before its attention is planned."""
        super().preprocess_state(input_batch, *args, **kwargs)
        num_requests = input_batch.num_reqs
        taken = self._contexts.take(
            input_batch.req_ids,
            input_batch.num_computed_tokens_np[:num_requests],
            input_batch.num_scheduled_tokens[:num_requests],
            self._tables.pages,
            input_batch.idx_mapping_np[:num_requests],
        )
        step.current = taken.batch
        if len(taken.rows):
            self._true = (self._to_device(taken.rows), self._to_device(taken.positions))

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Tensor | None]:
        """Give the model true positions; vLLM has computed slots and lengths by its own."""
        inputs = super().prepare_inputs(input_batch, req_states)
        num_rows = input_batch.num_tokens_after_padding
        self._positions[:num_rows].copy_(input_batch.positions[:num_rows])
        if self._true is not None:
            rows, positions = self._true
            self._positions[rows] = positions
            self._true = None
        return {**inputs, "positions": self._positions[:num_rows]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Inputs for graphs to be captured with."""
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self._positions[:num_tokens]}

    def _to_device(self, array: npt.NDArray[np.int64]) -> Tensor:
        pin = self.device.type == "cuda"
        host = torch.from_numpy(array)
        return (host.pin_memory() if pin else host).to(self.device, non_blocking=True)


class _HostTables:
    """vLLM's block table on the host: the runner's own is written on the device alone.

    Attributes:
        pages: int32, a row for each request, in the runner's numbers.
    """

    def __init__(self, block_tables: Any) -> None:
        """Note whatever is appended to a `vllm.v1.worker.gpu.block_table.BlockTables`."""
        (table,) = block_tables.block_tables
        self.pages = np.zeros(tuple(table.gpu.shape), np.int32)
        self._append = block_tables.append_block_ids
        self._lengths = block_tables.num_blocks.np
        block_tables.append_block_ids = self.append

    def append(self, req_index: int, new_block_ids: tuple[list[int], ...], overwrite: bool) -> None:
        """Append to vLLM's and to this."""
        begin = 0 if overwrite else int(self._lengths[0, req_index])
        self._append(req_index, new_block_ids, overwrite)
        (pages,) = new_block_ids
        self.pages[req_index, begin : begin + len(pages)] = pages


def install() -> None:
    """Have the V2 runners of this process use it. Called before they load their models."""
    resolve = model_states.resolve_model_state_cls
    if getattr(resolve, "is_tokendance", False):
        return

    def resolve_ours(vllm_config: Any, model: nn.Module) -> type[Any]:
        found = resolve(vllm_config, model)
        if found is not DefaultModelState:
            raise NotImplementedError(
                f"TokenDance serves no model with a state of its own ({found.__name__}). "
                "Start vLLM without TOKENDANCE=1."
            )
        return RoundModelState

    resolve_ours.is_tokendance = True  # type: ignore[attr-defined]
    model_states.resolve_model_state_cls = resolve_ours
