"""Who may ask, and how much at a time; without a model."""

import sys
from contextlib import ExitStack
from typing import Any

import pytest

from tokendance.errors import ConfigError
from tokendance.server.admission import Admission
from tokendance.server.auth import ApiKeys
from tokendance.server.errors import ApiError
from tokendance.server.settings import ServerSettings


def admission(**settings: Any) -> Admission:
    return Admission(ServerSettings(**settings), lambda: True)


def refused(admission: Admission, tenant: str, num_agents: int = 1) -> bool:
    try:
        with admission.admitted(tenant, num_agents):
            return False
    except ApiError as error:
        return error.status == 429


def test_it_tells_who_is_answered() -> None:
    server = admission(api_keys=("one", "two"))
    with server.admitted("one"), server.admitted("one"):
        with server.admitted("two"):
            assert sorted(server.tenants()) == ["one", "two"]
        assert server.tenants() == ["one"]
        assert server.activity() == (3, 2)
        server.is_draining = True
        assert server.tenants() == []
    assert server.tenants() == []


def test_threads_take_turns_quickly_while_several_are_answered() -> None:
    server, usual = admission(api_keys=("one", "two")), sys.getswitchinterval()
    with server.admitted("one"), server.admitted("one"):
        assert sys.getswitchinterval() == usual
        with server.admitted("two"):
            assert sys.getswitchinterval() < usual / 10
        assert sys.getswitchinterval() == usual
    assert sys.getswitchinterval() == usual


def test_a_tenant_leaves_room_for_the_others() -> None:
    server = admission(api_keys=("one", "two", "three"), max_open_requests=12)
    with ExitStack() as one, ExitStack() as rest:
        for _ in range(12 - 2 - 2 - 1):  # half is divided by three, and each keeps its two
            rest.enter_context(server.admitted("one"))
        one.enter_context(server.admitted("one"))
        assert refused(server, "one")
        for tenant in ("two", "three"):
            rest.enter_context(server.admitted(tenant))
            rest.enter_context(server.admitted(tenant))
            assert refused(server, tenant)
        one.close()
        rest.enter_context(server.admitted("three"))  # what one gives back is for all
        assert server.num_open == 12
        assert refused(server, "one")
    assert server.num_open == 0
    with pytest.raises(ConfigError, match="max_open_requests"):
        ServerSettings(api_keys=("one", "two"), max_open_requests=1)
    with pytest.raises(ConfigError, match="reserved_kv"):
        ServerSettings(reserved_kv=1.0)


def test_a_round_in_one_call_counts_as_its_agents() -> None:
    server = admission(max_open_requests=20)
    with server.admitted("", 7):
        assert server.num_open == 7
        with server.admitted("", 9):
            assert refused(server, "", 5)
            with server.admitted("", 4):
                assert server.num_open == 20
    with server.admitted("", 500):  # half of what there is, and may come twice
        assert server.num_open == 10
        with server.admitted("", 500):
            assert refused(server, "")
    assert server.num_open == 0


def test_nobody_is_admitted_to_a_server_that_stops() -> None:
    is_alive = True
    server = Admission(ServerSettings(), lambda: is_alive)
    assert server.is_ready
    server.is_draining = True
    with pytest.raises(ApiError) as stopping, server.admitted(""):
        pass
    assert stopping.value.status == 503
    server.is_draining, is_alive = False, False
    assert not server.is_ready
    assert server.num_open == 0


def scope(path: str, authorization: str | None = None) -> dict[str, Any]:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    return {"path": path, "headers": headers}


def test_each_key_is_a_tenant() -> None:
    keys = ApiKeys(ServerSettings(api_keys=("one", "two")))
    one, two = (keys.authenticate(scope("/v1/models", f"Bearer {key}")) for key in ("one", "two"))
    assert len({one, two, ""}) == 3
    assert "one" not in one  # it goes into logs and names
    assert keys.authenticate(scope("/v1/rounds", "one")) == one
    for wrong in (None, "", "Bearer ", "Bearer three", "Bearer one two"):
        with pytest.raises(ApiError) as error:
            keys.authenticate(scope("/v1/models", wrong))
        assert error.value.status == 401
    assert keys.authenticate(scope("/health")) == ""
    with pytest.raises(ApiError):
        keys.authenticate(scope("/metrics"))
    open_metrics = ApiKeys(ServerSettings(api_keys=("one",), open_metrics=True))
    assert open_metrics.authenticate(scope("/metrics")) == ""
    assert ApiKeys(ServerSettings()).authenticate(scope("/v1/models")) == ""
