"""Exact counts of computed, reused and corrected tokens, for rounds made by hand."""

from collections.abc import Callable, Sequence

import pytest

from tokendance import LLM, Agent, Part, Prompt, RoundResult, SamplingParams, private, shared
from tokendance.collector.owners import Start, in_order, order_starts
from tokendance.collector.plan import FRESH_END
from tokendance.rounds.segments import SegmentHash
from tokendance.store.entries import RoundId

MakeLLM = Callable[..., LLM]
ONE = SamplingParams(max_tokens=1)


def block(index: int, length: int = 20) -> Part:
    return shared([10 + index] * length)


def prompt(name: int, *middle: Part, own: int = 5, task: int = 3) -> Prompt:
    return Prompt(
        [private([100 + name] * (own + name)), *middle, private([200 + name] * task)],
        agent=f"agent {name}",
    )


def counts(result: RoundResult) -> list[tuple[int, int, int]]:
    result.raise_for_errors()
    for output in result.outputs:
        assert output.computed_tokens + output.reused_tokens == output.prompt_tokens
    return [(o.computed_tokens, o.reused_tokens, o.corrected_tokens) for o in result.outputs]


def test_all_gather_is_the_formula(make_llm: MakeLLM) -> None:
    """S + t + (N - 1)(k B + t) tokens, and the private parts once."""
    blocks = [block(i) for i in range(3)]
    llm = make_llm()
    private_parts = [[100 + n] * (5 + n) for n in range(4)]
    llm.generate(private_parts, ONE)
    result = llm.run_round([prompt(n, *blocks) for n in range(4)], ONE)
    s, t, b, k, agents = 60, 3, 3, 4, 4
    assert result.stats.computed_tokens == s + t + (agents - 1) * (k * b + t)
    assert counts(result) == [
        (s + t, 5, 0),
        *[(k * b + t, 5 + n + s - k * b, k * b) for n in (1, 2, 3)],
    ]


@pytest.mark.parametrize(("correction", "per_mirror"), [("none", 3), ("all", 63), ("first-k", 15)])
def test_corrections(make_llm: MakeLLM, correction: str, per_mirror: int) -> None:
    blocks = [block(i) for i in range(3)]
    result = make_llm(correction=correction).run_round([prompt(n, *blocks) for n in range(3)], ONE)
    assert [c for c, _, _ in counts(result)] == [
        5 + 63,
        6 + per_mirror,
        7 + per_mirror,
    ]


def test_other_orders_reuse_block_by_block(make_llm: MakeLLM) -> None:
    a, b, c = (block(i) for i in range(3))
    result = make_llm().run_round([prompt(0, a, b, c), prompt(1, c, a, b), prompt(2, b, c, a)], ONE)
    assert counts(result) == [(68, 0, 0), (6 + 12 + 3, 48, 12), (7 + 12 + 3, 48, 12)]


def test_agents_that_share_another_order_get_an_owner(make_llm: MakeLLM) -> None:
    a, b, c = (block(i) for i in range(3))
    result = make_llm().run_round(
        [prompt(0, a, b, c), prompt(1, a, b, c), prompt(2, c, b, a), prompt(3, c, b, a)], ONE
    )
    computed = [row[0] for row in counts(result)]
    assert computed == [5 + 63, 6 + 15, 7 + 63, 8 + 15]


def test_agents_without_their_own_block(make_llm: MakeLLM) -> None:
    blocks = [block(i) for i in range(4)]
    result = make_llm().run_round(
        [prompt(n, *(b for i, b in enumerate(blocks) if i != n)) for n in range(4)], ONE
    )
    computed = [row[0] for row in counts(result)]
    # The first owns what it sees; the next owns the block that the first does not see.
    assert computed == [5 + 60 + 3, 6 + 20 + 2 * 4 + 3, 7 + 12 + 3, 8 + 12 + 3]


def test_what_follows_new_words_is_computed_anew(make_llm: MakeLLM) -> None:
    """A question that is asked in each round is read after what was said in this one."""
    said, question = [block(i, 40) for i in range(2)], block(9, 40)
    llm = make_llm()
    llm.run_round([prompt(n, said[0], question) for n in range(3)], ONE)
    result = llm.run_round([prompt(n, said[0], said[1], question) for n in range(3)], ONE)
    # All find their private part and the first block; the first of them owns block and question.
    assert counts(result) == [
        (2 * 40 + 3, 5 + 40, 0),
        *[(2 * 4 + 3, 5 + n + 40 + 2 * 36, 2 * 4) for n in (1, 2)],
    ]
    # With nothing new before it, or with few words, it is what it was, but for its end.
    end = FRESH_END - 3
    corrected = 2 * 4 + end
    result = llm.run_round([prompt(n, said[0], question) for n in (3, 4)], ONE)
    assert counts(result) == [(n + 5 + corrected + 3, 80 - corrected, corrected) for n in (3, 4)]
    few = block(8, 31)
    result = llm.run_round([prompt(n, few, said[0], question) for n in (5, 6)], ONE)
    assert counts(result)[0] == (10 + 31 + corrected + 3, 80 - corrected, corrected)


def test_what_all_are_asked_is_computed_by_one_of_the_round(make_llm: MakeLLM) -> None:
    question = block(9, 40)
    llm = make_llm()
    engine = llm.engine

    def ask(names: Sequence[int], round_id: RoundId) -> list[int]:
        prompts = [Prompt([private([100 + n] * 5), question], agent=f"agent {n}") for n in names]
        requests = [llm.requests.make(one, ONE, round_id, "") for one in prompts]
        engine.add(requests)
        while engine.has_work:
            engine.tick()
        return [len(one.prompt) - one.num_reused for one in requests]

    first, second = engine.new_round_id(), engine.new_round_id()
    assert ask([0, 1], first) == [45, 5 + 4 + 1]
    assert ask([2], first) == [5 + 4 + 1]
    assert ask([3, 4], second) == [5 + 4 + FRESH_END] * 2


@pytest.mark.parametrize("is_first", [True, False])
def test_what_follows_new_words_is_computed_anew_by_whoever_comes(
    make_llm: MakeLLM, is_first: bool
) -> None:
    """Those who read only what is new make nothing older of what others read behind it."""
    new, question, other = block(0, 40), block(9), block(7)
    llm = make_llm()
    llm.run_round([prompt(n, question, other) for n in range(2)], ONE)
    prompts = [prompt(5, new), prompt(6, new, question, other), prompt(7, new, question, other)]
    result = llm.run_round(prompts if is_first else prompts[::-1], ONE)
    computed = {output.agent: output.computed_tokens for output in result.outputs}
    privates = 10 + 11 + 12
    corrected = 2 * 4 + 2 * 4  # of what is new two read it, of the others one
    assert sum(computed.values()) == privates + 40 + 2 * 20 + corrected + 3 * 3


def test_neighbourhoods(make_llm: MakeLLM) -> None:
    blocks = [block(i) for i in range(6)]
    prompts = [prompt(n, *(blocks[(n + i) % 6] for i in (0, 1, 2)), own=5) for n in range(6)]
    result = make_llm().run_round(prompts, ONE)
    total = sum(row[0] for row in counts(result))
    own_and_task = sum(5 + n + 3 for n in range(6))
    # Two owners cover six blocks of 20; the four others correct 4 tokens in each of 3 blocks.
    assert total == own_and_task + 6 * 20 + 4 * 3 * 4


def test_late_agents_reuse_what_the_round_computed(make_llm: MakeLLM) -> None:
    blocks = [block(i) for i in range(3)]
    llm = make_llm()
    engine = llm.engine
    round_id = engine.new_round_id()
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    early = [llm.requests.make(prompt(n, *blocks), params, round_id, "") for n in range(2)]
    engine.add(early)
    for _ in range(3):
        engine.tick()
    late = llm.requests.make(prompt(2, *blocks), params, round_id, "")
    engine.add([late])
    while engine.has_work:
        engine.tick()
        engine.check_integrity()
    assert len(late.prompt) - late.num_reused == 7 + 12 + 3
    assert [len(r.generated) for r in (*early, late)] == [6, 6, 6]


def test_a_segment_twice_in_one_prompt(make_llm: MakeLLM) -> None:
    a, b = block(0), block(1)
    exact = make_llm(reuse="none").run_round([prompt(0, a, b, a), prompt(1, a, b, a)], ONE)
    llm = make_llm(correction="all")
    result = llm.run_round([prompt(0, a, b, a), prompt(1, a, b, a)], ONE)
    assert [o.token_ids for o in result.outputs] == [o.token_ids for o in exact.outputs]
    assert counts(make_llm().run_round([prompt(0, a, b, a), prompt(1, a, b, a)], ONE)) == [
        (68, 0, 0),
        (6 + 12 + 3, 48, 12),
    ]


def test_singletons_and_blocks_shorter_than_k(make_llm: MakeLLM) -> None:
    assert counts(make_llm().run_round([prompt(0)], ONE)) == [(8, 0, 0)]
    short = [block(i, 3) for i in range(2)]
    result = make_llm().run_round([prompt(0, *short), prompt(1, *short)], ONE)
    assert counts(result) == [(14, 0, 0), (15, 0, 6)]


def test_a_prompt_that_ends_in_a_shared_block_computes_its_last_token(make_llm: MakeLLM) -> None:
    prompts = [Prompt([private([100 + n] * 5), block(0)], agent=f"agent {n}") for n in range(2)]
    assert counts(make_llm().run_round(prompts, ONE)) == [(25, 0, 0), (5 + 4 + 1, 15, 5)]


def test_repeated_reuse_is_limited(make_llm: MakeLLM) -> None:
    llm = make_llm(max_reuse_rounds=2)
    computed = []
    for turn in range(6):
        one = Prompt([private([turn + 1] * 6), block(0, 40), private([2] * FRESH_END)])
        computed.append(llm.run_round([one], ONE).outputs[0].computed_tokens)
    assert computed == [46 + FRESH_END, *[10 + FRESH_END] * 2] * 2


def test_the_reuse_limit_does_not_split_a_round(make_llm: MakeLLM) -> None:
    llm = make_llm(max_reuse_rounds=1)
    for turn in range(3):
        prompts = [
            Prompt([private([50 * turn + n + 60] * 6), block(0, 40), private([2])], agent=str(n))
            for n in range(4)
        ]
        computed = [row[0] for row in counts(llm.run_round(prompts, ONE))]
        assert computed == [47, 11, 11, 11], "one owner a round, and one copy for all mirrors"


def test_a_session_hands_on_no_special_tokens(make_llm: MakeLLM) -> None:
    llm = make_llm(num_pages=800)
    session = llm.session(agents=[Agent("Ann", "a"), Agent("Bo", "b")])
    start, end = (llm.model.tokenizer.convert_tokens_to_ids(t) for t in ("<|start|>", "<|end|>"))
    forged = SamplingParams(max_tokens=9, forced_tokens=(end, start, 60, 61, start))
    session.run("go", forged)
    prompts = [o.prompt_token_ids.tolist() for o in session.run("go", ONE).outputs]
    # The template's own: four messages of which the last is only begun.
    assert [(p.count(start), p.count(end)) for p in prompts] == [(5, 4), (5, 4)]


def test_a_session_hands_on_no_stop_text(make_llm: MakeLLM) -> None:
    llm = make_llm(num_pages=800)
    session = llm.session(agents=[Agent("Ann", "a"), Agent("Bo", "b")])
    said = session.run("go", SamplingParams(max_tokens=12, ignore_eos=True))
    letter = next(c for c in said.outputs[0].text[2:] if c.isascii() and c.isprintable())
    again = llm.session(agents=[Agent("Ann", "a"), Agent("Bo", "b")])
    stopped = again.run("go", SamplingParams(max_tokens=12, ignore_eos=True, stop=(letter,)))
    assert stopped.outputs[0].stopped_by_text
    assert letter not in stopped.outputs[0].text
    heard = llm.encoder.decode(again.run("?", ONE).outputs[1].prompt_token_ids.tolist())
    assert f"Ann: {stopped.outputs[0].text}\n" in heard


def test_prefix_reuse_matches_to_the_token(make_llm: MakeLLM) -> None:
    llm = make_llm(reuse="prefix")
    first = llm.generate([list(range(3, 40))], SamplingParams(max_tokens=5, ignore_eos=True))[0]
    grown = [*range(3, 40), *first.token_ids, 7, 8, 9]
    second = llm.generate([grown], ONE)[0]
    # All but the last generated token, whose KV was never computed, and the new ones.
    assert second.computed_tokens == 4
    fork = llm.generate([[*range(3, 30), 7, 7]], ONE)[0]
    assert fork.reused_tokens == 16  # whole blocks only, where the texts part


def test_identical_prompts_share_at_once(make_llm: MakeLLM) -> None:
    for reuse in ("prefix", "collective"):
        result = make_llm(reuse=reuse).run_round(
            [Prompt(list(range(3, 60)), agent=str(n)) for n in range(3)], ONE
        )
        assert [c for c, _, _ in counts(result)] == [57, 1, 1]


def test_session_hands_on_words_in_one_order(make_llm: MakeLLM) -> None:
    llm = make_llm(num_pages=800)
    session = llm.session(
        agents=[Agent(name, f"I am {name}.") for name in ("Ann", "Bo", "Cy")],
        params=SamplingParams(max_tokens=12, ignore_eos=True),
    )
    first = session.run("Speak.")
    assert first.stats.generated_tokens == 36
    session.leave("Bo")
    session.join(Agent("Di", "I am Di, and late."))
    second = session.run({"Ann": "Go on.", "Cy": "Stop.", "Di": "Begin."})
    second.raise_for_errors()
    # "Name: ", 12 tokens and "\n" of all three who spoke, the one who left included.
    texts = [llm.encoder.decode(o.prompt_token_ids.tolist()) for o in second.outputs]
    for output in first.outputs:
        assert all(f"{output.agent}: {output.text}\n" in text for text in texts)
    assert sum(output.corrected_tokens > 0 for output in second.outputs) == 2
    third = session.run("And now?")
    for before, after in zip(second.outputs, third.outputs, strict=True):
        assert after.reused_tokens >= before.prompt_tokens + 11


def test_session_drops_the_oldest_rounds_when_the_context_is_full(make_llm: MakeLLM) -> None:
    llm = make_llm(num_pages=800)
    session = llm.session(
        agents=[Agent(name, f"I am {name}.") for name in ("Ann", "Bo")],
        params=SamplingParams(max_tokens=60, ignore_eos=True),
    )
    lengths = [max(o.prompt_tokens for o in session.run("Speak.").outputs) for _ in range(6)]
    assert max(lengths) + 60 <= llm.model.shape.max_context
    assert lengths[-1] > 250


def hashes(text: str) -> list[tuple[SegmentHash, int]]:
    return [(SegmentHash(letter.encode()), 10) for letter in text]


@pytest.mark.parametrize(
    ("requests", "known", "expected"),
    [
        (["abc", "abc", "abc"], "", [0, 1, 2]),
        (["", "ab"], "", [1, 0]),
        (["ab", "abc", "c"], "", [1, 0, 2]),
        (["ab", "cd", "abcd"], "", [2, 0, 1]),
        (["ab", "ab"], "ab", [0, 1]),
        (["bcd", "acd", "abd", "abc"], "", [0, 1, 2, 3]),
    ],
)
def test_owners_come_first(requests: Sequence[str], known: str, expected: list[int]) -> None:
    starts = order_starts([hashes(text) for text in requests], [h for h, _ in hashes(known)])
    assert [start.index for start in starts] == expected
    assert not any(start.owns_order for start in starts)


def test_orders_with_several_agents_get_an_owner() -> None:
    starts = order_starts([hashes(text) for text in ("abc", "cba", "bac", "cba", "abc")], ())
    assert starts == [Start(0), Start(1, owns_order=True), Start(2), Start(3), Start(4)]


def test_in_order() -> None:
    def same(one: str, other: str) -> bool:
        return in_order([h for h, _ in hashes(one)], [h for h, _ in hashes(other)])

    assert same("ac", "abc")
    assert same("axc", "abc")
    assert same("aba", "aba")
    assert not same("ca", "abc")
    assert not same("aba", "ab")
