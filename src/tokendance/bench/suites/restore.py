"""`restore`: from a stored session to the first token of all its agents.

A town has talked for some rounds, and goes on. Timed is what it takes until every agent has its
next token, where what it has read and said is stored:

    in place    nothing is restored: attention reads what is shared where it lies
    fused       a dense cache for each agent is written into the engine's memory, layer by layer
                through one buffer, keys rotated on the way (TokenDance, "Fused Diff Restore")
    dense       whole dense caches are made first and written into the engine's memory then
    again       nothing was stored: the prompts are computed, with all reuse that there is

from memory, and from files that are not in the system's cache. The files of `dense` hold a dense
cache for each agent. The last pair is the whole next round up to its first tokens, after a restart,
with stored KV and without: what was said since is computed in both.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from tokendance.bench.arms import (
    TOWN_TASK,
    AgentCache,
    TownRound,
    agent_caches,
    answer_params,
    load,
    make_engines,
    pool_of,
    run_checked,
    talk,
)
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, in_turn, ratio, spread, timed
from tokendance.bench.workload import read_people
from tokendance.disk.kv_file import read_rows, write_rows
from tokendance.llm import LLM
from tokendance.rounds.prompts import Prompt
from tokendance.rounds.segments import PrefixHashes
from tokendance.session import Session
from tokendance.store.kv_rows import KVRows
from tokendance.store.pages import Holder

_COLUMNS = {
    "from": "from",
    "how": "how",
    "agents": "agents",
    "tokens": "tokens",
    "mib": "MiB read",
    "median": "seconds",
    "min": "min",
    "max": "max",
    "times": "x in place",
}
_NEXT_ROUND = "disk, next round"


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    agents, rounds, max_tokens = (3, 2, 8) if settings.tiny else (25, 4, 40)
    model = load(settings)
    people = read_people(settings.source)[:agents]
    longest = 1000 if settings.tiny else 600 + rounds * 60 * len(people)
    room = len(people) * longest
    engines = make_engines(model, settings.engine, ["collective", "prefix"], room)
    llm, dense = engines["collective"], engines["prefix"]
    table = LiveTable(console, "from a stored session to all first tokens, bfloat16", _COLUMNS)
    with tempfile.TemporaryDirectory(prefix="tokendance-") as folder:
        llm.open_store(Path(folder) / "store")
        with console.status("The town talks ..."):
            *_, last = talk(llm, people, rounds, max_tokens, settings.seed)
        with console.status("Dense caches are written ..."):
            bench = _Bench(llm, dense, last, Path(folder) / "dense")
        for source, ways in bench.ways().items():
            seconds = in_turn(ways, settings.repeats)
            for how, of_way in seconds.items():
                table.add(
                    {
                        "from": source,
                        "how": how,
                        "agents": len(people),
                        "tokens": bench.num_tokens,
                        "mib": bench.read_mib.get((source, how)),
                        **spread(of_way),
                        "times": ratio(of_way, seconds["in place"]),
                    }
                )
        llm.close()
    times = {(row["from"], row["how"]): row["times"] for row in table.rows}
    headline: dict[str, float | None] = {
        "speedup_vs_dense_restore": times["memory", "dense"],
        "speedup_vs_fused_restore": times["memory", "fused"],
        "speedup_vs_dense_from_disk": times["disk", "dense"],
        "speedup_vs_computing_again": times["disk", "again"],
        "next_round_vs_computing_again": times[_NEXT_ROUND, "again"],
    }
    notes = ["Files are dropped from the system's cache before they are read."]
    return SuiteResult("restore", settings.model, table.rows, headline, notes)


class _Bench:
    """The town's caches, and every way to the next token.

    Attributes:
        num_tokens: of all caches.
        read_mib: what was read, by source and way.
    """

    def __init__(self, llm: LLM, dense: LLM, last: TownRound, folder: Path) -> None:
        """Write a dense cache into `folder` for each agent of the town's last round."""
        self._llm, self._dense, self._last = llm, dense, last
        self._caches = agent_caches(llm, last.result)
        self._pool = pool_of(llm)
        self._positions = self._pool.slot_position.copy()
        self.num_tokens = sum(len(cache.token_ids) for cache in self._caches)
        folder.mkdir()
        self._folder = folder
        self._files = [write_rows(folder, self._make_dense(cache)) for cache in self._caches]
        num_bytes = sum(file.num_bytes for file in self._files)
        self.read_mib: dict[tuple[str, str], float] = {("disk", "dense"): num_bytes / 2**20}

    def ways(self) -> dict[str, dict[str, Callable[[], float]]]:
        """Every way by what it begins from: seconds until all have their next token."""
        return {
            "memory": {"in place": self._in_place, "fused": self._fused, "dense": self._copied},
            "disk": {
                "in place": self._in_place_from_disk,
                "dense": self._dense_from_disk,
                "again": self._compute_session_again,
            },
            _NEXT_ROUND: {"in place": self._go_on, "again": self._compute_again},
        }

    # -- from memory --------------------------------------------------------------------------

    def _in_place(self) -> float:
        """Decode at once."""
        return timed(lambda: _next_tokens(self._llm, self._caches))

    def _copied(self) -> float:
        """Make a dense cache for each agent, then write it into the engine."""
        return self._fill_dense(
            lambda index, slots: self._dense.executor.write_kv(
                slots, self._make_dense(self._caches[index])
            )
        )

    def _fused(self) -> float:
        """Write each agent's cache into the engine, a layer at a time."""
        source, target = self._pool, pool_of(self._dense)

        def fill(index: int, slots: npt.NDArray[np.int32]) -> None:
            cached = self._caches[index].slots
            old = torch.from_numpy(cached.astype(np.int64))
            new = torch.from_numpy(slots.astype(np.int64))
            target.slot_position[slots] = np.arange(len(slots))
            offsets = np.arange(len(cached)) - self._positions[cached]
            for layer, kind in enumerate(self._llm.model.layers):
                tables = kind.rope.tables(offsets, source.keys.device)
                keys = kind.rope.rotate(source.keys[layer].index_select(1, old), tables)
                target.keys[layer].index_copy_(1, new, keys)
                target.values[layer].index_copy_(1, new, source.values[layer].index_select(1, old))

        return self._fill_dense(fill)

    def _fill_dense(self, fill: Callable[[int, npt.NDArray[np.int32]], None]) -> float:
        """Time the dense engine, which begins and ends empty.

        `fill` writes the cache of an agent, by its index, into slots.
        """

        def work() -> None:
            with _published(self._dense, self._caches) as taken:
                for index, slots in enumerate(taken):
                    fill(index, slots)
            _next_tokens(self._dense, self._caches)

        self._dense.engine.forget()
        seconds = timed(work)
        self._dense.engine.forget()
        return seconds

    def _make_dense(self, cache: AgentCache) -> KVRows:
        """A whole dense cache, its keys rotated to the agent's positions."""
        positions = np.arange(len(cache.slots), dtype=np.int32)
        rows = replace(self._llm.executor.read_kv(cache.slots), positions=positions)
        offsets = positions - self._positions[cache.slots]
        dtype = self._llm.model.dtype
        for layer, kind in enumerate(self._llm.model.layers):
            keys = torch.from_numpy(rows.keys[layer]).view(dtype)
            tables = kind.rope.tables(offsets, keys.device)
            keys.copy_(kind.rope.rotate(keys, tables))
        return rows

    # -- from disk ----------------------------------------------------------------------------

    def _dense_from_disk(self) -> float:
        """Read a dense cache for each agent."""
        _drop_from_cache(self._folder)
        return self._fill_dense(
            lambda index, slots: self._dense.executor.write_kv(
                slots, read_rows(self._folder, self._files[index])
            )
        )

    def _in_place_from_disk(self) -> float:
        """Read what is stored of the session."""
        self._forget()

        def work() -> None:
            self._read_session("disk")
            _next_tokens(self._llm, self._caches)

        return timed(work)

    def _compute_session_again(self) -> float:
        """Compute what is stored, but for the last answers."""
        self._forget()
        return timed(lambda: run_checked(self._llm, self._last.prompts, 1))

    def _forget(self) -> None:
        """As after a restart: nothing in memory, and no file in the system's cache."""
        assert self._llm.tier is not None
        self._llm.engine.forget()
        _drop_from_cache(self._llm.tier.disk.folder / "kv")

    def _read_session(self, source: str) -> Session:
        session = self._llm.session("town")
        restored = session.restore(always=True)
        assert restored is not None
        assert restored.computed == 0, restored
        self.read_mib[source, "in place"] = restored.num_bytes / 2**20
        return session

    # -- the next round -----------------------------------------------------------------------

    def _go_on(self) -> float:
        """Read the session, and compute the next round's first tokens."""
        self._forget()
        return timed(lambda: self._next_round(self._read_session(_NEXT_ROUND)))

    def _compute_again(self) -> float:
        """Compute the next round's first tokens from nothing."""
        self._forget()
        return timed(lambda: self._next_round(self._llm.session("town")))

    def _next_round(self, session: Session) -> None:
        run_checked(self._llm, session.ask(TOWN_TASK, answer_params(1)).prompts, 1)


def _next_tokens(llm: LLM, caches: Sequence[AgentCache]) -> None:
    """Compute one token for each agent; all that comes before its last must be there."""
    prompts = [
        Prompt(cache.token_ids.tolist(), agent=str(index)) for index, cache in enumerate(caches)
    ]
    stats = run_checked(llm, prompts, 1).stats
    assert stats.computed_tokens == len(caches), stats


@contextmanager
def _published(llm: LLM, caches: Sequence[AgentCache]) -> Iterator[list[npt.NDArray[np.int32]]]:
    """Take slots for a dense cache of each agent; at the end they are published as computed."""
    store = llm.kv_store
    sizes = [len(cache.slots) for cache in caches]
    assert store.make_room(store.num_pages(sizes)), "the engine is too small"
    taken, pages = store.take_slots(sizes)
    yield taken
    for cache, slots in zip(caches, taken, strict=True):
        store.slot_ready[slots] = True
        store.publish_prefix(PrefixHashes(cache.token_ids, llm.encoder.salt), slots, len(slots))
    store.pool.release(pages, Holder.REQUEST)


def _drop_from_cache(folder: Path) -> None:
    """Make the system forget what it has read of a folder's files, where it can."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds by way, a group of bars for each source."""
    title = f"To the first token, {result.model}"
    draw_bars(path, result.rows, "how", "from", "median", title=title, y_label="seconds")
