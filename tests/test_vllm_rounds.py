"""Rounds inside vLLM, without vLLM: blocks, scheduling and memory are imitated here.

What is checked of every step is what attention needs: each position of each context lies at a slot
that holds this very token, of a block that somebody refers to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from tokendance.attention.interface import PackedBatch, PackedRequest
from tokendance.attention.plan import make_plan
from tokendance.collector.correction import Edges
from tokendance.collector.known import NO_SLOT
from tokendance.errors import ConfigError
from tokendance.integrations.vllm.arrivals import RoundKey
from tokendance.integrations.vllm.contexts import Contexts
from tokendance.integrations.vllm.hints import Hints, read_hints
from tokendance.integrations.vllm.pages import BlockPages
from tokendance.integrations.vllm.rewriting import restore, rewrite
from tokendance.integrations.vllm.rounds import Member, Rounds
from tokendance.integrations.vllm.settings import Settings
from tokendance.rounds.segments import make_salt
from tokendance.store.kv_store import KVStore

PAGE = 4
KEY = RoundKey(make_salt("test"))


@dataclass(eq=False)
class Block:
    block_id: int
    ref_cnt: int = 0


class Blocks:
    """References to blocks, counted as vLLM counts them; block 0 is nobody's."""

    def __init__(self, count: int) -> None:
        self.blocks = [Block(index) for index in range(count)]
        self.blocks[0].ref_cnt = 1

    def touch(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Sequence[Block]) -> None:
        for block in ordered_blocks:
            assert block.ref_cnt > 0, "a block was freed twice"
            block.ref_cnt -= 1

    def get_num_free_blocks(self) -> int:
        return sum(block.ref_cnt == 0 for block in self.blocks)

    def take(self) -> int | None:
        for block in self.blocks:
            if block.ref_cnt == 0:
                block.ref_cnt = 1
                return block.block_id
        return None


@dataclass(eq=False)
class Running:
    member: Member
    pages: list[int] = field(default_factory=list)
    num_done: int = 0  # own tokens
    answer: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [*self.member.token_ids.tolist(), *self.answer]

    @property
    def num_own(self) -> int:
        return len(self.member.own) + len(self.answer)


class Imitation:
    """A scheduler and a worker that do with requests what vLLM's do."""

    def __init__(self, num_blocks: int, rng: np.random.Generator, max_retained: int) -> None:
        self.blocks = Blocks(num_blocks)
        self.store = KVStore(BlockPages(self.blocks, PAGE), max_reuse_rounds=16)
        self.rounds = Rounds(
            self.store,
            Edges(1, 1),
            window_s=1.0,
            window_share=10.0,
            round_wait_s=1.0,
            max_retained=max_retained,
            recent_s=1e9,
        )
        self.contexts = Contexts(num_blocks, PAGE)
        self.content = np.full(num_blocks * PAGE, -1, np.int64)
        self.rng = rng
        self.running: list[Running] = []
        self.preempted: list[Running] = []
        self.now = 0.0
        self.num_computed = 0

    def start(self) -> None:
        self.now += 100.0  # the window's longest wait is over
        for member in self.rounds.start(self.now):
            reads = member.reads if member.is_mirror else None
            self.contexts.begin(member.request_id, reads)
            self.running.append(Running(member))

    def step(self) -> None:
        """Compute a random chunk of each request, and check what each reads."""
        self.running += self.preempted
        self.preempted = []
        scheduled: list[tuple[Running, int]] = []
        for one in list(self.running):
            if one not in self.running:
                continue
            num_new = min(int(self.rng.integers(1, 24)), one.num_own - one.num_done)
            if num_new and self._allocate(one, one.num_done + num_new, scheduled):
                scheduled.append((one, num_new))
        for one, num_new in scheduled:
            member = one.member
            if self.rounds.wants_publishing(member.request_id, one.num_done + num_new):
                self.rounds.publish(member.request_id, one.num_done + num_new, one.pages)
        self._compute(scheduled)
        for one, num_new in scheduled:
            one.num_done += num_new
            self.num_computed += num_new
            if one.num_done == one.num_own and len(one.answer) < one.member.max_new_tokens:
                one.answer.append(int(self.rng.integers(100)))

    def run_to_first_tokens(self) -> None:
        """Go on until each request has answered by a token, and end it then."""
        while self.running or self.rounds.num_waiting:
            self.start()
            self.step()
            for one in list(self.running):
                if one.answer:
                    self.end(one)

    def _allocate(
        self, one: Running, num_tokens: int, scheduled: Sequence[tuple[Running, int]]
    ) -> bool:
        while len(one.pages) * PAGE < num_tokens:
            page = self.blocks.take()
            if page is not None:
                one.pages.append(page)
            elif not self.rounds.give_up(1):
                others = [victim for victim, _ in scheduled]
                victims = [other for other in self.running if other not in others]
                if not victims:
                    return False
                victim = victims[-1]
                self._preempt(victim)
                if victim is one:
                    return False
        return True

    def _preempt(self, one: Running) -> None:
        self.running.remove(one)
        self.preempted.append(one)
        self._free(one)
        one.num_done = 0
        self.contexts.restart(one.member.request_id)

    def _free(self, one: Running) -> None:
        self.blocks.free_blocks([self.blocks.blocks[page] for page in one.pages])
        one.pages = []

    def _compute(self, scheduled: Sequence[tuple[Running, int]]) -> None:
        if not scheduled:
            return
        tables = np.zeros((len(scheduled), self.store.pool.num_pages), np.int32)
        for table, (one, _) in zip(tables, scheduled, strict=True):
            table[: len(one.pages)] = one.pages
        step = self.contexts.take(
            [one.member.request_id for one, _ in scheduled],
            np.array([one.num_done for one, _ in scheduled]),
            np.array([num_new for _, num_new in scheduled]),
            tables,
            np.arange(len(scheduled)),
        )
        packed = [
            (one, request) for (one, _), request in zip(scheduled, step.batch.requests, strict=True)
        ]
        true = {
            request.first_row + index: position
            for one, request in packed
            if one.member.is_mirror
            for index, position in enumerate(request.positions.tolist())
        }
        assert dict(zip(step.rows.tolist(), step.positions.tolist(), strict=True)) == true
        check_plan(step.batch)
        for one, request in packed:  # a layer writes all new KV before it attends
            for position in request.positions.tolist():
                self.content[request.slots[position]] = one.tokens[position]
        for one, request in packed:
            length = int(request.positions[-1]) + 1
            slots = request.slots[:length]
            assert (slots != NO_SLOT).all()
            assert self.content[slots].tolist() == one.tokens[:length]
            assert all(self.blocks.blocks[page].ref_cnt > 0 for page in (slots // PAGE).tolist())
            own = np.setdiff1d(np.arange(length), np.flatnonzero(one.member.reads != NO_SLOT))
            assert (self.contexts.slot_position[slots[own]] == own).all()

    def end(self, one: Running) -> None:
        member = one.member
        num_computed = min(one.num_done, one.num_own - 1)
        self.rounds.end(member.request_id, one.answer, num_computed, one.pages)
        self.contexts.forget([member.request_id])
        self._free(one)
        (self.running if one in self.running else self.preempted).remove(one)

    def check(self) -> None:
        self.rounds.check_integrity()


def check_plan(batch: PackedBatch) -> None:
    """Assert that what earlier steps have found changes no plan."""
    anew = PackedBatch(
        [PackedRequest(one.first_row, one.positions, one.slots) for one in batch.requests],
        batch.slot_position,
    )
    plan, expected = make_plan(batch), make_plan(anew)
    for name in ("offsets", "row_indptr", "range_indptr", "rows", "slot_begin", "slot_end"):
        assert getattr(plan, name).tolist() == getattr(expected, name).tolist(), name
    assert plan.rotations.tolist() == expected.rotations.tolist()
    assert plan.key_end.tolist() == expected.key_end.tolist()


def test_members_that_are_let_go_hold_nothing_and_nobody_waits_for_them() -> None:
    world = Imitation(400, np.random.default_rng(0), 400)
    shared = np.arange(100, 200, dtype=np.int32)
    for index in range(3):
        prompt = np.concatenate([np.full(3 + index, index, np.int32), shared])
        world.rounds.arrive(Member(str(index), KEY, prompt, 1), world.now)
    world.start()
    assert len(world.running) == 1  # the owner, for which two wait
    world.rounds.let_go()
    world.check()
    world.start()
    assert len(world.running) == 2
    assert not world.running[1].member.is_mirror  # it owns what the first would have
    while not world.running[1].member.is_published:
        world.step()
    world.start()
    assert world.running[2].member.is_mirror
    world.rounds.let_go()
    world.rounds.forget()
    world.check()
    assert world.store.pool.num_free == world.store.pool.num_pages


def random_prompts(rng: np.random.Generator, num_agents: int) -> list[np.ndarray]:
    blocks = [rng.integers(0, 9, int(rng.integers(16, 40))) for _ in range(int(rng.integers(1, 4)))]
    prompts = []
    for _ in range(num_agents):
        order = rng.permutation(len(blocks)) if rng.random() < 0.3 else range(len(blocks))
        private = rng.integers(10, 1000, int(rng.integers(0, 12)))
        task = rng.integers(10, 1000, int(rng.integers(1, 6)))
        prompts.append(np.concatenate([private, *(blocks[i] for i in order), task]))
    return prompts


@settings(max_examples=examples(80))
@given(
    seed=st.integers(0, 2**32 - 1),
    num_rounds=st.integers(1, 3),
    num_blocks=st.sampled_from([54, 70, 400]),
    max_retained=st.sampled_from([0, 20, 400]),
    aborts=st.booleans(),
)
def test_everybody_reads_what_its_prompt_says(
    seed: int, num_rounds: int, num_blocks: int, max_retained: int, aborts: bool
) -> None:
    rng = np.random.default_rng(seed)
    world = Imitation(num_blocks, rng, max_retained)
    history: list[np.ndarray] = []
    for number in range(num_rounds):
        prompts = random_prompts(rng, int(rng.integers(1, 6)))
        for index, prompt in enumerate(prompts):
            if history and rng.random() < 0.5:  # goes on with what was said
                prompt = np.concatenate([history[index % len(history)], prompt])[:200]
            member = Member(
                f"{number}-{index}", KEY, prompt.astype(np.int32), int(rng.integers(1, 5))
            )
            world.rounds.arrive(member, world.now)
        history = []
        for _ in range(2000):
            world.start()
            world.step()
            world.check()
            for one in [*world.running, *world.preempted]:
                is_done = len(one.answer) == one.member.max_new_tokens
                if is_done or (aborts and rng.random() < 0.03):
                    history.append(np.array(one.tokens))
                    world.end(one)
            if not (world.running or world.preempted or world.rounds.num_waiting):
                break
        else:
            pytest.fail("somebody waits for ever")
        assert world.store.pool.num_pages - world.store.pool.num_free <= max(0, max_retained)
    world.rounds.forget()
    world.check()
    assert world.blocks.get_num_free_blocks() == num_blocks - 1


def test_a_round_computes_what_all_read_once() -> None:
    rng = np.random.default_rng(0)
    world = Imitation(400, rng, 400)
    shared = rng.integers(0, 9, 120)
    for index in range(6):
        prompt = np.concatenate([rng.integers(10, 99, 5 + index), shared, rng.integers(10, 99, 3)])
        world.rounds.arrive(Member(str(index), KEY, prompt.astype(np.int32), 1), world.now)
    world.run_to_first_tokens()
    private = sum(5 + index + 3 for index in range(6))
    # One owner computes the run; five mirrors its first and its last token.
    assert world.num_computed == private + 120 + 5 * 2


def test_nobody_reads_across_tenants() -> None:
    world = Imitation(400, np.random.default_rng(0), 400)
    prompt = np.arange(60, dtype=np.int32)
    for name in ("one", "two"):
        world.rounds.arrive(Member(name, RoundKey(make_salt(name)), prompt, 1), world.now)
    world.start()
    world.step()
    assert [one.member.is_mirror for one in world.running] == [False, False]


def named(request_id: str, size: int | None, token: int = 5) -> Member:
    prompt = np.full(20, token, np.int32)
    return Member(request_id, KEY._replace(name="round"), prompt, 1, round_size=size)


def test_a_round_with_a_name_begins_when_it_is_full_or_after_a_wait() -> None:
    rounds = Imitation(400, np.random.default_rng(0), 400).rounds
    rounds.arrive(named("a", 3), 0.0)
    rounds.arrive(named("b", 3), 0.9)
    assert list(rounds.start(1.8)) == []
    rounds.arrive(named("c", 3), 1.8)
    assert [member.request_id for member in rounds.start(1.8)] == ["a", "b", "c"]
    for index in range(40):  # somebody keeps arriving, a little before each wait is over
        rounds.arrive(named(f"late{index}", None), 10 + 0.9 * index)
        if 10 + 0.9 * index >= 20:
            break
        list(rounds.start(10 + 0.9 * index))
    assert rounds.num_waiting == index + 1
    assert rounds.remove("late0") is not None
    assert rounds.remove("late0") is None
    assert len(list(rounds.start(20.0))) == index  # ten waits after the first: no longer


def test_sessions_have_windows_of_their_own() -> None:
    rounds = Imitation(400, np.random.default_rng(0), 400).rounds
    for name in ("one", "two"):
        key = KEY._replace(session=name)
        rounds.arrive(Member(name, key, np.full(20, 3, np.int32), 1), 0.0)
    (first, second) = rounds._arrivals.take(100.0)
    assert [member.request_id for member in (*first, *second)] == ["one", "two"]


@pytest.mark.parametrize(("priority", "waits"), [(-1, False), (0, True), (1, True)])
def test_nobody_waits_for_an_owner_that_is_put_off_for_less(priority: int, waits: bool) -> None:
    world = Imitation(400, np.random.default_rng(0), 400)
    shared = np.arange(100, 200, dtype=np.int32)
    for name in ("first", "second"):
        prompt = np.concatenate([np.full(3, ord(name[0]), np.int32), shared])
        world.rounds.arrive(Member(name, KEY, prompt, 1), world.now)
    world.start()
    assert [one.member.request_id for one in world.running] == ["first"]
    late = np.concatenate([np.full(5, 7, np.int32), shared])
    world.rounds.arrive(Member("late", KEY, late, 1, priority=priority), world.now)
    world.start()
    started = [one.member.request_id for one in world.running]
    assert ("late" not in started) == waits


def test_blocks_are_where_the_client_says() -> None:
    world = Imitation(400, np.random.default_rng(0), 400)
    for index in range(2):
        prompt = np.arange(60, dtype=np.int32)
        prompt[: 5 * (index + 1)] = 100 + index  # 10 to 59 are equal; the client says 20 to 39
        member = Member(str(index), KEY, prompt, 1, blocks=((20, 40),))
        world.rounds.arrive(member, world.now)
    world.run_to_first_tokens()
    assert world.rounds.figures.mirrors == 1
    assert world.rounds.figures.reused_tokens == 20 - 2
    assert world.rounds.figures.corrected_tokens == 2


@pytest.mark.parametrize(
    "said",
    [
        {"round": ""},
        {"round": "x" * 257},
        {"round": 7},
        {"round_size": 3},
        {"blocks": 5},
        {"blocks": [1]},
        {"blocks": [3, 2]},
        {"blocks": [-1, 2]},
        {"blocks": [0, 99]},
        {"blocks": [0, 5, 4, 8]},
        {"blocks": [0, True]},
        {"blocks": ["0", "1"]},
        {"blocks": [0, 1] * 5000},
        {"reuse": ["exact"]},
        {"reuse": {}},
        {"tokendance_reads": [1, 2], "pages": [3]},
    ],
)
def test_what_cannot_be_is_ignored(said: dict[str, Any]) -> None:
    assert read_hints(said, 10) == Hints()


def test_hints_are_read() -> None:
    said = {"round": "r", "round_size": 3, "blocks": [0, 4, 4, 10], "reuse": "exact"}
    assert read_hints(said, 10) == Hints("r", 3, ((0, 4), (4, 10)), exact=True)
    assert read_hints({"round": "r", "round_size": True}, 10) == Hints("r")


@dataclass
class Request:
    """What `rewrite` uses of vLLM's requests."""

    prompt_token_ids: list[int]
    max_tokens: int
    block_hashes: list[bytes]
    _all_token_ids: list[int] = field(default_factory=list)
    _block_hasher: Any = None
    num_prompt_tokens: int = 32

    @property
    def num_tokens(self) -> int:
        return len(self._all_token_ids)

    def update_block_hashes(self) -> None:
        self.block_hashes.extend(self._block_hasher(self))


def test_a_mirror_keeps_the_hashes_of_its_exact_beginning_only() -> None:
    tokens = list(range(32))
    member = Member("a", KEY, np.arange(32, dtype=np.int32), 100)
    member.reads = np.full(32, NO_SLOT, np.int32)
    member.reads[10:30] = np.arange(20)
    member.own = np.flatnonzero(member.reads == NO_SLOT)
    exact = [bytes([index]) for index in range(8)]
    made = []
    for _ in range(2):
        request = Request(list(tokens), 100, list(exact), list(tokens), lambda _: exact)
        rewrite(request, member, max_model_len=40, tokens_per_hash=4)
        made.append(request)
    assert made[0].prompt_token_ids == [*range(10), 30, 31]
    assert made[0].num_prompt_tokens == made[0].num_tokens == 12
    assert made[0].max_tokens == 8  # with all of the prompt, the context is full then
    assert made[0].block_hashes[:2] == exact[:2]  # tokens 0 to 7
    assert len(made[0].block_hashes) == 3
    assert made[0].block_hashes[2] not in [*exact, made[1].block_hashes[2]]

    made[0]._all_token_ids += [7, 8]  # it has said something
    restore(made[0], member)
    assert made[0]._all_token_ids == [*tokens, 7, 8]
    assert made[0].prompt_token_ids == tokens
    assert made[0].num_prompt_tokens == 32
    assert made[0].max_tokens == 100
    assert made[0].block_hashes == exact


def test_settings_are_read_from_the_environment() -> None:
    settings = Settings.from_environment({"TOKENDANCE_WINDOW_MS": "7.5", "OTHER": "x"})
    assert settings == Settings(window_ms=7.5)
    for name, value in (
        ("WINDOW_MS", "soon"),
        ("RETAINED_SHARE", "2"),
        ("CORRECTION", "most"),
        ("RECENT_S", "-1"),
    ):
        with pytest.raises(ConfigError):
            Settings.from_environment({f"TOKENDANCE_{name}": value})
