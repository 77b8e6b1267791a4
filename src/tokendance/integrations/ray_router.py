"""A request router for Ray Serve that keeps rounds whole: requests of one session, one replica.

    RequestRouterConfig(
        request_router_class="tokendance.integrations.ray_router.RoundRouter",
        request_router_kwargs={"overload": 1.5},
    )

The session is the header X-Session-ID, which Ray reads by itself, or what the caller gives to
`handle.options(session_id=...)`. A request without one goes to whoever has least to do: what it
belongs to is not known. The keywords are those of `Placement`; docs/scale.md has the rest.
"""

import random
import time
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from tokendance.integrations.placement import Placement


class RoundRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Sends all requests of a session to one replica, and sessions evenly to all."""

    def initialize_state(self, **settings: Any) -> None:
        """Take the settings of `Placement`; called by Ray."""
        self._placement = Placement(**settings)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The one replica that a request may go to; if it is full, the request waits for it."""
        if not candidate_replicas:
            return []
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        known = {
            name: self.replica_queue_len_cache.get(replica.replica_id)
            for name, replica in replicas.items()
        }
        loads = {name: load or 0 for name, load in known.items()}
        session = pending_request.metadata.session_id if pending_request is not None else ""
        if not session:
            return [[replicas[min(loads, key=lambda name: (loads[name], random.random()))]]]
        assert pending_request is not None
        pending_request.routing_context.should_backoff = True
        return [[replicas[self._placement.choose(session, loads, time.monotonic())]]]
