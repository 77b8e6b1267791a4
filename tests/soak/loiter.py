"""Clients that keep connections and let the server wait: it closes them, and serves the others."""

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable, Mapping

import httpx

from soak import bodies
from soak.judge import is_error

# How late the server may close a connection, and how long a health check may take: this process may
# have much else to do.
_LATE_S = 20.0
_PROMPT_S = 5.0
_CROWD = 700
# Answers, of 76 kB each, that are more than the system keeps of what a client does not read.
_PAGES = 100
_AT_A_TIME = 50
_CROWD_EVERY_S = 15.0

_GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
_POST = _GET.replace(b"GET /health", b"POST /v1/chat/completions")
_POST += b"content-type: application/json\r\n"
_NONSENSE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not TLS\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",  # no host
    _GET + b"host: two\r\n\r\n",
    _GET + b"a" * 40_000 + b"\r\n\r\n",
    _POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}   ",
    _POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    _POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
)


class Loiterers:
    """Each method is a client; it returns what was wrong, or None."""

    def __init__(self, port: int, key: str, deadlines: Mapping[str, float], num_most: int) -> None:
        """Clients of a server.

        Args:
            port: of this machine.
            key: of a tenant.
            deadlines: seconds of the server's settings `head_timeout` and so on.
            num_most: connections that the server has at most.
        """
        self._port = port
        self._authorization = f"authorization: Bearer {key}\r\n".encode()
        self._deadlines = deadlines
        self._num_most = num_most

    async def crowd(self, rng: random.Random) -> str | None:
        """More connections than there may be, with half a head each; others are served."""
        texts = (b"", _GET[:30], _POST + b"content-length: 99\r\n")
        writers: list[asyncio.StreamWriter] = []
        try:
            while len(writers) < max(_CROWD, self._num_most + _AT_A_TIME):
                opened = (self._connect() for _ in range(_AT_A_TIME))
                for _, writer in await asyncio.gather(*opened):
                    writers.append(writer)
                    writer.write(rng.choice(texts))
            begun = time.monotonic()
            async with httpx.AsyncClient(timeout=_LATE_S) as client:
                answer = await client.get(f"http://127.0.0.1:{self._port}/health")
            if answer.status_code != 200 or time.monotonic() - begun > _PROMPT_S:
                took = time.monotonic() - begun
                return f"in a crowd, {answer.status_code} after {took:.1f} s from /health"
        finally:
            for writer in writers:
                writer.close()
        await asyncio.sleep(rng.random() * _CROWD_EVERY_S)
        return None

    async def slow_head(self, rng: random.Random) -> str | None:
        """A head that comes byte by byte, maybe behind another request."""
        text = _GET + b"\r\n" if rng.random() < 0.5 else b""
        return await self._drip(text, _GET + b"x: " + b"a" * 10_000, "head_timeout", rng)

    async def slow_body(self, rng: random.Random) -> str | None:
        """A body that comes byte by byte, maybe behind its answer."""
        head = self._authorization + b"content-length: 99999\r\n\r\n"
        text = rng.choice([_GET, _POST]) + head
        return await self._drip(text, b" " * 10_000, "body_timeout", rng)

    async def silent(self, rng: random.Random) -> str | None:
        """A connection on which nothing comes, or nothing more."""
        text, deadline = rng.choice([(b"", "head_timeout"), (_GET + b"\r\n", "idle_timeout")])
        return await self._drip(text, b"", deadline, rng)

    async def unread(self, rng: random.Random) -> str | None:
        """Answers and streams that nobody reads."""
        body = bodies.chat(rng) | {"stream": True, "max_tokens": 300, "ignore_eos": True}
        data = json.dumps(body).encode()
        head = self._authorization + b"content-length: %d\r\n\r\n" % len(data)
        page = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n" + self._authorization + b"\r\n"
        loop = asyncio.get_running_loop()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", self._port))
            await loop.sock_sendall(connection, page * _PAGES + _POST + head + data)
            # First the answers have to fill what the system keeps of them.
            await asyncio.sleep(self._deadlines["send_timeout"] + 10)

            async def read_all() -> None:
                while await loop.sock_recv(connection, 2**16):
                    pass

            return await self._is_closed(read_all, "unread")

    async def nonsense(self, rng: random.Random) -> str | None:
        """What is not HTTP gets an error in OpenAI's shape."""
        end = b"\r\n" + self._authorization + b"\r\n"
        text = rng.choice(_NONSENSE).replace(b"\r\n\r\n", end, 1)
        reader, writer = await self._connect()
        with contextlib.closing(writer):
            writer.write(text)
            answer = b""
            with contextlib.suppress(ConnectionError):  # what it sends, too, may be cut off
                answer = await reader.read()
        head, _, body = answer.partition(b"\r\n\r\n")
        if answer and not (head.startswith(b"HTTP/1.1 4") and is_error(json.loads(body))):
            return f"{answer[:300]!r} to {text[:100]!r}"
        return None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)

    async def _drip(
        self, at_once: bytes, slowly: bytes, deadline: str, rng: random.Random
    ) -> str | None:
        """Send a text, and another byte by byte, until the server closes the connection."""
        reader, writer = await self._connect()

        async def drip() -> None:
            for byte in slowly:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.1 + rng.random())

        writer.write(at_once)
        dripping = asyncio.create_task(drip())
        try:

            async def read_all() -> None:
                await reader.read()

            return await self._is_closed(read_all, f"{deadline} after {at_once[-40:]!r}", deadline)
        finally:
            dripping.cancel()
            writer.close()

    async def _is_closed(
        self, read_all: Callable[[], Awaitable[None]], what: str, deadline: str | None = None
    ) -> str | None:
        """Wait for the end of a connection; what is wrong if it does not come."""
        late_s = _LATE_S + (self._deadlines[deadline] if deadline is not None else 0.0)
        try:
            async with asyncio.timeout(late_s):
                with contextlib.suppress(ConnectionError):
                    await read_all()
        except TimeoutError:
            return f"the connection is still open after {late_s} s: {what}"
        return None
