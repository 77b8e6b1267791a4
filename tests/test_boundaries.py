"""Where blocks end that all prompts have in a row: what is found, against plain references."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokendance import LLM, Prompt, SamplingParams, private, shared
from tokendance.rounds.boundaries import OutputEnds, message_ends, split_range
from tokendance.rounds.grams import GramHasher
from tokendance.rounds.segments import Salt, as_token_ids, build_prompt
from tokendance.server.dispatcher import Dispatcher
from tokendance.server.jobs import Job
from tokendance.server.metrics import Metrics
from tokendance.server.settings import ServerSettings
from tokendance.store.entries import RoundId

GRAM = 3
HASHER = GramHasher(GRAM)
TOKENS = st.lists(st.integers(0, 4), max_size=30)


@given(tokens=TOKENS, special=st.sets(st.integers(0, 4)))
def test_a_message_ends_where_a_special_token_stands_behind_another(
    tokens: list[int], special: set[int]
) -> None:
    found = message_ends(as_token_ids(tokens), as_token_ids(sorted(special)))
    pairs = enumerate(pairwise(tokens), 1)
    assert found.tolist() == [at for at, (a, b) in pairs if b in special and a not in special]


def tails(output: Sequence[int]) -> set[tuple[int, ...]]:
    """Its last four grams."""
    return {tuple(output[at : at + GRAM]) for at in range(len(output) - GRAM + 1)[-4:]}


@given(outputs=st.lists(TOKENS, max_size=6), tokens=TOKENS)
def test_outputs_end_where_the_last_of_their_grams_ends(
    outputs: list[list[int]], tokens: list[int]
) -> None:
    ends = OutputEnds(8)
    for output in outputs:
        ends.note(HASHER.hashes(as_token_ids(output)))
    known = set[tuple[int, ...]]().union(*map(tails, outputs))
    is_tail = [tuple(tokens[at : at + GRAM]) in known for at in range(len(tokens) - GRAM + 1)]
    expected = [
        at + GRAM
        for at, (here, further) in enumerate(zip(is_tail, [*is_tail[1:], False], strict=False))
        if here and not further
    ]
    assert ends.found_in(HASHER.hashes(as_token_ids(tokens)), GRAM).tolist() == expected


def test_the_oldest_outputs_are_forgotten() -> None:
    ends = OutputEnds(3)
    outputs = [as_token_ids(range(10 * first, 10 * first + 9)) for first in range(5)]
    for output in outputs:
        ends.note(HASHER.hashes(output))
        ends.note(HASHER.hashes(output))  # once more: it takes no other's place
    found = [len(ends.found_in(HASHER.hashes(output), GRAM)) for output in outputs]
    assert found == [0, 0, 1, 1, 1]


@given(
    begin=st.integers(0, 20),
    length=st.integers(1, 60),
    messages=st.sets(st.integers(0, 90)),
    outputs=st.sets(st.integers(0, 90)),
    moved=st.integers(0, 9),
)
def test_a_range_is_cut_into_blocks_alike_wherever_it_stands(
    begin: int, length: int, messages: set[int], outputs: set[int], moved: int
) -> None:
    def split(move: int) -> list[tuple[int, int]]:
        said, ended = (
            np.array(sorted(at + move for at in one), np.int64) for one in (messages, outputs)
        )
        blocks = split_range(begin + move, begin + move + length, said, ended, GRAM, 5)
        return [(first - move, last - move) for first, last in blocks]

    blocks = split(0)
    assert blocks == split(moved)
    assert (blocks[0][0], blocks[-1][1]) == (begin, begin + length)
    assert all(last == following for (_, last), (following, _) in pairwise(blocks))
    inner = {last for _, last in blocks[:-1]}
    usable = {at for at in messages if at > begin} | {at for at in outputs if at >= begin + GRAM}
    assert inner <= usable
    if len(blocks) > 1:
        assert min(last - first for first, last in blocks) >= 5
    # Nothing is left uncut that could be cut: wherever it is, a block would be too short.
    for first, last in blocks:
        assert not any(at - first >= 5 and last - at >= 5 for at in usable if first < at < last)


# -- what it is for --------------------------------------------------------------------------------


def ask_untagged(dispatcher: Dispatcher, llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Let unmarked prompts come together; what each answers and computes is noted."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    requests = [
        llm.requests.of(
            build_prompt([(as_token_ids(tokens), False)], Salt(b"")), params, "one", RoundId(-1)
        )
        for tokens in prompts
    ]
    now = 1000.0
    dispatcher.arrivals.add([Job(request, lambda _: None) for request in requests], now)
    while not all(request.finish_reason for request in requests):
        pause_s = dispatcher.pause_s(now)
        assert pause_s is not None
        now += pause_s
        dispatcher.tick(now)
    return [[len(request.prompt) - request.num_reused, *request.generated] for request in requests]


def test_rounds_without_tags_compute_as_much_as_with_them(
    make_fake_llm: Callable[..., LLM],
) -> None:
    """Six agents read what all have said in one order, which by itself is one piece."""
    rng = np.random.default_rng(0)
    systems = [rng.integers(10, 60, 20 + 9 * index).tolist() for index in range(6)]
    tasks = [rng.integers(10, 60, 8 + index).tolist() for index in range(6)]
    names = [rng.integers(10, 60, 4).tolist() for _ in range(6)]
    tagged, untagged = make_fake_llm(), make_fake_llm()
    dispatcher = Dispatcher(untagged, Metrics(untagged), ServerSettings())
    blocks: list[list[int]] = []
    computed: list[tuple[int, int]] = []
    for _ in range(3):
        marked = [
            Prompt([private(system), *map(shared, blocks), private(task)], agent=str(index))
            for index, (system, task) in enumerate(zip(systems, tasks, strict=True))
        ]
        result = tagged.run_round(marked, SamplingParams(max_tokens=40, ignore_eos=True))
        plain = [
            [*system, *(token for block in blocks for token in block), *task]
            for system, task in zip(systems, tasks, strict=True)
        ]
        found = ask_untagged(dispatcher, untagged, plain)
        # An engine without a model says the same after the same tokens.
        assert [list(output.token_ids) for output in result.outputs] == [one[1:] for one in found]
        own = sum(output.computed_tokens for output in result.outputs)
        computed.append((own, sum(one[0] for one in found)))
        blocks = [[*name, *one[1:]] for name, one in zip(names, found, strict=True)]
    for with_tags, without in computed[1:]:
        assert abs(without - with_tags) <= 0.1 * with_tags
