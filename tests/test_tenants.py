"""Tenants beside each other: nobody waits long for what others ask, and nobody waits for ever.

Passes take time here: so long for the weights, and so long for each token.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from fake_executor import FakeExecutor
from test_dispatcher import Desk
from tiny_models import SPECIALS, VOCAB, said
from tokendance import LLM, Prompt, SamplingParams, private, shared
from tokendance.engine.request import Request
from tokendance.engine.scheduling import Pace
from tokendance.engine.tenants import TenantRules
from tokendance.errors import BudgetError, ConfigError
from tokendance.executor.step import StepInput, StepOutput
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions
from tokendance.rounds.segments import Salt
from tokendance.store.pages import Holder

# What a pass takes: much as a small model on two cores.
PASS_S, TOKEN_S = 0.04, 0.0015
# The longest that a small request may take beside others, once the pass under way has ended.
SOON_S = 2.0
SMALL = "What is new? Tell me now please."  # a token for each character


class TimedExecutor(FakeExecutor):
    """An executor whose passes take time, which is its own.

    Attributes:
        now: seconds.
    """

    now = 0.0

    def execute(self, step: StepInput) -> StepOutput:
        """See `FakeExecutor`."""
        self.now += PASS_S + TOKEN_S * step.num_tokens
        return super().execute(step)


class Place:
    """An engine whose clock is that of its passes, and several tenants."""

    def __init__(
        self, fake: LoadedModel, num_pages: int = 2000, num_tenants: int = 2, **options: Any
    ) -> None:
        self.executor = TimedExecutor(num_pages * 16, VOCAB, SPECIALS)
        self.llm = LLM.from_loaded(
            fake,
            EngineOptions(kv_budget=num_pages * 16 * 8, **options),
            executor=self.executor,
        )
        self.engine = self.llm.engine
        self._numbers = itertools.count()
        self.engine._engine._clock = lambda: self.executor.now
        self.engine._engine.scheduler._clock = self.engine._engine._clock
        self.engine.set_tenants(TenantRules(num_tenants=num_tenants, reserved=0.25))

    def add(self, tenant: str, prompts: Sequence[Prompt], max_tokens: int = 5) -> list[Request]:
        """Let a tenant ask for a round."""
        encoder = self.llm.encoder.with_salt(Salt(tenant.encode()))
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        round_id = self.engine.new_round_id()
        requests = [
            self.llm.requests.of(
                encoder.encode(prompt),
                params,
                prompt.agent or tenant,
                round_id,
                isolated=prompt.reuse == "exact",
            )
            for prompt in prompts
        ]
        self.engine.add(requests)
        return requests

    def ask(self, tenant: str, num_tokens: int = 31, max_tokens: int = 5) -> Request:
        """Let a tenant ask one thing, which it has not asked before."""
        token = 10 + next(self._numbers) % 250
        (request,) = self.add(tenant, [Prompt([private([token] * num_tokens)])], max_tokens)
        return request

    def run(self, *requests: Request) -> None:
        """Go on until some requests are done; until all are, if none is given."""
        steps = 0
        while self.engine.has_work:
            if requests and all(request.finish_reason for request in requests):
                break
            self.engine.tick(self.executor.now)
            steps += 1
            if steps % 16 == 1:
                self.engine.check_integrity()
            assert steps < 20_000, "a request never finished"
        assert all(request.finish_reason for request in requests)

    def seconds(self, request: Request) -> float:
        """How long a request takes."""
        begun = self.executor.now
        self.run(request)
        assert request.error is None
        assert request.generated == said(request.prompt.token_ids.tolist(), request.max_new_tokens)
        return self.executor.now - begun


# -- what a server promises -----------------------------------------------------------------------


def crowded(fake: LoadedModel, num_pages: int) -> tuple[Desk, TimedExecutor]:
    executor = TimedExecutor(num_pages * 16, VOCAB, SPECIALS)
    llm = LLM.from_loaded(fake, EngineOptions(kv_budget=num_pages * 16 * 8), executor=executor)
    llm.engine._engine._clock = lambda: executor.now
    return Desk(llm, api_keys=("one", "two"), window_ms=0), executor


def seconds_of_a_small_request(desk: Desk, executor: TimedExecutor) -> float:
    begun = executor.now
    job = desk.ask(SMALL, tenant="two", max_tokens=8)
    while job.request.finish_reason is None:
        desk.tick()
    assert desk.is_answered(job)
    return executor.now - begun


def test_long_answers_of_one_key_leave_memory_for_anothers(fake: LoadedModel) -> None:
    desk, executor = crowded(fake, num_pages=12 * 30)
    hogs = [desk.ask(f"{n}: tell me all.", tenant="one", max_tokens=500) for n in range(12)]
    desk.tick(3)
    assert desk.llm.engine.status().num_waiting
    for _ in range(3):
        assert seconds_of_a_small_request(desk, executor) < SOON_S
    desk.run()
    assert all(desk.is_answered(job) for job in hogs)
    assert desk.is_empty()


def test_long_prompts_of_one_key_leave_time_for_anothers(fake: LoadedModel) -> None:
    desk, executor = crowded(fake, num_pages=4000)
    hogs = [desk.ask(f"{n} " * 2000, tenant="one") for n in range(4)]
    desk.tick()
    for _ in range(3):
        assert seconds_of_a_small_request(desk, executor) < SOON_S
        assert not any(job.request.finish_reason for job in hogs)
    desk.run()
    assert all(desk.is_answered(job) for job in hogs)
    assert desk.is_empty()


def test_a_crowd_of_one_key_leaves_time_for_anothers(fake: LoadedModel) -> None:
    """Each of its answers is one token of a pass, and there are hundreds of them."""
    desk, executor = crowded(fake, num_pages=8000)
    for n in range(300):
        desk.ask(f"{n}?", tenant="one", max_tokens=50)
    for _ in range(40):  # before each pass some are admitted
        desk.tick()
        if desk.llm.engine.status().num_running == 300:
            break
    assert desk.llm.engine.status().num_running == 300
    assert seconds_of_a_small_request(desk, executor) < SOON_S
    desk.run()
    assert desk.is_empty()


# -- turns ----------------------------------------------------------------------------------------


def order_of_ends(place: Place, jobs: dict[Request, str]) -> str:
    """In which order requests of some tenants end, by the tenants' names."""
    ended = ""
    while place.engine.has_work:
        place.engine.tick()
        ended += "".join(tenant for request, tenant in jobs.items() if request.finish_reason)
        jobs = {request: tenant for request, tenant in jobs.items() if not request.finish_reason}
    return ended


def test_whoever_has_used_least_is_admitted_next(fake: LoadedModel) -> None:
    place = Place(fake, num_pages=8, num_tenants=1)  # one request at a time
    assert order_of_ends(place, {place.ask(tenant, 80): tenant for tenant in "aaabc"}) == "abcaa"


def test_idling_saves_up_nothing(fake: LoadedModel) -> None:
    place = Place(fake, num_pages=8, num_tenants=1)
    *many, last = [place.ask("a", 80) for _ in range(10)]
    place.run(place.ask("b", 16))  # it has been here before, and used little
    place.run(*many)
    place.engine.tick()
    assert last.num_computed
    # What both use counts from now on, so they alternate.
    jobs = {place.ask(tenant, 80): tenant for tenant in "aaabbb"}
    assert order_of_ends(place, jobs) == "bababa"


def test_two_that_always_want_more_get_the_same(fake: LoadedModel) -> None:
    place = Place(fake, num_pages=4000, num_tenants=3)
    one = [place.ask("one", 2000) for _ in range(4)]
    place.engine.tick()
    before = sum(request.num_computed for request in one)
    # Many small ones are worth as much as few large ones.
    two = [place.ask("two", 100, 50) for _ in range(80)]
    for _ in range(60):
        place.engine.tick()
    computed = [sum(request.num_computed for request in jobs) for jobs in (one, two)]
    assert computed[0] - before == pytest.approx(computed[1], abs=64)
    place.run()


def test_what_is_admitted_counts_before_it_is_computed(fake: LoadedModel) -> None:
    place = Place(fake, num_pages=100, num_tenants=1, max_num_batched_tokens=64)
    place.ask("a", 1000)  # 63 pages
    place.engine.tick()
    # There is room for six more.
    some = [place.ask("a", 80, 10) for _ in range(6)]
    others = [place.ask("b", 80, 10) for _ in range(6)]
    place.engine.tick()
    assert not any(request.allocation for request in some)
    assert all(request.allocation for request in others)
    place.run()
    # And so it does among those that come at the same time.
    several = [[place.ask(tenant, 80, 200) for _ in range(5)] for tenant in "ab"]
    place.engine.tick()
    assert [sum(r.allocation is not None for r in requests) for requests in several] == [3, 2]
    place.run()


def test_one_alone_has_short_passes_where_others_may_soon_be_back(fake: LoadedModel) -> None:
    place = Place(fake)
    rules = TenantRules(num_tenants=2, reserved=0.25, pass_s=0.1, alone=2.5)
    place.engine.set_tenants(rules)

    def longest_pass() -> float:
        first = len(place.executor.steps)
        place.run(*[place.ask("a", 4000) for _ in range(2)])
        return max(PASS_S + TOKEN_S * step.num_tokens for step in place.executor.steps[first:])

    assert longest_pass() > 3  # nobody else has ever been there
    place.run(*[place.ask(tenant, 400) for tenant in "ab"])
    assert 0.15 < longest_pass() < 0.5
    place.executor.now += 61
    assert longest_pass() > 3


def test_a_burst_is_admitted_little_by_little(fake: LoadedModel) -> None:
    place = Place(fake)
    scheduler = place.engine._engine.scheduler
    place.engine.set_tenants(TenantRules(num_tenants=2, admission_s=2.5))
    looks = itertools.count()
    scheduler._clock = lambda: float(next(looks))  # a second for each
    burst = [place.ask("a") for _ in range(7)]
    sizes = []
    while scheduler.num_waiting:
        sizes.append(len(scheduler.admit()[0]))
    assert sizes == [3, 3, 1]
    assert scheduler.running == burst
    place.run(*burst)


def test_who_has_nothing_running_is_admitted_with_a_burst_of_another(fake: LoadedModel) -> None:
    place = Place(fake)
    scheduler = place.engine._engine.scheduler
    place.engine.set_tenants(TenantRules(num_tenants=2, reserved=0.5, admission_s=2.5))
    looks = itertools.count()
    scheduler._clock = lambda: float(next(looks))  # a second for each
    burst = [place.ask("a") for _ in range(7)]
    others = [place.ask("b") for _ in range(2)]
    scheduler._tenants.of(others[0]).used = 10_000  # so it is the turn of the burst
    assert scheduler.admit()[0] == [*burst[:3], others[0]]
    assert scheduler.admit()[0] == burst[3:6]
    place.run(*burst, *others)


def test_each_has_a_part_of_a_pass_and_what_others_leave(fake: LoadedModel) -> None:
    """Also who has used much; and who has used little has no more than its part."""
    place = Place(fake, num_pages=4000)
    used_much = place.ask("one", 3000, 100)
    place.ask("two", 16, 300)
    while not used_much.generated:
        place.engine.tick()
    place.ask("two", 3000)
    for number in range(2, 40):
        num_tokens = place.engine._engine.scheduler.pace.num_tokens
        place.engine.tick()
        assert len(used_much.generated) == number
        assert place.executor.steps[-1].num_tokens == num_tokens
    place.ask("one", 2000)
    place.engine.tick()
    place.engine.tick()
    decoding, *prompts = sorted(len(r.positions) for r in place.executor.steps[-1].requests)[1:]
    assert decoding == 1
    assert prompts[0] == pytest.approx(prompts[1], abs=1)
    place.run()


def test_isolated_requests_take_turns_too(fake: LoadedModel) -> None:
    place = Place(fake, num_pages=4000)
    prompts = [Prompt([private([20 + n] * 3000)], reuse="exact") for n in range(3)]
    place.add("one", prompts, 50)
    place.engine.tick()
    (small,) = place.add("two", [Prompt([private([7] * 31)], reuse="exact")])
    assert place.seconds(small) < SOON_S
    place.run()


# -- memory ---------------------------------------------------------------------------------------


def test_what_is_reserved_no_other_takes(fake: LoadedModel) -> None:
    place = Place(fake, num_pages=80, num_tenants=4)  # 5 pages for each
    many = [place.ask("one", 40, 40) for _ in range(20)]
    place.engine.tick()
    held = place.engine.status().resident_pages
    assert 80 - 15 - 5 < held <= 80 - 15
    # Each of the others still has its own.
    small = [place.ask(tenant, 31, 9) for tenant in ("two", "three", "four")]
    place.engine.tick()
    assert all(request.allocation is not None for request in small)
    place.run()
    assert all(request.error is None for request in many)


def test_pages_that_are_read_from_disk_are_no_tenants(fake: LoadedModel) -> None:
    """A request may hold pages that a load holds, too, and outlive the load or end before it."""
    for load_ends_first in (True, False):
        place = Place(fake, num_pages=80, num_tenants=2)
        pool = place.llm.kv_store.pool
        first = place.ask("one", 64, 40)
        place.engine.tick()
        assert first.allocation is not None
        loading = first.allocation.pages.copy()
        pool.retain(loading, Holder.REQUEST)
        place.llm.kv_store.in_transit["load"] = [loading]
        second = place.ask("one", 64, 3)
        place.engine.tick()
        for ends in ("load", "request") if load_ends_first else ("request", "load"):
            if ends == "load":
                pool.release(loading, Holder.REQUEST)
                del place.llm.kv_store.in_transit["load"]
            else:
                place.engine.abort(first)
            place.engine.check_integrity()
        place.run(second)
        place.engine.check_integrity()


def test_pages_for_all_are_kept_for_whoever_is_next(fake: LoadedModel) -> None:
    place = Place(fake, num_pages=80, num_tenants=4)
    place.ask("one", 40, 300)  # 22 pages
    place.engine.tick()
    large = place.ask("two", 800, 5)  # 51 of the 65 that it may have
    flood = [place.ask("three", 31, 5 + number % 7) for number in range(300)]
    place.run(large)
    # It waited for the first; the flood went on in its own pages, and no others.
    assert sum(request.finish_reason is not None for request in flood) < 150
    place.run()
    assert all(request.error is None for request in flood)


def test_what_is_too_large_beside_others_is_refused(fake: LoadedModel) -> None:
    place = Place(fake, num_pages=80, num_tenants=4)
    place.ask("one", 31, 100)
    too_large = place.ask("two", 1100, 5)
    fits = place.ask("two", 900, 5)
    place.engine.tick()
    assert isinstance(too_large.error, BudgetError)
    assert "of which one tenant may have" in str(too_large.error)
    assert "--reserved-kv" in str(too_large.error)
    place.run()
    assert fits.error is None
    alone = Place(fake, num_pages=80, num_tenants=1)
    assert alone.seconds(alone.ask("two", 1100, 5))


def test_each_has_a_page_or_the_server_does_not_start(fake: LoadedModel) -> None:
    place = Place(fake, num_pages=5, num_tenants=4)
    with pytest.raises(ConfigError, match="--kv-budget"):
        place.engine.set_tenants(TenantRules(num_tenants=6, reserved=0.25))
    place.engine.set_tenants(TenantRules(num_tenants=6))
    assert place.seconds(place.ask("one", 31, 9))


# -- one alone ------------------------------------------------------------------------------------


def test_one_alone_is_served_as_if_there_were_no_tenants(fake: LoadedModel) -> None:
    """With several keys as with none: the same steps, and full ones."""
    steps = []
    for num_tenants in (1, 3):
        place = Place(fake, num_tenants=num_tenants, max_num_batched_tokens=70)
        for n in range(3):
            heard = [shared([20 + b] * 20) for b in range(3)]
            prompts = [
                Prompt([private([40 + n + a] * (9 + a)), *heard, private([7])], agent=str(a))
                for a in range(4)
            ]
            place.add("one", prompts)
            place.engine.tick()
        place.run()
        steps.append(
            [
                [(request.positions.tolist(), request.slots.tolist()) for request in step.requests]
                for step in place.executor.steps
            ]
        )
    assert steps[0] == steps[1]
    assert max(sum(len(positions) for positions, _ in step) for step in steps[0]) == 70


# -- how long a pass may be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pass_s", "token_s", "least", "most"),
    [(0.04, 0.0015, 30, 50), (0.5, 0.05, 32, 32), (0.002, 0.00001, 5000, 10_000)],
)
def test_the_pace_is_found(pass_s: float, token_s: float, least: int, most: int) -> None:
    pace = Pace()
    pace.pass_s = 0.1
    for _ in range(30):
        pace.note(pace.num_tokens, pass_s + token_s * pace.num_tokens)
    assert least <= pace.num_tokens <= most
    before = pace.num_tokens
    pace.note(before, 60.0)  # the machine did something else
    assert pace.num_tokens >= before // 2
    pace.note(1, 0.0)  # says nothing
    assert pace.num_tokens >= before // 2


@pytest.mark.parametrize(("beside_s", "share"), [(0.02, 0.8), (0.08, 0.5)])
def test_what_is_done_around_a_pass_is_counted(beside_s: float, share: float) -> None:
    pace = Pace()
    pace.pass_s = 0.1
    for _ in range(30):
        pace.note(pace.num_tokens, 0.001 * pace.num_tokens, beside_s)
    assert pace.num_tokens == pytest.approx(100 * share, rel=0.05)


# -- properties -----------------------------------------------------------------------------------

floods = st.lists(
    st.tuples(
        st.sampled_from(["one", "two"]),
        st.integers(1, 6),  # agents
        st.integers(0, 3),  # shared blocks
        st.sampled_from([3, 60, 600]),  # own tokens
        st.sampled_from([1, 20, 80]),  # of the answer
        st.booleans(),  # isolated
        st.integers(0, 4),  # steps until the next
    ),
    min_size=1,
    max_size=8,
)


@given(floods, st.integers(0, 40), st.sampled_from([17, 64, 2048]))
@settings(max_examples=examples(40))
def test_no_flood_keeps_anybody_waiting(
    fake: LoadedModel, rounds: list[tuple[str, int, int, int, int, bool, int]], at: int, budget: int
) -> None:
    place = Place(fake, num_pages=160, num_tenants=3, max_num_batched_tokens=budget)
    requests: list[Request] = []
    for number, (tenant, agents, blocks, own, answer, isolated, steps) in enumerate(rounds):
        heard = [shared([20 + number + b] * 20) for b in range(blocks)]
        prompts = [
            Prompt(
                [private([60 + a] * (own + a)), *heard, private([7])],
                agent=str(a),
                reuse="exact" if isolated and a == 0 else None,
            )
            for a in range(agents)
        ]
        requests += place.add(tenant, prompts, answer)
        for _ in range(steps):
            place.engine.tick()
    for _ in range(at):
        place.engine.tick()
    assert place.seconds(place.ask("small")) < SOON_S
    place.run()
    for request in requests:
        assert request.error is None
        tokens = request.prompt.token_ids.tolist()
        assert request.generated == said(tokens, request.max_new_tokens)
    place.engine.forget()
    assert place.llm.kv_store.pool.num_free == 160
