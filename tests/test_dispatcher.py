"""The dispatcher without a thread or a model: time passes only where a test says so."""

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest

from fake_executor import FakeExecutor
from serving import held_by
from test_server_sessions import FakeDurable
from tiny_models import said
from tokendance import LLM, SamplingParams
from tokendance.engine.request import Request, RequestId
from tokendance.errors import AbortedError, EngineError, StoreError
from tokendance.fidelity.idle_shadows import IDLE_S
from tokendance.outputs import Output
from tokendance.rounds import discoveries
from tokendance.rounds.discovery import Discovery
from tokendance.rounds.segments import Salt, TokenIds, build_prompt
from tokendance.server.comparisons import Comparisons
from tokendance.server.dispatcher import Dispatcher
from tokendance.server.jobs import Event, Job, NewTokens, RoundKey
from tokendance.server.kept_chats import KeptChat
from tokendance.server.metrics import Metrics
from tokendance.server.settings import ServerSettings
from tokendance.store.entries import RoundId
from tokendance.tier.steps import Steps

MakeLLM = Callable[..., LLM]
STEP_S = 0.001  # what a step takes here
# 64 tokens for the tokenizer of the tests, whose tokens are characters.
NEWS = "The baker says that bread is out until noon, so come back later."


class Desk:
    """A dispatcher over an engine of its own, and all who wait for its answers."""

    def __init__(self, llm: LLM, **settings: Any) -> None:
        self.llm = llm
        self.metrics = Metrics(llm)
        self.dispatcher = Dispatcher(llm, self.metrics, ServerSettings(**settings))
        self.dispatcher._compared = Comparisons(60)  # waits for them, unless a test says otherwise
        self.arrivals = self.dispatcher.arrivals
        self.now = 1000.0
        self._names = itertools.count()
        self._events: dict[Job, list[Event]] = {}

    def ask(
        self,
        text: str | None = None,
        *,
        tenant: str = "",
        name: str | None = None,
        size: int | None = None,
        session: "FakeChat | None" = None,
        max_tokens: int = 4,
        in_parts: bool = True,
    ) -> Job:
        """Let a request come now, of a named round if there is a name."""
        number = next(self._names)
        text = f"{number} {number} {number}: {NEWS} And you, {number}?" if text is None else text
        salt = Salt(tenant.encode())
        prompt = build_prompt([(self.llm.encoder.text_ids(text), False)], salt)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = self.llm.requests.of(prompt, params, f"agent {number}", RoundId(-1))
        events: list[Event] = []
        key = None if name is None else RoundKey(salt, name)
        job = Job(request, events.append, in_parts, key, size, chat=cast(KeptChat, session))
        self._events[job] = events
        self.arrivals.add([job], self.now)
        return job

    def run(self, seconds: float = math.inf) -> None:
        """Do what the engine's thread does for so long; without end until nothing is to be done."""
        end = self.now + seconds
        while (pause_s := self.dispatcher.pause_s(self.now)) is not None:
            if self.now + pause_s > end:
                break
            self.now += pause_s
            self.tick()
        if not math.isinf(end):
            self.now = max(self.now, end)

    def tick(self, steps: int = 1) -> None:
        """Compute some steps."""
        for _ in range(steps):
            self.dispatcher.tick(self.now)
            self.now += STEP_S

    def wait_for_comparison(self, job: Job) -> None:
        """Wait for the thread that compares the prompt of a job, if it has not done so."""
        for queue in list(self.dispatcher._compared._under_way.values()):
            for one in queue:
                if job in one.num_cached:
                    one.found.result(60)

    def cancel(self, *jobs: Job) -> None:
        """Let clients leave; the thread goes on after each command."""
        self.dispatcher.cancel(jobs)
        self.tick()

    def tokens(self, job: Job) -> list[int]:
        """What a job was told so far."""
        events = self._events[job]
        assert not any(isinstance(event, Output) for event in events[:-1])
        return [token for one in events if isinstance(one, NewTokens) for token in one.token_ids]

    def is_answered(self, job: Job) -> bool:
        """Whether a job was told all that there is to say, and that this was all."""
        events, request = self._events[job], job.request
        last = events[-1] if events else None
        if not isinstance(last, Output) or last.error is not None:
            return False
        assert list(last.token_ids) == self.tokens(job)
        assert self.tokens(job) == said(request.prompt.token_ids.tolist(), request.max_new_tokens)
        return True

    def refusal(self, job: Job) -> str:
        """Why a job has no answer."""
        last = self._events[job][-1]
        assert isinstance(last, Output)
        assert isinstance(last.error, AbortedError)
        return str(last.error)

    def is_empty(self) -> bool:
        """Whether nothing is left of anybody."""
        self.llm.engine.check_integrity()
        return not (
            self.llm.engine.has_work
            or any(held_by(self.dispatcher).values())
            or self.llm.engine.status().resident_pages
        )


class FakeChat(FakeDurable):
    """A kept session whose files are there when a test says so."""

    def __init__(self, name: str, num_files: int = 0, error: Exception | None = None) -> None:
        super().__init__(name, num_files, error)
        self.noted: list[RequestId] = []
        self.num_saved = 0

    def note(self, request: Request) -> None:
        self.noted.append(request.id)

    def saving(self) -> Steps[None]:
        yield from ()
        self.num_saved += 1


@pytest.fixture
def desk(make_fake_llm: MakeLLM) -> Desk:
    return Desk(make_fake_llm(num_pages=2000), window_ms=4, window_share=1.0, round_wait=0.25)


def rounds_of(*jobs: Job) -> int:
    """In how many rounds some jobs have begun."""
    assert all(job.request.round_id >= 0 for job in jobs)
    return len({job.request.round_id for job in jobs})


# -- rounds without a name ----------------------------------------------------------------------


def test_what_comes_within_moments_begins_together(desk: Desk) -> None:
    first = desk.ask()
    desk.run(0.003)
    second = desk.ask()
    desk.run(0.0035)
    assert not desk.llm.engine.has_work
    desk.run()
    assert desk.is_answered(first)
    assert desk.is_answered(second)
    assert rounds_of(first, second) == 1
    assert first.request.num_reused == 0
    assert second.request.num_reused > 0.8 * len(NEWS) - 10
    assert 'round_agents_bucket{le="2.0"} 1.0' in desk.metrics.text().decode()
    assert desk.is_empty()


def test_who_wants_the_whole_answer_is_told_of_no_part(desk: Desk) -> None:
    whole, parts = desk.ask(in_parts=False), desk.ask()
    desk.run()
    assert desk.is_answered(parts)
    (output,) = desk._events[whole]
    assert isinstance(output, Output)
    assert list(output.token_ids) == said(whole.request.prompt.token_ids.tolist(), 4)


def test_a_stream_of_arrivals_keeps_nobody_waiting_for_ever(desk: Desk) -> None:
    jobs = []
    while not desk.llm.engine.has_work:
        jobs.append(desk.ask(max_tokens=400))
        desk.run(0.002)
        assert len(jobs) < 100
    # As long as anything waits; what has come until then begins with it.
    assert len(jobs) == pytest.approx(0.1 / 0.002, abs=1)
    assert rounds_of(*jobs) == 1
    desk.run()


def test_a_round_waits_for_requests_that_are_being_read(desk: Desk) -> None:
    first = desk.ask()
    desk.arrivals.window.num_expected = 1
    desk.run(0.05)
    assert not desk.llm.engine.has_work
    desk.arrivals.window.num_expected = 0
    second = desk.ask()
    desk.run()
    assert rounds_of(first, second) == 1
    # One that cannot be read does not hold the others up for long.
    desk.arrivals.window.num_expected = 1
    third = desk.ask()
    desk.run(0.099)
    assert not desk.llm.engine.has_work
    desk.run(0.001)
    desk.run()
    assert desk.is_answered(third)
    desk.arrivals.window.num_expected = 0
    assert desk.is_empty()


def test_who_comes_late_joins_those_who_decode(desk: Desk) -> None:
    early = [desk.ask(max_tokens=20) for _ in range(3)]
    desk.run(0.004)
    desk.tick(3)
    late = desk.ask()
    desk.run()
    assert rounds_of(*early) == 1
    assert rounds_of(early[0], late) == 2
    assert late.request.num_reused > 0.8 * len(NEWS) - 10
    assert all(desk.is_answered(job) for job in (*early, late))
    executor = desk.llm.executor
    assert isinstance(executor, FakeExecutor)
    assert max(len(step.requests) for step in executor.steps) == 4


def test_two_tenants_in_one_window_share_nothing(desk: Desk) -> None:
    text = f"{NEWS} And you?"
    jobs = [desk.ask(text, tenant=tenant) for tenant in ("one", "two")]
    jobs += [desk.ask(f"I am another. {NEWS}", tenant=tenant) for tenant in ("one", "two")]
    desk.run()
    assert all(desk.is_answered(job) for job in jobs)
    assert rounds_of(*jobs) == 2
    assert rounds_of(jobs[0], jobs[2]) == rounds_of(jobs[1], jobs[3]) == 1
    # Each reads what its own tenant has computed; the first of each computes all.
    assert [job.request.num_reused > 40 for job in jobs] == [False, False, True, True]
    assert jobs[0].request.num_reused == jobs[1].request.num_reused == 0


def test_the_tenant_that_asked_longest_ago_is_forgotten(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discoveries, "_MAX_TENANTS", 2)

    def reuses(tenant: str) -> bool:
        job = desk.ask(tenant=tenant)
        desk.run()
        return job.request.num_reused > 0

    assert [reuses(tenant) for tenant in "aabbacb"] == [
        False,
        True,
        False,
        True,
        True,
        False,
        False,
    ]


def test_how_long_a_lone_request_takes_is_measured(make_fake_llm: MakeLLM) -> None:
    desk = Desk(make_fake_llm(), window_ms=50, window_share=0.05)
    window = desk.arrivals.window
    before = window.lone_s
    desk.ask("a")
    desk.ask("b")
    desk.run()
    assert window.lone_s == before
    desk.ask("c")
    desk.run()
    assert window.lone_s < before


# -- rounds with a name ---------------------------------------------------------------------------


def test_a_named_round_begins_when_all_are_there(desk: Desk) -> None:
    waiting = [desk.ask(name="r", size=3) for _ in range(2)]
    desk.run(0.2)
    other = desk.ask()
    desk.run(0.04)
    assert desk.is_answered(other)  # it is not in their round
    assert not any(desk.tokens(job) for job in waiting)
    jobs = [*waiting, desk.ask(name="r", size=3)]
    assert desk.dispatcher.pause_s(desk.now) == 0
    desk.run()
    assert all(desk.is_answered(job) for job in jobs)
    assert rounds_of(*jobs) == 1
    assert rounds_of(jobs[0], other) == 2
    assert desk.is_empty()


def test_a_named_round_begins_when_nobody_else_comes(desk: Desk) -> None:
    first = desk.ask(name="r", size=3)
    desk.run(0.2)
    second = desk.ask(name="r", size=3)
    desk.run(0.2)
    assert not desk.llm.engine.has_work
    assert desk.dispatcher.pause_s(desk.now) == pytest.approx(0.05)
    desk.run()
    assert desk.is_answered(first)
    assert desk.is_answered(second)
    # However they keep coming.
    begun_s = desk.now
    jobs = [desk.ask(name="s", max_tokens=400)]
    while not desk.llm.engine.has_work:
        desk.run(0.2)
        jobs.append(desk.ask(name="s", max_tokens=400))
    assert desk.now - begun_s == pytest.approx(10 * 0.25, abs=0.2)
    desk.run()


def test_who_comes_late_joins_a_named_round(desk: Desk) -> None:
    jobs = [desk.ask(name="r", size=2, max_tokens=20) for _ in range(2)]
    desk.tick(3)
    late = desk.ask(name="r", size=2)  # more than was said
    desk.tick()
    assert late.request.round_id == jobs[0].request.round_id
    desk.run()
    assert all(desk.is_answered(job) for job in (*jobs, late))
    # When it has ended its name is free.
    again = [desk.ask(name="r", size=2) for _ in range(2)]
    desk.run()
    assert rounds_of(*again) == 1
    assert rounds_of(jobs[0], again[0]) == 2


def test_rounds_of_one_name_are_each_tenants_own(desk: Desk) -> None:
    jobs = [desk.ask(name="r", size=2, tenant=tenant) for tenant in ("one", "two")]
    desk.tick()
    assert not desk.llm.engine.has_work
    assert desk.arrivals.num_named == 2
    desk.run()
    assert rounds_of(*jobs) == 2


# -- clients that leave ---------------------------------------------------------------------------


def test_who_leaves_before_its_round_begins_is_not_counted(desk: Desk) -> None:
    stays = desk.ask(name="r", size=3)
    for _ in range(2):
        leaves = desk.ask(name="r", size=3)
        desk.tick()
        desk.cancel(leaves)
        assert desk.refusal(leaves) == "The request was taken back."
    again = desk.ask(name="r", size=3)
    desk.tick()
    assert not desk.llm.engine.has_work
    jobs = [stays, again, desk.ask(name="r", size=3)]
    desk.run()
    assert all(desk.is_answered(job) for job in jobs)
    desk.cancel(*jobs)  # nothing happens to those that are done
    assert all(desk.is_answered(job) for job in jobs)
    assert desk.is_empty()


def test_a_round_that_all_leave_before_it_begins_is_gone(desk: Desk) -> None:
    jobs = [desk.ask(name="r", size=3), desk.ask(name="r", size=3), desk.ask()]
    for job in jobs:
        desk.cancel(job)
    assert desk.dispatcher.pause_s(desk.now) is None
    assert desk.is_empty()
    executor = desk.llm.executor
    assert isinstance(executor, FakeExecutor)
    assert not executor.steps


@pytest.mark.parametrize("name", [None, "r"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_who_leaves_a_round_that_has_begun_harms_nobody(
    desk: Desk, name: str | None, steps: int
) -> None:
    jobs = [desk.ask(name=name, size=3, max_tokens=9) for _ in range(3)]
    desk.now += 0.004
    desk.tick(steps)
    assert all(desk.tokens(job) for job in jobs)
    leaves, *stay = jobs
    desk.cancel(leaves)
    assert desk.refusal(leaves) == "The request was taken back."
    assert leaves.request.allocation is None
    desk.run()
    assert all(desk.is_answered(job) for job in stay)
    assert desk.is_empty()


# -- sessions that are being loaded ---------------------------------------------------------------


def test_others_are_answered_while_a_session_is_loaded(desk: Desk) -> None:
    chat = FakeChat("town", num_files=2)
    waits = desk.ask(name="r", size=1, session=chat)
    for file in chat.files:
        other = desk.ask()
        desk.run(0.1)
        assert desk.is_answered(other)
        assert not desk.tokens(waits)
        file.set_result(None)
    desk.run()
    assert desk.is_answered(waits)
    assert chat.noted == [waits.request.id]
    assert chat.num_saved == 1
    assert desk.is_empty()


def test_a_round_of_several_sessions_loads_and_keeps_each(desk: Desk) -> None:
    """Whoever of its requests ends last, or leaves before it begins."""
    ann, bo, cy = (FakeChat(name, num_files=1) for name in ("ann", "bo", "cy"))
    longest = desk.ask(name="r", size=4, session=ann, max_tokens=9)
    jobs = [longest, *(desk.ask(name="r", size=4, session=chat) for chat in (bo, ann))]
    leaves = desk.ask(name="r", size=4, session=cy)
    for chat in (ann, bo):
        desk.run(0.5)
        assert not desk.llm.engine.has_work  # there are sessions that are not loaded
        chat.files[0].set_result(None)
    desk.cancel(leaves)
    cy.files[0].set_result(None)
    desk.run()
    assert all(desk.is_answered(job) for job in jobs)
    assert rounds_of(*jobs) == 1
    assert {job.request.id for job in (longest, jobs[2])} == set(ann.noted)
    assert bo.noted == [jobs[1].request.id]
    # Each once, when all are done.
    assert [chat.num_saved for chat in (ann, bo, cy)] == [1, 1, 0]


def test_a_session_of_a_round_that_is_left_in_the_middle_is_kept(desk: Desk) -> None:
    ann, bo = FakeChat("ann"), FakeChat("bo")
    stays = desk.ask(name="r", size=2, session=ann)
    leaves = desk.ask(name="r", size=2, session=bo, max_tokens=400)
    desk.run(0)
    desk.tick(5)
    assert desk.is_answered(stays)
    assert ann.num_saved == 0
    desk.cancel(leaves)
    desk.run()
    assert (ann.num_saved, bo.num_saved) == (1, 0)
    assert desk.is_empty()


def test_a_session_that_cannot_be_loaded_is_computed(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    chat = FakeChat("town", num_files=1, error=StoreError("The file is gone."))
    job = desk.ask(name="r", size=1, session=chat)
    desk.tick(2)
    assert not desk.tokens(job)
    chat.files[0].set_result(None)
    desk.run()
    assert desk.is_answered(job)
    assert "The file is gone." in caplog.text


# -- the end --------------------------------------------------------------------------------------


def test_whoever_stops_finishes_what_is_under_way(desk: Desk) -> None:
    jobs = [desk.ask(max_tokens=9)]
    desk.run(0.004)
    jobs += [desk.ask(), desk.ask(name="r", size=3)]
    desk.dispatcher.stop_by(desk.now + 10)
    assert not desk.dispatcher.is_stopped
    desk.tick()  # nobody waits for others any more
    assert all(job.request.round_id >= 0 for job in jobs)
    while not desk.dispatcher.is_stopped:
        desk.tick()
    assert all(desk.is_answered(job) for job in jobs)
    assert desk.is_empty()


def test_what_takes_too_long_is_ended_in_time(desk: Desk) -> None:
    chat = FakeChat("town", num_files=1)
    quick, slow = desk.ask(), desk.ask(max_tokens=400)
    waits = desk.ask(name="r", size=1, session=chat)
    desk.run(0.004)
    desk.dispatcher.stop_by(desk.now + 5)
    desk.dispatcher.stop_by(desk.now + 50)  # a later time is no reprieve
    desk.tick(10)
    assert desk.is_answered(quick)
    assert len(desk.tokens(slow)) > 4
    assert not desk.dispatcher.is_stopped
    desk.now += 5
    desk.tick(3)
    assert desk.refusal(slow) == "The server is stopping."
    assert desk.refusal(waits) == "The server is stopping."
    assert desk.dispatcher.is_stopped
    assert chat.is_closed
    assert desk.is_empty()


def test_an_engine_that_fails_leaves_nobody_waiting(desk: Desk) -> None:
    executor = desk.llm.executor
    assert isinstance(executor, FakeExecutor)
    running = desk.ask(max_tokens=9)
    desk.run(0.004)
    executor.fail = RuntimeError("once")
    desk.tick()  # one failed pass fails its requests, and that is all
    assert "once" in str(running.request.error)
    begun = desk.ask(name="s", size=1)
    executor.fail = RuntimeError("twice")
    waiting = [desk.ask(), desk.ask(name="r", size=2)]
    with pytest.raises(EngineError, match="twice"):
        desk.tick()
    desk.dispatcher.give_up()
    for job in (begun, *waiting):
        assert desk.refusal(job) == "The engine has stopped."


def test_what_was_just_taken_out_of_the_queue_is_told_too(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(desk.llm.engine, "add", fail)
    jobs = [desk.ask(), desk.ask(name="r", size=1)]
    desk.now += 0.004
    with pytest.raises(MemoryError):
        desk.tick()
    desk.dispatcher.give_up()
    assert [desk.refusal(job) for job in jobs] == ["The engine has stopped."] * 2


@pytest.fixture
def may_compare(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Keeps threads from comparing several prompts until it is set; nobody waits for them."""
    desk.dispatcher._compared = Comparisons(0)
    may_go_on, segment = threading.Event(), Discovery.segment

    def wait(self: Discovery, prompts: Sequence[TokenIds], *arguments: Any) -> Any:
        if len(prompts) > 1:
            assert may_go_on.wait(60)
        return segment(self, prompts, *arguments)

    monkeypatch.setattr(Discovery, "segment", wait)
    yield may_go_on
    may_go_on.set()


def test_others_go_on_while_many_prompts_are_compared(
    desk: Desk, may_compare: threading.Event
) -> None:
    many = [desk.ask() for _ in range(4)]
    gone = desk.ask()
    desk.run(0.01)
    behind = desk.ask("And you?")  # is not compared with what is not remembered yet
    other = desk.ask("What is new?", tenant="other")
    desk.run(0.1)  # longer than anybody waits for others of a round
    assert other.request.round_id >= 0
    desk.wait_for_comparison(other)
    desk.run(0.1)
    assert desk.is_answered(other)
    assert not any(desk.tokens(job) for job in (*many, behind))
    desk.cancel(gone)
    assert desk.refusal(gone) == "The request was taken back."
    may_compare.set()
    desk.run()
    assert all(desk.is_answered(job) for job in (*many, behind))
    assert rounds_of(*many) == 1
    assert all(job.request.prompt.shared_segments() for job in many)
    assert desk.is_empty()


def test_nobody_waits_for_prompts_that_are_compared_at_the_end(
    desk: Desk, may_compare: threading.Event
) -> None:
    jobs = [desk.ask() for _ in range(4)]
    desk.run(0.01)
    desk.dispatcher.stop_by(desk.now + 1)
    desk.run(2)
    assert [desk.refusal(job) for job in jobs] == ["The server is stopping."] * 4
    assert not may_compare.is_set()


def test_where_prompts_cannot_be_compared_nothing_is_found(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Discovery, "segment", fail)
        jobs = [desk.ask(), desk.ask()]
        desk.run()
    assert all(desk.is_answered(job) and job.request.num_reused == 0 for job in jobs)
    assert "could not be compared" in caplog.text
    later = [desk.ask(), desk.ask()]
    desk.run()
    assert later[1].request.num_reused > 0


# -- shadows --------------------------------------------------------------------------------------


def test_shadows_run_while_nobody_waits(make_fake_llm: MakeLLM) -> None:
    desk = Desk(make_fake_llm(num_pages=2000, shadow=1.0), window_ms=4, window_share=1.0)
    jobs = [desk.ask() for _ in range(4)]
    desk.run(0.5)
    assert all(desk.is_answered(job) for job in jobs)
    assert "shadow_kl_nats_count 0.0" in desk.metrics.text().decode()
    assert 0 < (desk.dispatcher.pause_s(desk.now) or 0) < IDLE_S
    desk.now += desk.dispatcher.pause_s(desk.now) or 0
    desk.tick()
    assert desk.llm.engine.has_work
    late = desk.ask()  # who comes in the middle of one
    desk.now += 0.004
    desk.tick()
    assert desk.tokens(late)
    desk.run()
    assert desk.is_answered(late)
    assert "shadow_kl_nats_count 4.0" in desk.metrics.text().decode()  # those of five mirrors
    assert desk.is_empty()


def test_no_shadow_begins_when_the_server_stops(make_fake_llm: MakeLLM) -> None:
    desk = Desk(make_fake_llm(num_pages=2000, shadow=1.0), window_ms=4, window_share=1.0)
    desk.ask()
    desk.ask()
    desk.run(0.004)
    desk.dispatcher.stop_by(desk.now + 10)
    while not desk.dispatcher.is_stopped:
        desk.tick()
    desk.now += 2 * IDLE_S
    desk.tick()
    assert not desk.llm.engine.has_work
