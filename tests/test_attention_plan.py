"""The plan of a step, on batches drawn by hand."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from tokendance.attention.interface import PackedBatch, PackedRequest
from tokendance.attention.plan import Plan, ReadGroup, make_plan


def batch_of(
    slot_position: npt.NDArray[np.int32], *requests: tuple[Sequence[int], Sequence[int]]
) -> PackedBatch:
    """Each request is (positions of its new tokens, slots of all its tokens)."""
    packed, first_row = [], 0
    for positions, slots in requests:
        packed.append(PackedRequest(first_row, np.array(positions), np.array(slots, np.int32)))
        first_row += len(positions)
    return PackedBatch(packed, slot_position)


def groups_of(plan: Plan) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Rows and slot ranges of each read group."""
    return [(group.rows.tolist(), ranges_of(group)) for group in plan.read_groups()]


def ranges_of(group: ReadGroup) -> list[tuple[int, int]]:
    return list(zip(group.slot_begin.tolist(), group.slot_end.tolist(), strict=True))


def test_the_drawing() -> None:
    """A has rows 0 and 1, B row 2, C rows 3 to 5."""
    shared = range(120)  # A has computed it, at the beginning of its prompt
    slot_position = np.full(300, -1, np.int32)
    slot_position[shared] = shared
    slot_position[200:210] = range(120, 130)  # A's own tokens
    slot_position[230:240] = [*range(7), *range(77, 80)]  # B's, before and after what it shares
    slot_position[250:290] = [*range(37), *range(117, 120)]  # C's, likewise
    a = ([128, 129], [*shared, *range(200, 210)])
    b = ([79], [*range(230, 237), *shared[:70], *range(237, 240)])
    c = ([36, 118, 119], [*range(250, 287), *shared[40:], *range(287, 290)])
    window = 50
    plan = make_plan(batch_of(slot_position, a, b, c), [window])

    assert plan.offsets.tolist() == [0, -3, 7]
    assert groups_of(plan) == [
        ([0, 1, 2], [(0, 40)]),
        ([0, 1, 2, 3, 4, 5], [(40, 70)]),
        ([0, 1, 3, 4, 5], [(70, 120)]),
        ([0, 1], [(200, 210)]),
        ([2], [(230, 240)]),
        ([3, 4, 5], [(250, 290)]),
    ]
    groups = list(plan.read_groups())
    assert [group.rotations.tolist() for group in groups] == [
        [[0, 0, 2]],
        [[0, 0, 2, 1, 1, 1]],
        [[0, 0, 1, 1, 1]],
        [[0, 0]],
        [[0]],
        [[0, 0, 0]],
    ]
    # Row 3, at position 36 of C, stands before all that C shares. Row 0, at 128, does not see 129.
    assert [group.key_end.tolist() for group in groups] == [
        [[40, 40, 40]],
        [[30, 30, 30, 0, 30, 30]],
        [[50, 50, 0, 50, 50]],
        [[9, 10]],
        [[10]],
        [[37, 39, 40]],
    ]
    # With the window A's row 0 sees positions 79 to 128, B's row 30 to 79 (slots 23 to 69), C's
    # rows 36, 118 and 119 positions 0 to 36, 69 to 118 (slots from 72 on), and 70 to 119.
    assert [group.key_begin[window].tolist() for group in groups] == [
        [[40, 40, 23]],
        [[30, 30, 0, 0, 30, 30]],
        [[9, 10, 0, 2, 3]],
        [[0, 0]],
        [[7]],
        [[0, 37, 37]],
    ]


def test_ranges_with_the_same_readers_are_one_group() -> None:
    """Two agents read two runs, with a gap in memory between them."""
    slot_position = np.zeros(64, np.int32)
    slot_position[0:10] = range(10)
    slot_position[20:30] = range(10, 20)
    slot_position[40], slot_position[41] = 20, 20
    both = [*range(10), *range(20, 30)]
    plan = make_plan(batch_of(slot_position, ([20], [*both, 40]), ([20], [*both, 41])))
    assert groups_of(plan) == [
        ([0, 1], [(0, 10), (20, 30)]),
        ([0], [(40, 41)]),
        ([1], [(41, 42)]),
    ]
    assert plan.row_indptr.tolist() == [0, 2, 3, 4]
    assert plan.range_indptr.tolist() == [0, 2, 3, 4]
    assert plan.key_end.tolist() == [10, 10, 10, 10, 1, 1]


def test_what_is_apart_in_the_prompt_and_side_by_side_in_memory_is_one_range() -> None:
    """An owner's run is stored as [common | corrected]; a mirror corrects tokens between those."""
    slot_position = np.zeros(14, np.int32)
    slot_position[0:4] = [2, 3, 6, 7]  # the owner's common tokens
    slot_position[4:8] = [0, 1, 4, 5]  # those that others correct
    slot_position[8:14] = [0, 1, 2, 5, 6, 9]  # the mirror's own, corrected, and own ones
    plan = make_plan(batch_of(slot_position, ([9], [8, 9, 10, 0, 1, 11, 12, 2, 3, 13])))
    assert plan.offsets.tolist() == [0, 1]
    assert groups_of(plan) == [([0], [(8, 14), (0, 4)])]
    assert plan.rotations.tolist() == [0, 1]
    assert plan.key_end.tolist() == [6, 4]


def test_who_reads_a_range_twice_reads_it_as_two() -> None:
    """The rows of a group are distinct: each has one rotation for a range."""
    slot_position = np.array([0, 1, 2, 6, 3], np.int32)
    a, b = ([6], [0, 1, 2, 0, 1, 2, 3]), ([3], [0, 1, 2, 4])
    plan = make_plan(batch_of(slot_position, a, b))
    assert plan.offsets.tolist() == [0, 3]
    assert groups_of(plan) == [
        ([0, 1], [(0, 3)]),
        ([0], [(3, 4), (0, 3)]),
        ([1], [(4, 5)]),
    ]
    assert [group.rotations.tolist() for group in plan.read_groups()] == [
        [[0, 0]],
        [[0], [1]],
        [[0]],
    ]


def test_a_long_context_of_few_rows_is_cut_at_fixed_positions() -> None:
    """Whatever pages it lies in: here the second half of it lies before the first."""
    length = 2500
    slots = (np.arange(length) + length // 2) % length
    slot_position = np.empty(length, np.int32)
    slot_position[slots] = np.arange(length)
    plan = make_plan(batch_of(slot_position, ([length - 1], slots.tolist())))
    positions = [
        [(slot_position[begin], slot_position[end - 1] + 1) for begin, end in ranges]
        for _, ranges in groups_of(plan)
    ]
    assert positions == [[(0, 1024)], [(1024, 1250), (1250, 2048)], [(2048, 2500)]]


@settings(max_examples=examples(100))
@given(st.permutations(range(80)), st.integers(1, 2400), st.integers(1, 80), st.integers(31, 40))
def test_who_runs_alone_and_reads_nothing_of_others_has_the_same_plan(
    pages: list[int], num_done: int, num_new: int, page_size: int
) -> None:
    """It is made without looking for other readers."""
    slots = np.array([page * page_size + at for page in pages for at in range(page_size)], np.int32)
    slot_position = np.zeros(len(slots), np.int32)
    slot_position[slots] = np.arange(len(slots))
    positions = np.arange(num_done, num_done + num_new)
    general, alone = (
        make_plan(
            PackedBatch(
                [PackedRequest(0, positions, slots, reads_others=reads_others)], slot_position
            ),
            [7],
        )
        for reads_others in (True, False)
    )
    for name in Plan.__slots__:
        if name != "key_begin":
            np.testing.assert_array_equal(getattr(alone, name), getattr(general, name), name)
    np.testing.assert_array_equal(alone.key_begin[7], general.key_begin[7])
