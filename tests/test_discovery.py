"""Shared text that nobody has marked."""

import tracemalloc
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from tokendance.rounds.discovery import (
    Discovery,
    DiscoveryConfig,
    DiscoveryResult,
    EarlierPrompt,
)
from tokendance.rounds.segments import EncodedPrompt, TokenIds, as_token_ids, make_salt

GRAM = 4
CONFIG = DiscoveryConfig(gram_size=GRAM, min_tokens=2 * GRAM, memory_tokens=2000)


def words(seed: int, count: int) -> list[int]:
    """Token ids that no other seed has."""
    return [1000 * seed + index for index in range(count)]


def discover_all(*rounds: list[list[int]]) -> tuple[list[EncodedPrompt], list[EarlierPrompt]]:
    """Segment some rounds one after the other; return what was found in the last."""
    discovery = Discovery(make_salt("test"), CONFIG)
    result = DiscoveryResult([], [])
    for now, prompts in enumerate(rounds):
        result = discovery.segment([as_token_ids(ids) for ids in prompts], now)
        discovery.check_integrity()
    return result.prompts, result.earlier


def discover(*rounds: list[list[int]]) -> list[EncodedPrompt]:
    """Only the prompts of that."""
    return discover_all(*rounds)[0]


def shared(prompt: EncodedPrompt) -> list[list[int]]:
    return [segment.token_ids.tolist() for _, segment in prompt.shared_segments()]


A, B, C = words(1, 30), words(2, 20), words(3, 25)


def test_what_all_have_in_one_order_is_one_segment() -> None:
    found = discover([[*words(10 + i, 5 + i), *A, *B, *words(20 + i, 3)] for i in range(3)])
    assert all(shared(prompt) == [[*A, *B]] for prompt in found)


def test_blocks_in_any_order_are_found_each() -> None:
    first = [*words(10, 5), *A, *B, *C, *words(11, 3)]
    second = [*C, *words(12, 7), *A, *words(13, 2), *B]
    third = [*words(14, 1), *B, *A, *C]
    assert [shared(prompt) for prompt in discover([first, second, third])] == [
        [A, B, C],
        [C, A, B],
        [B, A, C],
    ]


def test_a_later_round_finds_what_an_earlier_one_had() -> None:
    earlier = [[*words(10 + i, 5), *A, *B] for i in range(2)]
    later = [[*words(20 + i, 6), *A, *B, *C] for i in range(3)]
    assert all(shared(prompt) == [[*A, *B], C] for prompt in discover(earlier, later))


def test_a_late_prompt_finds_what_its_round_had() -> None:
    together = [[*words(10 + i, 5), *A] for i in range(2)]
    assert [shared(prompt) for prompt in discover(together, [[*words(30, 9), *A]])] == [[A]]


def test_prompts_one_after_another_find_what_the_earlier_ones_had() -> None:
    prompts = [[*words(10 + i, 5 + i), *A, *B, *words(20 + i, 9)] for i in range(3)]
    assert shared(discover([prompts[0]])[0]) == []
    assert shared(discover([prompts[0]], [prompts[1]])[0]) == [[*A, *B]]
    found, earlier = discover_all([prompts[0]], [prompts[1]], [prompts[2]])
    assert shared(found[0]) == [[*A, *B]]
    assert [prompt.token_ids.tolist() for prompt in earlier] == prompts[:2]
    for prompt in earlier:
        ((begin, end, _),) = prompt.segments
        assert prompt.token_ids[begin:end].tolist() == [*A, *B]


def test_a_conversation_that_goes_on_shares_nothing_with_itself() -> None:
    first = [*words(10, 5), *A]
    second = [*first, *words(11, 9), *B]
    third = [*second, *words(12, 9), *C]
    found, earlier = discover_all([first], [second], [third])
    assert shared(found[0]) == []
    assert earlier == []
    # But when its beginning is forgotten, the rest of it is found elsewhere.
    assert shared(discover([third], [third[5:]])[0]) == [third[5:]]


def test_prompts_of_long_ago_are_forgotten() -> None:
    discovery = Discovery(make_salt("test"), CONFIG)
    prompts = [as_token_ids([*words(10 + i, 5), *A]) for i in range(3)]
    late = CONFIG.recent_s + 1
    for prompt, now, is_found in ((prompts[0], 0.0, False), (prompts[1], late, False)):
        assert bool(shared(discovery.segment([prompt], now).prompts[0])) == is_found
    assert shared(discovery.segment([prompts[2]], 2 * late - 2).prompts[0]) == [A]
    only_together = Discovery(make_salt("test"), replace(CONFIG, recent_s=0.0))
    for prompt in prompts:
        assert shared(only_together.segment([prompt], 0.0).prompts[0]) == []


@settings(max_examples=examples(100))
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    times=st.lists(st.floats(0, 300), min_size=40, max_size=40),
)
def test_the_memory_stays_within_its_bounds(lengths: list[int], times: list[float]) -> None:
    config = DiscoveryConfig(gram_size=GRAM, min_tokens=2 * GRAM, memory_tokens=200, recent_s=900.0)
    discovery = Discovery(make_salt("test"), config)
    now = 0.0
    for index, length in enumerate(lengths):
        now += times[index]
        discovery.segment([as_token_ids([*words(index % 7, length), *A[: length % 20]])], now)
        discovery.check_integrity()


@settings(max_examples=examples(100))
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=12),
    num_agents=st.integers(1, 3),
)
def test_conversations_that_fill_the_memory_go_on(
    sizes: list[tuple[int, int]], num_agents: int
) -> None:
    discovery = Discovery(make_salt("test"), replace(CONFIG, memory_tokens=200))
    conversations = [words(10 + agent, 5) for agent in range(num_agents)]
    for turn, (said, own) in enumerate(sizes):
        for agent, conversation in enumerate(conversations):
            conversation += [*words(100 + turn, said), *words(1000 + 10 * turn + agent, own)]
        prompts = [as_token_ids(conversation) for conversation in conversations]
        for prompt, found in zip(prompts, discovery.segment(prompts, turn).prompts, strict=True):
            assert np.array_equal(found.token_ids, prompt)
        discovery.check_integrity()


def test_one_that_lacks_its_own_block() -> None:
    prompts = [[*words(10, 5), *A, *B, *C], [*words(11, 6), *A, *C], [*words(12, 7), *B, *C]]
    found = discover(prompts)
    assert [shared(prompt) for prompt in found] == [[A, B, C], [A, C], [B, C]]


def test_what_stands_between_blocks_belongs_to_one_of_them() -> None:
    mark = [7]
    blocks = [A, B, C]
    prompts = [
        [*words(10 + i, 5), *mark] + [token for block in order for token in [*blocks[block], *mark]]
        for i, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)])
    ]
    found = discover(prompts)
    assert [prompt.token_ids.tolist() for prompt in found] == prompts
    assert all(len(shared(prompt)) == 3 for prompt in found)
    assert len({tuple(ids) for prompt in found for ids in shared(prompt)}) == 3
    cut_off = [[*A, *B], [*A, B[0], *words(20, 9)], B]
    assert [prompt.token_ids.tolist() for prompt in discover(cut_off)] == cut_off


def test_what_an_agent_has_said_itself_does_not_cut_what_all_read() -> None:
    prompts = [[*words(10 + i, 5), *own, *words(20, 3), *A, *B, *C] for i, own in enumerate([A, B])]
    ids = [as_token_ids(prompt) for prompt in prompts]
    prefix_lengths = [5 + len(A), 5 + len(B) - 1]
    found = Discovery(make_salt("test"), CONFIG).segment(ids, 0.0, prefix_lengths).prompts
    assert [shared(prompt) for prompt in found] == [[[*words(20, 3), *A, *B, *C]]] * 2
    assert [prompt.token_ids.tolist() for prompt in found] == prompts
    assert shared(discover(prompts)[0]) != shared(found[0])  # where no prefix is found


def test_what_repeats_itself_is_found_if_all_have_it_alike() -> None:
    refrain = words(5, 2 * GRAM - 1)  # too short by itself, as is what stands between
    song = [token for verse in range(4) for token in [*refrain, 9000 + verse]]
    found = discover([[*words(10 + i, 5 + i), *song, *words(20 + i, 3)] for i in range(3)])
    segments = {tuple(map(tuple, shared(prompt))) for prompt in found}
    assert len(segments) == 1
    assert sum(map(len, *segments)) >= len(song) - GRAM
    # Who sings something of his own finds the verses that others sing, too.
    other = discover([[*words(10, 5), *song, *A], [*words(11, 6), *song[:20], *words(30, 9), *A]])
    assert all(A in shared(prompt) for prompt in other)


def test_a_ruler_cuts_nothing() -> None:
    """One token many times: of one length it belongs to the text, of another it does not."""
    ruled = [*A, *[7] * 40, *B]
    found = discover([[*words(10 + i, 5), *ruled, *words(20 + i, 5)] for i in range(2)])
    assert all(shared(prompt) == [ruled] for prompt in found)
    found = discover([[*words(10 + i, 5), *A, *[7] * (40 + i), *B] for i in range(2)])
    for prompt in found:
        (head, tail) = shared(prompt)
        assert head[: len(A)] == A
        assert tail[-len(B) :] == B


def test_one_token_many_times_costs_no_more_than_others() -> None:
    """Such texts are not compared gram with gram: that would be 32 GB here."""
    discovery = Discovery(make_salt("test"), replace(CONFIG, memory_tokens=2**17))
    tracemalloc.start()
    for now in range(2):
        rulers = [as_token_ids([10 * now + i + 100, *[7] * 8000]) for i in range(8)]
        discovery.segment(rulers, now)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6


def test_of_many_earlier_prompts_the_last_take_part() -> None:
    discovery = Discovery(make_salt("test"), replace(CONFIG, memory_tokens=10**6))
    for number in range(300):
        mine = words(100 + number, 40)
        discovery.segment([as_token_ids([*A[:GRAM], *mine])], number)
    late = as_token_ids([*A[:GRAM], *words(9, 3), *words(399, 40)])
    early = as_token_ids([*A[:GRAM], *words(8, 3), *words(101, 40)])
    assert shared(discovery.segment([late], 300.0).prompts[0]) == [words(399, 40)]
    assert shared(discovery.segment([early], 301.0).prompts[0]) == []


def test_short_and_lone_text_is_private() -> None:
    short = words(5, 2 * GRAM - 1)
    found = discover([[*words(10, 9), *short, *words(11, 9)], [*words(12, 9), *short]])
    assert [shared(prompt) for prompt in found] == [[], []]
    assert shared(discover([[*A, *B]])[0]) == []
    assert shared(discover([[1, 2]])[0]) == []


@settings(max_examples=examples(200))
@given(
    blocks=st.lists(
        st.lists(st.integers(0, 3), min_size=2 * GRAM, max_size=20), min_size=1, max_size=4
    ),
    orders=st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_segments_are_cut_from_the_prompt_and_stand_in_another(
    blocks: list[list[int]], orders: list[list[int]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    prompts: list[TokenIds] = []
    for order in orders:
        ids: list[int] = random.integers(10, 1000, random.integers(1, 9)).tolist()
        for block in order:
            ids += blocks[block % len(blocks)]
        prompts.append(as_token_ids(ids))
    found = Discovery(make_salt("test"), CONFIG).segment(prompts, 0.0).prompts
    for prompt, encoded in zip(prompts, found, strict=True):
        assert np.array_equal(encoded.token_ids, prompt)
        for _, segment in encoded.shared_segments():
            assert len(segment) >= CONFIG.min_tokens
            assert sum(contains(other, segment.token_ids) for other in prompts) >= 2


def contains(text: TokenIds, part: TokenIds) -> bool:
    return part.tobytes() in [
        text[start : start + len(part)].tobytes() for start in range(len(text) - len(part) + 1)
    ]


def test_what_all_have_in_one_order_is_cut_where_messages_end() -> None:
    special = [5, 6]
    message = [[*special, *text] for text in (A, B, C)]
    prompts = [
        as_token_ids([*words(10 + i, 5 + i), *message[0], *message[1], *message[2]])
        for i in range(3)
    ]
    config = replace(CONFIG, special_ids=frozenset(special))
    found = Discovery(make_salt("test"), config).segment(prompts, 0.0).prompts
    assert all(shared(prompt) == message for prompt in found)


def test_what_all_have_in_one_order_is_cut_where_outputs_end() -> None:
    discovery = Discovery(make_salt("test"), CONFIG)
    asked = [as_token_ids(words(10 + i, 20)) for i in range(3)]
    discovery.segment(asked, 0.0)
    for prompt, said in zip(asked, (A, B, [*C, 3]), strict=True):  # the last was ended by a token
        discovery.note_output(prompt, as_token_ids(said))
    name = [[7000 + i, 8000] for i in range(4)]
    heard = [*name[0], *A, *name[1], *B, *name[2], *C, *name[3], *words(40, 9)]
    prompts = [
        as_token_ids([*ids.tolist(), *words(20 + i, 5), *heard]) for i, ids in enumerate(asked)
    ]
    found = discovery.segment(prompts, 1.0, [25] * 3)
    discovery.check_integrity()
    blocks = [[*name[0], *A], [*name[1], *B], [*name[2], *C], [*name[3], *words(40, 9)]]
    assert [shared(prompt) for prompt in found.prompts] == [blocks] * 3
    assert found.earlier == []  # in a round, what was said is computed by its first agent


def test_who_comes_alone_reads_what_another_has_said() -> None:
    discovery = Discovery(make_salt("test"), CONFIG)
    first = as_token_ids(words(10, 20))
    discovery.segment([first], 0.0)
    discovery.note_output(first, as_token_ids(A))
    discovery.note_output(first, as_token_ids(B))  # two answers to one prompt
    found = discovery.segment([as_token_ids([*words(11, 9), *A, *words(12, 3), *B])], 1.0)
    discovery.check_integrity()
    # The KV of the last token need not be there.
    assert shared(found.prompts[0]) == [A[:-1], B[:-1]]
    assert [prompt.token_ids[20:].tolist() for prompt in found.earlier] == [A[:-1], B[:-1]]
    assert [prompt.segments[0][:2] for prompt in found.earlier] == [(20, 49), (20, 39)]


def test_outputs_count_as_memory() -> None:
    discovery = Discovery(make_salt("test"), replace(CONFIG, memory_tokens=100))
    for turn in range(20):
        prompt = as_token_ids(words(10 + turn, 30))
        discovery.segment([prompt], turn)
        discovery.note_output(prompt, as_token_ids(words(100 + turn, 20)))
    discovery.segment([prompt], 20)
    discovery.check_integrity()


def test_what_others_have_read_is_found_as_they_read_it() -> None:
    """With the name before it and all that stands behind, in whatever order."""
    discovery = Discovery(make_salt("test"), CONFIG)
    said = [[*[7000 + i, 8000], *text, 9000] for i, text in enumerate((A, B))]
    for i, text in enumerate((A, B)):
        prompt = as_token_ids(words(10 + i, 20))
        discovery.segment([prompt], 0.0)
        discovery.note_output(prompt, as_token_ids(text))
    first = as_token_ids([*words(20, 9), *said[0], *words(21, 9), *said[1], *words(22, 9)])
    second = as_token_ids([*words(30, 9), *said[1], *words(31, 9), *said[0], *words(32, 9)])
    assert shared(discovery.segment([first], 1.0).prompts[0]) == [A[:-1], B[:-1]]
    assert shared(discovery.segment([second], 2.0).prompts[0]) == said[::-1]
