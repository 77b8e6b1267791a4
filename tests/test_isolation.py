"""Isolation: nothing that anybody reads was computed behind text of others who guard it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from conftest import examples
from fake_executor import next_token
from serving import chat, serving
from test_dispatcher import NEWS, Desk
from test_exactness import KEEP, random_ids
from test_pic import DenseHook, dense_pass
from test_plan import FakeIndex, Refuses, prompt, spans
from tokendance import LLM, Agent, Prompt, SamplingParams, private, shared
from tokendance.collector.correction import CorrectAll, CorrectionPolicy, Edges
from tokendance.collector.neutral import neutral_runs
from tokendance.collector.plan import ReuseRules, plan_request
from tokendance.collector.planner import Planner
from tokendance.engine.request import Request
from tokendance.errors import ConfigError, PromptError, StoreError
from tokendance.models.loader import LoadedModel, load_model
from tokendance.options import EngineOptions
from tokendance.rounds.discovery import EarlierPrompt
from tokendance.rounds.prompts import Part
from tokendance.rounds.segments import (
    EncodedPrompt,
    PrefixHashes,
    SegmentHash,
    hash_segment,
    make_salt,
)
from tokendance.store.entries import RoundId
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import Holder, PagePool
from tracing_executor import Secrets, TracingExecutor, letters

MakeLLM = Callable[..., LLM]
NOW = RoundId(7)
GUARDED = ReuseRules(prefix=True, segments=True, publish=True, guarded=True)
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


# -- who computes -----------------------------------------------------------------------------


def runs_of(*requests: str) -> list[str]:
    named = [[SegmentHash(name.encode()) for name in request] for request in requests]
    return ["".join(name.decode() for name in run) for run in neutral_runs(named)]


def test_neutral_owners_put_nothing_behind_what_a_reader_lacks() -> None:
    assert runs_of() == []
    assert runs_of("abc") == ["abc"]
    assert runs_of("abc", "abc") == ["abc"]
    assert runs_of("wabv", "ab", "wabv") == ["wv", "ab"]  # what some whisper, and what all hear
    assert runs_of("ab", "ba") == ["a", "b"]
    assert runs_of("abcd", "cdba") == ["a", "b", "c", "d"]
    assert runs_of("bc", "ac", "ab") == ["b", "c", "a"]  # each reads all but its own
    assert runs_of("abab") == ["ab"]


@pytest.mark.parametrize(
    ("policy", "lengths"),
    [(Edges(3, 1), [20, 30]), (Edges(3, 1), [18]), (Edges(16, 0), [20]), (CorrectAll(), [50, 60])],
)
def test_a_neutral_owner_is_made_where_it_saves_something(
    policy: CorrectionPolicy, lengths: list[int]
) -> None:
    def count(segments: bool = True) -> list[int]:
        planner = Planner(FakeIndex(), policy, prefix=True, segments=segments)
        blocks = [(length, 2 + n, "shared") for n, length in enumerate(lengths)]
        guarded = [prompt((5, 90 + n), *blocks, (3, 9)) for n in range(3)]
        return [len(made) for made in planner.neutral_prompts(guarded, [], NOW)]

    assert count() == ([50] if lengths == [20, 30] else [])
    assert count(segments=False) == []


def test_what_others_compute_anyway_has_no_neutral_owner() -> None:
    index = FakeIndex()
    index.add(30, 4, run=0, index=0, start=0, round_id=NOW)
    planner = Planner(index, Edges(3, 1), prefix=True, segments=True)
    blocks = [(30, token, "shared") for token in (2, 3, 4)]
    guarded = [prompt((5, 90 + n), *blocks, (3, 9)) for n in range(2)]
    other = prompt((4, 80), (30, 2, "shared"), (3, 9))
    (made,) = planner.neutral_prompts(guarded, [other], NOW)
    assert made.token_ids.tolist() == [3] * 30


def test_who_guards_its_text_publishes_what_stands_before_it() -> None:
    asked = prompt((6, 2, "shared"), (5, 3, "shared"), (4, 1), (7, 4, "shared"), (2, 6))
    plan = plan_request(asked, 4, FakeIndex(), Edges(1, 0), GUARDED, NOW)
    assert spans(plan) == [(0, 11, "owned"), (11, 24, "own"), (24, 28, "answer")]
    (run,) = plan.runs
    assert run.context == tuple(segment.hash for _, segment in asked.shared_segments())[:2]
    assert plan.guarded
    for policy in (Edges(1, 0), Refuses()):
        plan = plan_request(asked, 4, FakeIndex(), policy, ReuseRules(True, True, True), NOW)
        assert [run.context for run in plan.runs] == [(), ()]


def test_a_reader_has_to_have_read_what_stood_before() -> None:
    store = KVStore(PagePool(64, 4), 16)
    asked = prompt(*((20, token, "shared") for token in (2, 3, 4)))
    names = [segment.hash for _, segment in asked.shared_segments()]
    (slots,), pages = store.take_slots([60])
    store.publish_run(
        [(name, 20 * n, slots[20 * n : 20 * n + 20]) for n, name in enumerate(names)],
        NOW,
        tuple(names),
    )

    def reused(*tokens: int) -> list[int]:
        reader = prompt((5, 90), *((20, token, "shared") for token in tokens), (3, 9))
        plan = plan_request(reader, 4, store, Edges(0, 0), ReuseRules(True, True, True), NOW)
        return [int(reader.token_ids[use.start]) for use in plan.uses]

    assert reused(2, 3, 4) == [2, 3, 4]
    assert reused(2, 5, 3) == [2, 3]
    assert reused(3, 4) == []
    assert reused(3, 2, 3) == [2, 3]
    assert reused(4, 3, 2) == [2]
    # Whoever lacks one of them lacks it, however often it has read others.
    assert reused(3, 3, 3, 3, 3) == []
    assert reused(2, 2, 2, 2, 4) == [2, 2, 2, 2]
    store.pool.release(pages, Holder.REQUEST)


def test_no_part_of_a_guarded_prompt_is_offered_to_others() -> None:
    salt = make_salt("s")
    text = PrefixHashes(np.arange(40, dtype=np.int32), salt)
    name = hash_segment(text.token_ids[10:30], salt)
    for guards in itertools.product((False, True), repeat=2):
        store = KVStore(PagePool(64, 4), 16)
        (slots,), pages = store.take_slots([40])
        store.slot_ready[slots] = True
        for guarded in guards:  # the same pages, published twice
            store.publish_prefix(text, slots, 40, guarded=guarded)
        store.publish_parts(text, [(10, 30, name)])
        assert bool(store.all_cached(name)) == (not any(guards))
        store.pool.release(pages, Holder.REQUEST)


# -- nothing is learned -----------------------------------------------------------------------


GUARDS = (0, 1, 2, 3)  # of the agents 0 to 5
WHISPERS = {100: (0, 2), 101: (1, 2), 102: (0, 1, 3)}  # who reads a text that not all read
WHO = [150, 150, 152, 153, 154, 155]  # two agents are told the same of themselves
SECRETS = [*WHISPERS, 150, 152, 153]
PAGES, PAGE_SIZE = 80, 8


def says(text: list[int], count: int) -> list[int]:
    """What the executor of a `Table` answers: public words, whatever it reads."""
    for _ in range(count):
        text = [*text, next_token(text, 40, 3)]
    return text[len(text) - count :]


class Table(RuleBasedStateMachine):
    """Agents talk, some of them guarded; parts of what they read are offered to all."""

    model: LoadedModel
    private = "isolated"
    owners = 1

    def __init__(self) -> None:
        super().__init__()
        options = EngineOptions(
            correction="edges:2+1",
            owners=self.owners,
            max_num_batched_tokens=48,
            kv_budget=PAGES * PAGE_SIZE * 8,
            page_size=PAGE_SIZE,
            max_reuse_rounds=3,
        )
        self.executor = TracingExecutor(PAGES * PAGE_SIZE, 40, 3, secrets=SECRETS)
        self.llm = LLM.from_loaded(self.model, options, executor=self.executor)
        self.histories: dict[int, list[Part]] = {}
        self.heard: list[Part] = []
        self.live: list[tuple[int, list[Part], Request]] = []
        self.prompts: list[EncodedPrompt] = []
        self.steps_at_failure = 0

    @precondition(lambda self: not self.live)
    @rule(
        agents=st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True),
        blocks=st.lists(st.integers(0, 4), max_size=3),
        shift=st.integers(0, 2),
        whisper=st.sampled_from([None, *WHISPERS]),
        split=st.booleans(),
        hears=st.booleans(),
    )
    def add_round(
        self,
        agents: list[int],
        blocks: list[int],
        shift: int,
        whisper: int | None,
        split: bool,
        hears: bool,
    ) -> None:
        round_id = self.llm.engine.new_round_id()
        requests = []
        for agent in agents:
            turn = agent * shift % max(1, len(blocks))
            read = [shared([50 + b] * (7 + 5 * b)) for b in blocks[turn:] + blocks[:turn]]
            if hears:
                read = self.heard + read
            if whisper is not None and agent in WHISPERS[whisper]:
                read.insert(agent % 2 + shift, shared([whisper] * 20))
            if split:
                read.insert(1, private([WHO[agent]] * 2))
            parts = self.histories.get(agent, [private([WHO[agent]] * (WHO[agent] - 145))]) + read
            guard = self.private if agent in GUARDS else None
            asked = Prompt([*parts, private([7])], agent=str(agent), private=guard)
            request = self.llm.requests.make(asked, PARAMS, round_id, str(agent))
            requests.append(request)
            self.prompts.append(request.prompt)
            self.live.append((agent, parts, request))
        self.heard = []
        self.llm.engine.add(requests)

    @precondition(lambda self: self.llm.engine.has_work)
    @rule(steps=st.integers(1, 6), fails=st.booleans())
    def tick(self, steps: int, fails: bool) -> None:
        if fails and len(self.executor.steps) > self.steps_at_failure:
            self.executor.fail = RuntimeError("now and then")
            self.steps_at_failure = len(self.executor.steps)
        for _ in range(steps):
            self.llm.engine.tick()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 10**6))
    def abort(self, which: int) -> None:
        _, _, request = self.live[which % len(self.live)]
        self.llm.engine.abort(request)

    @precondition(lambda self: self.live)
    @rule()
    def finish(self) -> None:
        while any(request.finish_reason is None for _, _, request in self.live):
            self.llm.engine.tick()
        assert not self.llm.engine.has_work, "an owner outlives its round"
        for agent, parts, request in self.live:
            if request.error is not None:
                continue
            assert request.generated == says(request.prompt.token_ids.tolist(), 24)
            self.histories[agent] = [*parts, private([7]), private(request.generated)]
            if sum(len(part.content) for part in self.histories[agent]) > 120:
                del self.histories[agent]
            self.heard.append(shared(request.generated[:20]))
        self.live = []

    @precondition(lambda self: self.prompts)
    @rule(which=st.integers(0, 10**6), whose=st.integers(0, 10**6))
    def recall(self, which: int, whose: int) -> None:
        """Offer parts of an earlier prompt that another has as segments, as discovery does."""
        earlier, other = (self.prompts[n % len(self.prompts)] for n in (which, whose))
        text = earlier.token_ids.tolist()
        parts = [
            (first, first + len(segment), segment.hash)
            for _, segment in other.shared_segments()
            for first in range(len(text) - len(segment) + 1)
            if text[first : first + len(segment)] == segment.token_ids.tolist()
        ]
        self.llm.engine.recall([EarlierPrompt(earlier.token_ids, tuple(parts))], earlier.salt)

    @invariant()
    def nothing_is_learned(self) -> None:
        assert self.executor.learned == []
        self.llm.engine.check_integrity()

    def teardown(self) -> None:
        self.executor.fail = None
        for _ in range(500):
            if self.llm.engine.has_work:
                self.llm.engine.tick()
        assert not self.llm.engine.has_work, "a request never finished"
        assert self.executor.learned == []
        self.llm.engine.forget()
        assert self.llm.kv_store.pool.num_free == PAGES


@pytest.mark.parametrize("owners", [1, 4])
def test_nothing_is_learned_whatever_happens(owners: int, fake: LoadedModel) -> None:
    Table.model, Table.owners = fake, owners
    run_state_machine_as_test(
        Table, settings=settings(max_examples=examples(150), stateful_step_count=25)
    )


@pytest.mark.parametrize("private", ["isolated", None])
@pytest.mark.parametrize("way", ["owner", "co-owner", "whisper", "place", "recall", "answer"])
def test_each_way_to_learn_is_closed(way: str, private: str | None, fake: LoadedModel) -> None:
    """Without isolation each of them is found, so that the property above has something to find."""
    Table.model, Table.owners = fake, 4 if way == "co-owner" else 1
    table = Table()
    table.private = private  # type: ignore[assignment]
    if way == "owner":  # who reads most would own what both read
        table.add_round([0, 2], [2, 3], 0, None, False, False)
    elif way == "co-owner":  # whoever has the longest text would own, and the other lend its own
        table.add_round([0, 5], [2, 3], 0, None, False, False)
    elif way == "whisper":  # some read more than others
        table.add_round([0, 2, 4], [2, 3], 0, 100, False, False)
    elif way == "place":  # each reads in an order of its own, and two begin alike
        table.add_round([0, 1, 2, 3], [2, 3, 4], 1, None, False, False)
    else:  # its own words, which it has computed in place, are offered to who hears them
        table.add_round([0], [4, 3], 0, None, False, False)
        table.finish()
        heard = table.heard
        if way == "recall":
            table.add_round([0], [], 0, None, False, False)
            table.finish()
            table.heard = heard
        table.add_round([4] if way == "recall" else [0, 4], [4, 3], 0, None, False, True)
        table.recall(len(table.prompts) - 2, len(table.prompts) - 1)
    table.finish()
    assert bool(table.executor.learned) == (private is None)


# -- what a model computes --------------------------------------------------------------------


def told(secret: list[int], readers: int = 3, **asks: Any) -> list[Prompt]:
    """A round in which the first agent is told something; it would own what all read."""
    rng = np.random.default_rng(5)
    blocks = [shared(random_ids(rng, length)) for length in (25, 14, 30)]
    prompts = [Prompt([private(secret), *blocks, private([9])], agent="told", private="isolated")]
    for n in range(readers):
        own = random_ids(rng, 5 + 7 * n)
        prompts.append(Prompt([private(own), *blocks, private([8, n])], agent=str(n), **asks))
    return prompts


@pytest.mark.parametrize("asks", [{}, {"private": "isolated"}])
@pytest.mark.parametrize(
    ("reuse", "chunk"), [("collective", 4096), ("collective", 24), ("pic", 64)]
)
def test_no_secret_changes_what_others_are_told(
    asks: dict[str, Any], reuse: str, chunk: int, make_llm: MakeLLM
) -> None:
    def answers(isolated: bool, secret: int) -> torch.Tensor:
        prompts = told([secret] * 20, **asks)
        if not isolated:
            prompts = [Prompt(one.content, agent=one.agent) for one in prompts]
        llm = make_llm(reuse=reuse, correction="edges:3+1", max_num_batched_tokens=chunk)
        result = llm.run_round(prompts, KEEP)
        result.raise_for_errors()
        assert result.stats.agents == 4
        assert all(output.reused_tokens > 0 for output in result.outputs[2:])
        return torch.stack([torch.stack(output.logprobs) for output in result.outputs[1:]])

    torch.testing.assert_close(answers(True, 50), answers(True, 99), rtol=0, atol=1e-5)
    assert (answers(False, 50) - answers(False, 99)).abs().max() > 1e-2


def test_readers_equal_a_dense_pass_over_kv_of_the_blocks_alone(
    tiny: LoadedModel, make_llm: MakeLLM
) -> None:
    prompts = told([50] * 20, private="isolated")
    llm = make_llm(correction="none")
    encoded = [llm.encoder.encode(one) for one in prompts]
    blocks = [segment for _, segment in encoded[0].shared_segments()]
    alone = DenseHook(tiny.layers)
    dense_pass(tiny, [token for block in blocks for token in block.token_ids.tolist()], alone)
    result = llm.run_round(prompts, KEEP)
    result.raise_for_errors()
    for one, output in zip(encoded, result.outputs, strict=True):
        reader = DenseHook(tiny.layers, recomputed_share=0)
        first = one.shared_segments()[0][0]
        length = sum(map(len, blocks))
        reader.sources = {first + n: (alone.kv, n) for n in range(length)}
        expected = dense_pass(tiny, one.token_ids.tolist(), reader)
        torch.testing.assert_close(output.logprobs[0], expected, rtol=0, atol=1e-4)


def test_what_isolation_costs_is_counted_exactly(make_llm: MakeLLM) -> None:
    prompts = told([50] * 20, private="isolated")
    llm = make_llm(correction="edges:3+1")
    encoded = [llm.encoder.encode(one) for one in prompts]
    num_shared = sum(len(block) for _, block in encoded[0].shared_segments())
    num_own = sum(len(one) - num_shared for one in encoded)
    stats = llm.run_round(prompts, KEEP).stats
    assert stats.computed_tokens == num_shared + num_own + 4 * 3 * 4  # of 4 agents and 3 blocks
    assert stats.prompt_tokens == num_own + 4 * num_shared
    assert stats.reused_tokens == 4 * (num_shared - 3 * 4)
    assert stats.corrected_tokens == 4 * 3 * 4
    # In the next round it is there.
    again = llm.run_round([Prompt([*one.content[1:-1], private([7] * 40)]) for one in prompts[:1]])
    assert again.stats.reused_tokens > num_shared - 16
    # With one who does not mind, nobody else is needed.
    llm.engine.forget()
    prompts[2] = Prompt(prompts[2].content, agent="open")
    stats = llm.run_round(prompts, KEEP).stats
    assert stats.computed_tokens == num_shared + num_own + 3 * 3 * 4


# -- from where it is asked for ---------------------------------------------------------------


def test_what_cannot_be_asked_for_is_refused(make_fake_llm: MakeLLM) -> None:
    with pytest.raises(PromptError, match="'isolated'"):
        Prompt([1, 2], private="secret")
    with pytest.raises(ConfigError, match="open"):
        EngineOptions(private="secret")  # type: ignore[arg-type]
    with serving(make_fake_llm()) as (client, _):
        answer = chat(client, private="secret")
        assert answer.status_code == 400
        assert "private" in answer.text


def guarded(llm: LLM) -> list[tuple[str, bool]]:
    """Note of each request whether it is guarded, by its agent."""
    noted: list[tuple[str, bool]] = []
    add = llm.engine.add

    def note(requests: list[Request]) -> None:
        noted.extend((request.agent, request.guarded) for request in requests)
        add(requests)

    llm.engine.add = note  # type: ignore[method-assign, assignment]
    return noted


def test_an_agent_a_round_or_a_server_asks_for_it(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=1000)
    noted = guarded(llm)

    def agents(*asking: str, **fields: Any) -> dict[str, Any]:
        said = [
            {
                "agent": name,
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 1,
                **({"private": "isolated"} if name in asking else {}),
            }
            for name in ("ann", "bo")
        ]
        return {"model": "tiny", "agents": said, **fields}

    with serving(llm) as (client, _):
        chat(client, private="isolated").raise_for_status()
        chat(client).raise_for_status()
        client.post("/v1/rounds", json=agents("bo")).raise_for_status()
        client.post("/v1/rounds", json=agents(private="isolated")).raise_for_status()
    assert noted == [
        ("the client", True),
        ("the client", False),
        ("ann", False),
        ("bo", True),
        ("ann", True),
        ("bo", True),
    ]
    llm = make_fake_llm(private="isolated")
    noted = guarded(llm)
    with serving(llm) as (client, _):
        chat(client).raise_for_status()
    assert noted == [("the client", True)]


@pytest.fixture(scope="module")
def roomy(model_folder: Callable[..., Path]) -> LoadedModel:
    return load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")


def test_an_agent_of_a_session_goes_on_asking(
    make_llm: MakeLLM, roomy: LoadedModel, tmp_path: Path
) -> None:
    tasks = [{"agent": name, "task": "speak", "max_tokens": 1} for name in ("ann", "bo")]
    for turn in range(2):
        llm = make_llm(model=roomy, num_pages=1000)
        llm.open_store(tmp_path / "kv")
        noted = guarded(llm)
        for task in tasks if turn == 0 else ():
            task["system"] = f"I am {task['agent']}."
            if task["agent"] == "bo":
                task["private"] = "isolated"
        with serving(llm) as (client, _):
            body = {"model": "tiny", "session": "town", "agents": tasks}
            client.post("/v1/rounds", json=body).raise_for_status()
        assert noted == [("ann", False), ("bo", True)]
        llm.close()
        tasks = [{"agent": name, "task": "speak", "max_tokens": 1} for name in ("ann", "bo")]


# -- the server and the store -----------------------------------------------------------------

# The tokenizer of the tests has a token for each letter; answers are of small ones.
LETTERS = dict(zip("ABCD", letters("ABCD"), strict=True))
SAYS = (letters("x")[0], letters("a")[0])


def traced(model: LoadedModel, sets: list[Secrets], pages: int, **options: Any) -> LLM:
    page_bytes = model.shape.kv_bytes_per_token(model.dtype) * 16
    executor = TracingExecutor(pages * 16, *SAYS, secrets=LETTERS.values(), known_sets=sets)
    chosen = EngineOptions(kv_budget=pages * page_bytes, **options)
    return LLM.from_loaded(model, chosen, executor=executor)


def learned(llm: LLM) -> list[Secrets]:
    assert isinstance(llm.executor, TracingExecutor)
    assert llm.executor.num_rows > 0
    return llm.executor.learned


@pytest.mark.parametrize("private", ["isolated", "open"])
def test_who_comes_one_after_another_shares_and_learns_nothing(
    private: str, fake: LoadedModel
) -> None:
    desk = Desk(traced(fake, [frozenset()], 2000, private=private))
    jobs = []
    for turn in range(3):
        for letter in LETTERS:
            who = f"you are {letter * 20}. "
            jobs.append(desk.ask(f"{who * 2}{NEWS.lower()} and so on and on, turn {turn}?"))
            desk.run()
        both = [desk.ask(f"{letter * 30} {NEWS.lower()[20:]} what now {turn}?") for letter in "AB"]
        desk.run()
        jobs += both
    assert all(job.request.error is None for job in jobs)
    # What several had read is found and shared, in both ways.
    assert all(job.request.num_reused > 0.5 * len(NEWS) for job in jobs[2:4])
    assert (learned(desk.llm) == []) == (private == "isolated")
    assert desk.is_empty()


@pytest.mark.parametrize("everybody", [False, True])
def test_a_session_on_disk_tells_nobody_anything(
    everybody: bool, roomy: LoadedModel, tmp_path: Path
) -> None:
    """It is evicted, goes on in other processes, and agents join: all of that reads the store."""
    sets: list[Secrets] = [frozenset()]
    num_rows = 0
    for turn in range(4):
        llm = traced(roomy, sets, 120, private="isolated" if everybody else "open")
        llm.open_store(tmp_path / "kv")
        asks = None if everybody else "isolated"
        people = [
            Agent(f"{n}", f"{letter * 25} is who i am.", asks) for n, letter in enumerate("ABC")
        ]
        session = llm.session("town", people)
        for number in range(2):
            if turn == 2 and number == 0:
                session.join(Agent("new", "i am new and have no secret.", asks))
            session.run("speak now. " * 3, SamplingParams(max_tokens=30, ignore_eos=True))
            llm.generate([[4] * 900])  # others need the memory
            assert learned(llm) == []
        num_rows += llm.executor.num_rows  # type: ignore[attr-defined]
        llm.close()
    assert num_rows > 1000


def test_a_store_of_open_rounds_is_not_one_of_isolated_ones(
    make_llm: MakeLLM, tmp_path: Path
) -> None:
    for mode, other in (("open", "isolated"), ("isolated", "open")):
        for _ in range(2):
            llm = make_llm(private=mode)
            llm.open_store(tmp_path / mode)
            llm.close()
        with pytest.raises(StoreError, match="--private isolated"):
            make_llm(private=other).open_store(tmp_path / mode)
