"""Rounds go whole to one replica, and evenly to all."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendance.errors import ConfigError
from tokendance.integrations.placement import Placement, rank_replicas

NAMES = st.text(max_size=8)
REPLICAS = st.sets(NAMES, min_size=1, max_size=8)
LOADS = st.dictionaries(NAMES, st.integers(0, 300), min_size=1, max_size=8)


@given(NAMES, REPLICAS, st.randoms())
def test_all_who_decide_decide_alike(name: str, replicas: set[str], rng: object) -> None:
    shuffled = sorted(replicas, key=lambda _: rng.random())  # type: ignore[attr-defined]
    ranked = rank_replicas(name, shuffled)
    assert ranked == rank_replicas(name, replicas)
    assert set(ranked) == replicas


@given(NAMES, REPLICAS, NAMES)
def test_a_replica_that_goes_moves_its_own_sessions_only(
    name: str, replicas: set[str], gone: str
) -> None:
    without = [one for one in rank_replicas(name, replicas) if one != gone]
    assert rank_replicas(name, replicas - {gone}) == without


def test_sessions_are_spread_evenly() -> None:
    replicas = [f"replica-{index}" for index in range(4)]
    counts = Counter(rank_replicas(f"town-{index}", replicas)[0] for index in range(4000))
    assert all(900 < counts[replica] < 1100 for replica in replicas)


@given(NAMES, LOADS, st.lists(st.integers(0, 10_000), min_size=1, max_size=12))
def test_no_load_splits_a_round(name: str, loads: dict[str, int], later: list[int]) -> None:
    placement = Placement()
    first = placement.choose(name, loads, 0.0)
    for now, load in enumerate(later):
        loads[first] = load
        assert placement.choose(name, loads, float(now)) == first


@given(NAMES, LOADS)
def test_new_sessions_go_where_there_is_room(name: str, loads: dict[str, int]) -> None:
    chosen = Placement(overload=1.5, min_load=16).choose(name, loads, 0.0)
    bound = max(15, 1.5 * sum(loads.values()) / len(loads))
    assert loads[chosen] <= bound
    preferred = rank_replicas(name, loads)
    assert all(loads[one] > bound for one in preferred[: preferred.index(chosen)])


def test_a_session_goes_back_when_it_was_left_alone() -> None:
    placement = Placement(min_load=1, keep_s=60)
    home, other = rank_replicas("town", ["a", "b"])
    assert placement.choose("town", {home: 9, other: 0}, 0.0) == other
    assert placement.choose("town", {home: 0, other: 9}, 59.0) == other
    assert placement.choose("town", {home: 0, other: 0}, 119.0) == home


def test_a_session_moves_when_its_replica_is_gone() -> None:
    placement = Placement()
    first, second = rank_replicas("town", ["a", "b"])
    assert placement.choose("town", {first: 0, second: 0}, 0.0) == first
    assert placement.choose("town", {second: 0}, 1.0) == second


def test_few_sessions_are_remembered() -> None:
    placement = Placement(max_sessions=3)
    for index in range(100):
        placement.choose(str(index), {"a": 0}, 0.0)
    assert len(placement._places) <= 4


@pytest.mark.parametrize("settings", [{"overload": 0.5}, {"min_load": -1}, {"keep_s": -1.0}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Placement(**settings)  # type: ignore[arg-type]
