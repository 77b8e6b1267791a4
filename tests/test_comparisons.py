"""Which prompts are compared when: those of each tenant in their order, and tenants in turn."""

import threading
from collections.abc import Iterator
from typing import cast

import pytest

from tokendance.rounds.segments import Salt
from tokendance.server.comparisons import Comparison, Comparisons
from tokendance.server.jobs import Job


class Prompts:
    """What is compared by threads that wait until they may."""

    def __init__(self) -> None:
        self.comparisons = Comparisons(0)
        self.begun: list[str] = []
        self.may_end = threading.Event()

    def add(
        self, name: str, tenant: str, *, marked: bool = False, waits: bool = False
    ) -> Comparison:
        def compare() -> None:
            self.begun.append(name)
            assert not waits or self.may_end.wait(60)

        job = cast(Job, object())
        comparison = Comparison(Salt(tenant.encode()), {job: 0}, [] if marked else [job], compare)
        self.comparisons.add(comparison)
        return comparison


@pytest.fixture
def prompts() -> Iterator[Prompts]:
    found = Prompts()
    yield found
    found.may_end.set()
    found.comparisons.close()


def test_a_tenants_are_compared_one_after_the_other(prompts: Prompts) -> None:
    first = prompts.add("first", "a", waits=True)
    marked = prompts.add("marked", "a", marked=True)
    assert marked.is_done
    second = prompts.add("second", "a")
    prompts.add("other", "b").found.result(60)  # another tenant waits for none of it
    assert [one.salt for one in prompts.comparisons.done()] == [b"b"]
    assert not second.is_done
    prompts.may_end.set()
    first.found.result(60)
    second.found.result(60)
    assert [name for name in prompts.begun if name in ("first", "second")] == ["first", "second"]
    assert list(prompts.comparisons.done()) == [first, marked, second]
    assert not prompts.comparisons


def test_what_fails_keeps_nobody_waiting(prompts: Prompts) -> None:
    def fail() -> None:
        raise MemoryError

    job = cast(Job, object())
    failed = Comparison(Salt(b"a"), {job: 0}, [job], fail)
    prompts.comparisons.add(failed)
    prompts.add("behind", "a").found.result(60)
    with pytest.raises(MemoryError):
        failed.found.result(60)
