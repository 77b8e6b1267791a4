"""HTTP as a client that may leave at any moment: before it has sent all, or before all has come."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import h11

_PIECE = 2**16


@dataclass(frozen=True, slots=True)
class Leave:
    """When and how a client goes away.

    Attributes:
        sent: share of its body that it sends.
        wait_s: it stays so long after that.
        received: or until it has read so many bytes of the answer's body, if not None.
        reset: whether it breaks the connection instead of closing it.
    """

    sent: float = 1.0
    wait_s: float = 0.0
    received: int | None = None
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that came whole."""

    status: int
    headers: dict[str, str]
    body: bytes


async def exchange(
    port: int,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    chunk: int | None = None,
    leave: Leave | None = None,
) -> Reply | None:
    """Send a request and read the answer.

    Args:
        port: of this machine.
        method: of the request.
        path: likewise.
        body: likewise.
        headers: likewise, besides those that HTTP needs.
        chunk: bytes to send at a time without saying how many there will be.
        leave: when to go away; never if left out.

    Returns:
        The answer; None if the client went away before it was there.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = h11.Connection(h11.CLIENT)
    size = {"transfer-encoding": "chunked"} if chunk else {"content-length": str(len(body))}
    wanted = {"host": f"127.0.0.1:{port}", "connection": "close", **size, **headers}
    try:
        head = h11.Request(method=method, target=path, headers=list(wanted.items()))
        writer.write(connection.send(head) or b"")
        sent = body if leave is None else body[: int(leave.sent * len(body))]
        for at in range(0, len(sent), chunk or _PIECE):
            data = h11.Data(data=sent[at : at + (chunk or _PIECE)])
            writer.write(connection.send(data) or b"")
        if leave is not None and leave.sent < 1:
            await asyncio.sleep(leave.wait_s)
            return None
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        if leave is None:
            return await _read(reader, connection, None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if leave.received is not None else leave.wait_s):
                return await _read(reader, connection, leave.received)
        return None
    finally:
        if leave is not None and leave.reset:
            raw: socket.socket = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read(
    reader: asyncio.StreamReader, connection: h11.Connection, enough: int | None
) -> Reply | None:
    """Read an answer; None once `enough` bytes of its body are there."""
    head: h11.Response | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_PIECE))
        elif isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if enough is not None and len(body) >= enough:
                return None
        elif isinstance(event, h11.EndOfMessage):
            break
        elif not isinstance(event, h11.InformationalResponse):
            raise h11.RemoteProtocolError(f"the answer broke off: {event!r}")
    assert head is not None
    headers = {name.decode().lower(): value.decode() for name, value in head.headers}
    return Reply(head.status_code, headers, bytes(body))
