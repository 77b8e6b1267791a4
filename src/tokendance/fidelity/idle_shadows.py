"""Shadows in idle time: mirrors computed again, exactly, while nobody waits for an answer."""

import math
from collections.abc import Callable, Iterable

from tokendance.engine.loop import EngineLoop
from tokendance.engine.request import Request
from tokendance.fidelity.shadow import ShadowReport, Shadows

# An engine that has had nothing to do for so long will hardly be asked in the next moment; who
# asks then waits for a forward pass of the shadow to end.
IDLE_S = 1.0


class IdleShadows:
    """Runs one shadow after the other while there is nothing else to do.

    It hangs on the engine's loop; all methods are called on its thread.
    """

    def __init__(
        self, shadows: Shadows, engine: EngineLoop, on_report: Callable[[ShadowReport], None]
    ) -> None:
        """Compute `shadows` by `engine`, and tell `on_report` how far each mirror was."""
        self._shadows = shadows
        self._engine = engine
        self._on_report = on_report
        self._running: Request | None = None
        self._idle_since_s = -math.inf
        self._is_closed = False

    def after_step(self, now: float, requests: Iterable[Request]) -> None:
        """Report a shadow that is done; give way to others, or begin the next if it is time.

        A shadow's own request may be among `requests`, which are or were under way.
        """
        is_busy = any(request is not self._running for request in requests)
        running = self._running
        if running is not None and running.finish_reason is not None:
            self._running = None
            report = self._shadows.finish(running)
            if report is not None:
                self._on_report(report)
        if is_busy:
            self.give_way(now)
            return
        due_s = self.due_s()
        if due_s is not None and due_s <= now:
            self._running = self._shadows.next_request(self._engine.new_round_id())
            assert self._running is not None, "one is due, and none waits"
            self._engine.add([self._running])

    def due_s(self) -> float | None:
        """Clock time at which a shadow begins if nothing else comes; None if none waits."""
        if self._running is not None or self._is_closed or not self._shadows.num_pending:
            return None
        return self._idle_since_s + IDLE_S

    def give_way(self, now: float) -> None:
        """Make room for requests that come at a clock time: what runs begins anew later."""
        self._idle_since_s = now
        if self._running is not None:
            self._shadows.put_back(self._running)
            self._engine.abort(self._running)
            self._running = None

    def close(self) -> None:
        """Give way for good."""
        self.give_way(self._idle_since_s)
        self._is_closed = True
