"""The arrival window, which learns how far apart a client's requests come; clocks are our own."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendance.integrations.vllm.arrivals import Arrivals, RoundKey
from tokendance.rounds.arrival_window import ArrivalPace, ArrivalPaces, ArrivalWindow
from tokendance.rounds.segments import make_salt

GAP_S, LONGEST_S = 0.004, 0.05


def make_window() -> ArrivalWindow[int]:
    window: ArrivalWindow[int] = ArrivalWindow(GAP_S, share=0.05, lone_s=1.0)
    assert window.longest_s == LONGEST_S
    return window


def rounds_of(
    window: ArrivalWindow[int], arrivals: list[float], pace: ArrivalPace | None
) -> list[list[int]]:
    """The rounds that arrivals make, each as the indices of its arrivals."""
    rounds: list[list[int]] = []
    for index, now in enumerate(arrivals):
        due_s = window.due_s()
        if due_s is not None and due_s <= now:
            rounds.append(window.take(due_s))
        window.add(index, now, pace)
    rounds.append(window.take(math.inf))
    return rounds


@pytest.mark.parametrize("apart", [0.005, 0.011, 0.022])
def test_latecomers_are_waited_for_from_the_second_round_on(apart: float) -> None:
    window, pace = make_window(), ArrivalPace()
    begins = [1.0, 3.0, 5.0]
    arrivals = [begin + apart * number for begin in begins for number in range(3)]
    first, *later = rounds_of(window, arrivals, pace)
    assert len(first) == 1  # not known yet
    assert later[-2:] == [[3, 4, 5], [6, 7, 8]]
    # Without learning, or where there is to be no window, each is alone.
    assert len(rounds_of(make_window(), arrivals, None)) == 9
    closed: ArrivalWindow[int] = ArrivalWindow(0.0, share=0.05, lone_s=1.0)
    assert len(rounds_of(closed, arrivals, pace)) == 9


def test_what_comes_later_than_the_longest_wait_teaches_nothing() -> None:
    window, pace = make_window(), ArrivalPace()
    assert rounds_of(window, [1.0, 1.06, 1.2, 3.0, 3.08], pace) == [[0], [1], [2], [3], [4]]
    assert pace.gap_s == 0


def test_a_client_that_is_quicker_now_waits_less_and_less() -> None:
    pace = ArrivalPace()
    for now in (1.0, 1.03):
        pace.note(now, LONGEST_S)
    assert pace.gap_s == pytest.approx(0.03)
    waits = []
    for number in range(60):
        pace.note(2.0 + number, LONGEST_S)  # begins a round
        pace.note(2.001 + number, LONGEST_S)
        waits.append(pace.wait_s)
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > 0.035
    assert waits[-1] < GAP_S


gaps = st.floats(0.0, 0.2)


@given(st.lists(gaps, min_size=1, max_size=40), st.floats(0, 2), st.floats(0, 0.02))
def test_nobody_waits_longer_than_the_longest_wait(
    apart: list[float], lone_s: float, gap_s: float
) -> None:
    window: ArrivalWindow[int] = ArrivalWindow(gap_s, share=0.05, lone_s=lone_s)
    pace, now, first_s = ArrivalPace(), 1.0, 1.0
    for index, gap in enumerate(apart):
        now += gap
        due_s = window.due_s()
        if due_s is not None and due_s <= now:
            assert window.take(due_s)
        if not len(window):
            first_s = now
        window.add(index, now, pace)
        due_s = window.due_s()
        assert due_s is not None
        assert due_s <= first_s + window.longest_s + 1e-9
        assert due_s >= min(now + gap_s, first_s + window.longest_s) - 1e-9
        assert 0 <= pace.gap_s <= window.longest_s


@given(st.lists(st.floats(0.001, 0.012), min_size=2, max_size=2), st.integers(2, 6))
def test_whose_gaps_fit_the_bound_has_whole_rounds(apart: list[float], num_rounds: int) -> None:
    """The wait is 1.5 times the longest gap, so a client that repeats itself is never cut again."""
    window, pace = make_window(), ArrivalPace()
    arrivals: list[float] = []
    for number in range(num_rounds):
        arrivals += [number + 1.0, number + 1.0 + apart[0], number + 1.0 + sum(apart)]
    rounds = rounds_of(window, arrivals, pace)
    assert [one for one in rounds if one[0] >= 3] == [
        [index, index + 1, index + 2] for index in range(3, len(arrivals), 3)
    ]


def test_who_waits_for_an_answer_before_asking_again_waits_for_nobody() -> None:
    """Answers that come within the longest wait: the gaps are the server's own time."""
    window, pace = make_window(), ArrivalPace()
    for number in range(10):
        now = 1.0 + 0.01 * number
        window.add(number, now, pace)
        assert window.due_s() == pytest.approx(now + window.gap_s)
        assert window.take(now + window.gap_s) == [number]
        pace.note_done()
    assert pace.gap_s == 0


def test_paces_are_each_clients_own_and_bounded() -> None:
    paces = ArrivalPaces()
    for now in (1.0, 1.02):
        paces.of("slow").note(now, LONGEST_S)
    assert paces.of("quick").gap_s == 0
    assert paces.of("slow").gap_s == pytest.approx(0.02)
    for number in range(1025):
        paces.of(number)
    assert paces.of("slow").gap_s == 0  # forgotten


@dataclass
class Member:
    """A request inside vLLM."""

    request_id: str
    key: RoundKey
    round_size: int | None = None


def test_inside_vllm_it_is_learned_for_each_session() -> None:
    arrivals: Arrivals[Member] = Arrivals(GAP_S, 0.1, 0.25)
    salt = make_salt("a")
    sizes = []
    for number, (session, apart) in enumerate([("a", 0.01), ("a", 0.01), ("b", 0.01), ("a", 0.01)]):
        begin = 1.0 + number
        for index in range(2):
            now = begin + apart * index
            sizes += [(session, len(taken)) for taken in arrivals.take(now)]
            arrivals.add(Member(f"{number} {index}", RoundKey(salt, session)), now)
        sizes += [(session, len(taken)) for taken in arrivals.take(begin + 0.5)]
    assert sizes == [("a", 1), ("a", 1), ("a", 2), ("b", 1), ("b", 1), ("a", 2)]
