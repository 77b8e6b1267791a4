"""The router for Ray Serve: what it chooses, with stand-ins for Ray; and in Ray, where it is."""

import asyncio
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace as Some
from typing import Any

import pytest

from tokendance.errors import ConfigError
from tokendance.integrations.placement import rank_replicas

MODULE = "tokendance.integrations.ray_router"
NAMES = ("a", "b", "c")
RAY = importlib.util.find_spec("ray")
# A mere folder of that name has no origin.
HAS_RAY = RAY is not None and RAY.origin is not None


class Base:
    """What a router has of Ray's base class."""

    def __init__(self) -> None:
        self.loads: dict[str, int] = {}
        self.replica_queue_len_cache = Some(get=lambda replica_id: self.loads.get(replica_id.name))


@pytest.fixture
def routers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes routers, with the settings that Ray is given."""
    request_router: Any = ModuleType("ray.serve.request_router")
    request_router.FIFOMixin = type("FIFOMixin", (), {})
    request_router.RequestRouter = Base
    request_router.PendingRequest = request_router.RunningReplica = object
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "ray.serve.request_router", request_router)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)

    def make(**settings: Any) -> Any:
        router = importlib.import_module(MODULE).RoundRouter()
        router.initialize_state(**settings)
        return router

    yield make
    sys.modules.pop(MODULE, None)


def replicas(*names: str) -> list[Any]:
    return [Some(replica_id=Some(unique_id=name, name=name)) for name in names]


def asks(session: str) -> Any:
    """A request that waits for a replica."""
    return Some(metadata=Some(session_id=session), routing_context=Some(should_backoff=False))


def choose(router: Any, request: Any, *names: str) -> list[list[str]]:
    """Names of the replicas that a request may go to, in groups that are tried in turn."""
    groups = asyncio.run(router.choose_replicas(replicas(*names), request))
    return [[replica.replica_id.name for replica in group] for group in groups]


def test_a_session_goes_where_its_hash_says_in_whatever_order_replicas_come(routers: Any) -> None:
    for index in range(20):
        session = f"town-{index}"
        home = rank_replicas(session, NAMES)[0]
        assert choose(routers(), asks(session), *NAMES) == [[home]]
        assert choose(routers(), asks(session), *reversed(NAMES)) == [[home]]


def test_all_proxies_decide_alike_and_sessions_are_spread(routers: Any) -> None:
    one, other = routers(), routers()
    chosen = [choose(one, asks(f"town-{index}"), *NAMES)[0][0] for index in range(60)]
    assert chosen == [choose(other, asks(f"town-{index}"), *NAMES)[0][0] for index in range(60)]
    assert min(Counter(chosen).values()) >= 10
    assert set(chosen) == set(NAMES)


def test_new_sessions_pass_over_a_replica_with_far_more_to_do(routers: Any) -> None:
    home, next_one, last = rank_replicas("town", NAMES)
    router = routers(overload=1.5, min_load=16)
    router.loads = {home: 15}  # far above the mean, but not many; of others nothing is known
    assert choose(router, asks("town"), *NAMES) == [[home]]
    busy = routers(overload=1.5, min_load=16)
    busy.loads = {home: 40, next_one: 3, last: 0}
    assert choose(busy, asks("town"), *NAMES) == [[next_one]]
    busy.loads = {home: 0, next_one: 90, last: 0}  # it has begun there, and stays
    assert choose(busy, asks("town"), *NAMES) == [[next_one]]


def test_a_session_waits_for_its_replica(routers: Any) -> None:
    """There is one candidate, so while that is full Ray tries again, more and more slowly."""
    request = asks("town")
    assert len(choose(routers(), request, *NAMES)) == 1
    assert request.routing_context.should_backoff


def test_a_session_moves_when_its_replica_is_gone(routers: Any) -> None:
    router = routers()
    home, next_one, last = rank_replicas("town", NAMES)
    assert choose(router, asks("town"), *NAMES) == [[home]]
    assert choose(router, asks("town"), next_one, last) == [[next_one]]
    assert choose(router, asks("town")) == []


def test_requests_without_a_session_go_to_whoever_has_least_to_do(routers: Any) -> None:
    router = routers()
    router.loads = {"a": 2, "b": 1, "c": 3}
    request = asks("")
    assert choose(router, request, *NAMES) == [["b"]]
    assert not request.routing_context.should_backoff
    assert choose(router, None, *NAMES) == [["b"]]
    router.loads = {}
    assert len({choose(router, asks(""), *NAMES)[0][0] for _ in range(200)}) == 3


def test_settings_that_cannot_be_are_refused(routers: Any) -> None:
    with pytest.raises(ConfigError, match="overload"):
        routers(overload=0.5)


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")
def test_in_ray_all_requests_of_a_session_reach_one_replica() -> None:
    script = Path(__file__).parent / "ray_scenario.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "sessions were whole" in done.stdout
