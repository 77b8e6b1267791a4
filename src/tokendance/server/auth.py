"""Who asks: each API key is a tenant, and tenants share nothing."""

import hashlib
import hmac

from fastapi import Request
from starlette.types import Scope

from tokendance.server.errors import ApiError
from tokendance.server.settings import ServerSettings


class ApiKeys:
    """The keys that may ask.

    Attributes:
        open_paths: that need no key; None if none does.
    """

    def __init__(self, settings: ServerSettings) -> None:
        """Take the keys of the settings; without any, everybody may ask."""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self.open_paths: set[str] | None = None
        if settings.api_keys:
            self.open_paths = {"/health", "/ready"}
            if settings.open_metrics:
                self.open_paths.add("/metrics")

    def authenticate(self, scope: Scope) -> str:
        """The tenant, by the key in the head of a request; "" where none is needed.

        Raises:
            ApiError: 401 without a key that is known.
        """
        if self.open_paths is None or scope["path"] in self.open_paths:
            return ""
        header = dict(scope["headers"]).get(b"authorization", b"")
        digest = hashlib.sha256(header.removeprefix(b"Bearer ").strip()).digest()
        # All are compared, so that time tells nothing about them.
        if not sum(hmac.compare_digest(known, digest) for known in self._digests):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()


async def tenant_of(request: Request) -> str:
    """Who asks; `Limits` has found it before the body was read."""
    tenant: str = request.state.tenant
    return tenant
