"""`storage`: bytes of KV per agent over rounds: stored between rounds, resident while they run.

A town talks for some rounds. After each the store is asked where it has each agent's prompt and
answer:

    dense       one full cache per agent, counted in tokens
    stored      distinct slots that these caches lie in
    resident    distinct pages that the agents held while they ran, room for answers included
    shared      the same counts over the tokens of shared segments alone
    mirror      slots that no other agent's cache has, of agents that reused a run; and of these,
                those that are tokens of shared segments

Slots are counted, not pages, but for `resident`. The small town's prompts and answers are replayed
in the other modes; the large one is a session that is stored on disk, whose files are counted.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from tokendance.bench.arms import (
    TownRound,
    agent_caches,
    forced_answers,
    load,
    make_engine,
    make_engines,
    talk,
)
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult
from tokendance.bench.workload import read_people
from tokendance.disk.records import SessionKey
from tokendance.llm import LLM
from tokendance.options import ReuseMode
from tokendance.params import SamplingParams

REPLAYED: tuple[ReuseMode, ...] = ("prefix", "pic-batched")
_COLUMNS = {
    "agents": "agents",
    "round": "round",
    "mode": "mode",
    "dense_mib": "dense MiB",
    "stored_mib": "stored",
    "resident_mib": "resident",
    "disk_mib": "on disk",
    "shared_mib": "of it shared: dense",
    "shared_stored_mib": "stored",
    "mirror_mib": "one mirror adds",
    "mirror_compression": "mirror x",
    "mirror_shared_compression": "its shared x",
    "shared_compression": "shared x",
    "stored_compression": "stored x",
    "resident_compression": "resident x",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module. The example town has 12 people in place of the 25."""
    # (people, rounds, tokens of an answer)
    small, large = ((3, 2, 8), (3, 2, 8)) if settings.tiny else ((10, 5, 64), (25, 8, 96))
    model = load(settings)
    people = read_people(settings.source)
    longest = 1000 if settings.tiny else model.shape.max_context
    table = LiveTable(console, "KV of agents over rounds, bfloat16", _COLUMNS)

    def add(llm: LLM, number: int, played: TownRound, disk_mib: float | None = None) -> None:
        row = {
            "agents": len(played.prompts),
            "round": number,
            "mode": llm.engine.options.reuse,
            **_measure(llm, played),
        }
        table.add(row | {"disk_mib": disk_mib})

    num_people, num_rounds, max_tokens = small
    room = num_people * min(longest, 6000)
    engines = make_engines(model, settings.engine, ["collective", *REPLAYED], room)
    rounds = []
    llm = engines["collective"]
    for played in talk(llm, people[:num_people], num_rounds, max_tokens, settings.seed):
        rounds.append(played)
        add(llm, len(rounds), played)
    for mode in REPLAYED:
        for number, played in enumerate(rounds, 1):
            add(engines[mode], number, _replay(engines[mode], played))
    del engines, llm
    num_people, num_rounds, max_tokens = large
    people = people[:num_people]
    llm = make_engine(model, settings.engine, "collective", len(people) * longest)
    with tempfile.TemporaryDirectory(prefix="tokendance-") as folder:
        llm.open_store(Path(folder) / "store")
        assert llm.tier is not None
        index = llm.tier.disk.index
        speaking = talk(llm, people, num_rounds, max_tokens, settings.seed)
        for number, played in enumerate(speaking, 1):
            add(llm, number, played, index.usage(SessionKey("", "town")).num_bytes / 2**20)
        llm.close()
    last = table.rows[-1]
    keys = ("mirror_compression", "shared_compression", "resident_compression")
    headline = {key: last[key] for key in (*keys, "mirror_shared_compression")}
    headline["disk_compression"] = last["dense_mib"] / last["disk_mib"]
    return SuiteResult("storage", settings.model, table.rows, headline)


def _replay(llm: LLM, played: TownRound) -> TownRound:
    """Run a round again, with the same answers."""
    answers = forced_answers(llm, played)
    params = [SamplingParams(max_tokens=len(answer), forced_tokens=answer) for answer in answers]
    result = llm.run_round(played.prompts, params)
    result.raise_for_errors()
    return TownRound(played.prompts, result)


def _measure(llm: LLM, played: TownRound) -> Row:
    """Count the slots in which the store has each agent's prompt and answer."""
    caches = [cache.slots for cache in agent_caches(llm, played.result)]
    shared = []
    for prompt, slots in zip(played.prompts, caches, strict=True):
        segments = llm.encoder.encode(prompt).shared_segments()
        parts = [slots[start : start + len(segment)] for start, segment in segments]
        shared.append(np.concatenate([np.empty(0, np.int32), *parts]))
    dense, stored = _total(caches)
    shared_dense, shared_stored = _total(shared)
    num_readers = np.bincount(np.concatenate(caches))

    def of_mirrors(of_agents: Sequence[npt.NDArray[np.int32]]) -> list[tuple[int, int]]:
        """Slots of each mirror, and how many of them nobody else has."""
        return [
            (len(slots), int(np.count_nonzero(num_readers[slots] == 1)))
            for slots, output in zip(of_agents, played.result.outputs, strict=True)
            if output.corrected_tokens
        ]

    mirrors = of_mirrors(caches)
    mib = llm.engine.kv_bytes_per_token / 2**20
    kv_bytes = played.result.stats.kv_bytes
    return {
        "dense_mib": dense * mib,
        "stored_mib": stored * mib,
        "resident_mib": kv_bytes.resident / 2**20,
        "shared_mib": shared_dense * mib,
        "shared_stored_mib": shared_stored * mib,
        "mirror_mib": statistics.mean(own for _, own in mirrors) * mib if mirrors else None,
        "disk_mib": None,
        "mirror_compression": _times(mirrors),
        "mirror_shared_compression": _times(of_mirrors(shared)),
        "stored_compression": dense / stored,
        "shared_compression": shared_dense / shared_stored if shared_stored else None,
        "resident_compression": kv_bytes.dense / kv_bytes.resident,
        "stored_mib_per_agent": stored * mib / len(caches),
        "resident_mib_per_agent": kv_bytes.resident / 2**20 / len(caches),
    }


def _times(mirrors: Sequence[tuple[int, int]]) -> float | None:
    """How many times as many slots mirrors read as only they have."""
    own = sum(own for _, own in mirrors)
    return sum(whole for whole, _ in mirrors) / own if own else None


def _total(caches: Sequence[npt.NDArray[np.int32]]) -> tuple[int, int]:
    """Slots over all caches: counted once for each, and once for all."""
    everything = np.concatenate(caches)
    return len(everything), len(np.unique(everything))


def plot(result: SuiteResult, path: Path) -> None:
    """Draw stored bytes per agent over rounds, a line per mode and number of agents."""
    points = []
    for row in result.rows:
        at, agents = row["round"], row["agents"]
        stored = row["stored_mib_per_agent"]
        points.append({"line": f"{row['mode']}, {agents} agents", "round": at, "mib": stored})
        if row["mode"] == "collective":
            dense = row["dense_mib"] / agents
            points.append({"line": f"dense, {agents} agents", "round": at, "mib": dense})
    title = f"KV stored between rounds, {result.model}"
    draw_lines(path, points, "line", "round", "mib", title=title, y_label="MiB per agent")
