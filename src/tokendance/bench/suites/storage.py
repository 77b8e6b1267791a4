"""`storage`: bytes of KV per agent over rounds, stored between rounds and resident while they run.

A town talks for some rounds; the same prompts and answers are then replayed in every mode. After
each round the store is asked where it has each agent's prompt and answer:

    dense       one full cache per agent, counted in tokens
    stored      distinct slots that these caches lie in
    resident    distinct pages that the agents held while they ran, room for answers included
    shared      the same counts over the tokens of shared segments alone
    mirror      slots that no other agent's cache has, of agents that reused a run

Slots are counted, not pages, but for `resident`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from tokendance.bench.arms import make_engines
from tokendance.bench.plots import draw_lines
from tokendance.bench.suite import BenchSettings, LiveTable, Row, SuiteResult
from tokendance.config import ReuseMode
from tokendance.engine.sampling import SamplingParams
from tokendance.llm import LLM, ParamsLike, Progress
from tokendance.models.loader import load_model
from tokendance.outputs import RoundResult
from tokendance.rounds.prompts import Prompt, PromptLike, as_prompt
from tokendance.rounds.trace import example_trace, read_trace
from tokendance.session import Agent, Session

MODES: tuple[ReuseMode, ...] = ("prefix", "pic-batched", "collective")
TASK = "Answer the others in one sentence. What will you do now?"
_COLUMNS = {
    "round": "round",
    "mode": "mode",
    "dense_mib": "dense MiB",
    "stored_mib": "stored",
    "resident_mib": "resident",
    "shared_mib": "of it shared: dense",
    "shared_stored_mib": "stored",
    "mirror_mib": "one mirror adds",
    "mirror_compression": "mirror x",
    "shared_compression": "shared x",
    "resident_compression": "resident x",
}


class _Recorder:
    """Stands in for an LLM in a session, and keeps the prompts that the session makes."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.encoder, self.model, self.tiers = llm.encoder, llm.model, None
        self.prompts: list[Prompt] = []

    def run_round(
        self, prompts: Sequence[PromptLike], params: ParamsLike, progress: Progress | None
    ) -> RoundResult:
        """Run and remember."""
        self.prompts = [as_prompt(prompt) for prompt in prompts]
        return self._llm.run_round(prompts, params, progress)


@dataclass(frozen=True, slots=True)
class _Played:
    """One round: its prompts, and what was answered."""

    prompts: list[Prompt]
    answers: list[tuple[int, ...]]


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    agents, num_rounds, max_tokens = (3, 2, 8) if settings.tiny else (10, 5, 64)
    model = load_model(settings.model, "bfloat16")
    room = agents * (1000 if settings.tiny else 6000)
    engines = make_engines(model, MODES, room)
    with console.status("The town talks ..."):
        played = _talk(engines["collective"], agents, num_rounds, max_tokens, settings.seed)
    table = LiveTable(console, f"KV of {agents} agents over rounds, bfloat16", _COLUMNS)
    rows: list[Row] = []
    for mode in MODES:
        llm = engines[mode]
        llm.engine.store.clear()
        for number, one in enumerate(played, 1):
            params = [
                SamplingParams(max_tokens=len(answer), forced_tokens=answer)
                for answer in one.answers
            ]
            result = llm.run_round(one.prompts, params)
            result.raise_for_errors()
            row = {"round": number, "mode": mode} | _measure(llm, one, result)
            rows.append(row)
            table.add(row)
    last = {row["mode"]: row for row in rows if row["round"] == num_rounds}["collective"]
    keys = ("mirror_compression", "shared_compression", "resident_compression")
    notes = ["A tiny run: the figures mean nothing."] if settings.tiny else []
    headline = {key: last[key] for key in keys}
    return SuiteResult("storage", settings.model, rows, headline, notes)


def _talk(llm: LLM, agents: int, num_rounds: int, max_tokens: int, seed: int) -> list[_Played]:
    """Let people of the example town hear each other."""
    recorder = _Recorder(llm)
    people = list(read_trace(example_trace()).agents.values())[:agents]
    session = Session(recorder, None, [Agent(one.name, one.system) for one in people])  # type: ignore[arg-type]
    played = []
    for number in range(num_rounds):
        params = {
            one.name: SamplingParams(
                max_tokens=max_tokens, temperature=0.7, seed=seed + 1000 * number + index
            )
            for index, one in enumerate(people)
        }
        result = session.run(TASK, params)
        result.raise_for_errors()
        # A forced answer has at least one token; one that ended at once is the token that ends it.
        end = (min(llm.model.stop_ids),)
        played.append(_Played(recorder.prompts, [o.token_ids or end for o in result.outputs]))
    return played


def _measure(llm: LLM, played: _Played, result: RoundResult) -> Row:
    """Ask the store where it has each agent's prompt and answer."""
    caches: list[npt.NDArray[np.int32]] = []
    shared: list[npt.NDArray[np.int32]] = []
    for prompt, answer in zip(played.prompts, played.answers, strict=True):
        encoded = llm.encoder.encode(prompt)
        # The last token of an answer has no KV yet.
        tokens = np.concatenate([encoded.token_ids, np.array(answer[:-1], np.int32)])
        _, slots = llm.engine.store.match_prefix(tokens, encoded.salt, exact=False)
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
    mirrors = [
        (len(slots), int(np.count_nonzero(num_readers[slots] == 1)))
        for slots, output in zip(caches, result.outputs, strict=True)
        if output.corrected_tokens
    ]
    mib = llm.engine.kv_bytes_per_token / 2**20
    resident = result.stats.kv_bytes.resident / 2**20
    return {
        "dense_mib": dense * mib,
        "stored_mib": stored * mib,
        "resident_mib": resident,
        "shared_mib": shared_dense * mib,
        "shared_stored_mib": shared_stored * mib,
        "mirror_mib": statistics.mean(own for _, own in mirrors) * mib if mirrors else None,
        "mirror_compression": (
            sum(whole for whole, _ in mirrors) / sum(own for _, own in mirrors) if mirrors else None
        ),
        "shared_compression": shared_dense / shared_stored if shared_stored else None,
        "resident_compression": result.stats.kv_bytes.dense / 2**20 / resident,
        "stored_mib_per_agent": stored * mib / len(caches),
        "resident_mib_per_agent": resident / len(caches),
    }


def _total(caches: Sequence[npt.NDArray[np.int32]]) -> tuple[int, int]:
    """Slots over all caches: counted once for each, and once for all."""
    everything = np.concatenate(caches)
    return len(everything), len(np.unique(everything))


def plot(result: SuiteResult, path: Path) -> None:
    """Draw stored bytes per agent over rounds, a line per mode."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        lines.setdefault(row["mode"], []).append((row["round"], row["stored_mib_per_agent"]))
        if row["mode"] == "collective":
            dense = row["dense_mib"] * row["stored_mib_per_agent"] / row["stored_mib"]
            lines.setdefault("dense", []).append((row["round"], dense))
    draw_lines(
        path,
        lines,
        title=f"KV stored between rounds, {result.model}",
        x_label="round",
        y_label="MiB per agent",
    )
