"""What the routes work with."""

import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request
from starlette.types import Scope

from tokendance.llm import LLM
from tokendance.models.encoder import PromptEncoder
from tokendance.rounds.segments import make_salt
from tokendance.server.dispatcher import make_dispatcher
from tokendance.server.engine_thread import EngineThread
from tokendance.server.errors import ApiError
from tokendance.server.grammar import Grammars
from tokendance.server.metrics import Metrics
from tokendance.server.sessions import Sessions
from tokendance.server.settings import ServerSettings
from tokendance.server.tool_calls import ToolFormat, find_tool_format

Result = TypeVar("Result")

# Of each tenant, for reading what it sends.
_THREADS = 4


@dataclass(slots=True)
class Server:
    """A model, its worker, and who may ask.

    Attributes:
        llm: the model; only the worker touches its engine.
        settings: of the server.
        metrics: what Prometheus reads.
        worker: runs the engine.
        sessions: that are open.
        grammars: for answers that have to parse.
        tools: how the model calls tools.
        started_s: seconds since 1970.
        is_draining: no more requests are taken.
    """

    llm: LLM
    settings: ServerSettings
    metrics: Metrics = field(init=False)
    worker: EngineThread = field(init=False)
    sessions: Sessions = field(init=False)
    grammars: Grammars = field(init=False)
    tools: ToolFormat = field(init=False)
    started_s: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    _open: Counter[str] = field(default_factory=Counter)  # requests that are answered, by tenant
    _limiters: dict[str, anyio.CapacityLimiter] = field(default_factory=dict)
    _encoder: PromptEncoder = field(init=False)
    _encoders: dict[str, PromptEncoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.llm)
        self._encoder = self.llm.encoder.with_salt(make_salt())
        self.grammars = Grammars(self.llm.model)
        self.tools = find_tool_format(self._encoder)
        self.worker = EngineThread(make_dispatcher(self.llm, self.metrics, self.settings))
        self.sessions = Sessions(self.llm, self.worker)

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.settings.served_name or self.llm.model.name

    @property
    def max_characters(self) -> int:
        """Longer texts are refused unread; hardly a token has more than a hundred."""
        return 128 * self.llm.model.shape.max_context

    def encoder(self, tenant: str) -> PromptEncoder:
        """The encoder of a tenant, whose hashes nobody else's prompts have."""
        model = self.llm.model
        if tenant not in self._encoders:
            salt = make_salt(model.name, str(model.dtype), tenant)
            self._encoders[tenant] = self._encoder.with_salt(salt)
        return self._encoders[tenant]

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer begins with; `kind` begins its id."""
        return {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.model_name,
        }

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return self._open.total()

    async def in_thread(self, tenant: str, work: Callable[[], Result]) -> Result:
        """Do something of a tenant's that takes a while, such as reading prompts, on a thread.

        Each tenant has a few of the threads, so that none keeps the others waiting.
        """
        if tenant not in self._limiters:
            self._limiters[tenant] = anyio.CapacityLimiter(_THREADS)
        return await anyio.to_thread.run_sync(work, limiter=self._limiters[tenant])

    @contextmanager
    def admitted(self, tenant: str, num_agents: int = 1) -> Iterator[None]:
        """Count a tenant's request as open while it is answered.

        Args:
            tenant: who asks.
            num_agents: of a round in one call. It counts as so many, but never as more than a
                tenant has for itself, so that the largest is served when the others are done.

        Raises:
            ApiError: 503 while the server stops or its engine has failed, 429 if too many are open.
        """
        if self.is_draining or not self.worker.is_alive:
            raise ApiError(
                503, "The server is stopping. Ask another, or later.", headers={"Retry-After": "5"}
            )
        count = min(num_agents, self._num_own)
        if not self._has_room(tenant, count):
            raise ApiError(
                429,
                f"{self.num_open} requests are being answered, {self._open[tenant]} of them yours, "
                "and no more are taken at a time. Ask again in a moment.",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        self._open[tenant] += count
        try:
            yield
        finally:
            self._open[tenant] -= count

    @property
    def _num_own(self) -> int:
        """Requests that each tenant may have open, whatever the others do."""
        return max(1, self.settings.max_open_requests // (2 * self._num_tenants))

    @property
    def _num_tenants(self) -> int:
        return max(1, len(self.settings.api_keys))

    def _has_room(self, tenant: str, count: int) -> bool:
        """Whether a tenant may have more: some are its own, the others go to who comes first.

        max_open_requests   [ own | own | own |   for all    ]
        """
        own = self._num_own
        would_be = self._open + Counter({tenant: count})
        num_beyond = sum(max(0, one - own) for one in would_be.values())
        for_all = self.settings.max_open_requests - own * self._num_tenants
        return would_be[tenant] <= own or num_beyond <= for_all

    def token_text(self, token: int) -> str:
        """The text of one token."""
        text: str = self.llm.model.tokenizer.decode([token])
        return text

    def authenticate(self, scope: Scope) -> str:
        """Who asks, by the API key in the head of a request; "" where none is needed.

        Raises:
            ApiError: 401 without a key that is known.
        """
        if self.open_paths is None or scope["path"] in self.open_paths:
            return ""
        header = dict(scope["headers"]).get(b"authorization", b"")
        digest = hashlib.sha256(header.removeprefix(b"Bearer ").strip()).digest()
        found = ""
        for key in self.settings.api_keys:
            # All are compared, so that time tells nothing about them.
            known = hashlib.sha256(key.encode()).digest()
            if hmac.compare_digest(known, digest):
                found = known.hex()
        if not found:
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found

    @property
    def open_paths(self) -> set[str] | None:
        """Paths that need no key; None if none does."""
        if not self.settings.api_keys:
            return None
        return {"/health", "/ready", *(["/metrics"] if self.settings.open_metrics else [])}

    @staticmethod
    async def tenant_of(request: Request) -> str:
        """Who asks; `Limits` has found it before the body was read."""
        tenant: str = request.state.tenant
        return tenant

    def check_model(self, name: str) -> None:
        """Refuse another model's name.

        Raises:
            ApiError: 404.
        """
        if name != self.model_name:
            raise ApiError(
                404,
                f"The model {name!r} is not served here. Ask for {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )
