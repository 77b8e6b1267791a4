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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from tokendance.bench.arms import load, make_engines
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult
from tokendance.bench.workload import read_people
from tokendance.conversation import Agent
from tokendance.disk.records import SessionKey
from tokendance.llm import LLM
from tokendance.options import ReuseMode
from tokendance.outputs import RoundResult
from tokendance.params import SamplingParams
from tokendance.rounds.prompts import Prompt
from tokendance.rounds.segments import PrefixHashes
from tokendance.rounds.trace import TraceAgent

REPLAYED: tuple[ReuseMode, ...] = ("prefix", "pic-batched")
TASK = "Answer the others in one sentence. What will you do now?"
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


@dataclass(frozen=True, slots=True)
class _Played:
    """One round: its prompts, and what was answered."""

    prompts: list[Prompt]
    answers: list[tuple[int, ...]]
    result: RoundResult


@dataclass(frozen=True, slots=True)
class _Town:
    """How many talk, for how long."""

    agents: int
    rounds: int
    max_tokens: int


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module.

    Args:
        settings: with the example town as source, 12 people take the place of 25.
        console: to print on.
    """
    small, large = _Town(10, 5, 64), _Town(25, 8, 96)
    if settings.tiny:
        small = large = _Town(3, 2, 8)
    model = load(settings)
    people = read_people(settings.source)
    longest = 1000 if settings.tiny else model.shape.max_context
    table = LiveTable(console, "KV of agents over rounds, bfloat16", _COLUMNS)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        table.add(row)

    engines = make_engines(
        model, settings.engine, ["collective", *REPLAYED], small.agents * min(longest, 6000)
    )
    played = []
    for number, one in enumerate(_talk(engines["collective"], people, small, settings.seed), 1):
        played.append(one)
        add({"agents": small.agents, "round": number, "mode": "collective"}
            | _measure(engines["collective"], one))  # fmt: skip
    for mode in REPLAYED:
        for number, one in enumerate(played, 1):
            add({"agents": small.agents, "round": number, "mode": mode}
                | _measure(engines[mode], _replay(engines[mode], one)))  # fmt: skip
    del engines
    people = people[: large.agents]
    llm = make_engines(model, settings.engine, ["collective"], len(people) * longest)["collective"]
    with tempfile.TemporaryDirectory(prefix="tokendance-") as folder:
        llm.open_store(Path(folder) / "store")
        assert llm.tiers is not None
        index = llm.tiers.disk.index
        for number, one in enumerate(_talk(llm, people, large, settings.seed), 1):
            on_disk = index.usage(SessionKey("", "town")).num_bytes / 2**20
            add({"agents": len(people), "round": number, "mode": "collective"}
                | _measure(llm, one) | {"disk_mib": on_disk})  # fmt: skip
        llm.close()
    last = rows[-1]
    notes = ["A tiny run: the figures mean nothing."] if settings.tiny else []
    keys = ("mirror_compression", "shared_compression", "resident_compression")
    headline = {key: last[key] for key in (*keys, "mirror_shared_compression")}
    headline["disk_compression"] = last["dense_mib"] / last["disk_mib"]
    return SuiteResult("storage", settings.model, rows, headline, notes)


def _talk(llm: LLM, people: Sequence[TraceAgent], town: _Town, seed: int) -> Iterator[_Played]:
    """Let people hear each other, in a session that is stored if the engine has a store."""
    people = people[: town.agents]
    session = llm.session("town", [Agent(one.name, one.system) for one in people])
    # A forced answer has at least one token; one that ended at once is the token that ends it.
    end = (min(llm.model.stop_ids),)
    for number in range(town.rounds):
        params = {
            one.name: SamplingParams(
                max_tokens=town.max_tokens, temperature=0.7, seed=seed + 1000 * number + index
            )
            for index, one in enumerate(people)
        }
        prompts = session.ask(TASK, params).prompts
        result = session.run(TASK, params)
        result.raise_for_errors()
        yield _Played(prompts, [output.token_ids or end for output in result.outputs], result)


def _replay(llm: LLM, played: _Played) -> _Played:
    """Run a round again, with the same answers."""
    params = [
        SamplingParams(max_tokens=len(answer), forced_tokens=answer) for answer in played.answers
    ]
    result = llm.run_round(played.prompts, params)
    result.raise_for_errors()
    return _Played(played.prompts, played.answers, result)


def _measure(llm: LLM, played: _Played) -> Row:
    """Ask the store where it has each agent's prompt and answer."""
    caches: list[npt.NDArray[np.int32]] = []
    shared: list[npt.NDArray[np.int32]] = []
    for prompt, output in zip(played.prompts, played.result.outputs, strict=True):
        encoded = llm.encoder.encode(prompt)
        # The last token of an answer that was cut off has no KV yet.
        count = len(output.token_ids) - (output.finish_reason != "stop")
        answer = np.array(output.token_ids[:count], np.int32)
        tokens = np.concatenate([encoded.token_ids, answer])
        slots = llm.kv_store.match_slots(PrefixHashes(tokens, encoded.salt))
        assert len(slots) == len(tokens), "the store has lost a part of an agent's cache"
        caches.append(slots)
        shared.append(
            np.concatenate(
                [
                    np.empty(0, np.int32),
                    *(slots[at : at + len(part)] for at, part in encoded.shared_segments()),
                ]
            )
        )
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
    resident = played.result.stats.kv_bytes.resident / 2**20
    return {
        "dense_mib": dense * mib,
        "stored_mib": stored * mib,
        "resident_mib": resident,
        "shared_mib": shared_dense * mib,
        "shared_stored_mib": shared_stored * mib,
        "mirror_mib": statistics.mean(own for _, own in mirrors) * mib if mirrors else None,
        "disk_mib": None,
        "mirror_compression": _times(mirrors),
        "mirror_shared_compression": _times(of_mirrors(shared)),
        "stored_compression": dense / stored,
        "shared_compression": shared_dense / shared_stored if shared_stored else None,
        "resident_compression": played.result.stats.kv_bytes.dense / 2**20 / resident,
        "stored_mib_per_agent": stored * mib / len(caches),
        "resident_mib_per_agent": resident / len(caches),
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
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        name = f"{row['mode']}, {row['agents']} agents"
        lines.setdefault(name, []).append((row["round"], row["stored_mib_per_agent"]))
        if row["mode"] == "collective":
            dense = row["dense_mib"] / row["agents"]
            name = f"dense, {row['agents']} agents"
            lines.setdefault(name, []).append((row["round"], dense))
    draw_lines(
        path,
        lines,
        title=f"KV stored between rounds, {result.model}",
        x_label="round",
        y_label="MiB per agent",
    )
