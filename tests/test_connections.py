"""Connections on which nothing is asked, or not in HTTP; and by which names one may ask."""

import asyncio
import gc
import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.client import HTTPResponse
from types import ModuleType
from typing import Any, cast

import h11
import httpx
import pytest
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError

from serving import HELLO, chat, listening, serving, wait_until
from soak.judge import is_error
from tokendance import LLM
from tokendance.errors import ConfigError
from tokendance.server.app import create_app
from tokendance.server.auth import ApiKeys
from tokendance.server.chat import ChatEndpoint
from tokendance.server.connection import Connection, network_of
from tokendance.server.connections import Connections, Phase, Reason
from tokendance.server.connections import log as connections_log
from tokendance.server.context import ServerContext
from tokendance.server.errors import ApiError
from tokendance.server.handles import handles_for_connections, raise_handle_limit
from tokendance.server.hosts import Hosts
from tokendance.server.http_server import Server
from tokendance.server.metrics import Metrics
from tokendance.server.settings import ServerSettings
from tokendance.server.shares import Shares

MakeLLM = Callable[..., LLM]
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
)
HALF_HEAD = HEAD[:40]
ENDLESS = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "ignore_eos": True}

# Opens many connections, sends half a head on each, and keeps them until its input ends.
CROWD = """
import resource, socket, sys
port, count, text = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
sockets = []
for _ in range(count):
    sockets.append(socket.create_connection(("127.0.0.1", port), timeout=60))
    sockets[-1].sendall(text)
print("here", flush=True)
sys.stdin.read()
"""


@contextmanager
def crowd(port: int, count: int, text: bytes = HALF_HEAD) -> Iterator[None]:
    """So many connections of another process that have sent a text and go on to do nothing."""
    command = [sys.executable, "-c", CROWD, str(port), str(count), text.decode()]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield
        process.stdin.close()


@contextmanager
def few_handles(count: int) -> Iterator[None]:
    """Let this process open no more files than so many at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    """A connection of one's own to the server of a client."""
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), 60) as connection:
        yield connection


def answer_on(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer."""
    answer = HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.read()


def is_at_end(connection: socket.socket) -> bool:
    """Whether the server has closed a connection; it is waited for as long as its timeout is."""
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False


def assert_refused(connection: socket.socket, status: int, says: str) -> None:
    """It gets an answer of OpenAI's shape, and is closed."""
    found, body = answer_on(connection)
    assert found == status
    assert is_error(json.loads(body))
    assert says in json.loads(body)["error"]["message"]
    assert is_closed(connection)


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closes a connection in a minute."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return True


def closed(server: ServerContext, reason: Reason) -> float:
    """How many connections the server has closed for a reason, as its metrics say."""
    return counted(server, f'connections_closed_total{{reason="{reason}"}}')


def counted(server: ServerContext, name: str) -> float:
    """A figure of the metrics; 0 if it is not there yet."""
    found = re.search(rf"^tokendance_{re.escape(name)} (.*)$", server.metrics.text().decode(), re.M)
    return float(found[1]) if found else 0.0


# -- connections that ask nothing -------------------------------------------------------------


def test_idle_connections_lock_nobody_out(make_fake_llm: MakeLLM) -> None:
    """More than there are handles: as many stay as may be, and whoever asks is answered."""
    with few_handles(1024), serving(make_fake_llm(), head_timeout=600.0) as (client, server):
        assert server.connections.most == 1024 - 256
        with crowd(client.base_url.port or 0, 1300):
            assert client.get("/health").json() == {"status": "ok"}
            assert chat(client).status_code == 200
            assert httpx.get(client.base_url.join("/health")).status_code == 200  # a new connection
            assert len(os.listdir("/dev/fd")) < 1024
            assert closed(server, Reason.DISPLACED) >= 1300 - server.connections.most
            assert len(server.connections._open) <= server.connections.most


def test_idle_connections_are_closed_in_time(
    make_fake_llm: MakeLLM, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(make_fake_llm(), head_timeout=0.2) as (client, server):
        with crowd(client.base_url.port or 0, 200):
            wait_until(server, lambda: closed(server, Reason.HEAD) == 200)
            assert not server.connections._open
        with connected(client) as silent:
            assert is_closed(silent)
        with connected(client) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" + HALF_HEAD)
            assert answer_on(slow)[0] == 200
            assert_refused(slow, 408, "The head of the request was not there after 0.2 s")
    lines = [record for record in caplog.records if record.name == connections_log.name]
    assert len(lines) == 1  # of hundreds in ten seconds
    assert "(--head-timeout)" in lines[0].getMessage()


def test_who_asks_nothing_more_is_let_go(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm(), idle_timeout=0.5) as (client, server):
        assert client.get("/health").status_code == 200
        wait_until(server, lambda: not server.connections._open)
        assert chat(client).status_code == 200


class Stub:
    """A connection without a client."""

    def __init__(self, all_of_them: Connections, address: str) -> None:
        self.address = address
        self.phase = Phase.HEAD
        self.is_closed = False
        self._all = all_of_them
        all_of_them.add(cast(Any, self))

    def move(self, phase: Phase) -> None:
        self.phase = phase
        self._all.move(cast(Any, self))

    def make_room(self) -> None:
        self.is_closed = True
        self._all.remove(cast(Any, self))


@contextmanager
def nothing_kept(server: ServerContext, count: Callable[[], int]) -> Iterator[None]:
    """Without a collection of garbage there are no more of some objects at the end than before."""
    gc.collect()
    before = count()
    gc.disable()
    try:
        yield
        wait_until(server, lambda: count() <= before)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        HALF_HEAD,
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"no HTTP\r\n\r\n",
    ],
)
@pytest.mark.parametrize("is_read", [False, True])
def test_who_has_gone_leaves_no_garbage(
    make_fake_llm: MakeLLM, text: bytes, *, is_read: bool
) -> None:
    """Its connection is freed at once: a collection of garbage would stop the event loop."""

    def num_transports() -> int:
        return sum(
            type(one) is Connection or type(one).__name__ == "_SelectorSocketTransport"
            for one in gc.get_objects()
        )

    with listening(make_fake_llm()) as (port, server, _), nothing_kept(server, num_transports):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(text)
                if is_read and text.endswith(b"\r\n\r\n"):
                    assert client.recv(2**16)


@pytest.mark.parametrize(
    "body",
    [
        b"{no JSON",
        b'{"model": "\xff"}',
        b'{"model": "tiny"}',
        json.dumps({**ENDLESS, "stream": True}).encode(),
    ],
    ids=["no JSON", "not UTF-8", "wrong", "stream"],
)
def test_a_request_that_fails_or_is_left_leaves_no_garbage(
    make_fake_llm: MakeLLM, body: bytes
) -> None:
    """Nothing that refers to itself keeps the body of a request, or all of an answer."""
    kinds = {ChatEndpoint, RequestValidationError, HTTPException, asyncio.CancelledError}

    def num_kept() -> int:
        return sum(type(one) in kinds for one in gc.get_objects())

    with listening(make_fake_llm()) as (port, server, _), nothing_kept(server, num_kept):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port), 60) as client:
                client.sendall(HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body))
                assert client.recv(2**12)


def test_connections_are_those_of_asyncio_where_there_is_uvloop(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose transports show nothing of what is bounded."""
    other = ModuleType("uvloop")
    other.new_event_loop = lambda: pytest.fail("uvloop was used")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uvloop", other)
    server = Server(create_app(make_fake_llm(), ServerSettings()))
    make_loop = server.config.get_loop_factory()
    assert make_loop is not None
    loop = make_loop()
    loop.close()
    assert isinstance(loop, asyncio.SelectorEventLoop)


def connections_of(make_fake_llm: MakeLLM, most: int) -> Connections:
    settings = ServerSettings(max_connections=most)
    return Connections(
        settings, Metrics(make_fake_llm()), ApiKeys(settings), Shares(settings.http_share, list)
    )


def test_addresses_share_the_connections(make_fake_llm: MakeLLM) -> None:
    """Who has most gives way, with what has waited longest, and never while it is answered."""
    all_of_them = connections_of(make_fake_llm, 6)
    lone = Stub(all_of_them, "one")
    crowd = [Stub(all_of_them, "many") for _ in range(5)]
    crowd[0].move(Phase.ANSWER)
    crowd[1].move(Phase.BODY)  # has done something: it is the last of them now
    late = Stub(all_of_them, "two")
    assert [one.is_closed for one in crowd] == [False, False, True, False, False]
    more = [Stub(all_of_them, "many") for _ in range(3)]
    assert [one.is_closed for one in crowd] == [False, True, True, True, True]
    for one in (lone, late, *more):
        assert not one.is_closed
        one.move(Phase.ANSWER)
    assert Stub(all_of_them, "three").is_closed  # there is nobody else who waits for nothing


@pytest.mark.parametrize(
    ("num_idle", "idle_gone", "held_gone"),
    [(69, 20, 0), (59, 15, 5)],  # of those who ask nothing 64 may have just come
)
def test_who_is_held_back_gives_way_where_few_ask_nothing(
    make_fake_llm: MakeLLM, num_idle: int, idle_gone: int, held_gone: int
) -> None:
    """Nobody is locked out by who asks too much."""
    all_of_them = connections_of(make_fake_llm, 100)
    other = Stub(all_of_them, "one")
    held = [Stub(all_of_them, "many") for _ in range(99 - num_idle)]
    for one in held:
        one.move(Phase.HELD)
    idle = [Stub(all_of_them, "many") for _ in range(num_idle)]
    more = [Stub(all_of_them, "many") for _ in range(20)]
    assert [one.is_closed for one in idle] == [number < idle_gone for number in range(len(idle))]
    assert [one.is_closed for one in held] == [number < held_gone for number in range(len(held))]
    assert not any(one.is_closed for one in (other, *more))


def test_a_client_of_ipv6_has_one_address() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1%eth0")
    assert network_of("2001:db8::1") != network_of("2001:db8:1::1")
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1") != network_of("10.0.0.2")
    assert network_of("a socket") == "a socket"


def test_the_limit_of_handles_is_raised() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with few_handles(256):
        assert handles_for_connections() == 128
        raise_handle_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


# -- bodies and answers -----------------------------------------------------------------------


def test_a_body_that_nobody_waits_for_ends_in_time(make_fake_llm: MakeLLM) -> None:
    """The request is answered, and its body goes on for ever."""
    settings = {"body_timeout": 0.3, "head_timeout": 0.3, "idle_timeout": 60.0}
    with serving(make_fake_llm(), **settings) as (client, server), connected(client) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\n\r\n")
        assert answer_on(slow)[0] == 200
        slow.settimeout(0.02)
        with suppress(ConnectionError):
            while not is_at_end(slow):
                slow.sendall(b"x")
        assert closed(server, Reason.BODY) == 1


@contextmanager
def short_of_room(runner: Any, port: int) -> Iterator[socket.socket]:
    """A connection whose two ends hold few bytes that are not read."""
    listener = runner.servers[0].sockets[0]
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        yield connection


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_does_not_read_is_not_waited_for(make_fake_llm: MakeLLM, is_stream: bool) -> None:
    """Neither a stream that is made, nor answers that are."""
    fields = {"max_tokens": 1000, "ignore_eos": True, "logprobs": True, "stream": True}
    body = json.dumps({"model": "tiny", "messages": HELLO, **fields}).encode()
    ask = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    if not is_stream:
        ask = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20
    with (
        listening(make_fake_llm(), send_timeout=0.4) as (port, server, runner),
        short_of_room(runner, port) as connection,
    ):
        connection.sendall(ask)
        wait_until(server, lambda: closed(server, Reason.UNREAD))
        wait_until(server, lambda: server.admission.num_open == 0)
        wait_until(server, lambda: not runner.server_state.connections)
        assert b"[DONE]" not in connection.recv(10**6)


def is_later(served: Any, since: float) -> bool:
    return bool(served.since_s > since)


def test_who_reads_slowly_is_waited_for(make_fake_llm: MakeLLM) -> None:
    """The deadline begins anew with whatever is read."""
    with (
        listening(make_fake_llm(), send_timeout=600.0, head_timeout=0.4) as (port, server, runner),
        short_of_room(runner, port) as connection,
    ):
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20)
        wait_until(server, lambda: server.connections._open)
        (served,) = server.connections._open
        for _ in range(3):
            wait_until(server, lambda: served.phase is Phase.UNREAD)
            since, num_bytes = served.since_s, 0
            while num_bytes < 2**16:
                num_bytes += len(connection.recv(2**16))
            wait_until(server, partial(is_later, served, since))


def test_small_chunks_are_taken_few_at_a_time(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One takes as long as many bytes of a large one, and others wait meanwhile."""
    sizes: list[int] = []
    receive = h11.Connection.receive_data

    def noting(connection: h11.Connection, data: bytes) -> None:
        sizes.append(len(data))
        receive(connection, data)

    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1}).encode().rjust(40_000)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with serving(make_fake_llm()) as (client, _), connected(client) as connection:
        monkeypatch.setattr(h11.Connection, "receive_data", noting)
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert answer_on(connection)[0] == 200
    assert max(sizes) <= 2**14
    assert sum(sizes) > 6 * 40_000


def test_bodies_that_do_not_end_hold_no_more_than_so_much(make_fake_llm: MakeLLM) -> None:
    """The one that has been arriving longest is refused when others need its memory."""
    settings = {"max_body": 100_000, "max_arriving": 250_000}
    head = HEAD + b"content-length: 99999\r\nexpect: 100-continue\r\n\r\n"
    with serving(make_fake_llm(), **settings) as (client, server), ExitStack() as stack:
        sockets = [stack.enter_context(connected(client)) for _ in range(4)]
        for slow in sockets:
            slow.sendall(head)
            assert b"100 Continue" in slow.recv(1000)  # its body is waited for
        for slow in sockets:
            slow.sendall(b" " * 99_990)
        for slow in sockets[:2]:
            status, body = answer_on(slow)
            assert status == 503
            assert b"--max-arriving" in body
        assert chat(client).status_code == 200
        for slow in sockets[2:]:
            slow.sendall(b" " * 9)  # it is whole, and no JSON
            assert answer_on(slow)[0] == 400
        assert counted(server, 'refused_requests_total{status="503"}') == 2


# -- what is not HTTP -------------------------------------------------------------------------

CHUNKED = b"transfer-encoding: chunked\r\n"
WRONG = {
    "no HTTP": (b"hello\r\n\r\n", "illegal request line"),
    "an endless head": (HEAD + b"x: " + b"a" * 40_000, "too long"),
    "two hosts": (HEAD + b"host: evil.example\r\n\r\n", "Host"),
    "two lengths": (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab", "Content-Length"),
    "two lengths in one": (HEAD + b"content-length: 1, 2\r\n\r\nab", "Content-Length"),
    "a length that is none": (HEAD + b"content-length: +1\r\n\r\na", "Content-Length"),
    "length and chunks": (HEAD + b"content-length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n", "neither"),
    "chunks and length": (HEAD + CHUNKED + b"content-length: 5\r\n\r\n0\r\n\r\n", "neither"),
    "chunks before HTTP/1.1": (
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + CHUNKED + b"\r\n0\r\n\r\n",
        "neither",
    ),
    "no chunk": (HEAD + CHUNKED + b"\r\nzz\r\n", "chunk"),
    "no chunk for nobody": (
        b"GET /nothing HTTP/1.1\r\nhost: localhost\r\n" + CHUNKED + b"\r\nzz\r\n",
        "chunk",
    ),
    "unknown coding": (HEAD + b"transfer-encoding: gzip\r\n\r\n", "Transfer-Encoding"),
}


def test_what_is_not_http_is_refused(
    make_fake_llm: MakeLLM, caplog: pytest.LogCaptureFixture
) -> None:
    """In OpenAI's shape, and without a line in the log for each."""
    caplog.set_level(logging.WARNING)
    with serving(make_fake_llm()) as (client, server):
        for case, (text, says) in WRONG.items():
            with connected(client) as connection:
                connection.sendall(text)
                status = {"an endless head": 431, "unknown coding": 501}.get(case, 400)
                assert_refused(connection, status, says)
        num_refused = sum(says == "neither" for _, says in WRONG.values())
        assert counted(server, 'refused_requests_total{status="400"}') == num_refused
        assert closed(server, Reason.INVALID) == len(WRONG) - num_refused
    assert not [record for record in caplog.records if record.name != connections_log.name]


def test_nonsense_behind_an_answer_that_has_begun(
    make_fake_llm: MakeLLM, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the body that is refused nothing is wanted but its end."""
    with serving(make_fake_llm(), api_keys=("one",)) as (client, _):
        with connected(client) as connection:
            connection.sendall(HEAD + CHUNKED + b"\r\n")
            assert HTTPResponse(connection)._read_status()[1] == 401  # type: ignore[attr-defined]
            connection.sendall(b"zz\r\n")
            assert is_closed(connection)
        assert client.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# -- names ------------------------------------------------------------------------------------


def is_answered(name: str, **settings: Any) -> bool:
    error: ApiError | None = None
    try:
        Hosts(ServerSettings(**settings)).check({"headers": [(b"host", name.encode())]})
    except ApiError as raised:
        error = raised
    if error is not None:
        assert (error.status, error.code) == (421, "host_not_allowed")
        assert "--allowed-host" in error.message
    return error is None


OURS = [
    "localhost", "localhost:8000", "LocalHost.", "127.0.0.1", "127.0.0.1:80", "127.9.9.9", "[::1]",
    "[::1]:8000", "town.localhost:3000",
]  # fmt: skip
FOREIGN = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
    "evillocalhost", "10.0.0.5", "0.0.0.0:8000", "[::]", "[fd00::5]", "", ":8000", "[::1", "[x]",
    "127.0.0.1:80:80", "localhost, evil.example", "localhost@evil.example", "::1",
]  # fmt: skip


def test_a_server_of_this_machine_answers_to_its_names() -> None:
    for settings in ({}, {"host": "localhost"}, {"host": "::1"}, {"allowed_hosts": ("a.example",)}):
        assert all(is_answered(host, **settings) for host in OURS)
        assert not any(is_answered(host, **settings) for host in FOREIGN)
    Hosts(ServerSettings()).check({"headers": []})  # HTTP/1.0


def test_other_names_are_checked_where_they_are_given() -> None:
    assert is_answered("evil.example", api_keys=("one",))
    assert is_answered("evil.example", host="0.0.0.0", allow_public=True)
    named = {"allowed_hosts": ("Town.example", "[fd00::5]")}
    for settings in (named, named | {"host": "0.0.0.0", "api_keys": ("one",)}):
        for host in ("town.example", "TOWN.example:8000", "[fd00::5]:80", *OURS):
            assert is_answered(host, **settings)
        assert not is_answered("evil.example", **settings)
    assert is_answered("evil.example", allowed_hosts=("*",))
    for wrong in ("https://a.example", "a.example:80", "", "a b"):
        with pytest.raises(ConfigError, match="allowed host"):
            ServerSettings(allowed_hosts=(wrong,))


def test_a_page_whose_name_is_bound_anew_gets_nothing(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm()) as (client, _):
        for path in ("/health", "/metrics", "/v1/models", "/openapi.json"):
            answer = client.get(path, headers={"host": "evil.example"})
            assert answer.status_code == 421
            assert is_error(answer.json())
        client.headers["host"] = "evil.example"
        assert chat(client).status_code == 421


def test_a_page_cannot_ask_without_asking_whether_it_may(make_fake_llm: MakeLLM) -> None:
    """What browsers send to other origins unasked: a text without a type, or with a simple one."""
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1})
    with serving(make_fake_llm()) as (client, _):
        for kind in ({}, {"content-type": "text/plain"}):
            answer = client.post("/v1/chat/completions", content=body, headers=kind)
            assert answer.status_code == 400


PAGE = "https://town.example"
ASKS = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def test_pages_of_some_origins_may_ask(make_fake_llm: MakeLLM) -> None:
    settings: dict[str, Any] = {"api_keys": ("one",), "cors_origins": (PAGE, "http://localhost:3")}
    with serving(make_fake_llm(), **settings) as (client, _):
        asked = client.options("/v1/chat/completions", headers=ASKS)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
        other = client.options("/v1/chat/completions", headers={**ASKS, "origin": "https://a.b"})
        assert "access-control-allow-origin" not in other.headers
        for key, status in (("one", 200), ("two", 401)):
            client.headers = httpx.Headers({"origin": PAGE, "authorization": f"Bearer {key}"})
            answer = chat(client)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE


def test_other_pages_may_not(make_fake_llm: MakeLLM) -> None:
    with serving(make_fake_llm()) as (client, _):
        assert client.options("/v1/chat/completions", headers=ASKS).status_code == 405
        assert "access-control-allow-origin" not in chat(client).headers
    for wrong in ("town.example", f"{PAGE}/", "https://", ""):
        with pytest.raises(ConfigError, match="origin"):
            ServerSettings(cors_origins=(wrong,))
