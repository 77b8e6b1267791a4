"""Plans of requests: exact spans, on cases drawn by hand, and what making one may not change."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from tokendance import LLM, Prompt, SamplingParams, private, shared
from tokendance.collector.correction import Edges, Mask, Reuse
from tokendance.collector.plan import RequestPlan, ReuseRules, Role, plan_request
from tokendance.engine.allocator import Allocator
from tokendance.rounds import segments
from tokendance.rounds.segments import (
    EncodedPrompt,
    PrefixHashes,
    Salt,
    Segment,
    SegmentHash,
    TokenIds,
    build_prompt,
    hash_chain,
    hash_segment,
)
from tokendance.store.entries import CachedSegment, PrefixPage, RoundId, RunId
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import PagePool

SALT = Salt(b"salt")
ALL = ReuseRules(prefix=True, segments=True, publish=True)
NOW, BEFORE = RoundId(7), RoundId(3)


def ids(length: int, token: int) -> TokenIds:
    return np.full(length, token, np.int32)


def prompt(*parts: tuple[int, int] | tuple[int, int, str]) -> EncodedPrompt:
    """Of (length, token) private parts, and (length, token, "shared") ones."""
    return build_prompt([(ids(part[0], part[1]), len(part) == 3) for part in parts], SALT)


@dataclass
class FakeIndex:
    """Says what a test has written down."""

    pages: list[PrefixPage] = field(default_factory=list)
    segments: dict[SegmentHash, list[CachedSegment]] = field(default_factory=dict)

    def match_prefix(self, text: PrefixHashes, *, exact: bool) -> Sequence[PrefixPage]:
        del text
        return [page for page in self.pages if page.exact or not exact]

    def cached(self, segment: SegmentHash, round_id: RoundId) -> Sequence[CachedSegment]:
        del round_id
        return self.segments.get(segment, [])

    def add_page(self, num_tokens: int, *, exact: bool = True) -> None:
        self.pages.append(PrefixPage(hash_chain(None, ids(1, 1), SALT), num_tokens, exact))

    def add(
        self, length: int, token: int, *, run: int, index: int, start: int, round_id: RoundId = NOW
    ) -> CachedSegment:
        name = hash_segment(ids(length, token), SALT)
        cached = CachedSegment(name, length, RunId(run), index, start, round_id)
        self.segments.setdefault(name, []).append(cached)
        return cached


def spans(plan: RequestPlan) -> list[tuple[int, int, str]]:
    return [(span.start, span.stop, span.role.name.lower()) for span in plan.spans]


def plan_of(
    index: FakeIndex, asked: EncodedPrompt, policy: Edges | None = None, rules: ReuseRules = ALL
) -> RequestPlan:
    return plan_request(asked, 4, index, policy or Edges(2, 1), rules, NOW)


def test_whoever_comes_first_owns_what_is_shared() -> None:
    asked = prompt((5, 1), (6, 2, "shared"), (4, 3, "shared"), (3, 4), (7, 5, "shared"), (2, 6))
    plan = plan_of(FakeIndex(), asked)
    assert spans(plan) == [
        (0, 5, "own"),
        (5, 15, "owned"),
        (15, 18, "own"),
        (18, 25, "owned"),
        (25, 27, "own"),
        (27, 31, "answer"),
    ]
    # Two runs, since private text stands between them, each as common tokens, then corrected ones.
    assert [[start for start, _, _ in run.segments] for run in plan.runs] == [[5, 11], [18]]
    assert plan.runs[0].layout.tolist() == [7, 8, 9, 13, 5, 6, 10, 11, 12, 14]
    assert plan.runs[1].layout.tolist() == [20, 21, 22, 23, 18, 19, 24]
    own = plan.parts[-1].tolist()
    assert own == [0, 1, 2, 3, 4, 15, 16, 17, 25, 26, 27, 28, 29, 30]
    assert plan.compute.tolist() == list(range(27))
    assert (plan.num_reused, plan.num_corrected, plan.num_exact) == (0, 0, 31)


def test_a_mirror_reads_at_its_offset_and_corrects() -> None:
    index = FakeIndex()
    first = index.add(6, 2, run=0, index=0, start=9)
    second = index.add(4, 3, run=0, index=1, start=15)
    plan = plan_of(index, prompt((5, 1), (6, 2, "shared"), (4, 3, "shared"), (3, 4)))
    assert spans(plan) == [
        (0, 5, "own"),
        (5, 7, "corrected"),
        (7, 10, "reused"),
        (10, 11, "corrected"),
        (11, 13, "corrected"),
        (13, 14, "reused"),
        (14, 15, "corrected"),
        (15, 18, "own"),
        (18, 22, "answer"),
    ]
    assert {(span.source, span.offset) for span in plan.spans if span.source} == {
        (first, -4),
        (second, -4),
    }
    assert [use.source for use in plan.uses] == [first, second]
    assert (plan.num_reused, plan.num_corrected, plan.num_exact) == (4, 6, 7)
    assert str(plan).splitlines() == [
        "18 prompt tokens: 14 computed, 6 of them corrected, 4 reused",
        "0     5      11   15  18",
        "|#####|cc...c|cc.c|###|____|",
        "      d=-4   d=-4",
    ]


def test_a_beginning_is_read_but_for_the_last_token() -> None:
    index = FakeIndex()
    index.add_page(16)
    index.add_page(4)
    plan = plan_of(index, prompt((20, 1)))
    assert spans(plan) == [(0, 19, "prefix"), (19, 20, "own"), (20, 24, "answer")]
    assert plan.num_exact == 24
    index.pages[1].exact = False
    plan = plan_of(index, prompt((20, 1), (6, 2, "shared")))
    assert spans(plan)[:2] == [(0, 20, "prefix"), (20, 26, "owned")]
    assert plan.num_exact == 16, "what comes behind KV of another context is not exact"
    alone = ReuseRules(prefix=True, segments=False, publish=True)
    plan = plan_of(index, prompt((20, 1), (6, 2, "shared")), rules=alone)
    assert spans(plan) == [(0, 16, "prefix"), (16, 26, "own"), (26, 30, "answer")]
    assert plan.runs == ()


def test_a_segment_that_begins_in_the_prefix_is_taken_up_there() -> None:
    index = FakeIndex()
    index.add_page(16)
    source = index.add(10, 2, run=0, index=0, start=12)
    plan = plan_of(index, prompt((12, 1), (10, 2, "shared"), (2, 3)))
    assert spans(plan) == [
        (0, 16, "prefix"),
        (16, 21, "reused"),
        (21, 22, "corrected"),
        (22, 24, "own"),
        (24, 28, "answer"),
    ]
    assert plan.spans[1].source is source
    assert plan.spans[1].offset == 0


def test_the_end_of_a_prompt_is_fresh_unless_this_round_has_computed_it() -> None:
    asked = prompt((5, 1), (50, 2, "shared"))
    index = FakeIndex()
    index.add(50, 2, run=0, index=0, start=0, round_id=NOW)
    assert spans(plan_of(index, asked))[-3:] == [
        (7, 54, "reused"),
        (54, 55, "corrected"),
        (55, 59, "answer"),
    ]
    index = FakeIndex()
    index.add(50, 2, run=0, index=0, start=0, round_id=BEFORE)
    assert spans(plan_of(index, asked))[-3:] == [
        (7, 23, "reused"),
        (23, 55, "corrected"),
        (55, 59, "answer"),
    ]


def test_a_whole_run_in_order_goes_before_a_newer_one() -> None:
    index = FakeIndex()
    for position, token in enumerate((2, 3, 4)):
        index.add(5, token, run=0, index=position, start=5 * position)
    index.add(5, 3, run=1, index=0, start=0)
    index.add(5, 2, run=1, index=1, start=5)
    plan = plan_of(index, prompt((1, 1), *((5, token, "shared") for token in (2, 3, 4)), (2, 9)))
    assert [use.source.run for use in plan.uses] == [0, 0, 0]
    # In another order than both, each segment comes from the run that has most of it in order.
    plan = plan_of(index, prompt((1, 1), *((5, token, "shared") for token in (3, 2)), (2, 9)))
    assert [use.source.run for use in plan.uses] == [1, 1]


def test_who_owns_an_order_takes_no_other() -> None:
    index = FakeIndex()
    index.add(5, 2, run=0, index=0, start=0)
    index.add(5, 3, run=0, index=1, start=5)
    rules = ReuseRules(prefix=True, segments=True, publish=True, owns_order=True)
    plan = plan_of(index, prompt((5, 3, "shared"), (5, 2, "shared"), (2, 9)), rules=rules)
    assert spans(plan) == [(0, 10, "owned"), (10, 12, "own"), (12, 16, "answer")]


class Refuses:
    """No correction is enough."""

    spec = "refuses"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.reuses: list[Reuse] = []

    def choose(self, reuse: Reuse, segment: Segment, num_read: int) -> Mask | None:
        del num_read
        self.asked.append((reuse.num_blocks, len(segment)))
        self.reuses.append(reuse)
        return None


def test_where_no_correction_is_enough_nothing_is_reused_out_of_context() -> None:
    index = FakeIndex()
    index.add_page(4)
    index.add(6, 2, run=0, index=0, start=9)
    asked = prompt((5, 1), (6, 2, "shared"), (3, 4))
    policy = Refuses()
    plan = plan_request(asked, 4, index, policy, ALL, NOW)
    assert policy.asked == [(1, 6)]
    assert spans(plan) == [(0, 4, "prefix"), (4, 14, "own"), (14, 18, "answer")]
    assert plan.num_exact == 18


@pytest.mark.parametrize("exact", [True, False])
def test_a_reuse_goes_on_where_its_beginning_holds_kv_of_another_context(exact: bool) -> None:
    """Also where that stands in private text, as all does that was not found to be shared."""
    index = FakeIndex()
    index.add_page(4)
    index.add_page(4, exact=exact)
    index.add(6, 2, run=0, index=0, start=9)
    policy = Refuses()
    plan_request(prompt((9, 1), (6, 2, "shared"), (3, 4)), 4, index, policy, ALL, NOW)
    assert [reuse.goes_on for reuse in policy.reuses] == [not exact]


HEARD = [(6, token, "shared") for token in (2, 3, 4, 5)]


def test_an_opening_is_what_is_reused_first() -> None:
    """It goes on over segments, and over own text between them."""
    index = FakeIndex()
    for place, token in enumerate((2, 3, 4, 5)):
        index.add(6, token, run=0, index=place, start=9 + 6 * place)
    policy = Edges(0, 1, opening=8)

    def corrected(*parts: tuple[int, int] | tuple[int, int, str]) -> list[int]:
        plan = plan_request(prompt(*parts), 1, index, policy, ALL, NOW)
        return np.flatnonzero(plan.roles == Role.CORRECTED).tolist()

    assert corrected((5, 1), *HEARD[:2], (9, 9), HEARD[2], (1, 1)) == [*range(5, 13), 16, 31]
    assert corrected(*HEARD[:2]) == [*range(8), 11]
    # What is shared and not reused, as an answer of its own, is not counted.
    assert corrected((5, 1), (9, 7, "shared"), HEARD[0], (9, 9), HEARD[1], (1, 1)) == [
        *range(14, 20),
        *range(29, 31),
        34,
    ]
    # Behind a matched beginning, which may end within a segment.
    index.add_page(8)
    assert corrected((5, 1), *HEARD, (1, 1)) == [*range(8, 16), 16, 22, 28]
    assert corrected(*HEARD, (1, 1)) == [*range(8, 16), 17, 23]


@pytest.mark.parametrize("is_beginning", [True, False])
@pytest.mark.parametrize("before", [(), ((10, 8, "shared"),)], ids=["one", "two"])
def test_the_end_of_a_beginning_that_all_have_is_computed(
    before: tuple[tuple[int, int, str], ...], *, is_beginning: bool
) -> None:
    """It fills no page; were it read from whoever was first, all behind it would be inexact."""
    index = FakeIndex()
    first = sum(length for length, *_ in before)
    index.add_page(first + 4)
    index.add(6, 2, run=0, index=0, start=first if is_beginning else first + 9)
    index.add(6, 4, run=1, index=0, start=first + 20)
    asked = prompt(*before, HEARD[0], (5, 1), HEARD[2], (1, 1))
    plan = plan_request(asked, 4, index, Edges(0, 0, opening=3), ALL, NOW)
    corrected = np.flatnonzero(plan.roles == Role.CORRECTED) - first
    assert plan.num_exact == first + (14 if is_beginning else 12)
    assert corrected.tolist() == ([11, 12, 13] if is_beginning else [4, 5, 11])
    assert not plan.runs


def test_an_opening_is_not_stored_apart() -> None:
    asked = prompt((5, 1), *HEARD[:2], (2, 1))
    plan = plan_request(asked, 1, FakeIndex(), Edges(0, 1, 8), ALL, NOW)
    (run,) = plan.runs
    assert run.layout[run.num_common :].tolist() == [10, 16]


# -- properties -------------------------------------------------------------------------------


@settings(max_examples=examples(200))
@given(data=st.data())
def test_every_position_is_had_in_one_way(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    is_shared = [data.draw(st.booleans()) for _ in lengths]
    asked = prompt(
        *(
            (length, number, "shared") if share else (length, number)
            for number, (length, share) in enumerate(zip(lengths, is_shared, strict=True))
        )
    )
    index = FakeIndex()
    for number, (length, share) in enumerate(zip(lengths, is_shared, strict=True)):
        if share and data.draw(st.booleans()):
            start = data.draw(st.integers(0, 50))
            round_id = data.draw(st.sampled_from([NOW, BEFORE]))
            run = data.draw(st.integers(0, 2))
            index.add(length, number, run=run, index=number, start=start, round_id=round_id)
    for _ in range(data.draw(st.integers(0, 3))):
        index.add_page(4, exact=data.draw(st.booleans()))
    num_tokens = sum(page.num_tokens for page in index.pages)
    if num_tokens > len(asked):
        index.pages.clear()
    policy = Edges(*(data.draw(st.integers(0, most)) for most in (3, 2, 20)))
    plan = plan_of(index, asked, policy)

    bounds = [(span.start, span.stop) for span in plan.spans]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == len(asked) + 4
    assert all(here[1] == there[0] for here, there in itertools.pairwise(bounds))
    compute, parts = plan.compute.tolist(), np.concatenate(plan.parts).tolist()
    assert len(asked) - 1 in compute
    assert len(set(parts)) == len(parts)
    assert sorted(parts) == sorted([*compute, *range(len(asked), len(asked) + 4)])
    assert plan.num_reused == len(asked) - len(compute)
    roles = plan.roles[: len(asked)]
    assert plan.num_corrected == np.count_nonzero(roles == Role.CORRECTED)
    for span in plan.spans:
        if span.role is Role.REUSED:
            assert span.source is not None
            first = span.start - span.offset - span.source.start
            name = hash_segment(ids(span.source.num_tokens, asked.token_ids[span.start]), SALT)
            assert span.source.hash == name, "other tokens than the prompt's are read"
            assert 0 <= first <= span.source.num_tokens - len(span)


# -- a prompt is hashed once, and waiting changes nothing ------------------------------------


def test_a_prompt_is_hashed_once_however_long_it_waits(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[tuple[bytes, int]] = []
    digest = segments._digest

    def counting(data: bytes, salt: Salt) -> bytes:
        hashed.append((data, 1))
        return digest(data, salt)

    monkeypatch.setattr(segments, "_digest", counting)
    llm = make_llm(num_pages=12)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    round_id = llm.engine.new_round_id()
    requests = [
        llm.requests.make(Prompt([token] * 100), params, round_id, str(token), in_round=False)
        for token in (5, 6)
    ]
    llm.engine.add(requests)
    llm.engine.tick()
    assert llm.engine.status().num_waiting == 1
    before = len(hashed)
    for _ in range(20):
        llm.engine.tick()
    assert llm.engine.status().num_waiting == 1
    assert len(hashed) == before
    assert len(set(hashed)) == len(hashed), "something was hashed twice"
    while llm.engine.has_work:
        llm.engine.tick()
    assert len(set(hashed)) == len(hashed)


def test_waiting_changes_no_order_of_eviction(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(num_pages=30)
    once = SamplingParams(max_tokens=1)
    for token in (3, 4, 5):
        llm.generate([[token] * 96], once)
    order = list(llm.kv_store.order)
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    round_id = llm.engine.new_round_id()
    busy = llm.requests.make(Prompt([9] * 200), long, round_id, "busy", in_round=False)
    llm.engine.add([busy])
    llm.engine.tick()
    order = [entry for entry in llm.kv_store.order if entry in order]
    # It would go on from the oldest of the three, and does not fit.
    waits = llm.requests.make(Prompt([3] * 320), long, round_id, "waits", in_round=False)
    llm.engine.add([waits])
    for _ in range(5):
        llm.engine.tick()
    assert llm.engine.status().num_waiting == 1
    assert [entry for entry in llm.kv_store.order if entry in order] == order
    llm.engine.abort(busy)
    llm.engine.abort(waits)


def test_can_allocate_changes_nothing() -> None:
    store = KVStore(PagePool(8, 4), 16)
    allocator = Allocator(store)
    first = prompt((10, 1), (6, 2, "shared"))
    plan = plan_request(first, 4, store, Edges(1, 0), ALL, NOW)
    assert allocator.num_pages(plan) == 2 + 4
    assert allocator.can_allocate(plan)
    assert store.pool.num_free == 8
    allocation = allocator.allocate(plan, first, NOW)
    assert store.pool.num_free == 2
    assert len(set(allocation.slots.tolist())) == 20
    second = prompt((7, 3), (6, 2, "shared"))
    wanted = plan_request(second, 4, store, Edges(1, 0), ALL, NOW)
    assert [use.source for use in wanted.uses] == [allocation.entries[0]]
    assert allocator.num_pages(wanted) == 4  # 7 own, 2 corrected, 4 to come
    assert not allocator.can_allocate(wanted)
    store.check_integrity([allocation.pages])
    assert str(plan).startswith("16 prompt tokens")


def test_prefix_hashes_are_those_of_a_chain() -> None:
    text = PrefixHashes(np.arange(23, dtype=np.int32), SALT)
    chain = None
    for start in range(0, 20, 5):
        chain = hash_chain(chain, text.token_ids[start : start + 5], SALT)
        assert text.of(start + 5, 5) == chain
    assert text.of(23, 5) == hash_chain(chain, text.token_ids[20:], SALT)
    assert text.of(3, 5) == hash_chain(None, text.token_ids[:3], SALT)
    longer = text.extended([30, 31])
    assert longer.of(20, 5) == chain
    assert longer.of(25, 5) == hash_chain(chain, longer.token_ids[20:], SALT)
    assert longer.of(23, 5) == text.of(23, 5)


def test_a_plan_is_drawn_in_a_line(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    drawings: list[str] = []

    class Draws:
        def on_event(self, event: object) -> None:
            plan = getattr(event, "plan", None)
            if isinstance(plan, RequestPlan):
                drawings.append(str(plan))

    llm.engine.observe(Draws())
    blocks = [shared([10 + n] * 20) for n in range(2)]
    prompts = [Prompt([private([100 + n] * (5 + n)), *blocks, private([7])]) for n in range(2)]
    llm.run_round(prompts, SamplingParams(max_tokens=2))
    assert drawings[0].splitlines()[1:] == [
        "0     5                                        45 46",
        "|#####|OOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOOO|#|__|",
    ]
    assert drawings[1].splitlines()[1:] == [
        "0      6                    26                   46 47",
        "|######|cccc................|cccc................|#|__|",
        "       d=+1                 d=+1",
    ]
