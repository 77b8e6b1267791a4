"""Scheduler and loop without a model: steps, failures, events; exact, and in no time."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conftest import examples
from fake_executor import FakeExecutor
from tiny_models import SPECIALS, VOCAB, said
from tokendance import LLM, Prompt, SamplingParams, private, shared
from tokendance.collector.plan import RequestPlan
from tokendance.engine.events import (
    Admitted,
    Event,
    Evicted,
    Finished,
    FirstToken,
    RoundStarted,
    StepDone,
)
from tokendance.engine.request import Request
from tokendance.engine.tenants import TenantRules
from tokendance.errors import EngineError, StepError
from tokendance.executor.step import StepInput, StepOutput
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions
from tokendance.rounds.segments import EncodedPrompt, Salt

MakeLLM = Callable[..., LLM]
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


def executor_of(llm: LLM) -> FakeExecutor:
    assert isinstance(llm.executor, FakeExecutor)
    return llm.executor


def round_of(agents: int, blocks: int = 3, own: int = 10) -> list[Prompt]:
    heard = [shared([20 + n] * 20) for n in range(blocks)]
    return [
        Prompt([private([100 + n] * (own + n)), *heard, private([7])], agent=f"agent {n}")
        for n in range(agents)
    ]


def add(
    llm: LLM, prompts: list[Prompt], params: SamplingParams = PARAMS, tenant: str = ""
) -> list[Request]:
    round_id = llm.engine.new_round_id()
    requests = [llm.requests.make(prompt, params, round_id, "") for prompt in prompts]
    if tenant:
        encoder = llm.encoder.with_salt(Salt(tenant.encode()))
        for request, prompt in zip(requests, prompts, strict=True):
            request.prompt = encoder.encode(prompt)
    llm.engine.add(requests)
    return requests


def finish(llm: LLM) -> None:
    while llm.engine.has_work:
        llm.engine.tick()
        llm.engine.check_integrity()


def expected(llm: LLM, prompt: Prompt, count: int = 5) -> list[int]:
    return said(llm.encoder.encode(prompt).token_ids.tolist(), count)


# -- steps --------------------------------------------------------------------------------------


def test_what_it_says_follows_from_what_each_reads(make_fake_llm: MakeLLM) -> None:
    for budget in (4096, 50, 7):
        llm = make_fake_llm(max_num_batched_tokens=budget)
        prompts = round_of(4)
        result = llm.run_round(prompts, PARAMS)
        assert [list(o.token_ids) for o in result.outputs] == [expected(llm, p) for p in prompts]
        assert result.stats.reused_tokens == 3 * 3 * 16
        assert max(step.num_tokens for step in executor_of(llm).steps) <= budget


def test_a_step_is_integers_and_arrays(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    params = SamplingParams(max_tokens=3, temperature=0.7, seed=5, logit_bias=((9, 2.0),))
    llm.run_round(round_of(3), params)
    for step in executor_of(llm).steps:
        again = pickle.loads(pickle.dumps(step))
        assert isinstance(again, StepInput)
        for request, other in zip(step.requests, again.requests, strict=True):
            for name in ("token_ids", "positions", "slots"):
                assert np.array_equal(getattr(request, name), getattr(other, name))
            assert (request.sampling is None) == (other.sampling is None)
            if request.sampling is not None and other.sampling is not None:
                assert request.sampling.uniform == other.sampling.uniform
        with pytest.raises(AttributeError):
            step.requests = ()  # type: ignore[misc]


def test_owners_come_before_their_mirrors_in_a_step(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    llm.run_round(round_of(3), PARAMS)
    first = executor_of(llm).steps[0].requests
    # The owner computes all; the mirrors their own tokens, 4 of each block, and the last.
    assert [len(request.positions) for request in first] == [71, 11 + 12 + 1, 12 + 12 + 1]
    shared_slots = set(first[0].slots[first[0].positions].tolist())
    for mirror in first[1:]:
        read = set(mirror.slots[: int(mirror.positions[-1])].tolist())
        assert len(read & shared_slots) == 3 * 16


# -- failures -----------------------------------------------------------------------------------


def test_a_failed_pass_fails_its_requests_and_no_other(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=15)
    first = add(llm, round_of(2))
    later = add(llm, [Prompt([private([60] * 200)], agent="later")])
    llm.engine.tick()
    assert llm.engine.status().num_waiting == 1
    executor_of(llm).fail = RuntimeError("out of memory")
    llm.engine.tick()
    for request in first:
        assert isinstance(request.error, StepError)
        assert "out of memory" in str(request.error)
    finish(llm)
    assert later[0].error is None
    assert later[0].generated == said([60] * 200, 5)


def test_only_a_second_failure_in_a_row_ends_the_engine(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    for _ in range(3):
        executor_of(llm).fail = RuntimeError("once")
        result = llm.run_round(round_of(2), PARAMS)
        assert all(isinstance(output.error, StepError) for output in result.outputs)
        llm.run_round(round_of(2), PARAMS).raise_for_errors()
    executor_of(llm).fail = RuntimeError("once")
    add(llm, round_of(1))
    llm.engine.tick()
    executor_of(llm).fail = RuntimeError("twice")
    add(llm, round_of(1))
    with pytest.raises(EngineError, match="twice"):
        llm.engine.tick()
    llm.engine.check_integrity()


def test_kv_of_a_failed_pass_is_not_found(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    executor_of(llm).fail = RuntimeError("no")
    llm.run_round(round_of(2), PARAMS)
    assert llm.engine.status().stored_pages == 0
    result = llm.run_round(round_of(2), PARAMS)
    assert result.outputs[0].reused_tokens == 0


def test_mirrors_that_wait_for_a_failed_owner_begin_anew(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(max_num_batched_tokens=30)
    prompts = round_of(3)
    owner, *mirrors = add(llm, prompts)
    llm.engine.tick()
    assert owner.allocation is not None
    assert mirrors[0].num_computed == 0
    executor_of(llm).fail = RuntimeError("no")
    llm.engine.tick()
    assert isinstance(owner.error, StepError)
    finish(llm)
    for mirror, prompt in zip(mirrors, prompts[1:], strict=True):
        assert mirror.error is None
        assert mirror.generated == expected(llm, prompt)


def test_an_interrupt_sends_the_step_back(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    prompts = round_of(2)
    requests = add(llm, prompts)
    executor_of(llm).fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        llm.engine.tick()
    llm.engine.check_integrity()
    finish(llm)
    assert [r.generated for r in requests] == [expected(llm, prompt) for prompt in prompts]


class Breaks:
    """A constraint that raises when it is asked, or when it is told."""

    def __init__(self, where: str, after: int) -> None:
        self.where, self.left = where, after

    def _count(self, where: str) -> None:
        if where == self.where:
            self.left -= 1
            if self.left < 0:
                raise ValueError("a bug of the grammar")

    @property
    def is_ready(self) -> bool:
        return self.where != "prepare"

    def prepare(self) -> None:
        self._count("prepare")

    def forbidden(self) -> Any:
        self._count("forbidden")
        return np.zeros(VOCAB, np.bool_)

    def accept(self, token: int) -> None:
        del token
        self._count("accept")

    def failure(self) -> str | None:
        return None

    def restart(self) -> None:
        pass


@pytest.mark.parametrize(
    ("where", "after"),
    [("forbidden", 0), ("forbidden", 2), ("accept", 0), ("accept", 2), ("prepare", 0)],
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_failure_in_one_requests_part_is_its_own(
    make_fake_llm: MakeLLM, where: str, after: int, victim: int
) -> None:
    llm = make_fake_llm()
    prompts = round_of(3)
    round_id = llm.engine.new_round_id()
    requests = [llm.requests.make(prompt, PARAMS, round_id, "") for prompt in prompts]
    requests[victim].constraint = Breaks(where, after)
    llm.engine.add(requests)
    finish(llm)
    assert isinstance(requests[victim].error, StepError)
    assert "ValueError" in str(requests[victim].error)
    for number, request in enumerate(requests):
        if number != victim:
            assert request.error is None
            assert request.generated == expected(llm, prompts[number])


def test_a_prompt_that_cannot_be_planned_fails_alone(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_fake_llm()
    planner = llm.engine._engine._planner
    plan = planner.plan

    def fails(prompt: EncodedPrompt, *others: Any) -> RequestPlan:
        if prompt.token_ids[0] == 101:
            raise ValueError("a bug of a policy")
        return plan(prompt, *others)

    monkeypatch.setattr(planner, "plan", fails)
    outputs = llm.run_round(round_of(3), PARAMS).outputs
    assert [type(output.error) for output in outputs] == [type(None), StepError, type(None)]


def test_what_fails_on_the_loop_is_called_no_more(make_fake_llm: MakeLLM) -> None:
    class Fails:
        calls = 0

        def after_step(self, now: float, requests: Any) -> None:
            del now, requests
            self.calls += 1
            raise RuntimeError("no")

        def due_s(self) -> float | None:
            return None

    llm, fails = make_fake_llm(), Fails()
    llm.engine.attach(fails)
    llm.run_round(round_of(2), PARAMS).raise_for_errors()
    assert fails.calls == 1


def test_requests_that_wait_for_each_other_are_told(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(max_num_batched_tokens=30)
    owner, mirror = add(llm, round_of(2))
    llm.engine.tick()
    # As if the owner read what only the mirror computes.
    assert owner.allocation is not None
    assert mirror.allocation is not None
    left = owner.allocation.compute[owner.num_computed :]
    owner.allocation.slots[left[0] - 1] = mirror.allocation.slots[0]
    llm.kv_store.slot_ready[mirror.allocation.slots[0]] = False
    mirror.allocation.compute = mirror.allocation.compute[1:]
    for _ in range(5):
        llm.engine.tick()
    assert isinstance(owner.error, StepError)
    assert isinstance(mirror.error, StepError)
    assert "waits for KV" in str(mirror.error)
    assert not llm.engine.has_work


# -- events -------------------------------------------------------------------------------------


class Notes:
    """A second observer."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def test_a_second_observer_hears_all_of_a_round(make_fake_llm: MakeLLM) -> None:
    llm, notes = make_fake_llm(), Notes()
    llm.engine.observe(notes)
    result = llm.run_round(round_of(3), PARAMS)
    (started,) = notes.of(RoundStarted)
    admitted = notes.of(Admitted)
    assert started.num_requests == 3
    assert list(started.admitted) == admitted
    assert [event.agent for event in admitted] == ["agent 0", "agent 1", "agent 2"]
    (run,) = admitted[0].runs
    for mirror in admitted[1:]:
        assert mirror.runs == ()
        assert {use.source.run for use in mirror.plan.uses} == {run}
    assert len(notes.of(FirstToken)) == len(notes.of(Finished)) == 3
    steps = notes.of(StepDone)
    assert sum(sum(step.num_tokens.values()) for step in steps) == (
        result.stats.computed_tokens + 3 * 4
    )
    pages = max(step.resident_pages[started.round_id] for step in steps)
    assert pages * llm.engine.page_bytes == result.stats.kv_bytes.resident
    assert {event.output.text for event in notes.of(Finished)} == {
        output.text for output in result.outputs
    }
    times = [event.time_s for event in notes.events]
    assert times == sorted(times)


def test_evictions_are_told(make_fake_llm: MakeLLM) -> None:
    llm, notes = make_fake_llm(num_pages=16), Notes()
    llm.engine.observe(notes)
    for token in (3, 4, 5, 6):
        llm.generate([[token] * 90], SamplingParams(max_tokens=1))
    assert sum(event.num_entries for event in notes.of(Evicted)) == llm.kv_store.num_evicted > 0


def test_an_observer_that_fails_is_told_no_more(make_fake_llm: MakeLLM) -> None:
    class Fails:
        calls = 0

        def on_event(self, event: Event) -> None:
            del event
            self.calls += 1
            raise RuntimeError("no")

    llm, fails, notes = make_fake_llm(), Fails(), Notes()
    llm.engine.observe(fails)
    llm.engine.observe(notes)
    llm.run_round(round_of(2), PARAMS).raise_for_errors()
    assert fails.calls == 1
    assert len(notes.of(Finished)) == 2


# -- a second executor ----------------------------------------------------------------------------


class Parrot:
    """Says the first token of what it reads, whatever comes after it."""

    def __init__(self, num_slots: int) -> None:
        self.tokens = np.zeros(num_slots, np.int32)

    def execute(self, step: StepInput) -> StepOutput:
        chosen = []
        for request in step.requests:
            self.tokens[request.slots[request.positions]] = request.token_ids
            if request.sampling is not None:
                chosen.append(int(self.tokens[request.slots[0]]))
        count = len(chosen)
        return StepOutput(chosen, [True] * count, [None] * count, [None] * count)

    def read_kv(self, slots: Any) -> Any:
        raise NotImplementedError

    def positions_of(self, slots: Any) -> Any:
        raise NotImplementedError

    def write_kv(self, slots: Any, rows: Any) -> None:
        raise NotImplementedError


def test_a_second_executor_works(fake: LoadedModel) -> None:
    options = EngineOptions(kv_budget=100 * 16 * 8)
    llm = LLM.from_loaded(fake, options, executor=Parrot(1600))
    outputs = llm.run_round(round_of(3), PARAMS).outputs
    assert [output.token_ids for output in outputs] == [(100 + n,) * 5 for n in range(3)]


# -- properties -----------------------------------------------------------------------------------


class FakeMachine(RuleBasedStateMachine):
    """Rounds of two tenants come, run, fail, are aborted, with little memory.

    What is said stays what it is.
    """

    model: LoadedModel
    owners: int

    def __init__(self) -> None:
        super().__init__()
        options = EngineOptions(
            correction="edges:2+1",
            owners=self.owners,
            max_num_batched_tokens=48,
            kv_budget=40 * 8 * 8,
            page_size=8,
            max_reuse_rounds=3,
        )
        self.executor = FakeExecutor(320, VOCAB, SPECIALS)
        self.llm = LLM.from_loaded(self.model, options, executor=self.executor)
        self.llm.engine.set_tenants(TenantRules(num_tenants=2, reserved=0.2, pass_s=0))
        self.live: list[Request] = []
        self.steps_at_failure = 0

    @rule(
        agents=st.integers(1, 4),
        blocks=st.lists(st.integers(0, 5), max_size=4),
        shift=st.integers(0, 3),
        tokens=st.integers(1, 4),
        isolated=st.booleans(),
        tenant=st.sampled_from("ab"),
    )
    def add_round(
        self, agents: int, blocks: list[int], shift: int, tokens: int, isolated: bool, tenant: str
    ) -> None:
        prompts = []
        for n in range(agents):
            turn = n * shift % max(1, len(blocks))
            order = blocks[turn:] + blocks[:turn]
            parts = [private([60 + n] * (n + 1)), *(shared([10 + b] * (5 + b)) for b in order)]
            reuse = "exact" if isolated and n == 0 else None
            prompts.append(Prompt([*parts, private([7])], agent=str(n), reuse=reuse))
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        self.live += add(self.llm, prompts, params, tenant)

    @precondition(lambda self: self.llm.engine.has_work)
    @rule(steps=st.integers(1, 4), fails=st.booleans())
    def tick(self, steps: int, fails: bool) -> None:
        # Twice in a row would end the engine.
        if fails and len(self.executor.steps) > self.steps_at_failure:
            self.executor.fail = RuntimeError("now and then")
            self.steps_at_failure = len(self.executor.steps)
        for _ in range(steps):
            self.llm.engine.tick()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 10**6))
    def abort(self, which: int) -> None:
        self.llm.engine.abort(self.live[which % len(self.live)])

    @invariant()
    def books_balance(self) -> None:
        self.llm.engine.check_integrity()

    def teardown(self) -> None:
        self.executor.fail = None
        for _ in range(500):
            if not self.llm.engine.has_work:
                break
            self.llm.engine.tick()
        assert not self.llm.engine.has_work, "a request never finished"
        for request in self.live:
            assert request.finish_reason in ("length", "error")
            if request.finish_reason == "length":
                tokens = request.prompt.token_ids.tolist()
                assert request.generated == said(tokens, request.max_new_tokens)
        self.llm.engine.forget()
        assert self.llm.kv_store.pool.num_free == 40
        assert self.llm.engine.status().num_rounds == 0


@pytest.mark.parametrize("owners", [1, 3])
def test_whatever_happens_all_say_what_they_would(owners: int, fake: LoadedModel) -> None:
    FakeMachine.model, FakeMachine.owners = fake, owners
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        FakeMachine, settings=settings(max_examples=examples(100), stateful_step_count=25)
    )
