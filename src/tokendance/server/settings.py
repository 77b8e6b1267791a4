"""Settings of the server: each name, default, help text and check is written here, once.

The command line takes the same names, with hyphens, and shows the texts below as its help.
"""

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cyclopts import Parameter

from tokendance.errors import ConfigError
from tokendance.options import check_range
from tokendance.units import format_bytes, parse_bytes

LogFormat = Literal["text", "json"]
MAX_DRAIN_S = 86_400.0


_Size = Annotated[int | str, Parameter(metavar="SIZE")]


def _each(name: str, variable: str, metavar: str) -> Parameter:
    """An option that is given once for each of its values, or all in an environment variable."""
    return Parameter(name=name, env_var=variable, metavar=metavar, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the server listens, whom it lets in, and what it refuses.

    Attributes:
        host: address to listen on. Beyond this machine an API key is needed.
        port: port to listen on; 0 takes any that is free.
        served_name: what clients call the model; as it was loaded if left out.
        api_keys: who may ask; give it once per tenant. Tenants share nothing. Without any,
            everybody may ask. Better in the environment (separated by blanks) than on the command
            line, where other users of the machine see it.
        allow_public: listen beyond this machine without a key.
        allowed_hosts: a name by which clients may ask this server, besides localhost; give it once
            per name. Without any, all names are answered, but where no key is needed and the server
            listens on this machine only: there a web page could get in by another name. * is all.
        cors_origins: web pages of this origin, like https://town.example, may ask from a browser;
            give it once per origin. * is all.
        open_metrics: show /metrics without a key, to whoever scrapes it. Otherwise, where there are
            keys, all paths but /, /health and /ready need one.
        dashboard: show at /dashboard who shares what, while it happens. Where there are keys, a
            browser asks for one (any user name, the key as the password), and each sees its own
            rounds.
        dashboard_text: show there the texts of prompts and answers, too.
        window_ms: requests that arrive within so many milliseconds of each other make a round; more
            for clients that were seen to take longer, within the next. 0 waits for nobody.
        window_share: share of a lone request's time that it may wait for others at most.
        round_wait: a round with an id starts so many seconds after its last request, if it is not
            full.
        recent: agents may be asked one after another: text of prompts of so many seconds ago is
            reused, too. 0: only of those that arrive together.
        drain: what is under way when the server is stopped may take so many seconds.
        max_open_requests: requests that are answered at a time; more are told to come back. Half of
            them are divided among the keys, so that each has some that no other takes. A call of
            /v1/rounds counts as its agents, at most as many as one key has for itself.
        reserved_kv: share of the KV memory (0 to 0.9) that is divided among the keys, so that each
            has some that no other takes. Where there are several, what would need more than all but
            the others' part is refused.
        busy_pass_ms: while requests of several keys are computed, each forward pass is cut to take
            about so many milliseconds with what is done around it, and divided among them, so that
            none waits long for others.
        http_share: while requests of several keys are answered, all requests together may take this
            share (0.01 to 1) of the time of the thread that reads them, and each key an even part.
            Whoever has taken more, as by a flood of requests, is held back before the next one.
        max_body: largest body of a request, like 8MiB; larger ones are refused.
        max_body_objects: messages, parts, references and calls in a body, or four times as many
            fields, eight times as many lists or fifty times as many values; more are refused, since
            reading them holds up everybody: 20,000 for some 50 ms. In a round in which all hear
            all, references are agents times agents; one with a session needs none.
        max_arriving: memory for all bodies that have not come whole, like 512MiB. Beyond that, the
            one that has been arriving longest is refused.
        body_timeout: bodies that take more seconds to arrive are refused.
        head_timeout: connections on which the head of a request takes more seconds to arrive, from
            when they are made, are closed.
        send_timeout: connections whose client reads nothing of its answer for so many seconds are
            closed.
        idle_timeout: connections on which nothing is asked for so many seconds are closed.
        max_connections: connections at a time, or fewer if the limit of open files (ulimit -n) does
            not allow them. Beyond that, a new one takes the place of the one that has kept the
            server waiting longest, or of one that is held back; so nobody is locked out by those
            who ask nothing, or too much.
        max_messages: messages in a conversation; more are refused.
        max_choices: answers to one request; more are refused.
        max_responses: answers of /v1/responses that are remembered of each key, so that a later
            request can go on from one by previous_response_id; the least recently used are
            forgotten first. 0: none. A client that says store: false leaves none.
        max_responses_size: likewise memory for each key, like 64MiB.
        default_max_tokens: longest answer where a request does not say.
        embedding_model: makes the vectors of /v1/embeddings: an encoder, by folder or hub id. If
            left out, they are the mean of the served model's hidden states.
        max_embedding_inputs: texts of one request for vectors; more are refused.
        max_embedding_tokens: likewise tokens of each text.
        max_schema_size: schemas of a request, of its response format or of all its tools, like
            256KiB; larger ones are refused. So are those with more than each of the following.
        max_schema_depth: levels of a schema, references followed; of recursive ones each once.
        max_schema_definitions: named parts of schemas.
        max_schema_alternatives: alternatives in anyOf, oneOf and allOf.
        max_schema_enum: values in enums.
        max_schema_properties: properties of objects.
        max_schema_pattern: characters in a pattern.
        max_schema_repeats: repetitions of a part of a pattern, as in [a-z]{1,50}.
        schema_timeout: a schema that takes more seconds to compile is refused. Each is tried in a
            process of its own first, unless the same key has sent it before.
        schema_memory: likewise memory, like 64MiB.
        schema_processes: schemas that are tried at a time, one of each key at most.
        log_format: a line for each request, as this.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str | None = None
    api_keys: Annotated[tuple[str, ...], _each("--api-key", "TOKENDANCE_API_KEYS", "KEY")] = field(
        default=(), repr=False
    )
    allow_public: bool = False
    allowed_hosts: Annotated[
        tuple[str, ...], _each("--allowed-host", "TOKENDANCE_ALLOWED_HOSTS", "NAME")
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...], _each("--cors-origin", "TOKENDANCE_CORS_ORIGINS", "ORIGIN")
    ] = ()
    open_metrics: bool = False
    dashboard: bool = True
    dashboard_text: bool = False
    window_ms: float = 4.0
    window_share: float = 0.05
    round_wait: float = 0.2
    recent: float = 600.0
    drain: float = 30.0
    max_open_requests: int = 256
    reserved_kv: float = 0.25
    busy_pass_ms: float = 100.0
    http_share: float = 0.1
    max_body: _Size = "8MiB"
    max_body_objects: int = 20_000
    max_arriving: _Size = "512MiB"
    body_timeout: float = 60.0
    head_timeout: float = 10.0
    send_timeout: float = 60.0
    idle_timeout: float = 30.0
    max_connections: int = 2048
    max_messages: int = 4096
    max_choices: int = 16
    max_responses: int = 1000
    max_responses_size: _Size = "64MiB"
    default_max_tokens: int = 512
    embedding_model: Annotated[str | None, Parameter(metavar="MODEL")] = None
    max_embedding_inputs: int = 2048
    max_embedding_tokens: int = 8192
    max_schema_size: _Size = "256KiB"
    max_schema_depth: int = 256
    max_schema_definitions: int = 1000
    max_schema_alternatives: int = 1000
    max_schema_enum: int = 5000
    max_schema_properties: int = 2000
    max_schema_pattern: int = 1000
    max_schema_repeats: int = 10_000
    schema_timeout: float = 1.0
    schema_memory: _Size = "64MiB"
    schema_processes: int = 2
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        if not self.api_keys and not self.allow_public and not is_loopback(self.host):
            raise ConfigError(
                f"Without an API key the server listens on this machine only, not on {self.host}. "
                "Give --api-key, or --allow-public if everybody who reaches it may use it."
            )
        check_range(self, 0, "port", most=65_535)
        check_range(self, 0, "window_ms", "window_share", "round_wait", "recent", "body_timeout")
        check_range(self, 0, "busy_pass_ms")
        check_range(self, 0, "max_responses")
        check_range(self, 1, "max_embedding_inputs", "max_embedding_tokens")
        _check_size("--max-responses-size", self.max_responses_bytes, 0)
        check_range(self, 0, "reserved_kv", most=0.9)
        check_range(self, 0, "drain", most=MAX_DRAIN_S)
        check_range(self, 0.01, "http_share", most=1)
        check_range(self, 1, "max_body_objects", "max_messages", "max_choices")
        _check_size("--max-body", self.max_body_bytes, 1)
        check_range(self, 1, "max_open_requests", "default_max_tokens", "max_connections")
        check_range(self, 0.01, "head_timeout", "send_timeout", "idle_timeout")
        _check_size("--max-arriving", self.max_arriving_bytes, self.max_body_bytes)
        _check_size("--max-schema-size", self.max_schema_bytes, 1)
        check_range(self, 1, "max_schema_depth", "max_schema_definitions")
        check_range(self, 1, "max_schema_alternatives", "max_schema_enum", "max_schema_properties")
        check_range(self, 1, "max_schema_pattern", "max_schema_repeats", "schema_processes")
        check_range(self, 0.05, "schema_timeout", most=600)
        _check_size("--schema-memory", self.schema_memory_bytes, 2**20)
        if any(not key for key in self.api_keys):
            raise ConfigError("An API key is empty. Give each at least one character.")
        for host in self.allowed_hosts:
            if not re.fullmatch(r"\*|\[[0-9a-f:]+\]|[\w.-]+", host.lower(), re.ASCII):
                raise ConfigError(
                    f"The allowed host {host!r} is no name. Give it without scheme and port, like "
                    "town.example, 10.0.0.5 or [fd00::5]."
                )
        for origin in self.cors_origins:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ConfigError(
                    f"The origin {origin!r} is none. Give scheme, host and port as a browser shows "
                    "them, without a path: https://town.example or http://localhost:3000."
                )
        if self.max_open_requests < len(self.api_keys):
            raise ConfigError(
                f"max_open_requests is {self.max_open_requests}, and there are "
                f"{len(self.api_keys)} API keys. Let each have one request or more."
            )

    @property
    def max_body_bytes(self) -> int:
        """Bytes of the largest body."""
        return parse_bytes(self.max_body)

    @property
    def max_arriving_bytes(self) -> int:
        """Bytes of all bodies that have not come whole."""
        return parse_bytes(self.max_arriving)

    @property
    def max_responses_bytes(self) -> int:
        """Bytes of a key's answers that are remembered."""
        return parse_bytes(self.max_responses_size)

    @property
    def max_schema_bytes(self) -> int:
        """Bytes of the largest schema."""
        return parse_bytes(self.max_schema_size)

    @property
    def schema_memory_bytes(self) -> int:
        """Bytes that compiling a schema may take."""
        return parse_bytes(self.schema_memory)


def _check_size(option: str, num_bytes: int, least: int) -> None:
    """Raise ConfigError for a size that is too small."""
    if num_bytes < least:
        raise ConfigError(
            f"{option} is {format_bytes(num_bytes)}. Give {format_bytes(least)} or more."
        )


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
