"""The check at the start: a tiny round is computed both ways, and what differs is refused.

It knows neither model nor kernels: each rank runs its own runner as a scheduler would let it. RoPE
sees differences of positions only, so a context that is shifted as a whole has the same answers:

    owner     [ X ]                              at 0
    plain     [ X | T ]                          at 0, computed
    mirror            d spaces [ reads X | T ]   its own tokens T at true positions d + len(X) ...

Mirror and plain agree, unless keys are turned by another offset, read from other slots, or the
model is given other positions. T repeats X, so that a model that can copy has to look there.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput

from tokendance.collector.known import NO_SLOT
from tokendance.errors import UnsupportedModelError
from tokendance.integrations.vllm.contexts import NO_TOKEN, Slots

log = logging.getLogger("vllm.tokendance")

_NUM_SHARED, _NUM_OWN = 24, 8
_MAX_OFFSET = 1000
_NUM_COMPARED, _NUM_TOP = 5, 20
# Differences of a logprob that are rounding: sums of another order, in the dtype of the model.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 0.25, torch.bfloat16: 1.0}


@dataclass(slots=True)
class _Pages:
    """Pages that nobody has yet: vLLM has not begun to allocate. Its block 0 is no page."""

    size: int
    next: int = 1

    def take(self, num_tokens: int) -> list[int]:
        """Pages for so many tokens."""
        first, self.next = self.next, self.next - (-num_tokens // self.size)
        return list(range(first, self.next))


def check_round(worker: Any) -> None:
    """Compute the round on this rank's `vllm.v1.worker.gpu_worker.Worker`; the last stage decides.

    It leaves no request and no page behind, and takes three small passes.

    Raises:
        UnsupportedModelError: if a mirror's answer is not what it has to be.
    """
    runner = worker.model_runner
    (group,) = runner.kv_cache_config.kv_cache_groups
    pages = _Pages(group.kv_cache_spec.block_size)
    offset = min(_MAX_OFFSET, runner.max_model_len - _NUM_SHARED - _NUM_OWN - 2)
    num_needed = 2 + sum(
        -(-length // pages.size) for length in (_NUM_SHARED, _NUM_SHARED + _NUM_OWN, _NUM_OWN)
    )
    if (
        offset < 1
        or runner.max_num_tokens < _NUM_SHARED + _NUM_OWN
        or runner.kv_cache_config.num_blocks < num_needed
    ):
        log.warning("No room for TokenDance's check at the start: it is left out.")
        return
    began = time.perf_counter()
    vocabulary = runner.model_config.get_vocab_size()
    shared = np.random.default_rng(0).integers(0, vocabulary, _NUM_SHARED).tolist()
    own = shared[:_NUM_OWN]

    owner = pages.take(_NUM_SHARED)
    _run(worker, "owner", shared, [_NUM_SHARED], owner)
    plain = _run(
        worker,
        "plain",
        shared + own,
        [_NUM_SHARED + _NUM_OWN - 1, 1],
        pages.take(_NUM_SHARED + _NUM_OWN),
    )
    tokens = np.arange(_NUM_SHARED)
    slots = np.array(owner)[tokens // pages.size] * pages.size + tokens % pages.size
    spaces, nothing = np.full(offset, NO_TOKEN), np.full(_NUM_OWN, NO_SLOT)
    reads = np.concatenate([spaces, slots, nothing]).astype(np.int32)
    mirror = _run(worker, "mirror", own, [_NUM_OWN - 1, 1], pages.take(_NUM_OWN), reads)
    if plain is None or mirror is None:
        return
    difference = _difference(plain, mirror)
    tolerance = TOLERANCE[runner.model_config.dtype]
    if not difference <= tolerance:
        raise UnsupportedModelError(
            "TokenDance's check at the start failed: a request that reads KV in place, "
            f"{offset} positions from where it was computed, answers otherwise than one that "
            f"computes all itself (a log-probability differs by {difference:.3g}; up to "
            f"{tolerance:.3g} is rounding). Start vLLM without TOKENDANCE=1, and report the model, "
            "its dtype and the attention backend."
        )
    log.info(
        "TokenDance's check at the start passed in %.2f s: the largest difference is %.2g.",
        time.perf_counter() - began,
        difference,
    )


def _run(
    worker: Any,
    name: str,
    token_ids: list[int],
    chunks: Sequence[int],
    pages: list[int],
    reads: Slots | None = None,
) -> dict[int, float] | None:
    """Compute a prompt in chunks, and let the request go.

    Returns:
        Logprobs of the likeliest next tokens; None on a rank that has none.
    """
    request_id = f"_tokendance_{name}_"
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=_NUM_TOP)
    new = NewRequestData(
        req_id=request_id,
        prompt_token_ids=token_ids,
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=(pages,),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=token_ids,
    )
    if reads is not None:
        new.tokendance_reads = reads
    result, num_done = None, 0
    for count in chunks:
        step = SchedulerOutput.make_empty()
        if num_done == 0:
            step.scheduled_new_reqs = [new]
        else:
            step.scheduled_cached_reqs = CachedRequestData.make_empty()
            step.scheduled_cached_reqs.req_ids = [request_id]
            step.scheduled_cached_reqs.new_token_ids = [[]]
            step.scheduled_cached_reqs.new_block_ids = [None]
            step.scheduled_cached_reqs.num_computed_tokens = [num_done]
            step.scheduled_cached_reqs.num_output_tokens = [0]
        step.num_scheduled_tokens = {request_id: count}
        step.total_num_scheduled_tokens = count
        worker.execute_model(step)
        result = worker.sample_tokens(None)
        num_done += count
    if isinstance(result, AsyncModelRunnerOutput):
        result = result.get_output()
    gone = SchedulerOutput.make_empty()
    gone.finished_req_ids = {request_id}
    worker.execute_model(gone)
    if not get_pp_group().is_last_rank or result is None or result.logprobs is None:
        return None
    ids, logprobs = result.logprobs.logprob_token_ids[0], result.logprobs.logprobs[0]
    return dict(zip(ids.tolist(), logprobs.tolist(), strict=True))


def _difference(plain: dict[int, float], mirror: dict[int, float]) -> float:
    """Largest difference of a logprob among the likeliest tokens; infinite if one is far away."""
    likeliest = sorted(plain, key=plain.__getitem__, reverse=True)[:_NUM_COMPARED]
    return max(abs(plain[token] - mirror.get(token, -np.inf)) for token in likeliest)
