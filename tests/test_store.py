"""Pages, references and eviction: exact after every step, whatever happens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conftest import examples
from tokendance import LLM, Prompt, SamplingParams, private, shared
from tokendance.errors import BudgetError
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions
from tokendance.rounds.segments import PrefixHashes, make_salt
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PageIds, PagePool

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


@settings(max_examples=examples(60))
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


def test_the_first_gap_that_fits_is_taken_else_the_largest() -> None:
    pool = PagePool(12, 16)
    pages = pool.allocate(12)
    pool.release(pages[[1, 3, 4, 6, 7, 8, 10]], Holder.REQUEST)  # gaps of 1, 2, 3 and 1
    assert pool.num_free == 7
    assert pool.allocate(2).tolist() == [3, 4]
    assert pool.allocate(2).tolist() == [6, 7]
    pool.release(pages[[3, 4]], Holder.REQUEST)  # gaps of 1, 2, 1 and 1
    assert pool.allocate(4).tolist() == [1, 3, 4, 8]  # of gaps of a size, the first
    assert pool.allocate(1).tolist() == [10]
    assert pool.num_free == 0


def plain_allocate(free: set[int], count: int) -> list[int]:
    """Which pages to take, found page by page."""
    gaps: list[list[int]] = []
    for page in sorted(free):
        if gaps and gaps[-1][-1] == page - 1:
            gaps[-1].append(page)
        else:
            gaps.append([page])
    for gap in gaps:
        if len(gap) >= count:
            return gap[:count]
    taken = [page for gap in sorted(gaps, key=len, reverse=True) for page in gap]
    return sorted(taken[:count])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["allocate", "retain", "release"]),
            st.sampled_from(list(Holder)),
            st.sets(st.integers(0, 14), min_size=1),
        ),
        max_size=30,
    )
)
def test_pool_is_that_of_plain_sets(steps: list[tuple[str, Holder, set[int]]]) -> None:
    pool = PagePool(15, 16)
    refs = {holder: [0] * 15 for holder in Holder}
    for action, holder, chosen in steps:
        free = {page for page in range(15) if not any(refs[one][page] for one in Holder)}
        if action == "allocate":
            assert pool.can_allocate(len(chosen)) == (len(chosen) <= len(free))
            if len(chosen) > len(free):
                continue
            pages = plain_allocate(free, len(chosen))
            assert pool.allocate(len(chosen)).tolist() == pages
            holder = Holder.REQUEST
        else:
            pages = sorted(page for page in chosen if action == "retain" or refs[holder][page])
            getattr(pool, action)(np.array(pages, np.int32), holder)
        for page in pages:
            refs[holder][page] += -1 if action == "release" else 1
        pool.check_integrity(np.array([refs[one] for one in Holder], np.int32))
        assert pool.num_free == sum(
            not any(refs[one][page] for one in Holder) for page in range(15)
        )


def hashes_of(text: int) -> PrefixHashes:
    """A text of one token, many times over."""
    return PrefixHashes(np.full(99, text, np.int32), make_salt("s"))


def put(store: KVStore, text: int, num_tokens: int) -> PageIds:
    """Publish the beginning of a text; return its pages, held."""
    (slots,), pages = store.take_slots([num_tokens])
    store.publish_prefix(hashes_of(text), slots, num_tokens)
    return pages


def lengths(store: KVStore, *texts: int) -> list[int]:
    """How many tokens of each text are known."""
    return [len(store.match_slots(hashes_of(text))) for text in texts]


def test_room_is_made_from_the_end_of_what_was_used_longest_ago() -> None:
    store = KVStore(PagePool(9, 4), max_reuse_rounds=1)
    for text in (1, 2, 3):
        store.pool.release(put(store, text, 12), Holder.REQUEST)
    assert store.pool.num_free == 0
    assert store.make_room(2)
    assert lengths(store, 1, 2, 3) == [4, 12, 12]
    assert store.pool.num_free == 2
    store.touch(store.match_prefix(hashes_of(1), exact=True))
    assert store.make_room(4)
    assert lengths(store, 1, 2, 3) == [4, 4, 12]
    assert store.make_room(9)
    assert lengths(store, 1, 2, 3) == [0, 0, 0]
    assert not store.make_room(10)
    store.check_integrity([])


def test_what_requests_hold_is_left_where_it_is() -> None:
    store = KVStore(PagePool(9, 4), max_reuse_rounds=1)
    held = put(store, 1, 12)
    for text in (2, 3):
        store.pool.release(put(store, text, 12), Holder.REQUEST)
    store.pool.release(held[2:], Holder.REQUEST)  # a request holds the first two pages
    assert store.can_make_room(7, np.empty(0, np.int32))
    assert store.make_room(3)
    assert lengths(store, 1, 2, 3) == [8, 4, 12]
    assert store.make_room(7)
    assert lengths(store, 1, 2, 3) == [8, 0, 0]
    assert not store.can_make_room(8, np.empty(0, np.int32))
    assert not store.make_room(8)
    assert lengths(store, 1, 2, 3) == [8, 0, 0]  # taking it out would have freed nothing
    store.pool.release(held[:2], Holder.REQUEST)
    store.check_integrity([])


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
        options = EngineOptions(
            correction="first:2",
            max_num_batched_tokens=48,
            kv_budget=40 * page_bytes,
            page_size=8,
            max_reuse_rounds=3,
        )
        self.llm = LLM.from_loaded(self.model, options)
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
            requests.append(self.llm.requests.make(prompt, params, round_id, str(n)))
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
        EngineMachine, settings=settings(max_examples=examples(40), stateful_step_count=20)
    )
