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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from tokendance.bench.arms import answer_params, load, make_engines, pool_of
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult, in_turn, ratio, spread
from tokendance.bench.suites.storage import TASK
from tokendance.bench.workload import read_people
from tokendance.conversation import Agent
from tokendance.disk.kv_file import WrittenFile, read_rows, write_rows
from tokendance.llm import LLM
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Prompt
from tokendance.rounds.segments import PrefixHashes, TokenIds
from tokendance.rounds.trace import TraceAgent
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


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """One agent's cache: its tokens, and where their KV lies in the engine that made it."""

    token_ids: TokenIds
    slots: npt.NDArray[np.int32]


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
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tokendance-") as folder:
        llm.open_store(Path(folder) / "store")
        with console.status("The town talks ..."):
            caches, last = _talk(llm, people, rounds, max_tokens, settings.seed)
        total = sum(len(one.token_ids) for one in caches)
        bench = _Bench(llm, dense, caches, last, Path(folder) / "dense")
        with console.status("Dense caches are written ..."):
            bench.write_dense()
        for source, kinds in (
            ("memory", {"in place": bench.in_place, "fused": bench.fused, "dense": bench.dense}),
            (
                "disk",
                {
                    "in place": bench.in_place_from_disk,
                    "dense": bench.dense_from_disk,
                    "again": bench.compute_session_again,
                },
            ),
            (_NEXT_ROUND, {"in place": bench.go_on, "again": bench.compute_again}),
        ):
            found = in_turn(kinds, settings.repeats)
            for how, seconds in found.items():
                row = {"from": source, "how": how, "agents": len(people), "tokens": total}
                row |= {"mib": bench.read_mib.get((source, how)), **spread(seconds)}
                row["times"] = ratio(seconds, found["in place"])
                rows.append(row)
                table.add(row)
        llm.close()
    times = {(row["from"], row["how"]): row["times"] for row in rows}
    headline: dict[str, float | None] = {
        "speedup_vs_dense_restore": times["memory", "dense"],
        "speedup_vs_fused_restore": times["memory", "fused"],
        "speedup_vs_dense_from_disk": times["disk", "dense"],
        "speedup_vs_computing_again": times["disk", "again"],
        "next_round_vs_computing_again": times[_NEXT_ROUND, "again"],
    }
    notes = ["A tiny run: the figures mean nothing."] if settings.tiny else []
    notes.append("Files are dropped from the system's cache before they are read.")
    return SuiteResult("restore", settings.model, rows, headline, notes)


def _talk(
    llm: LLM, people: Sequence[TraceAgent], rounds: int, max_tokens: int, seed: int
) -> tuple[list[_Stored], list[Prompt]]:
    """Let them talk; return what each has read and said, and the prompts of the last round."""
    session = llm.session("town", [Agent(one.name, one.system) for one in people])
    params = {
        one.name: SamplingParams(max_tokens=max_tokens, temperature=0.7, seed=seed + index)
        for index, one in enumerate(people)
    }
    for _ in range(rounds):
        prompts = session.ask(TASK, params).prompts
        result = session.run(TASK, params)
        result.raise_for_errors()
    caches = []
    for output in result.outputs:
        said = np.array(output.token_ids, np.int32)
        tokens = np.concatenate([output.prompt_token_ids, said])
        slots = llm.kv_store.match_slots(PrefixHashes(tokens, llm.encoder.salt))
        assert len(tokens) - len(slots) <= 1, "the store has lost a part of an agent's cache"
        # The last token is computed, as its logits are wanted.
        caches.append(_Stored(tokens[: len(slots) + 1], slots))
    return caches, prompts


class _Bench:
    """The town's caches, and every way to the next token.

    Attributes:
        read_mib: what was read, by source and way.
    """

    def __init__(
        self, llm: LLM, dense: LLM, caches: list[_Stored], last: list[Prompt], folder: Path
    ) -> None:
        self._llm, self._dense, self._caches, self._last = llm, dense, caches, last
        self._folder = folder
        self._files: list[WrittenFile] = []
        self._pool = pool_of(llm)
        self._positions = self._pool.slot_position.copy()
        self.read_mib: dict[tuple[str, str], float] = {}

    # -- from memory --------------------------------------------------------------------------

    def in_place(self) -> float:
        """Decode at once."""
        return _seconds(partial(_next_tokens, self._llm, self._caches))

    def dense(self) -> float:
        """Make a dense cache for each agent, then write it into the engine."""

        def work() -> None:
            with _published(self._dense, self._caches) as taken:
                for one, slots in zip(self._caches, taken, strict=True):
                    self._dense.executor.write_kv(slots, self._make_dense(one))
            _next_tokens(self._dense, self._caches)

        return self._apart(work)

    def fused(self) -> float:
        """Write each agent's cache into the engine, a layer at a time."""

        def work() -> None:
            source, target = self._pool, pool_of(self._dense)
            with _published(self._dense, self._caches) as taken:
                for one, slots in zip(self._caches, taken, strict=True):
                    old = torch.from_numpy(one.slots.astype(np.int64))
                    new = torch.from_numpy(slots.astype(np.int64))
                    target.slot_position[slots] = np.arange(len(slots))
                    offsets = np.arange(len(one.slots)) - self._positions[one.slots]
                    for layer, kind in enumerate(self._llm.model.layers):
                        tables = kind.rope.tables(offsets, source.keys.device)
                        keys = kind.rope.rotate(source.keys[layer].index_select(1, old), tables)
                        target.keys[layer].index_copy_(1, new, keys)
                        values = source.values[layer].index_select(1, old)
                        target.values[layer].index_copy_(1, new, values)
            _next_tokens(self._dense, self._caches)

        return self._apart(work)

    def _apart(self, work: Callable[[], None]) -> float:
        """Time something on the dense engine, which begins and ends empty."""
        self._dense.engine.forget()
        seconds = _seconds(work)
        self._dense.engine.forget()
        return seconds

    def _make_dense(self, one: _Stored) -> KVRows:
        """A whole dense cache, its keys rotated to the agent's positions."""
        positions = np.arange(len(one.slots), dtype=np.int32)
        rows = replace(self._llm.executor.read_kv(one.slots), positions=positions)
        offsets = positions - self._positions[one.slots]
        dtype = self._llm.model.dtype
        for layer, kind in enumerate(self._llm.model.layers):
            keys = torch.from_numpy(rows.keys[layer]).view(dtype)
            tables = kind.rope.tables(offsets, keys.device)
            keys.copy_(kind.rope.rotate(keys, tables))
        return rows

    # -- from disk ----------------------------------------------------------------------------

    def write_dense(self) -> None:
        """Write a dense cache for each agent."""
        self._folder.mkdir()
        self._files = [write_rows(self._folder, self._make_dense(one)) for one in self._caches]
        self.read_mib["disk", "dense"] = sum(file.num_bytes for file in self._files) / 2**20

    def dense_from_disk(self) -> float:
        """Read a dense cache for each agent."""
        _drop_from_cache(self._folder)

        def work() -> None:
            with _published(self._dense, self._caches) as taken:
                for file, slots in zip(self._files, taken, strict=True):
                    self._dense.executor.write_kv(slots, read_rows(self._folder, file))
            _next_tokens(self._dense, self._caches)

        return self._apart(work)

    def in_place_from_disk(self) -> float:
        """Read what is stored of the session."""
        self._forget()

        def work() -> None:
            self._read_session("disk")
            _next_tokens(self._llm, self._caches)

        return _seconds(work)

    def compute_session_again(self) -> float:
        """Compute what is stored, but for the last answers."""
        self._forget()
        return _seconds(
            lambda: self._llm.run_round(self._last, answer_params(1)).raise_for_errors()
        )

    def _forget(self) -> None:
        """As after a restart: nothing in memory, and no file in the system's cache."""
        assert self._llm.tiers is not None
        self._llm.engine.forget()
        _drop_from_cache(self._llm.tiers.disk.folder / "kv")

    def _read_session(self, source: str) -> Session:
        session = self._llm.session("town")
        restored = session.restore(always=True)
        assert restored is not None
        assert restored.computed == 0, restored
        self.read_mib[source, "in place"] = restored.num_bytes / 2**20
        return session

    # -- the next round -----------------------------------------------------------------------

    def go_on(self) -> float:
        """Read the session, and compute the next round's first tokens."""
        self._forget()
        return _seconds(lambda: self._next_round(self._read_session(_NEXT_ROUND)))

    def compute_again(self) -> float:
        """Compute the next round's first tokens from nothing."""
        self._forget()
        return _seconds(lambda: self._next_round(self._llm.session("town")))

    def _next_round(self, session: Session) -> None:
        asked = session.ask(TASK, answer_params(1))
        self._llm.run_round(asked.prompts, asked.params).raise_for_errors()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _next_tokens(llm: LLM, caches: Sequence[_Stored]) -> None:
    """Compute one token for each agent; all that comes before its last must be there."""
    prompts = [Prompt(one.token_ids.tolist(), agent=str(n)) for n, one in enumerate(caches)]
    result = llm.run_round(prompts, answer_params(1))
    result.raise_for_errors()
    assert result.stats.computed_tokens == len(caches), result.stats


@contextmanager
def _published(llm: LLM, caches: Sequence[_Stored]) -> Iterator[list[npt.NDArray[np.int32]]]:
    """Take slots for a dense cache of each agent; at the end they are published as computed."""
    store = llm.kv_store
    sizes = [len(one.slots) for one in caches]
    assert store.make_room(store.num_pages(sizes)), "the engine is too small"
    taken, pages = store.take_slots(sizes)
    yield taken
    for one, slots in zip(caches, taken, strict=True):
        store.slot_ready[slots] = True
        store.publish_prefix(PrefixHashes(one.token_ids, llm.encoder.salt), slots, len(slots))
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
    bars: dict[str, dict[str, float]] = {}
    for row in result.rows:
        bars.setdefault(row["how"], {})[row["from"]] = round(row["median"], 2)
    draw_bars(path, bars, title=f"To the first token, {result.model}", y_label="seconds")
