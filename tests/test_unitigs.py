"""Paths without branches, on texts drawn by hand. A letter is a token."""

import numpy as np
import pytest

from tokendance.rounds.unitigs import find_shared


def shared(*texts: str, gram_size: int = 2, min_tokens: int = 3) -> list[list[str]]:
    """What `find_shared` finds in each text. A gram's letters are its hash."""
    grams = [
        np.array(
            [
                int.from_bytes(text[index : index + gram_size].encode())
                for index in range(len(text) - gram_size + 1)
            ],
            np.uint64,
        )
        for text in texts
    ]
    ranges = find_shared(grams, gram_size, min_tokens)
    return [
        [text[begin:end] for begin, end in of_text]
        for text, of_text in zip(texts, ranges, strict=True)
    ]


@pytest.mark.parametrize("gram_size", [1, 2, 3, 4])
def test_the_drawing(gram_size: int) -> None:
    assert shared("pqABCDr", "sABCDtu", gram_size=gram_size) == [["ABCD"], ["ABCD"]]


def test_shared_text_is_cut_where_one_text_goes_on_otherwise() -> None:
    assert shared("ABCDEF", "-ABCDEF", "ABCx") == [["ABC", "DEF"], ["ABC", "DEF"], ["ABC"]]
    assert shared("ABCDEF", "-ABCDEF", "xDEF") == [["ABC", "DEF"], ["ABC", "DEF"], ["DEF"]]


def test_blocks_in_any_order() -> None:
    assert shared("ABCDefgh", "efghABCD", "ABCDefgh", min_tokens=2) == [
        ["ABCD", "efgh"],
        ["efgh", "ABCD"],
        ["ABCD", "efgh"],
    ]


@pytest.mark.parametrize("min_tokens", [2, 3])
def test_a_mark_between_blocks_goes_to_the_same_block_everywhere(min_tokens: int) -> None:
    texts = ["ABCD|efgh|IJKL|", "IJKL|ABCD|efgh|", "efgh|IJKL|ABCD|"]
    assert shared(*texts, min_tokens=min_tokens) == [
        ["ABCD|", "efgh|", "IJKL|"],
        ["IJKL|", "ABCD|", "efgh|"],
        ["efgh|", "IJKL|", "ABCD|"],
    ]


def test_where_paths_overlap_one_is_shortened_everywhere() -> None:
    """`CD` is the end of one path and the beginning of another."""
    earlier_has_it = shared("pABCDEFq", "rABCDs", "tCDEFu", gram_size=3, min_tokens=2)
    assert earlier_has_it == [["ABCD", "EF"], ["ABCD"], ["EF"]]
    # Here all go on from the earlier path alike, and only the later one is reached from elsewhere.
    later_has_it = shared("pABCDEFq", "rABCDEFs", "tCDEFu", gram_size=3, min_tokens=2)
    assert later_has_it == [["AB", "CDEF"], ["AB", "CDEF"], ["CDEF"]]


def test_what_one_text_alone_repeats_is_not_shared() -> None:
    assert shared("ABCDxABCDyABCD", "qrstu") == [[], []]
    assert shared("ABCDxABCDyABCD", "qABCDr") == [["ABCD"] * 3, ["ABCD"]]


def test_short_text_is_left_out() -> None:
    assert shared("xABCy", "pABCq", min_tokens=4) == [[], []]
    assert shared("xABCDy", "pABCDq", min_tokens=4) == [["ABCD"], ["ABCD"]]
    assert shared("xAy", "pAq", min_tokens=1) == [[], []]  # shorter than a gram


def test_text_that_repeats_itself_is_shared_as_a_whole() -> None:
    """`AB` goes on in two ways in each text, but in all texts alike."""
    assert shared("pABcABdq", "rABcABds", min_tokens=4) == [["ABcABd"], ["ABcABd"]]


def test_one_token_many_times_is_part_of_the_text_where_its_length_is_equal() -> None:
    assert shared("pAB----CDq", "rAB----CDs") == [["AB----CD"], ["AB----CD"]]
    assert shared("pABx----yCDq", "rABx-----yCDs") == [["ABx-", "-yCD"], ["ABx-", "-yCD"]]


def test_nothing_to_compare() -> None:
    assert shared() == []
    assert shared("", "A", "AB") == [[], [], []]
    assert shared("ABCD") == [[]]
    assert shared("", "ABCD", "ABCD") == [[], ["ABCD"], ["ABCD"]]
