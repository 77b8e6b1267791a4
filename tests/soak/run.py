"""The server of a soak, what is measured of it meanwhile, and what has to be true at the end."""

import ctypes
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from rich.console import Console
from rich.table import Table

from serving import comes_true, held_by, listening
from soak.load import Target
from tiny_models import save_model
from tokendance import LLM
from tokendance.engine.events import Event, StepDone
from tokendance.executor.torch_executor import TorchExecutor
from tokendance.models.loader import load_model
from tokendance.options import EngineOptions
from tokendance.server.context import ServerContext
from tokendance.server.malloc import objects_frozen
from tokendance.server.pauses import Pauses

_CONTEXT = 1024
_NUM_PAGES = 2000
_DISK_BYTES = 64 * 2**20
_KEYS = ["one", "two", "three"]
_LOITERER, _CANARY = "loiterer", "canary"
_SETTINGS: dict[str, Any] = {
    "api_keys": (*_KEYS, _LOITERER, _CANARY),
    "max_body": 200_000,
    "max_messages": 200,
    # Fewer than a burst: there have to be some who are told to come back.
    "max_open_requests": 96,
    "default_max_tokens": 16,
    # Fewer than the largest crowd.
    "max_connections": 600,
    "head_timeout": 5.0,
    "body_timeout": 10.0,
    "send_timeout": 10.0,
    "idle_timeout": 5.0,
}

# Memory is flat if a straight line through its last two thirds gains less than this in MiB. What
# is in use goes up and down with the requests that are under way; a hundred bytes left behind by
# each request of ten minutes would be more. What is resident grows a little on its own, since
# memory that was freed lies between pieces that are in use. Shorter runs have hardly warmed up.
_MOST_GROWTH = {"resident": 32.0, "in use": 8.0}
_SHORTEST_S = 240.0
# Most that a small request of another key may take, beside the pass that is under way.
_CANARY_S = 2.0
# Most that the engine's thread or the event loop may compute in one pause. What else a pause takes,
# which is shown beside it, it waits for the processor and the interpreter's lock, which the clients
# and all else on this machine want, too.
_COMPUTING_S = 0.05
# Pools of threads that grow to a limit when there is much to do.
_POOLS = ("AnyIO", "discovery", "store")


@dataclass(slots=True)
class Watch:
    """What was seen of the server's process while it worked.

    Attributes:
        seconds: of each look at the memory, since the first clients came.
        memory: MiB, of each kind.
        problems: what was not as it has to be.
        pauses: seconds of the longest of each kind, and the most that its thread computed in one.
    """

    seconds: list[float] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    pauses: dict[str, tuple[float, float]] = field(default_factory=dict)
    longest_pass_s: float = 0.0

    def on_event(self, event: Event) -> None:
        """Note the longest pass."""
        if isinstance(event, StepDone):
            self.longest_pass_s = max(self.longest_pass_s, event.seconds)

    def note_pause(self, who: str, seconds: float, computing_s: float) -> None:
        """Note a pause of the calling thread that has just ended."""
        longest, most = self.pauses.get(who, (0.0, 0.0))
        self.pauses[who] = max(longest, seconds), max(most, computing_s)

    def look(self, seconds: float, remembered_mib: float) -> None:
        """Look at the memory, but for so much that is remembered and has a bound of its own."""
        self.seconds.append(seconds)
        for kind, mib in _memory_mib().items():
            self.memory.setdefault(kind, []).append(mib - remembered_mib)

    def growth(self, kind: str) -> float:
        """MiB that a line through the last two thirds gains.

        Its slope is the median of those between any two points, so that it shows what stays and not
        a large request that happened to be under way.
        """
        third = len(self.seconds) // 3
        seconds, mib = np.array(self.seconds[third:]), np.array(self.memory[kind][third:])
        one, other = np.triu_indices(len(seconds), 1)
        if len(one) == 0:
            return 0.0
        slopes = (mib[other] - mib[one]) / (seconds[other] - seconds[one])
        return float(np.median(slopes) * (seconds[-1] - seconds[0]))


def soak(seconds: float, seed: int, console: Console) -> list[str]:
    """Serve a tiny model to clients of all kinds for some time; return what went wrong."""
    watch = Watch()
    with (
        _llm() as llm,
        listening(llm, **_SETTINGS) as (port, server, runner),
        objects_frozen(),  # the application's, too, as `tokendance serve` has them
        _errors_noted(watch),
    ):
        # Memory for KV is mapped where it is first written, which would look like growth.
        assert isinstance(llm.executor, TorchExecutor)
        llm.executor.pool.keys.zero_()
        llm.executor.pool.values.zero_()
        target = Target(
            port,
            _KEYS,
            _CANARY,
            _LOITERER,
            _SETTINGS["max_body"],
            _SETTINGS["max_messages"],
            _CONTEXT,
            _SETTINGS["max_connections"],
            {name: value for name, value in _SETTINGS.items() if name.endswith("_timeout")},
        )
        _run_clients(target, 1.0, seed, lambda _: None)  # what is made once is made now
        watch.problems += _leftovers(server, runner)
        before = _handles()
        begun = time.monotonic()
        llm.engine.observe(watch)

        def look(progress: dict[str, Any]) -> None:
            watch.look(time.monotonic() - begun, _remembered_mib(server))
            _check_books(server, watch)
            _show_progress(progress, watch, console)

        with _pauses_noted(server, watch):
            result = _run_clients(target, seconds, seed, look)
        watch.problems += result["problems"] + _leftovers(server, runner)
        watch.problems += _new_handles(server, before)
    if seconds >= _SHORTEST_S:
        if max(result["canary_s"]) > _CANARY_S + watch.longest_pass_s:
            watch.problems.append("a small request waited too long for others")
        for who, (_, computing_s) in watch.pauses.items():
            if computing_s > _COMPUTING_S:
                watch.problems.append(f"the {who}'s thread computed {computing_s:.3f} s in a pause")
        for kind in watch.memory:
            if watch.growth(kind) > _MOST_GROWTH[kind]:
                watch.problems.append(f"memory {kind} grew by {watch.growth(kind):.1f} MiB")
    _show(result, watch, console)
    return watch.problems


@contextmanager
def _llm() -> Iterator[LLM]:
    """A tiny model with all that a server can have: a store, and shadows."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), "llama", max_position_embeddings=_CONTEXT)
        model = load_model(folder, "float32")
        page_bytes = model.shape.kv_bytes_per_token(model.dtype) * 16
        options = EngineOptions(kv_budget=_NUM_PAGES * page_bytes, shadow=0.05)
        llm = LLM.from_loaded(model, options)
        llm.open_store(Path(folder) / "store", _DISK_BYTES)
        try:
            yield llm
        finally:
            llm.close()


def _run_clients(
    target: Target, seconds: float, seed: int, look: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Let the clients ask, in two processes of their own; return what they have counted."""
    results: list[dict[str, Any]] = []
    with _clients(target, seconds, seed, "--canary") as canary:
        next(canary)  # it knows what has to be answered
        with _clients(target, seconds, seed) as others:
            for document in (*others, *canary):
                if "progress" in document:
                    look(document["progress"])
                if "result" in document:
                    results.append(document["result"])
    if len(results) < 2:
        raise RuntimeError("Some clients have failed.")
    return {
        "answers": results[0]["answers"] | results[1]["answers"],
        "canary_s": results[1]["canary_s"],
        "problems": [problem for result in results for problem in result["problems"]],
        "num_problems": sum(result["num_problems"] for result in results),
        **{name: max(results, key=_slowest)[name] for name in ("slowest_s", "slowest")},
    }


def _slowest(result: dict[str, Any]) -> float:
    return float(result["slowest_s"])


@contextmanager
def _clients(
    target: Target, seconds: float, seed: int, *options: str
) -> Iterator[Iterator[dict[str, Any]]]:
    """A process of clients: the documents that it writes."""
    command = [sys.executable, "-m", "soak.load", "--target", json.dumps(asdict(target))]
    command += ["--seconds", str(seconds), "--seed", str(seed), *options]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as clients:
        assert clients.stdout is not None
        yield map(json.loads, clients.stdout)


# -- what has to be true ----------------------------------------------------------------------


def _check_books(server: ServerContext, watch: Watch) -> None:
    """Have the engine's thread compare all counts of pages between two steps."""

    def check() -> None:
        server.metrics.engine_watch.rest()  # this is nothing that a client has asked for
        try:
            server.llm.engine.check_integrity()
        except AssertionError as error:
            watch.problems.append(f"under load: {error}")
        server.metrics.engine_watch.wake()

    server.engine_thread._put(check)


@contextmanager
def _pauses_noted(server: ServerContext, watch: Watch) -> Iterator[None]:
    """Watch the threads that must not pause for long; the metrics tell of the last minute only."""
    metrics = server.metrics
    by_name = {"engine": metrics.engine_pauses, "event loop": metrics.event_loop_pauses}
    for who, pauses in by_name.items():
        _note_also(pauses, partial(watch.note_pause, who))
    try:
        yield
    finally:
        for pauses in by_name.values():
            del pauses.__dict__["note"]


def _note_also(pauses: Pauses, also: Callable[[float, float], None]) -> None:
    """Have something else told of pauses, too."""
    note = pauses.note

    def both(seconds: float, computing_s: float = 0.0) -> None:
        note(seconds, computing_s)
        also(seconds, computing_s)

    pauses.note = both  # type: ignore[method-assign]


def _leftovers(server: ServerContext, runner: uvicorn.Server) -> list[str]:
    """What is left of requests when nobody asks any more; nothing, after a moment."""
    engine, thread = server.llm.engine, server.engine_thread

    def found() -> dict[str, int]:
        return {
            "open requests": server.admission.num_open,
            "running requests": engine.status().num_running,
            "waiting requests": engine.status().num_waiting,
            **held_by(thread._dispatcher),
            "rounds": engine.status().num_rounds,
            "shadows": server.llm.shadows.num_pending,
            "pages held by requests": engine.status().resident_pages,
            "HTTP requests": len(runner.server_state.tasks),
            "connections": len(runner.server_state.connections),
        }

    comes_true(server, lambda: not any(found().values()))
    left = [f"left at the end: {count} {what}" for what, count in found().items() if count]
    if not thread.is_alive:
        return [*left, f"the engine has failed: {thread.failure!r}"]
    engine.check_integrity()
    return left


def _new_handles(server: ServerContext, before: dict[str, int]) -> list[str]:
    comes_true(server, lambda: all(count <= before[what] for what, count in _handles().items()))
    return [
        f"{count} {what} at the end, {before[what]} before"
        for what, count in _handles().items()
        if count > before[what]
    ]


def _handles() -> dict[str, int]:
    """Threads, but for those of pools; open files."""
    threads = [one for one in threading.enumerate() if not one.name.startswith(_POOLS)]
    folder = Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")
    return {"threads": len(threads), "open files": len(list(folder.iterdir()))}


@contextmanager
def _errors_noted(watch: Watch) -> Iterator[None]:
    """Whatever the server logs as an error is a problem."""

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            watch.problems.append(f"logged: {logging.Formatter().format(record)}")

    handler = Noting(logging.ERROR)
    loggers = [logging.getLogger(name) for name in (None, "uvicorn")]  # the latter keeps to itself
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _remembered_mib(server: ServerContext) -> float:
    """What discovery remembers: in ten minutes it fills up to its bound, for each tenant."""
    discoveries = server.engine_thread._dispatcher._discoveries
    return sum(discovery.num_bytes for discovery in discoveries) / 2**20


_COUNTS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _MallocInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _COUNTS.split()]


def _memory_mib() -> dict[str, float]:
    """Memory of this process that is resident, and that is allocated and not freed.

    Nothing where the system does not say it.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        read = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return {}
    read.restype = _MallocInfo
    info = read()
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "in use": (info.uordblks + info.hblkhd) / 2**20,
    }


# -- what is shown ----------------------------------------------------------------------------


def _show_progress(progress: dict[str, Any], watch: Watch, console: Console) -> None:
    counts = ", ".join(f"{how}: {count}" for how, count in sorted(progress["statuses"].items()))
    memory = "".join(f"{mib[-1]:6.1f} MiB {kind}, " for kind, mib in watch.memory.items())
    console.print(
        f"{progress['seconds']:5.0f} s  {memory}{counts}  problems: {progress['problems']}",
        highlight=False,
    )


def _show(result: dict[str, Any], watch: Watch, console: Console) -> None:
    answers: dict[str, dict[str, int]] = result["answers"]
    total = sum((Counter(counts) for counts in answers.values()), Counter[str]())
    columns = sorted(total)
    table = Table("kind", *columns, "all", title="Requests by kind and status")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, counts in [*sorted(answers.items()), ("all", total)]:
        shown = [str(counts.get(column, "")) for column in columns]
        table.add_row(kind, *shown, str(sum(counts.values())))
    console.print(table)
    console.print(f"The slowest answer took {result['slowest_s']:.2f} s: {result['slowest']}.")
    canary_s = result["canary_s"]
    console.print(
        f"A small request of another key took {np.median(canary_s):.2f} s, the slowest hundredth "
        f"{np.quantile(canary_s, 0.99):.2f} or more, {max(canary_s):.2f} at most; "
        f"the longest pass {watch.longest_pass_s:.2f} s."
    )
    for who, (pause_s, computing_s) in watch.pauses.items():
        console.print(
            f"Longest pause of the {who}: {1000 * pause_s:.0f} ms; "
            f"its thread computed for {1000 * computing_s:.0f} ms of one at most."
        )
    for kind, mib in watch.memory.items():
        third = max(1, len(mib) // 3)
        console.print(
            f"Memory {kind}: {np.mean(mib[:third]):.1f} MiB in the first third, "
            f"{np.mean(mib[-third:]):.1f} in the last; "
            f"a line through the last two gains {watch.growth(kind):.1f}."
        )
    if result["num_problems"] > len(result["problems"]):
        console.print(f"{result['num_problems']} problems of clients; the first:")
    for problem in watch.problems:
        console.print(f"PROBLEM {problem}", style="red", markup=False, highlight=False)
    if not watch.problems:
        console.print("No problems: all were answered, and nothing is left behind.")
