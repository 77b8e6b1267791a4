"""`capacity`: how many agents a machine serves, by mode, within a time and within a memory.

By time: the most agents whose round, from prompts to the last of 32 answer tokens each, stays
within an objective. Private parts are in the store before; the round grows with its agents, since
everybody hears everybody. By memory: the most agents whose round fits a KV budget all at once,
answers included; this is counted by admission, without running.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import (
    answer_params,
    load,
    make_engines,
    run_checked,
    started_vllm,
    timed_spec,
    vllm_round,
    wall_seconds,
)
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult
from tokendance.bench.vllm import VLLMConfig, count_blocks
from tokendance.bench.workload import RoundWorkload, generate_workload
from tokendance.errors import ConfigError
from tokendance.executor.fake import FakeExecutor
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions, ReuseMode

MODES: tuple[ReuseMode, ...] = ("prefix", "pic", "pic-batched", "collective")
ANSWER_TOKENS = 32
BUDGET_BYTES = 2**30
# A probe this far from the objective is clear after one run; others are the median of three.
_CLEAR = 1.25
_COLUMNS = {
    "mode": "mode",
    "limit": "limit",
    "agents": "agents",
    "seconds": "seconds",
    "next_seconds": "one size more",
    "vs_vllm": "x vllm",
    "vs_prefix": "x prefix",
}


@dataclass(slots=True)
class _Search:
    """The largest size whose time is within the objective, found by doubling and halving.

    Attributes:
        measure: seconds of a round of so many agents.
        objective_s: see the module.
        limit: largest size that can be asked for.
        seconds: by size, as measured.
    """

    measure: Callable[[int], float]
    objective_s: float
    limit: int
    seconds: dict[int, float] = field(default_factory=dict)

    def largest(self) -> int:
        """Find it; 0 if not even a single agent is served in time."""
        good, bad, size = 0, self.limit + 1, min(2, self.limit)
        while good < size < bad:
            if self._fits(size):
                good = size
                size = min(2 * size, self.limit)
            else:
                bad = size
        return _bisect(self._fits, good, bad)

    def _fits(self, size: int) -> bool:
        found = [self.measure(size)]
        if self.objective_s / _CLEAR < found[0] < self.objective_s * _CLEAR:
            found += [self.measure(size) for _ in range(2)]
        self.seconds[size] = statistics.median(found)
        return self.seconds[size] <= self.objective_s


def _bisect(fits: Callable[[int], bool], good: int, bad: int) -> int:
    """The largest size from `good` on that fits, given that `bad` does not."""
    while good + 1 < bad:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    model = load(settings)
    objective_s, limit, longest = 5.0, 4, 400
    if not settings.tiny:
        # A prompt has its private part, what everybody said, the task, and the answer.
        fitting = (model.shape.max_context - 1200) // 110
        if fitting < 2:
            raise ConfigError(
                f"The context of {settings.model} ({model.shape.max_context} tokens) is too short "
                "for this suite."
            )
        objective_s, limit = 15.0, min(60, fitting)
        longest = 1200 + 110 * limit
    engines = make_engines(model, settings.engine, MODES, limit * longest, one_memory=True)
    token_bytes = model.shape.kv_bytes_per_token(model.dtype)
    with console.status(f"The model writes the blocks of {limit} agents ..."):
        workload = generate_workload(engines["prefix"], timed_spec(settings, limit))
    table = LiveTable(
        console, f"most agents: within {objective_s:.0f} s, or within 1 GiB of KV", _COLUMNS
    )
    rows: list[Row] = []
    found: dict[str, int] = {}
    vllm_settings: list[str] = []

    def search(name: str, measure: Callable[[RoundWorkload], float]) -> None:
        one = _Search(lambda size: measure(workload.head(size)), objective_s, limit)
        with console.status(f"{name}: looking for the largest round in time ..."):
            measure(workload.head(2))  # warms up
            found[name] = one.largest()
        above = [size for size in one.seconds if size > found[name]]
        rows.append(
            {
                "mode": name,
                "limit": f"{objective_s:.0f} s",
                "agents": found[name],
                "seconds": one.seconds.get(found[name]),
                "next_seconds": one.seconds[min(above)] if above else None,
                "vs_vllm": _over(found[name], found.get("vllm")),
                "vs_prefix": _over(found[name], found.get("prefix")),
                "probes": {str(size): seconds for size, seconds in sorted(one.seconds.items())},
            }
        )
        table.add(rows[-1])

    with started_vllm(
        settings,
        console,
        max_context=longest,
        num_tokens=limit * longest // 2,
        token_bytes=token_bytes,
    ) as vllm:
        if vllm is not None:
            vllm_settings.append(vllm.settings)
            encoder = engines["prefix"]
            search("vllm", lambda part: vllm_round(vllm, encoder, part, ANSWER_TOKENS).seconds)
    for mode in MODES:
        search(mode, lambda part, llm=engines[mode]: _seconds(llm, part))  # type: ignore[misc]

    by_memory: dict[str, int] = {
        mode: _most_in_budget(model, settings.engine, mode, workload) for mode in MODES
    }
    if "vllm" in found:
        by_memory["vllm"] = _most_in_vllm_budget(engines["prefix"], workload, token_bytes)
    for name, agents in by_memory.items():
        row: Row = {
            "mode": name,
            "limit": "1 GiB",
            "agents": agents,
            "vs_prefix": _over(agents, by_memory["prefix"]),
        }
        rows.append(row)
        table.add(row)
    notes = _notes(settings, found, limit) + vllm_settings
    headline: dict[str, float | None] = {
        "agents_vllm": found.get("vllm"),
        "agents_prefix": found["prefix"],
        "agents_pic": max(found["pic"], found["pic-batched"]),
        "agents_collective": found["collective"],
        "ratio_vs_vllm": _over(found["collective"], found.get("vllm")),
        "ratio_by_memory": _over(by_memory["collective"], by_memory["prefix"]),
    }
    return SuiteResult("capacity", settings.model, rows, headline, notes)


def _seconds(llm: LLM, workload: RoundWorkload) -> float:
    workload.warm(llm)
    return wall_seconds(run_checked(llm, workload.prompts(), ANSWER_TOKENS))


def _most_in_budget(
    model: LoadedModel, options: EngineOptions, mode: ReuseMode, workload: RoundWorkload
) -> int:
    """The most agents of a workload that are admitted together."""
    options = replace(options, reuse=mode, kv_budget=BUDGET_BYTES)
    num_slots = BUDGET_BYTES // model.shape.kv_bytes_per_token(model.dtype)
    llm = LLM.from_loaded(model, options, executor=FakeExecutor(num_slots, model.shape.vocab_size))

    def fits(size: int) -> bool:
        engine = llm.engine
        engine.forget()
        round_id = engine.new_round_id()
        requests = [
            llm.make_request(prompt, answer_params(ANSWER_TOKENS), round_id, str(index))
            for index, prompt in enumerate(workload.head(size).prompts())
        ]
        engine.add(requests)
        engine.tick()
        all_in = engine.status().num_waiting == 0 and all(one.error is None for one in requests)
        for request in requests:
            engine.abort(request)
        return all_in

    return _bisect(fits, 0, len(workload.views) + 1)


def _most_in_vllm_budget(encoder: LLM, workload: RoundWorkload, token_bytes: int) -> int:
    """Likewise for vLLM, by counting its blocks: all but one, which it keeps for itself."""
    block_size = VLLMConfig().block_size
    budget = BUDGET_BYTES // (block_size * token_bytes) - 1

    def fits(size: int) -> bool:
        prompts = [prompt.token_ids.tolist() for prompt in workload.head(size).encoded(encoder)]
        return count_blocks(prompts, ANSWER_TOKENS, block_size) <= budget

    return _bisect(fits, 0, len(workload.views) + 1)


def _over(count: int, other: int | None) -> float | None:
    return count / other if other else None


def _notes(settings: BenchSettings, found: Mapping[str, int], limit: int) -> list[str]:
    notes = [
        f"{mode} served all {limit} agents in time: the largest round that was tried."
        for mode, agents in found.items()
        if agents == limit
    ]
    if settings.tiny:
        notes.append("A tiny run: the figures mean nothing.")
    return notes


def plot(result: SuiteResult, path: Path) -> None:
    """Draw agents by mode, a group of bars per limit."""
    bars: dict[str, dict[str, float]] = {}
    for row in result.rows:
        bars.setdefault(row["mode"], {})[row["limit"]] = row["agents"]
    draw_bars(path, bars, title=f"Most agents, {result.model}", y_label="agents")
