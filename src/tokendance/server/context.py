"""What all routes share."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from tokendance.llm import LLM
from tokendance.models.embedders import Embedder, MeanEmbedder, OwnEmbedder
from tokendance.models.encoder import PromptEncoder
from tokendance.rounds.segments import make_salt
from tokendance.server.admission import Admission
from tokendance.server.auth import ApiKeys
from tokendance.server.connections import Connections
from tokendance.server.dispatcher import Dispatcher
from tokendance.server.embedding_thread import EmbeddingThread
from tokendance.server.engine_thread import EngineThread
from tokendance.server.errors import ApiError
from tokendance.server.grammar import Grammars
from tokendance.server.hosts import Hosts
from tokendance.server.ids import new_id
from tokendance.server.jobs import Mailbox
from tokendance.server.metrics import Metrics
from tokendance.server.responses_api.kept import KeptAnswers
from tokendance.server.sessions import Sessions
from tokendance.server.settings import ServerSettings
from tokendance.server.shares import Shares
from tokendance.server.tool_format import find_tool_format

Result = TypeVar("Result")

# Threads that read a tenant's requests at a time.
_THREADS = 4


class ServerContext:
    """A model, what runs it, and all that requests to it share.

    Attributes:
        llm: the model; only `engine_thread` touches its engine.
        settings: of the server.
        keys: authenticates requests.
        hosts: by which the server may be asked.
        metrics: for Prometheus.
        connections: of clients.
        engine_thread: runs the engine; it is not started here.
        mailbox: brings what it tells into the event loop.
        admission: limits open requests.
        kept_answers: of /v1/responses, that are remembered.
        sessions: that are open.
        grammars: constrain answers that have to parse.
        tools: how the model calls tools.
        embeddings: makes vectors; it is not started here, either.
        started_s: Unix time.
    """

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        self.llm = llm
        self.settings = settings
        self.keys = ApiKeys(settings)
        self.hosts = Hosts(settings)
        self.metrics = Metrics(llm)
        dispatcher = Dispatcher(llm, self.metrics, settings)
        self.engine_thread = EngineThread(dispatcher, self.metrics.engine_watch)
        self.mailbox = Mailbox()
        self.admission = Admission(settings, lambda: self.engine_thread.is_alive)
        shares = Shares(settings.http_share, self.admission.tenants)
        self.connections = Connections(settings, self.metrics, self.keys, shares)
        self.kept_answers = KeptAnswers(settings)
        self.sessions = Sessions(llm, self.engine_thread)
        self.grammars = Grammars(llm.model, settings)
        self.tools = find_tool_format(llm.encoder)
        self.embeddings = EmbeddingThread(_embedder(llm, settings))
        self.started_s = int(time.time())
        self._special_ids = frozenset(llm.model.tokenizer.all_special_ids)
        self._encoders: dict[str, PromptEncoder] = {}  # by tenant, like the next
        self._limiters: dict[str, anyio.CapacityLimiter] = {}

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.settings.served_name or self.llm.model.name

    @property
    def embedding_model_name(self) -> str:
        """What clients call what makes vectors."""
        return self.embeddings.embedder.name or f"{self.model_name}-mean-pooled"

    @property
    def max_embedding_tokens(self) -> int:
        """Tokens of the longest text that a vector is made of."""
        return min(self.settings.max_embedding_tokens, self.embeddings.embedder.max_tokens)

    def check_embedding_model(self, name: str) -> None:
        """Raise ApiError for the name of a model that makes no vectors here."""
        embedder = self.embeddings.embedder
        if name != self.embedding_model_name and (embedder.name or name != self.model_name):
            message = f"Vectors are made by {self.embedding_model_name!r} here, not by {name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    @property
    def max_characters(self) -> int:
        """Longer prompts are refused before they are tokenized: tokens are hardly ever so long."""
        return 128 * self.llm.model.shape.max_context

    def check_model(self, name: str) -> None:
        """Raise ApiError for another model's name."""
        if name != self.model_name:
            message = f"The model {name!r} is not served here. Ask for {self.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def head(self, kind: str) -> dict[str, Any]:
        """The first fields of every answer; `kind` begins its id."""
        return {
            "id": f"{kind}-{new_id()}",
            "created": int(time.time()),
            "model": self.model_name,
        }

    def encoder(self, tenant: str, cache_salt: str | None = None) -> PromptEncoder:
        """The encoder of a tenant; its salt keeps hashes apart from those of other tenants.

        What a tenant's requests share they share with those that name the same `cache_salt`.
        """
        if tenant not in self._encoders:
            salt = make_salt(*self.llm.model.salt_names, tenant)
            self._encoders[tenant] = self.llm.encoder.with_salt(salt)
        encoder = self._encoders[tenant]
        if not cache_salt:
            return encoder
        return encoder.with_salt(make_salt(encoder.salt.hex(), cache_salt))

    async def in_thread(self, tenant: str, work: Callable[[], Result]) -> Result:
        """Do a tenant's work on one of its few threads, so that it cannot take all of them."""
        limiter = self._limiters.setdefault(tenant, anyio.CapacityLimiter(_THREADS))
        return await anyio.to_thread.run_sync(work, limiter=limiter)

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to the bytes of a text; half a character, maybe."""
        if token in self._special_ids:
            return b""
        data = self.grammars.token_bytes(token)
        return self.token_text(token).encode() if data is None else data

    def token_text(self, token: int) -> str:
        """The text of one token."""
        return str(self.llm.model.tokenizer.decode([token]))


def _embedder(llm: LLM, settings: ServerSettings) -> Embedder:
    if settings.embedding_model is None:
        return MeanEmbedder(llm.model, llm.encoder)
    return OwnEmbedder(settings.embedding_model, device=llm.model.device)
