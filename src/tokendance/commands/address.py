"""Whether a server can listen at an address, found out before its model is loaded."""

import socket

from tokendance.errors import ConfigError


def check_address(host: str, port: int) -> None:
    """Listen for a moment.

    Args:
        host: a name or an address.
        port: 0 for any that is free.

    Raises:
        ConfigError: if that cannot be.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in addresses:
            try:
                listener = socket.socket(family, socket.SOCK_STREAM)
            except OSError:  # this machine has no such addresses; the server passes them over, too
                continue
            with listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind(address)
                listener.listen()
    except OSError as error:
        raise ConfigError(
            f"The server cannot listen at {host}, port {port}: {error.strerror}. Give another "
            "--port or --host, or stop what listens there."
        ) from error
