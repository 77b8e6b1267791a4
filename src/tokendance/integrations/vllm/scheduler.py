"""vLLM's scheduler with rounds: a mirror is to it a request with fewer tokens, its own.

Block tables, slot mappings, lengths, chunks and preemption then stay right by themselves. What a
worker has to know beside that, which KV a mirror reads and so where its own tokens stand, goes with
the step in which vLLM tells it of the request. The scheduler alone writes it: nothing that a client
can send comes near.

    prompt        [ private | corrected | reused ............ | task ]
    vLLM's        [ private | corrected | task ]       true positions 0-40, 41-44, 620-640
    reads                     slots of the owner's pages at 45-619

Its beginning up to the first reused token is exact, and vLLM's prefix cache finds and keeps it as
ever. The hashes of blocks behind it are drawn at random, so nobody finds approximate KV by them.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.config import ModelConfig
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.async_scheduler import AsyncScheduler as VLLMAsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler as VLLMScheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from tokendance.integrations.vllm.arrivals import RoundKey
from tokendance.integrations.vllm.figures import Figures
from tokendance.integrations.vllm.hints import read_hints
from tokendance.integrations.vllm.metrics import RoundStats
from tokendance.integrations.vllm.pages import BlockPages
from tokendance.integrations.vllm.rewriting import restore, rewrite
from tokendance.integrations.vllm.rounds import Member, Rounds
from tokendance.integrations.vllm.settings import Settings
from tokendance.rounds.segments import make_salt
from tokendance.store.kv_store import KVStore

log = logging.getLogger("vllm.tokendance")

_GAUGES_EVERY_S = 0.5
_NO_FIGURES = Figures()


class _RoundsMixin(VLLMScheduler):  # type: ignore[misc]
    """What is added to vLLM's schedulers, synchronous or not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings, model = Settings.from_environment(), self.vllm_config.model_config
        pool = BlockPages(self.kv_cache_manager.block_pool, self.block_size)
        store = KVStore(pool, settings.max_reuse_rounds)
        self._rounds = Rounds(
            store,
            settings.policy(model.model, str(model.dtype).removeprefix("torch.")),
            window_s=settings.window_ms / 1000,
            window_share=settings.window_share,
            round_wait_s=settings.round_wait_s,
            max_retained=int(pool.num_pages * settings.retained_share),
            recent_s=settings.recent_s,
            special_ids=_special_ids(model),
        )
        self._requests: dict[str, Request] = {}  # that have not started
        self._members: dict[str, Member] = {}  # that have
        self._whole: set[str] = set()  # mirrors until they are computed whole, which workers hear
        self._gauges = Figures()
        self._gauges_s = 0.0  # when they were counted
        (group,) = self.kv_cache_config.kv_cache_groups
        self._page_bytes = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_or_give_up

    # -- requests come ------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Let a request wait for others of its round, or start it if it can be in none."""
        member = None if request.request_id in self.requests else self._member_of(request)
        if member is None:
            super().add_request(request)
            return
        self._requests[request.request_id] = request
        self._rounds.arrive(member, time.monotonic())

    def _member_of(self, request: Request) -> Member | None:
        """A request as a member of a round; None if it can be in none."""
        if not _can_share(request):
            return None
        try:
            hints = read_hints(request.sampling_params.extra_args, len(request.prompt_token_ids))
            if hints.exact:
                return None
            adapter = request.lora_request.lora_int_id if request.lora_request else 0
            salt = make_salt("vllm", request.cache_salt or "", str(adapter))
            has_priority = self.policy == SchedulingPolicy.PRIORITY
            return Member(
                request.request_id,
                RoundKey(salt, request.session_id, hints.round),
                np.array(request.prompt_token_ids, np.int32),
                request.max_tokens,
                round_size=hints.round_size,
                blocks=hints.blocks,
                priority=request.priority if has_priority else 0,
            )
        except Exception:  # an exception in a scheduler ends the engine, for all
            log.exception("A request is in no round, as what it says could not be read.")
            return None

    def _start_members(self) -> None:
        for member in self._rounds.start(time.monotonic()):
            request = self._requests.pop(member.request_id)
            self._members[member.request_id] = member
            if member.is_mirror:
                rewrite(
                    request,
                    member,
                    max_model_len=self.max_model_len,
                    tokens_per_hash=self.kv_cache_manager.block_pool.hash_block_size,
                )
            super().add_request(request)

    # -- steps --------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Start what can start, schedule a step, and tell the workers what new mirrors read."""
        if self.pause_state == PauseState.UNPAUSED:
            self._start_members()
        output = super().schedule(*args, **kwargs)
        if self._whole:
            resumed = self._whole & output.scheduled_cached_reqs.resumed_req_ids
            output.tokendance_whole = {
                request_id: self.requests[request_id].prompt_token_ids for request_id in resumed
            }
            self._whole -= resumed
        for new in output.scheduled_new_reqs:
            self._whole.discard(new.req_id)
            member = self._members.get(new.req_id)
            if member is None:
                continue
            if member.is_mirror:
                new.tokendance_reads = member.reads
            stats = self.requests[new.req_id].prefill_stats
            if stats is not None and stats.num_prompt_tokens == len(member.own):
                num_reused = len(member.token_ids) - len(member.own)
                stats.set(len(member.token_ids), stats.num_local_cached_tokens + num_reused, 0)
                self._rounds.figures.computed_tokens += stats.num_computed_tokens
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            num_scheduled = self.requests[request_id].num_computed_tokens
            if self._rounds.wants_publishing(request_id, num_scheduled):
                self._rounds.publish(request_id, num_scheduled, self._pages(request_id))

    def _pages(self, request_id: str) -> list[int]:
        (pages,) = self.kv_cache_manager.get_block_ids(request_id)
        return list(pages)

    def _allocate_or_give_up(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Allocate as vLLM does; where there is no room, forget what is kept for later rounds."""
        count = 1
        while (blocks := self._allocate_slots(request, *args, **kwargs)) is None:
            if not self._rounds.give_up(count):
                break
            count *= 2
        return blocks

    # -- requests go --------------------------------------------------------------------------

    def _free_blocks(self, request: Request) -> None:
        self._whole.discard(request.request_id)
        if self._members.pop(request.request_id, None) is not None:
            answer = list(request.output_token_ids)
            # The last token of an answer is not read any more, so it has no KV.
            num_computed = min(
                request.num_computed_tokens, request.num_prompt_tokens + len(answer) - 1
            )
            pages = self._pages(request.request_id)
            self._rounds.end(request.request_id, answer, num_computed, pages)
        super()._free_blocks(request)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """See vLLM's; also requests that wait for their round."""
        if request_ids is None:
            ids: set[str] | None = None
        else:
            ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        gone: list[Request] = []
        for request_id in list(self._requests):
            if ids is None or request_id in ids:
                self._rounds.remove(request_id)
                request = self._requests.pop(request_id)
                request.status = finished_status
                gone.append(request)
        finished: list[Request] = super().finish_requests(ids, finished_status)
        return gone + finished

    # -- what others ask ----------------------------------------------------------------------

    def has_request(self, request_id: str) -> bool:
        """Whether it runs or waits, for vLLM or for its round. Asked since vLLM 0.33."""
        return request_id in self._requests or request_id in self.requests

    def get_num_unfinished_requests(self) -> int:
        """See vLLM's; with those that wait for their round, unless all have to wait."""
        num_unfinished = int(super().get_num_unfinished_requests())
        is_paused = self.pause_state != PauseState.UNPAUSED
        return num_unfinished if is_paused else num_unfinished + len(self._requests)

    def get_request_counts(self) -> tuple[int, int]:
        """Running and waiting; with those that wait for their round."""
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._requests)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """VLLM's statistics of a step, with figures of rounds where there are new ones."""
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            return None
        figures, now = self._rounds.figures, time.monotonic()
        is_due = now >= self._gauges_s + _GAUGES_EVERY_S or not self._members
        if not is_due and figures == _NO_FIGURES:
            return stats
        self._rounds.figures = Figures()
        if is_due:
            self._gauges, self._gauges_s = self._count_pages(), now
        for name in ("shared_pages", "resident_pages", "dense_pages", "retained_pages"):
            setattr(figures, name, getattr(self._gauges, name))
        figures.page_bytes = self._page_bytes
        return RoundStats(**vars(stats), tokendance=figures)

    def _count_pages(self) -> Figures:
        """What members have of vLLM's blocks at the moment."""
        readers: Counter[int] = Counter()
        num_dense = 0
        for request_id, member in self._members.items():
            pages = {*self._pages(request_id), *member.held.tolist()}
            readers.update(pages)
            num_tokens = len(member.token_ids) + self.requests[request_id].num_output_tokens
            num_dense += -(-num_tokens // self.block_size) if pages else 0
        pool = self.kv_cache_manager.block_pool
        num_used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return Figures(
            shared_pages=sum(count > 1 for count in readers.values()),
            resident_pages=len(readers),
            dense_pages=num_dense,
            retained_pages=max(0, num_used - len(readers)),
        )

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, *args: Any, **kwargs: Any
    ) -> bool:
        """Forget all KV; with `reset_running_requests` also of those that run."""
        if reset_running_requests:
            self._compute_whole()
        self._rounds.forget()
        return bool(super().reset_prefix_cache(reset_running_requests, *args, **kwargs))

    def _compute_whole(self) -> None:
        """Let all members go on as plain requests: the KV that they read is going to be lost."""
        self._rounds.let_go()
        for request_id, member in self._members.items():
            if member.is_mirror:
                request = self.requests[request_id]
                restore(request, member)
                if request.status != RequestStatus.WAITING:  # workers know it
                    self._whole.add(request_id)
        self._members.clear()


class RoundScheduler(_RoundsMixin, VLLMScheduler):  # type: ignore[misc]
    """Rounds with vLLM's synchronous scheduler."""


class AsyncRoundScheduler(_RoundsMixin, VLLMAsyncScheduler):  # type: ignore[misc]
    """Rounds with vLLM's asynchronous scheduler."""


def make_scheduler(*args: Any, **kwargs: Any) -> _RoundsMixin:
    """Make the one that fits vLLM's configuration; called as vLLM calls a scheduler's class."""
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    is_async = config.scheduler_config.async_scheduling
    return (AsyncRoundScheduler if is_async else RoundScheduler)(*args, **kwargs)


def _can_share(request: Request) -> bool:
    """Whether a request may be in a round; others are vLLM's own business."""
    params = request.sampling_params
    return (
        params is not None
        and request.prompt_token_ids is not None
        and request.prompt_embeds is None
        and not request.mm_features
        and not request.resumable
        and params.prompt_logprobs is None
        # It would see the own tokens only.
        and params.repetition_penalty == 1.0
        and not params.bad_words
        and not request.skip_reading_prefix_cache
    )


def _special_ids(model_config: ModelConfig) -> frozenset[int]:
    """Special tokens of the model's tokenizer, which this process has loaded for grammars anyway.

    None where vLLM is told to load no tokenizer: blocks are then told apart by outputs alone.
    """
    tokenizer = cached_tokenizer_from_config(model_config=model_config)
    if tokenizer is None:
        return frozenset()
    # Those of a chat template need not be among those that the tokenizer has a name for.
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids).union(
        token_id for token_id, token in added.items() if token.special
    )
