"""Settings of the server. Each default is written here and nowhere else."""

import ipaddress
from dataclasses import dataclass

from tokendance.errors import ConfigError

MAX_DRAIN_S = 86_400.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server listens, whom it lets in, and what it refuses.

    Attributes:
        host: address to listen on.
        port: likewise; 0 takes any that is free.
        served_name: the model's name for clients; as it was loaded if None.
        api_keys: who may ask. Each key is a tenant, and tenants share nothing. Without any,
            everybody may.
        allow_public: listen beyond this machine without keys.
        open_metrics: show /metrics to everybody. Otherwise, where there are keys, all paths but
            /health and /ready need one.
        max_body_bytes: larger requests are refused.
        max_body_objects: likewise those of more JSON objects, by their braces: messages, their
            parts, calls, and references to blocks, of which a round in which all hear all has
            agents times agents. Checking so many holds up everybody for a second.
        body_timeout_s: requests that take longer to arrive are refused.
        max_messages: of one conversation.
        max_open_requests: that are answered at a time; more are told to come back. Half of them
            are divided among the keys, so that each has some that no other takes. A call of
            /v1/rounds counts as its agents, at most as many as one key has for itself.
        default_max_tokens: of an answer whose request does not say.
        max_choices: answers to one request.
        window_s: requests that arrive within so many seconds of each other make a round.
        window_share: of a lone request's time; nobody waits longer for others.
        round_wait_s: a round with an id starts so long after its last request, if it is not full.
        recent_s: text of prompts of so many seconds ago is reused, too, so agents may be asked one
            after another; with 0 only that of prompts that arrive together.
        drain_s: answers that are under way may take so long to end when the server stops.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str | None = None
    api_keys: tuple[str, ...] = ()
    allow_public: bool = False
    open_metrics: bool = False
    max_body_bytes: int = 8 * 2**20
    max_body_objects: int = 300_000
    body_timeout_s: float = 60.0
    max_messages: int = 4096
    max_open_requests: int = 256
    default_max_tokens: int = 512
    max_choices: int = 16
    window_s: float = 0.004
    window_share: float = 0.05
    round_wait_s: float = 0.2
    recent_s: float = 600.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.api_keys and not self.allow_public and not _is_loopback(self.host):
            raise ConfigError(
                f"Without an API key the server listens on this machine only, not on {self.host}. "
                "Give --api-key, or --allow-public if everybody who reaches it may use it."
            )
        for name in (
            "max_body_bytes",
            "max_body_objects",
            "max_messages",
            "max_open_requests",
            "default_max_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. It must be 1 or more.")
        if not 0 <= self.drain_s <= MAX_DRAIN_S:
            raise ConfigError(
                f"drain_s is {self.drain_s:g}. Give 0 to {MAX_DRAIN_S:g} seconds, which is a day."
            )
        if any(not key for key in self.api_keys):
            raise ConfigError("An API key is empty. Give each at least one character.")
        if self.max_open_requests < len(self.api_keys):
            raise ConfigError(
                f"max_open_requests is {self.max_open_requests}, and there are "
                f"{len(self.api_keys)} API keys. Let each have one request or more."
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
