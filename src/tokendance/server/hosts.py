"""By which names a server may be asked.

A browser lets a web page ask the host that it came from. If the name evil.example is said to mean
127.0.0.1 once its page is open (DNS rebinding), the page may ask a server on the visitor's machine,
and read the answer. Such requests name evil.example in their Host header.
"""

import ipaddress
import re

from starlette.types import Scope

from tokendance.server.errors import ApiError
from tokendance.server.settings import ServerSettings, is_loopback

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?", re.ASCII)
_ANY = "*"
_SHOWN = 100


class Hosts:
    """Checks the Host header where a web page could reach what it must not.

    That is where the server listens on this machine only and needs no key; and where it is told
    which names it has. Names of this machine always do.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._allowed = {name.lower() for name in settings.allowed_hosts}
        is_open_here = is_loopback(settings.host) and not settings.api_keys
        self._is_checked = _ANY not in self._allowed and bool(self._allowed or is_open_here)

    def check(self, scope: Scope) -> None:
        """Raise ApiError for a request to a host that is not this one."""
        if not self._is_checked:
            return
        host = dict(scope["headers"]).get(b"host")
        if host is None:  # HTTP/1.0, which no browser speaks
            return
        text = host.decode("latin-1").strip().lower()
        match = _HOST.fullmatch(text)
        name = match[1].rstrip(".") if match else ""
        if name in self._allowed or _is_this_machine(name):
            return
        raise ApiError(
            421,
            f"This server does not answer for the host {text[:_SHOWN]!r}. Ask for localhost or "
            "127.0.0.1, or start it with --allowed-host and the name that its clients use.",
            code="host_not_allowed",
        )


def _is_this_machine(name: str) -> bool:
    if name.startswith("["):
        try:
            return ipaddress.IPv6Address(name[1:-1]).is_loopback
        except ValueError:
            return False
    return name.endswith(".localhost") or is_loopback(name)
