"""Figures of rounds, from what the engine tells."""

from dataclasses import dataclass, field

from tokendance.engine.events import Event, Finished, StepDone
from tokendance.outputs import KVBytes, RoundStats
from tokendance.store.entries import RoundId


@dataclass(slots=True)
class _Watched:
    """A round that somebody wants figures of.

    Attributes:
        started_s: clock time at which it was added.
        finished: its requests that are done.
        resident_pages: most pages that its requests held at one time.
    """

    started_s: float
    finished: list[Finished] = field(default_factory=list)
    resident_pages: int = 0


class RoundFigures:
    """An observer that adds up the rounds that it is asked to watch."""

    def __init__(self, kv_bytes_per_token: int, page_bytes: int) -> None:
        """Turn tokens and pages into bytes."""
        self._kv_bytes_per_token = kv_bytes_per_token
        self._page_bytes = page_bytes
        self._watched: dict[RoundId, _Watched] = {}

    def watch(self, round_id: RoundId, now: float) -> None:
        """Add up a round that begins now."""
        self._watched[round_id] = _Watched(now)

    def on_event(self, event: Event) -> None:
        """See `EngineObserver`."""
        if isinstance(event, StepDone):
            for round_id in self._watched.keys() & event.resident_pages.keys():
                watched = self._watched[round_id]
                pages = event.resident_pages[round_id]
                watched.resident_pages = max(watched.resident_pages, pages)
        elif isinstance(event, Finished) and event.round_id in self._watched:
            self._watched[event.round_id].finished.append(event)

    def take(self, round_id: RoundId) -> RoundStats:
        """Hand over the figures of a round whose requests are all done, and forget it."""
        watched = self._watched.pop(round_id)
        sound = [event for event in watched.finished if event.output.error is None]
        answered = [event for event in sound if not event.silent]
        outputs = [event.output for event in answered]
        first_tokens = [e.first_token_s for e in answered if e.first_token_s is not None]
        first_s = max(first_tokens, default=watched.started_s)
        last_s = max((event.time_s for event in answered), default=first_s)
        num_tokens = sum(output.prompt_tokens + len(output.token_ids) for output in outputs)
        return RoundStats(
            agents=len(outputs),
            prompt_tokens=sum(output.prompt_tokens for output in outputs),
            computed_tokens=sum(event.output.computed_tokens for event in sound),
            reused_tokens=sum(output.reused_tokens for output in outputs),
            corrected_tokens=sum(output.corrected_tokens for output in outputs),
            generated_tokens=sum(len(output.token_ids) for output in outputs),
            prefill_s=first_s - watched.started_s,
            decode_s=last_s - first_s,
            kv_bytes=KVBytes(
                dense=num_tokens * self._kv_bytes_per_token,
                resident=watched.resident_pages * self._page_bytes,
            ),
            dropped_tokens=sum(output.dropped_tokens for output in outputs),
        )

    def forget(self, round_id: RoundId) -> None:
        """Forget a round that nobody waits for any more."""
        self._watched.pop(round_id, None)
