"""The dispatcher: makes rounds of jobs, runs them on the engine, and sends their events.

    jobs -> arrivals -> discovery -> engine.add -> engine.tick -> job.on_event(event)

All of it happens on the engine's thread. The dispatcher has no thread and no clock of its own: its
driver calls `tick` again and again, and may sleep in between for `pause_s`.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from tokendance.engine.request import Request, make_output
from tokendance.engine.tenants import TenantRules
from tokendance.errors import AbortedError
from tokendance.fidelity.idle_shadows import IdleShadows
from tokendance.llm import LLM
from tokendance.rounds.discoveries import Discoveries
from tokendance.rounds.discovery import DiscoveryConfig, DiscoveryResult
from tokendance.rounds.segments import Salt, as_token_ids
from tokendance.server.arrivals import Arrivals
from tokendance.server.comparisons import Comparison, Comparisons
from tokendance.server.jobs import Job, NewTokens
from tokendance.server.loading import Loader
from tokendance.server.metrics import Metrics
from tokendance.server.settings import ServerSettings
from tokendance.store.entries import RoundId

# Time between looks at prompts that are being compared, if there is nothing to compute.
_LOOK_S = 0.002
# Before each pass, so that a burst of requests does not keep those that run waiting.
_ADMISSION_S = 0.01
# How many times `busy_pass_ms` a pass takes whose tenant is alone for the moment.
_ALONE = 2.5


class Dispatcher:
    """Runs jobs on the engine; see the module.

    Attributes:
        arrivals: jobs that have not begun.
        loader: reads sessions from disk.
    """

    def __init__(self, llm: LLM, metrics: Metrics, settings: ServerSettings) -> None:
        """Run jobs on the engine of an LLM, which nothing else may use then."""
        self._engine, self._turns = llm.engine, llm.turns
        self._engine.set_tenants(
            TenantRules(
                num_tenants=max(1, len(settings.api_keys)),
                reserved=settings.reserved_kv,
                pass_s=settings.busy_pass_ms / 1000,
                alone=_ALONE,
                admission_s=_ADMISSION_S,
            )
        )
        self._shadows = IdleShadows(llm.shadows, llm.engine, metrics.note_shadow)
        self._discoveries = Discoveries(
            DiscoveryConfig(recent_s=settings.recent, special_ids=llm.encoder.special_ids)
        )
        self._compared = Comparisons()
        self.loader = Loader()
        self.arrivals = Arrivals(self.loader, settings)
        self._live: dict[Request, Job] = {}
        self._is_stopping = False
        self._deadline_s = math.inf  # when live jobs are aborted
        self._now = 0.0
        self._engine.observe(metrics)
        self._engine.attach(self._shadows)

    def driving(self) -> AbstractContextManager[None]:
        """Keep all others from the engine, whose calls are refused meanwhile.

        Raises:
            UsageError: in a process that was forked, or if another server has the engine.
        """
        return self._turns.take(
            refusal="A server runs this LLM. Send it your requests, or make another LLM for them."
        )

    def check_process(self) -> None:
        """Raise UsageError in a process that was forked since the LLM was made."""
        self._turns.check_process()

    # -- jobs come and go -----------------------------------------------------------------------

    def begin(self, jobs: Sequence[Job], round_id: RoundId | None = None) -> None:
        """Begin jobs that arrived together; those of each tenant make a round.

        Args:
            jobs: to begin.
            round_id: of a round that has begun, for jobs that join it; a new one if left out.
        """
        by_salt: dict[Salt, list[Job]] = {}
        for job in jobs:
            self._live[job.request] = job  # first, so that it is answered if what follows fails
            by_salt.setdefault(job.request.prompt.salt, []).append(job)
        for salt, of_tenant in by_salt.items():
            own_round = self._engine.new_round_id() if round_id is None else round_id
            for job in of_tenant:
                job.request.round_id = own_round
                job.is_alone = len(of_tenant) == 1
            # Tokens at the beginning of each prompt whose KV is there already.
            num_cached = {job: self._engine.num_cached(job.request.prompt) for job in of_tenant}
            self._compared.add(self._discover(salt, num_cached))

    def _discover(self, salt: Salt, num_cached: Mapping[Job, int]) -> Comparison:
        """Find what prompts share; not where the client has marked it."""
        unmarked = [job for job in num_cached if not job.marked]
        if not self._engine.options.reuses_segments:
            unmarked = []
        prompts = [job.request.prompt.token_ids for job in unmarked]
        lengths, now = [num_cached[job] for job in unmarked], self._now

        def compare() -> DiscoveryResult | None:
            return self._discoveries.segment(salt, prompts, now, lengths) if prompts else None

        return Comparison(salt, num_cached, unmarked, compare)

    def _add_compared(self) -> None:
        """Let the jobs run whose prompts have been compared, cut into segments."""
        for one in self._compared.done():
            shared = one.found.result()
            if shared is not None:
                self._engine.recall(shared.earlier, one.salt)
                for job, prompt in zip(one.unmarked, shared.prompts, strict=True):
                    prompt.keep_hashes(job.request.prompt.prefix_hashes)
                    job.request.prompt = prompt
            requests = []
            for job, num_cached in one.num_cached.items():
                request = job.request
                # A request outside of rounds reads exact KV only. What is cached of a conversation
                # that goes on need not be exact, and is reused all the same.
                request.in_round = bool(request.prompt.shared_segments()) or num_cached > 0
                if request.finish_reason is None:  # else it was taken back
                    requests.append(request)
            self._engine.add(requests)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Abort the jobs of one request, whether they wait or run."""
        refuse(self.arrivals.remove(jobs), "The request was taken back.")
        for job in jobs:
            if job.request in self._live:
                self._abort(job, "The request was taken back.")

    def _abort(self, job: Job, why: str) -> None:
        """End a job that has begun; does nothing if it is done."""
        if job not in self._compared:
            self._engine.abort(job.request, why)
        elif job.request.finish_reason is None:
            job.request.error, job.request.finish_reason = AbortedError(why), "error"

    # -- one turn -------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Begin rounds that are due, compute one step, and send events."""
        self._now = now
        for jobs, named in self.arrivals.take(math.inf if self._is_stopping else now):
            if named is not None and named.round_id is None:
                named.round_id = self._engine.new_round_id()
            self.begin(jobs, named.round_id if named is not None else None)
        if self._is_stopping:
            self._shadows.close()
        elif self._live:
            self._shadows.give_way(now)
        if now > self._deadline_s:
            self.loader.stop()
            for job in self._live.values():
                self._abort(job, "The server is stopping.")
        self._compared.wait()
        self._add_compared()
        self._engine.tick(now)
        self.loader.go_on()
        self._publish()

    def pause_s(self, now: float) -> float | None:
        """Seconds until there is something to do if no command comes; None: for ever."""
        if self._engine.can_compute:
            return 0.0
        if self.loader:
            return self.loader.pause_s
        if self._compared:
            return _LOOK_S
        if self._is_stopping:
            return 0.0
        times_s = (self.arrivals.due_s(), self._engine.due_s())
        due_s = min((time_s for time_s in times_s if time_s is not None), default=None)
        return max(0.0, due_s - now) if due_s is not None else None

    def _publish(self) -> None:
        """Send new tokens and outputs to the jobs' listeners, and drop jobs that are done."""
        for request, job in list(self._live.items()):
            # A request that was restarted generates again the tokens that were sent already.
            new = tuple(request.generated[job.num_sent :]) if job.in_parts else ()
            if new and request.error is None:
                logprobs = tuple(request.logprobs[job.num_sent :])
                job.num_sent += len(new)
                job.on_event(NewTokens(new, logprobs))
            if request.finish_reason is not None:
                self._finish(job)

    def _finish(self, job: Job) -> None:
        request, has_answer = job.request, job.request.error is None
        del self._live[request]
        if has_answer and not job.marked:
            prompt = request.prompt
            self._discoveries.note_output(
                prompt.salt, prompt.token_ids, as_token_ids(request.generated)
            )
        if job.is_alone and has_answer and request.finished_s and request.arrived_s:
            self.arrivals.window.note_lone(request.finished_s - request.arrived_s)
        self.arrivals.note_done(job, has_answer=has_answer)
        job.on_event(make_output(request))

    # -- the end --------------------------------------------------------------------------------

    def stop_by(self, deadline_s: float) -> None:
        """Stop when all jobs are done; those that are not done at the deadline are aborted."""
        self._is_stopping = True
        self._deadline_s = min(self._deadline_s, deadline_s)

    @property
    def is_stopped(self) -> bool:
        """Whether it is to stop, and all jobs are done."""
        return self._is_stopping and not (self._live or self.arrivals or self.loader)

    def give_up(self) -> None:
        """Fail all jobs and loads, when the engine does not run any more."""
        self._compared.close()
        self.loader.stop()
        refuse([*self._live.values(), *self.arrivals.take_waiting()])


def refuse(jobs: Iterable[Job], why: str = "The engine has stopped.") -> None:
    """Fail jobs that will not run."""
    for job in jobs:
        job.request.error = AbortedError(why)
        job.request.finish_reason = "error"
        with contextlib.suppress(Exception):
            job.on_event(make_output(job.request))
