"""Pages, references and eviction: exact after every step, whatever happens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokendance import LLM, Prompt, SamplingParams, private, shared
from tokendance.collector.correction import Edges
from tokendance.config import EngineConfig, StoreConfig
from tokendance.errors import BudgetError
from tokendance.models.loader import LoadedModel
from tokendance.store.pages import Holder, PagePool

MakeLLM = Callable[..., LLM]


def test_pages_lie_side_by_side_where_they_can() -> None:
    pool = PagePool(10, 16)
    first, second, third = pool.allocate(3), pool.allocate(2), pool.allocate(3)
    assert [p.tolist() for p in (first, second, third)] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    pool.release(first, Holder.REQUEST)
    pool.release(third, Holder.REQUEST)
    assert pool.allocate(2).tolist() == [0, 1]
    assert pool.num_free == 6
    assert pool.allocate(6).tolist() == [2, 5, 6, 7, 8, 9]
    assert not pool.can_allocate(1)


def test_a_page_lives_as_long_as_somebody_holds_it() -> None:
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    pool.retain(pages, Holder.INDEX)
    pool.release(pages, Holder.REQUEST)
    assert pool.num_free == 1
    assert pool.num_held(Holder.INDEX) == 1
    pool.release(pages, Holder.INDEX)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="twice"):
        pool.release(pages, Holder.INDEX)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=40))
def test_pool_hands_out_each_page_once(actions: list[tuple[bool, int]]) -> None:
    pool = PagePool(20, 16)
    held: list[np.ndarray] = []
    for take, count in actions:
        if take and pool.can_allocate(count):
            held.append(pool.allocate(count))
        elif held:
            pool.release(held.pop(count % len(held)), Holder.REQUEST)
        pages = [int(page) for one in held for page in one]
        assert len(pages) == len(set(pages)) == 20 - pool.num_free


def test_eviction_makes_room_and_keeps_what_is_read(make_llm: MakeLLM) -> None:
    llm = make_llm(num_pages=20)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for turn in range(30):
        llm.generate([[turn + 3] * 100], params)
        llm.engine.check_integrity()
    again = llm.generate([[32] * 100], params)[0]
    assert again.reused_tokens == 99, "the newest was kept"
    first = llm.generate([[3] * 100], params)[0]
    assert first.reused_tokens == 0, "the oldest was evicted"


def test_requests_queue_when_memory_is_short(make_llm: MakeLLM) -> None:
    prompts = [[n + 3] * 60 for n in range(12)]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    roomy = make_llm(num_pages=400).generate(prompts, params)
    tight = make_llm(num_pages=12).generate(prompts, params)
    assert [o.token_ids for o in tight] == [o.token_ids for o in roomy]


def test_a_round_queues_when_memory_is_short(make_llm: MakeLLM) -> None:
    blocks = [shared([n + 9] * 30) for n in range(3)]
    prompts = [
        Prompt([private([n + 99] * 20), *blocks, private([5])], agent=str(n)) for n in range(6)
    ]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    roomy = make_llm().run_round(prompts, params)
    tight = make_llm(num_pages=13).run_round(prompts, params)
    assert [o.token_ids for o in tight.outputs] == [o.token_ids for o in roomy.outputs]
    assert tight.stats.kv_bytes.resident < roomy.stats.kv_bytes.resident


def test_a_budget_too_small_says_how_much_is_needed(make_llm: MakeLLM) -> None:
    llm = make_llm(num_pages=6)
    small, large = llm.generate([[5] * 30, [6] * 200], SamplingParams(max_tokens=8))
    assert small.error is None
    assert small.token_ids
    assert isinstance(large.error, BudgetError)
    needed = 13 * llm.engine.page_bytes / 1024  # 208 tokens
    assert f"{needed:.1f} KiB" in str(large.error)


@pytest.mark.parametrize("correction", ["all", "first-k"])
@pytest.mark.parametrize("num_pages", [8, 9, 10, 12])
def test_what_fits_alone_fits_after_others(
    make_llm: MakeLLM, num_pages: int, correction: str
) -> None:
    """Reading KV of others keeps their pages; a request that then does not fit computes all."""
    blocks = [shared([n + 9] * 20) for n in range(4)]
    prompts = [
        Prompt([private([n + 99] * 10), *blocks, private([5])], agent=str(n)) for n in range(3)
    ]
    llm = make_llm(num_pages=num_pages, correction=correction)
    result = llm.run_round(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
    assert [output.error for output in result.outputs] == [None] * 3


class EngineMachine(RuleBasedStateMachine):
    """Rounds and single requests come, run, are aborted, in any order and with little memory."""

    model: LoadedModel

    def __init__(self) -> None:
        super().__init__()
        page_bytes = self.model.shape.kv_bytes_per_token(self.model.dtype) * 8
        config = EngineConfig("collective", Edges(2, 0), 48, StoreConfig(40 * page_bytes, 8, 3))
        self.llm = LLM.from_loaded(self.model, config)
        self.live: list[Any] = []

    @rule(
        agents=st.integers(1, 4),
        blocks=st.lists(st.integers(0, 5), max_size=4),
        shift=st.integers(0, 3),
        tokens=st.integers(1, 4),
        exact=st.booleans(),
    )
    def add_round(
        self, agents: int, blocks: list[int], shift: int, tokens: int, exact: bool
    ) -> None:
        round_id = self.llm.engine.new_round_id()
        requests = []
        for n in range(agents):
            order = (
                blocks[n * shift % max(1, len(blocks)) :]
                + blocks[: n * shift % max(1, len(blocks))]
            )
            parts = [private([60 + n] * (n + 1)), *(shared([10 + b] * (5 + b)) for b in order)]
            prompt = Prompt([*parts, private([7])], reuse="exact" if exact and n == 0 else None)
            params = SamplingParams(max_tokens=tokens, ignore_eos=True)
            requests.append(self.llm.make_request(prompt, params, round_id, str(n)))
        self.llm.engine.add(requests)
        self.live += requests

    @precondition(lambda self: self.llm.engine.has_work)
    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            if self.llm.engine.has_work:
                self.llm.engine.tick()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 10**6))
    def abort(self, which: int) -> None:
        self.llm.engine.abort(self.live[which % len(self.live)])

    @invariant()
    def books_balance(self) -> None:
        self.llm.engine.check_integrity()

    def teardown(self) -> None:
        for _ in range(500):
            if not self.llm.engine.has_work:
                break
            self.llm.engine.tick()
            self.llm.engine.check_integrity()
        assert not self.llm.engine.has_work, "a request never finished"
        for request in self.live:
            assert request.finish_reason in ("length", "error")
            if request.finish_reason == "length":
                assert len(request.generated) == request.max_new_tokens
        self.llm.kv_store.clear()
        assert self.llm.kv_store.pool.num_free == 40


def test_books_balance_whatever_happens(tiny: LoadedModel) -> None:
    EngineMachine.model = tiny
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        EngineMachine, settings=settings(max_examples=40, stateful_step_count=20, deadline=None)
    )
