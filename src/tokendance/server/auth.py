"""Authentication: each API key is a tenant, and tenants share nothing."""

import base64
import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Scope

from tokendance.server.errors import ApiError
from tokendance.server.settings import ServerSettings

# Only where there is nothing but pages to look at: a browser sends such a key by itself, also when
# another site's page asks.
_ASK_IN_BROWSER = 'Basic realm="TokenDance: the key is the password", charset="UTF-8"'


class ApiKeys:
    """The API keys of the settings; without any, no request needs a key.

    Attributes:
        open_paths: paths that need no key; None if no path needs one.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        open_paths = {"/", "/health", "/ready"} | ({"/metrics"} if settings.open_metrics else set())
        self.open_paths = open_paths if settings.api_keys else None

    def authenticate(self, scope: Scope) -> str:
        """The tenant of a request, by the key in its headers; "" where no key is needed.

        Raises:
            ApiError: 401 for a missing or unknown key.
        """
        if self.open_paths is None or scope["path"] in self.open_paths:
            return ""
        header = dict(scope["headers"]).get(b"authorization", b"")
        is_page = scope["path"].split("/")[1:2] == ["dashboard"]
        key = _password(header) if is_page else None
        digest = hashlib.sha256(key or header.removeprefix(b"Bearer ").strip()).digest()
        # It is compared with all of them, so that the time this takes reveals nothing.
        if not sum(hmac.compare_digest(own, digest) for own in self._digests):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": _ASK_IN_BROWSER if is_page else "Bearer"},
            )
        return digest.hex()


def _password(header: bytes) -> bytes | None:
    """What a browser sends when its user was asked for a key; None if the header is another."""
    scheme, _, credentials = header.partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return None


async def _tenant_of(request: Request) -> str:
    return str(request.state.tenant)


Tenant = Annotated[str, Depends(_tenant_of)]
"""Parameter of a route: the tenant, which `Limits` has found before the body was read."""
