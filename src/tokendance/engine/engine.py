"""The engine: one loop for rounds and single requests alike.

step():  schedule  ->  run  ->  postprocess
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tokendance.attention.backends import make_backend
from tokendance.collector.owners import Start, order_starts
from tokendance.collector.placement import usable_copies
from tokendance.config import EngineConfig
from tokendance.engine.blend import MIN_LAYERS
from tokendance.engine.request import Request
from tokendance.engine.runner import KVMemory, Runner
from tokendance.engine.sampling import choose_tokens, text_up_to_stop, top_logprobs
from tokendance.engine.scheduler import Scheduled, Scheduler
from tokendance.errors import AbortedError, ConfigError, ConstraintError, NumericsError
from tokendance.models.loader import LoadedModel
from tokendance.rounds.discovery import Heard
from tokendance.rounds.segments import EncodedPrompt, Salt
from tokendance.store.entries import RoundId
from tokendance.store.kv_store import KVStore

_MAX_RETRIES = 2
# A pass of fewer tokens says little of how fast prompts are computed.
_PACE_TOKENS = 256


@dataclass(slots=True)
class RoundRecord:
    """What the engine measures of a round while it runs.

    Attributes:
        requests: of the round, late ones included.
        started_s: clock time at which the first of them came.
        resident_pages: most pages that its requests held at one time.
    """

    requests: list[Request] = field(default_factory=list)
    started_s: float = field(default_factory=time.perf_counter)
    resident_pages: int = 0


class Engine:
    """Runs requests through a model, sharing KV as the configuration says.

    Not safe for several threads at once.

    Attributes:
        seconds_per_token: of the last large pass over prompts; None before there was one.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        decode: Callable[[Sequence[int]], str],
        memory: KVMemory | None = None,
    ) -> None:
        """Allocate memory under the budget.

        Args:
            model: to run.
            config: of the loop and the memory.
            decode: token ids to text, for stop strings and answers.
            memory: to use in place of its own, as large as the budget says or larger.

        Raises:
            ConfigError: if the budget does not hold a single page, or cannot be allocated.
        """
        self.config = config
        self.kv_bytes_per_token = model.shape.kv_bytes_per_token(model.dtype)
        self.page_bytes = self.kv_bytes_per_token * config.store.page_size
        num_pages = config.store.kv_budget // self.page_bytes
        if num_pages == 0:
            raise ConfigError(
                f"The KV budget of {config.store.kv_budget} bytes is smaller than one page "
                f"({self.page_bytes} bytes). Raise kv_budget (--kv-budget)."
            )
        num_pages = min(num_pages, (2**31 - 1) // config.store.page_size)  # slots are int32
        self.store = KVStore(num_pages, config.store.page_size, config.store.max_reuse_rounds)
        if config.takes_copies and model.shape.num_layers < MIN_LAYERS:
            raise ConfigError(
                f"reuse {config.reuse!r} compares keys of the second layer and drops rows after "
                f"it, and {model.name} has {model.shape.num_layers} layers. Use another reuse."
            )
        memory = memory or KVMemory.allocate(model, num_pages * config.store.page_size)
        self.runner = Runner(model, memory, partial(make_backend, name=config.attention))
        self.scheduler = Scheduler(config, self.store, self.kv_bytes_per_token)
        self._decode = decode
        self.seconds_per_token: float | None = None
        self._rounds: dict[RoundId, RoundRecord] = {}
        self._round_ids = itertools.count()

    def new_round_id(self) -> RoundId:
        """Return an id for requests that belong together."""
        return RoundId(next(self._round_ids))

    def num_known(self, prompt: EncodedPrompt) -> int:
        """How many tokens at the beginning of a prompt have KV that its round may reuse."""
        _, slots = self.store.match_prefix(prompt.token_ids, prompt.salt, exact=False)
        return len(slots)

    def recall(self, prompts: Iterable[Heard], salt: Salt) -> None:
        """Offer parts of earlier prompts for reuse, as far as their KV is still there."""
        for prompt in prompts:
            self.store.put_copies(prompt.token_ids, salt, prompt.parts)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests that arrive together; those of a running round join it.

        Their order in the queue is chosen so that little is computed twice. A request whose
        `error` is set already is done at once.
        """
        for request in requests:
            self._rounds.setdefault(request.round_id, RoundRecord()).requests.append(request)
            if request.error is not None:
                self._finish(request, "error")
        sound = [request for request in requests if request.error is None]
        together = [request for request in sound if request.in_round]
        shared = [request.prompt.shared_segments() for request in together]
        known = {
            segments[place][1].hash
            for request, segments in zip(together, shared, strict=True)
            for place, copies in usable_copies(segments, self.store, request.round_id)
            if copies
        }
        sizes = [[(segment.hash, len(segment)) for _, segment in one] for one in shared]
        starts = order_starts(sizes, known)
        if self.config.takes_copies:  # whoever comes first computes
            starts = [Start(index) for index in range(len(together))]
        for start in starts:
            together[start.index].owns_order = start.owns_order
            self.scheduler.waiting.append(together[start.index])
        self.scheduler.waiting.extend(request for request in sound if not request.in_round)

    def abort(self, request: Request, why: str = "The request was taken back.") -> None:
        """End a request; the others go on. Does nothing if it is done."""
        if request.finish_reason is None:
            request.error = AbortedError(why)
            self._fail(request, keep_kv=True)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @property
    def can_compute(self) -> bool:
        """Whether a step would compute something, as far as one can tell before it.

        Requests may wait for pages that are being filled from disk.
        """
        return bool(self.scheduler.running or (self.scheduler.waiting and not self.store.loading))

    def step(self) -> list[Request]:
        """Compute one batch; return the requests that are done."""
        num_running = len(self.scheduler.running)
        refused = self.scheduler.admit()
        if len(self.scheduler.running) > num_running:
            self._note_residency()
        for request in refused:
            self._finish(request, "error")
        step = self.scheduler.schedule() or self.scheduler.schedule()
        assert step or not self.scheduler.running, (
            "nothing can be computed: requests wait in a circle"
        )
        if not step:
            return refused
        start = time.perf_counter()
        try:
            logits = self.runner.run(step, self.store.slot_position)
        except BaseException:
            # An interrupt, most often: what was to be written is not there.
            self.scheduler.undo(step)
            raise
        num_tokens = sum(len(item.positions) for item in step)
        if num_tokens >= _PACE_TOKENS:
            self.seconds_per_token = (time.perf_counter() - start) / num_tokens
        return refused + self._postprocess(step, logits)

    def pop_round(self, round_id: RoundId) -> RoundRecord:
        """Hand over the record of a round whose requests are all done, and forget it."""
        return self._rounds.pop(round_id)

    def check_integrity(self) -> None:
        """Assert that page counts, indexes and running requests agree."""
        held = [
            request.placement.pages
            for request in self.scheduler.running
            if request.placement is not None
        ]
        self.store.check_integrity(held)

    # -- after a step -------------------------------------------------------------------------

    def _postprocess(self, step: Sequence[Scheduled], logits: Tensor) -> list[Request]:
        """Choose next tokens, and let go of requests that are done or have failed."""
        done: list[Request] = []
        wanting = [item.request for item in step if item.wants_logits]
        # A sum is finite only where all numbers are, and one pass over these megabytes is enough.
        finite = logits.sum(dim=-1).isfinite().tolist()
        for request, is_finite in zip(wanting, finite, strict=True):
            if not is_finite and request.placement is not None:
                done += self._numerics(request)
        rows = [
            row
            for row, request in enumerate(wanting)
            if finite[row] and request.placement is not None  # else it failed or began anew
        ]
        if not rows:
            return done
        alive = [wanting[row] for row in rows]
        if len(rows) < len(wanting):
            logits = logits[rows]
        for request, row_logits in zip(alive, logits, strict=True):
            _restrict(row_logits, request)
        chosen = choose_tokens(logits, [r.params for r in alive], [r.generator for r in alive])
        now = time.perf_counter()
        for request, row_logits, token in zip(alive, logits, chosen, strict=True):
            forced = request.params.forced_tokens
            if forced is not None:
                token = forced[len(request.generated)]
            in_shadow = len(request.shadow_tokens) < request.num_shadowed
            if in_shadow:
                request.shadow_tokens.append(token)
            if in_shadow or request.params.keep_logprobs:
                request.logprobs.append(torch.log_softmax(row_logits, dim=-1))
            if request.params.top_logprobs is not None:
                request.top_logprobs.append(
                    top_logprobs(row_logits, token, request.params.top_logprobs)
                )
            if request.constraint is not None:
                request.constraint.accept(token)
                if (reason := request.constraint.failure()) is not None:
                    request.error = ConstraintError(
                        f"What the answer of {request.agent!r} shall look like cannot be followed: "
                        f"{reason} Simplify it."
                    )
                    done += self._fail(request, keep_kv=True)
                    continue
            if request.first_token_s is None:
                request.first_token_s = now
                self.scheduler.mark_sound(request)
            reason = self._append(request, token)
            if reason is not None:
                self.scheduler.keep_answer(request)
                self.scheduler.release(request, keep_kv=True)
                self._finish(request, reason)
                done.append(request)
        return done

    def _append(self, request: Request, token: int) -> str | None:
        """Add a token to a request's answer; return why it is done, if it is."""
        params = request.params
        if params.forced_tokens is None:
            # A constrained answer ends where its grammar does.
            goes_on = params.ignore_eos and request.constraint is None
            ends = () if goes_on else request.stop_ids
            if token in ends or token in params.stop_token_ids:
                return "stop"
        request.generated.append(token)
        if params.stop and params.forced_tokens is None:
            text = text_up_to_stop(request.generated, params.stop, self._decode)
            if text is not None:
                request.text = text
                request.stopped_by_text = True
                return "stop"
        return "length" if len(request.generated) >= request.max_new_tokens else None

    def _numerics(self, request: Request) -> list[Request]:
        """Fail a request whose logits are not finite, or let it begin anew if others may be why.

        KV that it computed is dropped, and whoever read it begins anew without it. If it read
        runs of an owner that has yet to show that it is sound, those are dropped too.
        """
        assert request.placement is not None
        suspects = [copy for copy in request.placement.copies if not copy.sound]
        if suspects and request.num_retries < _MAX_RETRIES:
            for copy in suspects:
                self.store.drop(copy)
            self.scheduler.restart(request)
            return []
        request.error = NumericsError(
            f"The model produced NaN or infinity for {request.agent!r}. "
            "Try dtype float32, or check the weights."
        )
        return self._fail(request, keep_kv=False)

    def _fail(self, request: Request, *, keep_kv: bool) -> list[Request]:
        self.scheduler.release(request, keep_kv=keep_kv)
        self._finish(request, "error")
        return [request]

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        request.finished_s = time.perf_counter()
        if reason == "error":
            request.generated.clear()
        elif request.text is None:
            request.text = self._decode(request.generated)

    def _note_residency(self) -> None:
        """Note how many pages each round's running requests hold."""
        by_round: dict[RoundId, list[Request]] = {}
        for request in self.scheduler.running:
            by_round.setdefault(request.round_id, []).append(request)
        for round_id, requests in by_round.items():
            record = self._rounds[round_id]
            pages = self.scheduler.resident_pages(requests)
            record.resident_pages = max(record.resident_pages, pages)


def _restrict(logits: Tensor, request: Request) -> None:
    """Apply what a request asks of its next token to its logits (vocabulary,), in place."""
    if request.bias is None and request.constraint is None:
        return
    with torch.inference_mode():
        if request.bias is not None:
            tokens, biases = request.bias
            logits.index_add_(0, tokens.to(logits.device), biases.to(logits.device))
        if request.constraint is not None:
            logits.masked_fill_(request.constraint.forbidden(), -math.inf)
