"""Metrics for Prometheus. Labels are few and never contain what clients send."""

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tokendance.engine.events import Event, Finished, RoundStarted, StepDone
from tokendance.errors import AbortedError
from tokendance.fidelity.shadow import ShadowReport
from tokendance.llm import LLM
from tokendance.server.pauses import EngineWatch, Pauses

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
_SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1)
_AGENTS = (1, 2, 3, 5, 10, 20, 50, 100, 200)


class Metrics:
    """Counters and histograms of one server, which observes its engine.

    Attributes:
        engine_pauses: of the engine's thread.
        engine_watch: notes them; it has to be told when the thread waits.
        event_loop_pauses: of the loop that answers requests.
    """

    def __init__(self, llm: LLM) -> None:
        self._registry = CollectorRegistry()
        self._mode = llm.engine.options.reuse
        counter = partial(Counter, namespace="tokendance", registry=self._registry)
        histogram = partial(Histogram, namespace="tokendance", registry=self._registry)
        self._agents = histogram("round_agents", "Requests that started together.", buckets=_AGENTS)
        self._prompt = counter("prompt_tokens", "Prompt tokens of requests that were answered.")
        self._computed = counter(
            "computed_tokens",
            "Of these, computed; and what requests without an answer computed for them.",
        )
        self._reused = counter("reused_tokens", "Of these, not computed: their KV was there.")
        self._corrected = counter("corrected_tokens", "Of the computed, shared and corrected.")
        self._dropped = counter(
            "dropped_tokens", "Of what was said in sessions, left out of prompts to make them fit."
        )
        self._generated = counter("generated_tokens", "Tokens of answers.")
        self._embedded = counter("embedding_tokens", "Tokens of texts that vectors were made of.")
        self._requests = counter(
            "requests",
            "Requests by how they ended; cancelled if nobody waits.",
            ["reason"],
        )
        self._first_token = histogram(
            "first_token_seconds", "To the first token.", ["reuse"], buckets=_SECONDS
        )
        self._per_token = histogram(
            "inter_token_seconds",
            "Between tokens of an answer, on average.",
            ["reuse"],
            buckets=_SECONDS,
        )
        self._connections = Gauge(
            "tokendance_connections", "Connections of clients.", registry=self._registry
        )
        self._closed = counter(
            "connections_closed", "Connections that the server has closed, and why.", ["reason"]
        )
        self._held = histogram(
            "held_back_seconds",
            "Seconds that requests were held back, as their key had taken more than its part of "
            "--http-share; also if their clients left meanwhile.",
            buckets=_SECONDS,
        )
        self._refused = counter(
            "refused_requests", "Requests refused before they were read, by status.", ["status"]
        )
        status, page_bytes = llm.engine.status, llm.engine.page_bytes
        self._gauge("running_requests", "Being computed.", lambda: status().num_running)
        self._gauge("waiting_requests", "In the queue.", lambda: status().num_waiting)
        self._gauge(
            "kv_bytes_resident",
            "KV that running requests hold, room for their answers included.",
            lambda: status().resident_pages * page_bytes,
        )
        self._gauge(
            "kv_bytes_stored",
            "KV that can be found again; what running requests hold of it is resident, too.",
            lambda: status().stored_pages * page_bytes,
        )
        self._gauge(
            "kv_bytes_budget", "Most KV that there can be.", lambda: status().num_pages * page_bytes
        )
        self._gauge(
            "kv_bytes_on_disk",
            "KV in the store's files.",
            lambda: llm.tier.bytes_on_disk if llm.tier is not None else 0,
        )
        self._shadow_kl = histogram(
            "shadow_kl_nats",
            "Mirrors computed again exactly: KL divergence of their answers, a token.",
            buckets=_NATS,
        )
        self._shadow_top1 = histogram(
            "shadow_top1",
            "Mirrors computed again exactly: share of tokens that both put first.",
            buckets=_SHARES,
        )

        self.engine_pauses = Pauses(
            "engine", "What held up the engine's thread, but for passes.", self._registry
        )
        self.engine_watch = EngineWatch(self.engine_pauses)
        self.event_loop_pauses = Pauses(
            "event_loop", "What held up the event loop.", self._registry
        )

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"tokendance_{name}", text, registry=self._registry).set_function(read)

    def note_connections(self, count: int) -> None:
        """Record how many connections there are."""
        self._connections.set(count)

    def note_closed(self, reason: str) -> None:
        """Record a connection that the server has closed; there are few reasons."""
        self._closed.labels(reason).inc()

    def note_held(self, seconds: float) -> None:
        """Record a request that was held back, before it began or before its body was parsed."""
        self._held.observe(seconds)

    def note_embedded(self, num_tokens: int) -> None:
        """Count the tokens of texts that vectors were made of."""
        self._embedded.inc(num_tokens)

    def note_refused(self, status: int) -> None:
        """Record a request that was refused before its body was read."""
        self._refused.labels(status).inc()

    def note_shadow(self, report: ShadowReport) -> None:
        """Record a mirror that was computed again."""
        self._shadow_kl.observe(report.kl)
        self._shadow_top1.observe(report.top1)

    def on_event(self, event: Event) -> None:
        """Record an event of the engine; see `EngineObserver`."""
        if isinstance(event, RoundStarted):
            self._agents.observe(event.num_requests)
        elif isinstance(event, Finished):
            self._count(event)
        elif isinstance(event, StepDone):
            self.engine_watch.passed(event.time_s, event.seconds, event.cpu_seconds)

    def _count(self, event: Finished) -> None:
        output = event.output
        if event.silent:
            self._computed.inc(output.computed_tokens)
            return
        is_cancelled = isinstance(output.error, AbortedError)
        self._requests.labels("cancelled" if is_cancelled else output.finish_reason).inc()
        if output.error is not None:
            return
        self._prompt.inc(output.prompt_tokens)
        self._computed.inc(output.computed_tokens)
        self._reused.inc(output.reused_tokens)
        self._corrected.inc(output.corrected_tokens)
        self._dropped.inc(output.dropped_tokens)
        self._generated.inc(len(output.token_ids))
        if event.first_token_s is None:
            return
        mode = "none"
        if output.reused_tokens:
            mode = self._mode if event.reused_segments else "prefix"
        self._first_token.labels(mode).observe(event.first_token_s - event.arrived_s)
        if len(output.token_ids) > 1:
            between = (event.time_s - event.first_token_s) / (len(output.token_ids) - 1)
            self._per_token.labels(mode).observe(between)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self._registry)
