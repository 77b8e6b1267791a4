"""Shadows in idle time: mirrors computed again, exactly, while nobody waits for an answer."""

import time

from tokendance.engine.engine import Engine
from tokendance.engine.request import Request
from tokendance.engine.shadow import Shadow, compare, exact_request
from tokendance.server.metrics import Metrics

# An engine that has had nothing to do for so long will hardly be asked in the next moment; who
# asks then waits for a forward pass of the shadow to end.
_IDLE_S = 1.0


class IdleShadows:
    """Runs one shadow after the other while there is nothing else to do.

    All methods are called on the engine's thread.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        """Take shadows from an engine."""
        self._engine = engine
        self._metrics = metrics
        self._running: tuple[Shadow, Request] | None = None
        self._idle_since_s = time.perf_counter()

    def due_s(self) -> float | None:
        """When there is something to do if nothing else comes; None if there is nothing."""
        if self._running is not None:
            _, request = self._running
            return None if request.finish_reason is None else 0.0
        if not self._engine.shadows.pending:
            return None
        return self._idle_since_s + _IDLE_S

    def give_way(self) -> None:
        """Make room for requests: what runs begins anew later."""
        self._idle_since_s = time.perf_counter()
        if self._running is not None:
            shadow, request = self._running
            self._running = None
            self._engine.abort(request)
            self._engine.pop_round(request.round_id)
            self._engine.shadows.pending.append(shadow)

    def go_on(self) -> None:
        """Begin one if it is time, and report one that is done."""
        if self._running is None:
            due_s = self.due_s()
            if due_s is None or time.perf_counter() < due_s:
                return
            shadow = self._engine.shadows.pending.pop()
            request = exact_request(shadow, self._engine.new_round_id())
            self._running = shadow, request
            self._engine.add([request])
            return
        shadow, request = self._running
        if request.finish_reason is None:
            return
        self._running = None
        self._engine.pop_round(request.round_id)
        if request.error is None:
            self._metrics.note_shadow(compare(shadow, tuple(request.logprobs)))
