"""KV of rounds that are under way, written in the background while they decode.

A prompt's KV does not change once it is computed, so most of what a round leaves can be on disk
before it ends, and its answers soon after. Such files have no name in the index until the session
is saved: if that does not happen they are removed, by this process or by the next that opens the
store.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokendance.disk.kv_file import WrittenFile, file_bytes
from tokendance.disk.records import FileId, SessionKey
from tokendance.engine.request import Request
from tokendance.errors import StoreError
from tokendance.rounds.segments import PrefixHashes
from tokendance.store.entries import RoundId, Slots
from tokendance.store.kv_store import KVStore
from tokendance.tier.caches import SpokenCache
from tokendance.tier.levels import Levels, Written

log = logging.getLogger("tokendance.store")

# Files that are being written at one time: each holds a copy of its rows.
_MAX_UNDER_WAY = 2
# Longer than the time between a round's last token and its save.
_ABANDONED_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Slots whose rows make a file, and the stamps that they had."""

    slots: Slots
    stamps: npt.NDArray[np.int64]

    def is_unchanged(self, store: KVStore) -> bool:
        return bool((store.slot_stamp[self.slots] == self.stamps).all())


@dataclass(slots=True)
class _Round:
    """What of a round is written in the background."""

    round_id: RoundId
    seen_s: float  # when a request of it was last seen
    left: list[_Group]  # that are not being written yet
    begun: list[tuple[_Group, Written]] = field(default_factory=list)
    num_bytes: int = 0  # at most, of what is begun
    making_room: Future[bool] | None = None  # before any of it is written
    is_awaited: bool = False  # by somebody who saves the session when all of it is written


class BackgroundWriter:
    """Writes files on another thread; all methods are called on the engine's."""

    def __init__(self, levels: Levels) -> None:
        self._levels = levels
        self._rounds: dict[SessionKey, _Round] = {}

    @property
    def num_bytes(self) -> int:
        """Most bytes of files that have no name yet."""
        return sum(round_.num_bytes for round_ in self._rounds.values())

    def due_s(self) -> float | None:
        """When `after_step` has something to remove if nothing else happens; None for never."""
        seen_s = [round_.seen_s for round_ in self._rounds.values() if not round_.is_awaited]
        return min(seen_s) + _ABANDONED_S if seen_s else None

    def after_step(self, now: float, requests: Collection[Request]) -> None:
        """Begin to write the next file of each round all of which decodes; see `DiskTier`."""
        rounds: dict[SessionKey, list[Request]] = {}
        for request in requests:
            if request.session is not None:
                rounds.setdefault(request.session, []).append(request)
        self._drop_abandoned(now, rounds)
        if self._levels.turn.is_taken:
            return  # whoever is saved has been promised the room
        for key, together in rounds.items():
            if not all(request.is_decoding or request.finish_reason for request in together):
                continue
            round_id = together[0].round_id
            try:
                if key not in self._rounds or self._rounds[key].round_id != round_id:
                    self._begin(now, key, together)
                self._add_answers(key, together)
                self._write_next(key)
            except StoreError as error:  # the round goes on, and whoever saves it is told
                log.warning("KV cannot be written in the background: %s", error)
                self._drop(key)
                self._rounds[key] = _Round(round_id, now, [])

    def _drop_abandoned(self, now: float, seen: Mapping[SessionKey, object]) -> None:
        """Remove what rounds have left that are over and were not saved."""
        for key, round_ in list(self._rounds.items()):
            if key in seen:
                round_.seen_s = now
            elif now - round_.seen_s >= _ABANDONED_S and not round_.is_awaited:
                self._drop(key)

    def _begin(self, now: float, key: SessionKey, together: Sequence[Request]) -> None:
        """Plan the files of a round, and make room for them."""
        self._drop(key)
        self._rounds[key] = _Round(together[0].round_id, now, [])
        prompts = [request.prompt for request in together if request.error is None]
        self._add(key, [prompt.prefix_hashes for prompt in prompts])

    def _add_answers(self, key: SessionKey, together: Sequence[Request]) -> None:
        """Plan files of the answers that have just ended."""
        ended = [request for request in together if request.finish_reason and not request.error]
        spoken = [SpokenCache.of(one.prompt.token_ids, one.generated) for one in ended]
        self._add(
            key,
            [
                PrefixHashes(cache.token_ids, request.prompt.salt)
                for cache, request in zip(spoken, ended, strict=True)
            ],
        )

    def _add(self, key: SessionKey, texts: Sequence[PrefixHashes]) -> None:
        """Plan files of what is not on disk of some texts, nor planned, and make room for them."""
        if not texts:
            return
        levels, stamps, round_ = self._levels, self._levels.store.slot_stamp, self._rounds[key]
        is_planned = np.zeros(levels.store.num_slots, np.bool_)
        for group in (*round_.left, *(group for group, _ in round_.begun)):
            if group.is_unchanged(levels.store):
                is_planned[group.slots] = True
        caches = [levels.match_computed(text)[1] for text in texts]
        for slots in levels.unwritten([cache[~is_planned[cache]] for cache in caches], (), ()):
            round_.left.append(_Group(slots, stamps[slots]))
        num_bytes = sum(len(group.slots) for group in round_.left) * levels.row_bytes
        num_bytes += self.num_bytes
        if levels.disk.num_bytes + num_bytes > levels.disk.budget:
            round_.making_room = levels.threads.index.submit(levels.disk.make_room, num_bytes, key)

    def _write_next(self, key: SessionKey) -> None:
        """Begin to write the next group of a session's round, if the thread is free for it."""
        if not self._has_made_room(self._rounds[key]):
            return
        jobs = [job for round_ in self._rounds.values() for _, job in round_.begun]
        if sum(not job.done() for job in jobs) >= _MAX_UNDER_WAY:
            return
        levels, round_ = self._levels, self._rounds[key]
        while round_.left and not round_.left[0].is_unchanged(levels.store):
            del round_.left[0]
        if not round_.left:
            return
        slots = round_.left[0].slots
        room = levels.disk.budget - levels.disk.num_bytes - self.num_bytes
        fits = len(slots) * levels.row_bytes <= room
        rows = levels.memory.read_kv(slots) if fits else None
        if rows is None or file_bytes(rows) > room:
            round_.left.clear()  # what is begun may still be collected
            return
        job = levels.threads.writer.submit(levels.disk.write, rows)
        round_.begun.append((round_.left.pop(0), job))
        round_.num_bytes += file_bytes(rows)

    def _has_made_room(self, round_: _Round) -> bool:
        """Whether others' KV has given way, as far as it can; raise why it could not."""
        if (job := round_.making_room) is None:
            return True
        if job.done():
            round_.making_room = None
            job.result()
        return job.done()

    def go_on(self, key: SessionKey) -> bool:
        """See `DiskTier.go_on_writing`."""
        if (round_ := self._rounds.get(key)) is None:
            return False
        round_.is_awaited = True
        if self._levels.turn.is_taken:
            return True
        try:
            self._write_next(key)
        except StoreError:  # whoever saves the session is told
            round_.left.clear()
        return bool(round_.left) or not all(job.done() for _, job in round_.begun)

    def collect(self, key: SessionKey) -> list[tuple[FileId, WrittenFile, Slots]]:
        """Hand over what a session's round has written, with the slots that still hold it.

        What could not be written, or was not begun yet, is left to whoever saves the session.
        """
        if key not in self._rounds:
            return []
        begun = [(group, job) for group, job in self._rounds[key].begun if not job.cancel()]
        wait([job for _, job in begun])
        del self._rounds[key]
        collected: list[tuple[FileId, WrittenFile, Slots]] = []
        for group, job in begun:
            if (error := job.exception()) is not None:
                log.warning("KV could not be written in the background: %s", error)
                continue
            file, written = job.result()
            if group.is_unchanged(self._levels.store):
                collected.append((file, written, group.slots))
            else:
                self._levels.disk.discard([written])
        return collected

    def give_up(self, key: SessionKey) -> None:
        """Wait for what a session's round is writing, and remove it."""
        self._levels.disk.discard([written for _, written, _ in self.collect(key)])

    def _drop(self, key: SessionKey) -> None:
        """Remove what a session's round has written; what is being written, when it is there."""
        if key in self._rounds:
            for _, job in self._rounds.pop(key).begun:
                self._levels.discard_written(job)

    def close(self) -> None:
        """Remove what nobody has collected."""
        for key in list(self._rounds):
            self._drop(key)
