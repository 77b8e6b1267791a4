"""The index of recent texts: what it finds, in which order, and what it forgets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokendance.rounds.gram_index import GramIndex, IndexedText
from tokendance.rounds.grams import GramHasher
from tokendance.rounds.segments import as_token_ids

GRAM = 4
HASHER = GramHasher(GRAM)


def add(index: GramIndex, *texts: range, now: float = 0.0, is_prompt: bool = True) -> None:
    ids = [as_token_ids(text) for text in texts]
    index.add([(text, HASHER.hashes(text)) for text in ids], now, is_prompt=is_prompt)
    index.check_integrity()


def lookup(index: GramIndex, text: range, now: float = 0.0) -> list[IndexedText]:
    texts = index.lookup(HASHER.hashes(as_token_ids(text)), now)
    index.check_integrity()
    return texts


def first_ids(texts: list[IndexedText]) -> list[int]:
    return [int(text.token_ids[0]) for text in texts]


@given(texts=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=2, max_size=2))
def test_grams_have_one_hash_exactly_where_they_are_equal(texts: list[list[int]]) -> None:
    grams = [tuple(ids[i : i + GRAM]) for ids in texts for i in range(len(ids) - GRAM + 1)]
    hashes = np.concatenate([HASHER.hashes(as_token_ids(ids)) for ids in texts]).tolist()
    assert len(grams) == len(hashes) == len([gram for gram in hashes if gram])
    assert len(set(grams)) == len(set(hashes)) == len(set(zip(grams, hashes, strict=True)))


def test_texts_are_found_by_any_gram_and_the_last_used_come_last() -> None:
    index = GramIndex(1000, 60.0)
    add(index, range(10), range(100, 110), range(200, 210))
    assert first_ids(lookup(index, range(106, 120))) == [100]
    assert lookup(index, range(107, 120)) == []  # three tokens of a text are no gram
    everything = HASHER.hashes(as_token_ids([*range(10), *range(100, 110), *range(200, 210)]))
    assert first_ids(index.lookup(everything, 0.0)) == [0, 200, 100]


def test_the_least_recently_used_are_evicted() -> None:
    index = GramIndex(30, 60.0)
    add(index, range(10), range(100, 110), range(200, 210))
    lookup(index, range(10))
    add(index, range(300, 310), range(400, 401))  # one token is no gram
    assert first_ids(lookup(index, range(1000))) == [200, 0, 300]
    add(index, range(500, 531))  # longer than the index
    assert first_ids(lookup(index, range(1000))) == [200, 0, 300]
    add(index, range(200, 210))  # used once more
    add(index, range(600, 615))
    assert first_ids(lookup(index, range(1000))) == [200, 600]


def test_prompts_are_dropped_after_a_while_and_segments_are_not() -> None:
    index = GramIndex(1000, 60.0)
    add(index, range(10), range(100, 110))
    add(index, range(200, 210), is_prompt=False)
    assert first_ids(lookup(index, range(10), now=50.0)) == [0]
    assert first_ids(lookup(index, range(1000), now=70.0)) == [200, 0]
    assert first_ids(lookup(index, range(1000), now=1000.0)) == [200]


def test_what_is_discarded_is_not_found() -> None:
    index = GramIndex(1000, 60.0)
    add(index, range(10), range(5, 15))
    add(index, range(10), is_prompt=False)
    index.discard(lookup(index, range(5, 6 + GRAM))[:1])
    assert [text.is_prompt for text in lookup(index, range(10))] == [True, False]
    assert index.num_bytes > 0
    index.discard(lookup(index, range(10)))
    assert (index.num_bytes, lookup(index, range(20))) == (0, [])


def test_a_segment_does_not_keep_its_prompt() -> None:
    index = GramIndex(100, 60.0)
    prompt = np.arange(1000, dtype=np.int32)
    grams = HASHER.hashes(prompt[:10])
    index.add([(prompt[:10], grams)], 0.0, is_prompt=False)
    (text,) = index.lookup(grams, 0.0)
    assert not np.shares_memory(text.token_ids, prompt)
