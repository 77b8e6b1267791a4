"""Turns of constraints: no step waits long for what may come next, and every answer goes on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tiny_models import VOCAB
from tokendance import LLM, Prompt, SamplingParams
from tokendance.engine import mask_turns
from tokendance.engine.mask_turns import MaskTurns
from tokendance.engine.request import Request
from tokendance.errors import ConstraintError
from tokendance.executor.step import StepInput
from tokendance.rounds.segments import Salt

MakeLLM = Callable[..., LLM]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Takes:
    """A constraint that allows all, and takes so long to say so."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds
        self.is_ready = True

    def prepare(self) -> None:
        self.clock.now += self.seconds
        self.is_ready = True

    def forbidden(self) -> Any:
        assert self.is_ready
        return np.zeros(VOCAB, np.bool_)

    def accept(self, token: int) -> None:
        del token
        self.is_ready = False

    def failure(self) -> str | None:
        return None

    def restart(self) -> None:
        self.is_ready = True


@pytest.mark.parametrize("num_slow", [1, 3, 40])
def test_slow_constraints_hold_up_themselves(make_fake_llm: MakeLLM, num_slow: int) -> None:
    llm, clock = make_fake_llm(), Clock()
    engine = llm.engine._engine
    engine._mask_turns = MaskTurns(clock)
    round_id = llm.engine.new_round_id()
    takes = [0.03] * num_slow + [0.0001] * 5 + [None]
    requests: list[Request] = []
    for index, seconds in enumerate(takes):
        request = llm.requests.make(Prompt(f"number {index}"), PARAMS, round_id, "")
        request.constraint = None if seconds is None else Takes(clock, seconds)
        requests.append(request)
    llm.engine.add(requests)
    held: list[float] = []
    while llm.engine.has_work:
        before = clock.now
        llm.engine.tick()
        held.append(clock.now - before)
    assert [request.error for request in requests] == [None] * len(requests)
    assert {len(request.generated) for request in requests} == {PARAMS.max_tokens}
    # A step waits for all that are quick, and for those that are slow one by one.
    assert max(held) <= mask_turns.STEP_S + 0.03 + 1e-9
    executor: Any = llm.executor
    steps: list[StepInput] = executor.steps
    # Nobody knows who is slow before the first turn. Then all that are quick are in every step.
    quick = [len(step.requests) for step in steps[num_slow + 2 : PARAMS.max_tokens]]
    assert all(count >= 6 for count in quick)
    assert len(steps) <= num_slow * PARAMS.max_tokens + PARAMS.max_tokens


def test_whoever_waited_longest_is_next(make_fake_llm: MakeLLM) -> None:
    llm, clock = make_fake_llm(), Clock()
    turns = MaskTurns(clock)
    round_id = llm.engine.new_round_id()
    requests = []
    for index in range(3):
        requests.append(llm.requests.make(Prompt(f"number {index}"), PARAMS, round_id, ""))
        requests[-1].constraint = Takes(clock, 0.03)
    taken: list[int] = []
    for _ in range(6):
        for request in requests:
            request.constraint.is_ready = False  # type: ignore[union-attr, misc]
        for request in turns.take(requests):
            assert request.constraint is not None
            request.constraint.prepare()
            taken.append(requests.index(request))
    assert taken == [0, 1, 2, 0, 1, 2]


class Fails(Takes):
    """A constraint that turns out to be wrong when what may come second is asked for."""

    has_failed = False

    def prepare(self) -> None:
        super().prepare()
        self.has_failed = True

    def failure(self) -> str | None:
        return "It is too large." if self.has_failed else None


def test_a_slow_constraint_that_fails_takes_nobody_with_it(make_fake_llm: MakeLLM) -> None:
    llm, clock = make_fake_llm(), Clock()
    llm.engine._engine._mask_turns = MaskTurns(clock)
    round_id = llm.engine.new_round_id()
    requests: list[Request] = []
    for constraint in (Fails(clock, 0.03), Takes(clock, 0.0001)):
        request = llm.requests.make(Prompt(f"number {len(requests)}"), PARAMS, round_id, "")
        request.constraint = constraint
        requests.append(request)
    llm.engine.add(requests)
    while llm.engine.has_work:
        llm.engine.tick()
    assert isinstance(requests[0].error, ConstraintError)
    assert requests[1].error is None
    assert len(requests[1].generated) == PARAMS.max_tokens


def test_tenants_take_turns(make_fake_llm: MakeLLM) -> None:
    llm, clock = make_fake_llm(), Clock()
    round_id = llm.engine.new_round_id()

    def slow(text: str, tenant: str) -> Request:
        encoder = llm.encoder.with_salt(Salt(tenant.encode()))
        request = llm.requests.of(encoder.encode(Prompt(text)), PARAMS, text, round_id)
        request.constraint = Takes(clock, 0.0)
        request.constraint.is_ready = False
        return request

    many = [slow(f"many {index}", "a") for index in range(9)]
    few = [slow(f"few {index}", "b") for index in range(2)]
    taken = list(MaskTurns(clock).take([*many, *few]))
    assert taken == [many[0], few[0], many[1], few[1], *many[2:]]
