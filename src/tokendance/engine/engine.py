"""The engine: one step for rounds and single requests alike.

step():  admit  ->  schedule  ->  execute  ->  take what was chosen
"""

import itertools
import logging
import time
from collections.abc import Callable, Sequence

from tokendance.collector.owners import Lenders
from tokendance.collector.planner import Planner
from tokendance.engine.answers import add_token, text_of
from tokendance.engine.events import (
    Admitted,
    EngineObserver,
    Event,
    Evicted,
    Finished,
    FirstToken,
    RoundStarted,
    StepDone,
)
from tokendance.engine.mask_turns import MaskTurns
from tokendance.engine.open_rounds import OpenRounds
from tokendance.engine.request import Request, RequestId, as_failure, make_silent
from tokendance.engine.scheduler import Scheduled, Scheduler
from tokendance.engine.scheduling import SchedulingPolicy
from tokendance.engine.tenants import TenantRules
from tokendance.errors import (
    AbortedError,
    NumericsError,
    StepError,
    TokenDanceError,
)
from tokendance.executor.step import Executor, StepInput, StepOutput
from tokendance.store.entries import RoundId
from tokendance.store.kv_store import KVStore

log = logging.getLogger("tokendance.engine")

Clock = Callable[[], float]

_MAX_RETRIES = 2
# A pass of fewer tokens says little of how fast prompts are computed.
_PACE_TOKENS = 256


class Engine:
    """Runs requests, sharing KV as its planner says. Not safe for several threads at once.

    Attributes:
        store: pages and indexes.
        scheduler: queue and running requests.
        seconds_per_token: of the last large pass over prompts; None before there was one.
    """

    def __init__(
        self,
        store: KVStore,
        planner: Planner,
        policy: SchedulingPolicy,
        executor: Executor,
        decode: Callable[[Sequence[int]], str],
        *,
        max_num_batched_tokens: int,
        kv_bytes_per_token: int,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Make an engine over a store.

        Args:
            store: empty.
            planner: decides, over that store.
            policy: divides the tokens of a step.
            executor: runs the steps; it has room for the store's slots.
            decode: token ids to text, for stop texts and answers.
            max_num_batched_tokens: of one step.
            kv_bytes_per_token: for messages.
            clock: seconds; a test may have one of its own.
        """
        self.store = store
        self._executor = executor
        self._planner = planner
        self.scheduler = Scheduler(
            store,
            planner,
            policy,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_bytes_per_token=kv_bytes_per_token,
            clock=clock,
        )
        self._decode = decode
        self._clock = clock
        self._mask_turns = MaskTurns(clock)
        self._observers: list[EngineObserver] = []
        self._request_ids = itertools.count()
        self._rounds = OpenRounds()
        self.seconds_per_token: float | None = None

    # -- coming and going -----------------------------------------------------------------------

    def observe(self, observer: EngineObserver) -> None:
        """Tell an observer what happens from now on."""
        self._observers.append(observer)

    def set_tenants(self, rules: TenantRules) -> None:
        """Say what is kept for each tenant; see `Scheduler.set_rules`."""
        self.scheduler.set_rules(rules)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests that arrive together; those of a running round join it.

        Their order in the queue is chosen so that little is computed twice. A request whose
        `error` is set already is done at once.
        """
        now = self._clock()
        for request in requests:
            request.id = RequestId(next(self._request_ids))
            if request.arrived_s is None:
                request.arrived_s = now
            self._rounds.add(request, now)
        for request in requests:
            if request.error is not None:
                self._finish(request, "error")
        sound = [request for request in requests if request.error is None]
        together = [request for request in sound if request.in_round]
        if together:
            self._queue_round(together, now)
        for request in sound:
            if not request.in_round:
                self.scheduler.add(request)

    def _queue_round(self, together: Sequence[Request], now: float) -> None:
        """Queue requests of a round: those that may compute for others come first."""
        round_id = together[0].round_id
        # Nobody reads what is computed in isolation.
        alone = [request for request in together if request.isolated and not request.guarded]
        others = [request for request in together if not (request.isolated or request.guarded)]
        prompts = [request.prompt for request in others]
        for start in self._planner.order(prompts, round_id):
            request = others[start.index]
            request.owns_order = start.owns_order
            if start.lenders is not None:
                self._lend(request, start.lenders, now)
            self.scheduler.add(request)
        for request in alone:
            self.scheduler.add(request)
        guarded = [request for request in together if request.guarded]
        neutral = self._planner.neutral_prompts(
            [request.prompt for request in guarded if not request.isolated],
            prompts,
            round_id,
        )
        for prompt in neutral:
            self._add_silent(make_silent(prompt, guarded[0], "a neutral owner"), now)
        for request in guarded:
            self.scheduler.add(request)

    def _lend(self, request: Request, lenders: Lenders, now: float) -> None:
        """Let a request own its run with others, whose texts are computed before it."""
        if request.params.prompt_logprobs is not None:
            return  # log-probabilities of a prompt are those of its own context
        # In little memory texts would be evicted before their agents come.
        request.lenders = lenders.within(self.store.num_slots // 2 - len(request.prompt))
        for text in request.lenders.texts:
            if not self._planner.is_cached(text):
                self._add_silent(make_silent(text, request, "a co-owner's text"), now)

    def _add_silent(self, request: Request, now: float) -> None:
        """Queue a request that computes for others of its round."""
        request.id, request.arrived_s = RequestId(next(self._request_ids)), now
        self._rounds.add_silent(request)
        self.scheduler.add(request)

    def abort(self, request: Request, why: str = "The request was taken back.") -> None:
        """End a request; the others go on. Does nothing if it is done."""
        if request.finish_reason is None:
            self._fail(request, AbortedError(why), keep_kv=True)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.scheduler.running or self.scheduler.num_waiting)

    @property
    def can_compute(self) -> bool:
        """Whether a step would compute something, as far as one can tell before it.

        Requests may wait for pages that are being filled from disk, or written.
        """
        scheduler = self.scheduler
        return bool(scheduler.running or (scheduler.num_waiting and not self.store.in_transit))

    @property
    def num_rounds(self) -> int:
        """Rounds of which somebody waits or runs."""
        return len(self._rounds)

    def open_requests(self) -> list[Request]:
        """All requests of rounds of which somebody waits or runs."""
        return self._rounds.requests()

    # -- one step -------------------------------------------------------------------------------

    def step(self) -> None:
        """Compute one batch.

        Raises:
            StepError: if the forward pass failed; its requests have failed, too, and the others go
                on.
        """
        begun = self._clock()
        self._admit()
        self._prepare_masks()
        scheduled = self.scheduler.schedule() or self.scheduler.schedule()
        if not scheduled:
            if all(request.has_mask for request in self.scheduler.running):
                self._fail_stuck()
            return  # or others' masks took all the time, and these have their turn next
        scheduled, step = self._make_step(scheduled)
        if not scheduled:
            return
        start, cpu_start = self._clock(), time.thread_time()
        try:
            output = self._executor.execute(step)
        except Exception as error:
            failure = StepError(
                f"The forward pass failed ({type(error).__name__}: {error}). Ask again; if it "
                "fails again, the log says where."
            )
            for item in scheduled:
                self.scheduler.unmark(item)
            for item in scheduled:
                self._fail(item.request, failure, keep_kv=False)
            raise failure from error
        except BaseException:
            # An interrupt, most often: what was to be written is not there.
            self.scheduler.undo(scheduled)
            raise
        now = self._clock()
        if step.num_tokens >= _PACE_TOKENS:
            self.seconds_per_token = (now - start) / step.num_tokens
        self.emit(
            StepDone(
                now,
                now - start,
                time.thread_time() - cpu_start,
                {item.request.id: len(item.positions) for item in scheduled},
                len(self.scheduler.running),
                self.scheduler.num_waiting,
                self.scheduler.resident_pages(),
            )
        )
        self._take(scheduled, output, now)
        beside_s = self._clock() - begun - (now - start)
        self.scheduler.pace.note(step.num_tokens, now - start, beside_s)

    def _admit(self) -> None:
        num_evicted = self.store.num_evicted
        admitted, refused = self.scheduler.admit()
        now = self._clock()
        if self.store.num_evicted > num_evicted:
            self.emit(Evicted(now, self.store.num_evicted - num_evicted))
        events: dict[RoundId, list[Admitted]] = {}
        for request in admitted:
            events.setdefault(request.round_id, []).append(Admitted.of(request, now))
        for round_id, of_round in events.items():
            if (started := self._rounds.start(round_id)) is not None:
                num_requests = len(started.requests)
                self.emit(
                    RoundStarted(now, started.added_s, round_id, num_requests, tuple(of_round))
                )
            for event in of_round:
                self.emit(event)
        for request in refused:
            self._finish(request, "error")

    def _prepare_masks(self) -> None:
        """Find out what may come next in answers that have to look like something."""
        for request in self._mask_turns.take(self.scheduler.running):
            assert request.constraint is not None
            try:
                request.constraint.prepare()
                request.check_constraint()
            except Exception as error:
                self._fail(request, as_failure(request, error), keep_kv=True)

    def _make_step(self, scheduled: Sequence[Scheduled]) -> tuple[list[Scheduled], StepInput]:
        """What the executor is given; a request whose share cannot be made fails, and no other."""
        made = []
        for item in scheduled:
            if item.request.allocation is None:
                continue  # it read what another has failed to compute, and begins anew
            try:
                made.append((item, item.request.shares(item.positions)))
            except Exception as error:
                self.scheduler.unmark(item)
                self._fail(item.request, as_failure(item.request, error), keep_kv=True)
        made = [(item, shares) for item, shares in made if item.request.allocation is not None]
        shares = itertools.chain.from_iterable(shares for _, shares in made)
        return [item for item, _ in made], StepInput(tuple(shares))

    def _fail_stuck(self) -> None:
        """Fail requests of which none can be computed, since each waits for another."""
        for request in list(self.scheduler.running):
            error = StepError(
                f"The request{request.whose} waits for KV that nobody computes. Ask again."
            )
            log.error("%s", error)
            self._fail(request, error, keep_kv=False)

    # -- after a step ---------------------------------------------------------------------------

    def _take(self, scheduled: Sequence[Scheduled], output: StepOutput, now: float) -> None:
        """Take the tokens that were chosen, and let go of requests that are done or have failed."""
        wanting = [
            item.request
            for item in scheduled
            if item.request.num_computed == item.request.num_to_compute
        ]
        targets = iter(output.targets)
        for item in scheduled:
            num_targets = len(item.request.targets(item.positions))
            item.request.prompt_logprobs += itertools.islice(targets, num_targets)
        for request, is_finite in zip(wanting, output.is_finite, strict=True):
            if not is_finite and request.allocation is not None:
                self._fail_numerics(request)
        for index, request in enumerate(wanting):
            if not output.is_finite[index] or request.allocation is None:
                continue  # it has failed, or has begun anew
            try:
                self._take_token(request, output, index, now)
            except Exception as error:
                self._fail(request, as_failure(request, error), keep_kv=True)

    def _take_token(self, request: Request, output: StepOutput, index: int, now: float) -> None:
        token = output.token_ids[index]
        distribution, logprobs = output.distributions[index], output.logprobs[index]
        if distribution is not None:
            request.distributions.append(distribution)
        if logprobs is not None:
            request.logprobs.append(logprobs)
        if request.constraint is not None:
            request.constraint.accept(token)
            request.check_constraint()
        if request.first_token_s is None:
            request.first_token_s = now
            self.scheduler.mark_verified(request)
            self.emit(FirstToken(now, request.id, request.round_id))
        reason = add_token(request, token, self._decode)
        if reason is not None:
            self.scheduler.publish_answer(request)
            self._finish(request, reason)

    def _fail_numerics(self, request: Request) -> None:
        """Fail a request whose logits are not finite, or let it begin anew if others may be why.

        KV that it computed is dropped, and whoever read it begins anew without it. If it read
        runs of an owner that has yet to show finite logits, those are dropped too.
        """
        if request.num_retries < _MAX_RETRIES and self.scheduler.retry_without_suspects(request):
            return
        error = NumericsError(
            f"The model produced NaN or infinity in the request{request.whose}. "
            "Try dtype float32, or check the weights."
        )
        self._fail(request, error, keep_kv=False)

    def _fail(self, request: Request, error: TokenDanceError, *, keep_kv: bool) -> None:
        request.error = error
        self.scheduler.release(request, keep_kv=keep_kv)
        self._finish(request, "error")

    def _finish(self, request: Request, reason: str) -> None:
        self._end(request, reason)
        for silent in self._rounds.finish(request):
            self._end(silent, "stop")
            self._tell_end(silent)
        self._tell_end(request)

    def _end(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        request.finished_s = self._clock()
        if reason == "error":
            request.generated.clear()
        elif request.text is None:
            request.text = text_of(request, self._decode)
        self.scheduler.release(request, keep_kv=True)

    def _tell_end(self, request: Request) -> None:
        self.emit(Finished.of(request))

    # -- telling --------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Tell all observers; one that fails is told no more."""
        for observer in list(self._observers):
            try:
                observer.on_event(event)
            except Exception:  # whoever only looks on must not end what he looks at
                log.exception("an observer has failed, and is told no more")
                self._observers.remove(observer)

    def check_integrity(self) -> None:
        """Assert that page counts, indexes and running requests agree."""
        self.store.check_integrity(self.scheduler.held_pages())
        self.scheduler.check_integrity()
