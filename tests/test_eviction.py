"""What gives way first: on cases drawn by hand, and against a plain list of entries."""

from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendance.store.entries import Entry
from tokendance.store.eviction import EvictionOrder


def entry(name: str) -> Entry:
    """The order asks nothing of an entry but to be hashable."""
    return cast(Entry, name)


def order_of(times: str, on_disk: str = "", disk_cost: float = 1.0) -> EvictionOrder:
    """Each word of `times` is used at once, letter by letter, one word after the other."""
    order = EvictionOrder()
    for together in times.split():
        order.begin_use()
        for name in together:
            if entry(name) in order:
                order.use(entry(name))
            else:
                order.add(entry(name))
    for name in on_disk:
        order.mark_on_disk(entry(name))
    order.disk_cost = disk_cost
    return order


def in_turn(order: EvictionOrder) -> str:
    return "".join(cast(str, found) for found in order.in_turn())


@pytest.mark.parametrize(
    ("times", "on_disk", "disk_cost", "expected"),
    [
        ("a b c", "", 1.0, "abc"),  # used longest ago first
        ("abc", "", 1.0, "abc"),  # at once: as they were given
        ("a b c a", "", 1.0, "bca"),
        ("ab c ba", "", 1.0, "cba"),
        # Reading costs as much as computing: both wait alike, and disk gives way at equal times.
        ("a b c d", "bd", 1.0, "abcd"),
        ("ab", "b", 1.0, "ba"),
        # At half the cost waiting counts double: b has waited 2, which counts 4, and a 3.
        ("a b c .", "b", 0.5, "bac."),
        ("a b c d .", "d", 0.5, "abdc."),
        # What is used now has waited 0, at any cost.
        ("a b", "b", 0.01, "ab"),
        # A cost below a hundredth counts as one, and one above 1 as 1.
        ("a " + "b " * 100 + "c d", "c", 0.0, "acbd"),
        ("a b c", "a", 5.0, "abc"),
    ],
)
def test_order_of_cases_drawn_by_hand(
    times: str, on_disk: str, disk_cost: float, expected: str
) -> None:
    assert in_turn(order_of(times, on_disk, disk_cost)) == expected


def test_what_is_on_disk_stays_so_when_it_is_used() -> None:
    order = order_of("a b c", "ab", 0.5)
    order.begin_use()
    order.use(entry("a"))
    order.begin_use()
    # At half the cost: b has waited 3, which counts 6, a 1, which counts 2, and c 2.
    assert in_turn(order) == "bac"
    order.mark_on_disk(entry("a"))  # again: changes nothing
    order.mark_on_disk(entry("x"))  # nobody knows it
    assert in_turn(order) == "bac"


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_an_entry_leaves_its_queue_from_anywhere(name: str) -> None:
    order = order_of("a b c")
    order.discard(entry(name))
    order.discard(entry(name))  # again: changes nothing
    assert entry(name) not in order
    assert in_turn(order) == "abc".replace(name, "")
    order.add(entry(name))
    assert in_turn(order) == "abc".replace(name, "") + name
    for left in "abc":
        order.discard(entry(left))
    assert in_turn(order) == ""
    order.add(entry("d"))
    assert in_turn(order) == "d"


@dataclass
class PlainEntry:
    """An entry of the reference: `since` counts all that was ever put at the end of a queue."""

    name: str
    used: int
    since: int
    on_disk: bool = False


def plain_order(entries: list[PlainEntry], now: int, cost: Fraction) -> list[str]:
    """Take the entry away that gives way, until there is none."""
    left = list(entries)
    names = []
    while left:
        heads = {}
        for one in sorted(left, key=lambda one: -one.since):
            heads[one.on_disk] = one  # the last to be written stays: the first of its queue
        weights = {
            on_disk: Fraction(now - head.used) / (cost if on_disk else 1)
            for on_disk, head in heads.items()
        }
        gives_way = heads[max(weights, key=lambda on_disk: (weights[on_disk], on_disk))]
        names.append(gives_way.name)
        left.remove(gives_way)
    return names


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "put", "put", "disk", "discard", "evict"]),
            st.sampled_from("abcdefg"),
        ),
        max_size=60,
    ),
    st.sampled_from([Fraction(1), Fraction(1, 2), Fraction(1, 8)]),
)
def test_order_is_that_of_a_plain_list(steps: list[tuple[str, str]], cost: Fraction) -> None:
    order, plain, now = EvictionOrder(), dict[str, PlainEntry](), 0
    order.disk_cost = float(cost)
    for since, (action, name) in enumerate(steps):
        if action == "begin":
            order.begin_use()
            now += 1
        elif action == "put" and name in plain:
            order.use(entry(name))
            plain[name].used, plain[name].since = now, since
        elif action == "put":
            order.add(entry(name))
            plain[name] = PlainEntry(name, now, since)
        elif action == "disk":
            order.mark_on_disk(entry(name))
            if name in plain and not plain[name].on_disk:
                plain[name].on_disk, plain[name].since = True, since
        elif action == "discard":
            order.discard(entry(name))
            plain.pop(name, None)
        else:  # every second one gives way
            for gone in plain_order(list(plain.values()), now, cost)[1::2]:
                order.discard(entry(gone))
                del plain[gone]
        assert [cast(str, found) for found in order.in_turn()] == plain_order(
            list(plain.values()), now, cost
        )
        assert set(order) == set(map(entry, plain))
