"""The dispatcher: from jobs to rounds, from the engine to those who wait for answers.

    jobs -> arrivals -> discovery -> engine.add -> engine.tick -> job.on_event(event)

All of it happens on the engine's thread. It has no thread and no clock of its own: whoever drives
it calls `tick`, and `pause_s` says how long there is nothing to do.
"""

import contextlib
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from tokendance.engine.request import Request, make_output
from tokendance.errors import AbortedError
from tokendance.fidelity.idle_shadows import IdleShadows
from tokendance.llm import LLM
from tokendance.rounds.discovery import Discovery, DiscoveryConfig
from tokendance.rounds.segments import Salt
from tokendance.server.arrivals import Arrivals
from tokendance.server.jobs import Job, NewTokens
from tokendance.server.loading import Loader
from tokendance.server.metrics import Metrics
from tokendance.server.settings import ServerSettings
from tokendance.store.entries import RoundId

log = logging.getLogger("tokendance.server")

# Tenants whose shared text is remembered; the one that asked longest ago is forgotten.
_MAX_TENANTS = 64


class Dispatcher:
    """Begins rounds, tells jobs what is new, and lets go of what is done; see the module.

    Attributes:
        arrivals: jobs that have not begun.
        loader: sessions that are being read from disk.
    """

    def __init__(self, llm: LLM, metrics: Metrics, settings: ServerSettings) -> None:
        """Drive the engine of an LLM, which nobody else may use then."""
        self._engine = llm.engine
        self._shadows = IdleShadows(llm.shadows, llm.engine, metrics.note_shadow)
        self._discovery = DiscoveryConfig(recent_s=settings.recent)
        self.loader = Loader()
        self.arrivals = Arrivals(self.loader, settings)
        self._discoveries: OrderedDict[Salt, Discovery] = OrderedDict()
        self._live: dict[Request, Job] = {}
        self._is_stopping = False
        self._deadline_s = math.inf  # when what is under way is ended
        self._now = 0.0
        self._engine.observe(metrics)
        self._engine.attach(self._shadows)

    # -- jobs come and go -----------------------------------------------------------------------

    def begin(self, jobs: Sequence[Job], round_id: RoundId | None = None) -> None:
        """Begin jobs that came together; those of one tenant make a round.

        Args:
            jobs: to begin.
            round_id: of the engine, for jobs of one tenant; a new one for each tenant if left out.
        """
        by_salt: dict[Salt, list[Job]] = {}
        for job in jobs:
            self._live[job.request] = job  # so that they are answered even if what follows fails
            by_salt.setdefault(job.request.prompt.salt, []).append(job)
        for salt, of_tenant in by_salt.items():
            # Tokens at the beginning of each prompt whose KV is there already.
            num_cached = {job: self._engine.num_known(job.request.prompt) for job in of_tenant}
            self._discover(salt, num_cached)
            own_round = self._engine.new_round_id() if round_id is None else round_id
            for job in of_tenant:
                request = job.request
                request.round_id = own_round
                # A lone request that shares nothing is computed exactly, unless it goes on from
                # what was not.
                request.in_round = bool(request.prompt.shared_segments()) or num_cached[job] > 0
                job.is_alone = len(of_tenant) == 1
            self._engine.add([job.request for job in of_tenant])

    def _discover(self, salt: Salt, num_cached: Mapping[Job, int]) -> None:
        """Cut the prompts of jobs into segments, where clients have not; by what is shared."""
        unmarked = [job for job in num_cached if not job.marked]
        if not unmarked or not self._engine.options.reuses_segments:
            return
        if salt not in self._discoveries:
            self._discoveries[salt] = Discovery(salt, self._discovery)
            if len(self._discoveries) > _MAX_TENANTS:
                self._discoveries.popitem(last=False)
        self._discoveries.move_to_end(salt)
        try:
            shared = self._discoveries[salt].segment(
                [job.request.prompt.token_ids for job in unmarked],
                self._now,
                [num_cached[job] for job in unmarked],
            )
        except Exception:  # nothing is found then, and all are served
            log.exception("prompts could not be compared; what was remembered is forgotten")
            del self._discoveries[salt]
            return
        self._engine.recall(shared.earlier, salt)
        for job, prompt in zip(unmarked, shared.prompts, strict=True):
            job.request.prompt = prompt

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End the jobs of one request, wherever they are, but for those that are done."""
        refuse(self.arrivals.remove(jobs), "The request was taken back.")
        for job in jobs:
            if job.request in self._live:
                self._engine.abort(job.request)

    # -- one turn -------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Begin what is due, compute one step, and tell the jobs what is new."""
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
            for request in self._live:
                self._engine.abort(request, "The server is stopping.")
        self._engine.tick(now)
        self.loader.go_on()
        self._publish()

    def pause_s(self, now: float) -> float | None:
        """How long there is nothing to do if nothing comes; None: for ever."""
        if self._engine.can_compute:
            return 0.0
        if self.loader:
            return self.loader.pause_s
        if self._is_stopping:
            return 0.0
        times_s = (self.arrivals.due_s(), self._engine.due_s())
        due_s = min((time_s for time_s in times_s if time_s is not None), default=None)
        return max(0.0, due_s - now) if due_s is not None else None

    def _publish(self) -> None:
        """Tell jobs what is new, and let go of those that are done."""
        for request, job in list(self._live.items()):
            # A request that began anew generates again what was sent already.
            new = tuple(request.generated[job.num_sent :])
            if new and request.error is None:
                logprobs = tuple(request.logprobs[job.num_sent :])
                job.num_sent += len(new)
                job.on_event(NewTokens(new, logprobs))
            if request.finish_reason is not None:
                self._finish(job)

    def _finish(self, job: Job) -> None:
        request, has_answer = job.request, job.request.error is None
        del self._live[request]
        if job.is_alone and has_answer and request.finished_s and request.arrived_s:
            self.arrivals.window.note_lone(request.finished_s - request.arrived_s)
        self.arrivals.note_done(job, has_answer=has_answer)
        job.on_event(make_output(request))

    # -- the end --------------------------------------------------------------------------------

    def stop_by(self, deadline_s: float) -> None:
        """Finish what is under way, and end what is not done at a clock time."""
        self._is_stopping = True
        self._deadline_s = min(self._deadline_s, deadline_s)

    @property
    def is_stopped(self) -> bool:
        """Whether it was told to stop, and nothing is under way any more."""
        return self._is_stopping and not (self._live or self.arrivals or self.loader)

    def give_up(self) -> None:
        """Tell all who wait that nothing comes any more."""
        self.loader.stop()
        refuse([*self._live.values(), *self.arrivals.take_waiting()])


def refuse(jobs: Iterable[Job], why: str = "The engine has stopped.") -> None:
    """Answer jobs that nobody will run."""
    for job in jobs:
        job.request.error = AbortedError(why)
        job.request.finish_reason = "error"
        with contextlib.suppress(Exception):
            job.on_event(make_output(job.request))
