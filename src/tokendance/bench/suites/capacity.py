"""`capacity`: how many agents a machine serves, by mode, within a time and within a memory.

By time: the most agents whose round, from prompts to the last of 32 answer tokens each, stays
within an objective. Private parts are in the store before; the round grows with its agents, since
everybody hears everybody. By memory: the most agents whose round fits a KV budget all at once,
answers included; this is found by planning and allocating, without running.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import (
    context_too_short,
    load,
    make_engines,
    run_checked,
    timed_spec,
    wall_seconds,
)
from tokendance.bench.plots import draw_bars
from tokendance.bench.rivals import started_vllm, vllm_round
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult
from tokendance.bench.vllm import VLLMConfig, count_blocks
from tokendance.bench.workload import RoundWorkload, generate_workload
from tokendance.build import make_planner
from tokendance.engine.allocator import Allocator
from tokendance.executor.kv_pool import KVPool
from tokendance.llm import LLM
from tokendance.options import ReuseMode
from tokendance.store.entries import RoundId
from tokendance.store.kv_store import KVStore
from tokendance.store.pages import PagePool

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
class Search:
    """The largest size whose time is within the objective, found by doubling and halving."""

    measure: Callable[[int], float]  # seconds of a round of so many agents
    objective_s: float
    limit: int  # largest size that can be asked for
    seconds: dict[int, float] = field(default_factory=dict)  # by size, as measured

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

    def row(self, largest: int) -> Row:
        """What tables and JSON lines have of it, given what `largest` has found."""
        above = [size for size in self.seconds if size > largest]
        return {
            "limit": f"{self.objective_s:.0f} s",
            "agents": largest,
            "seconds": self.seconds.get(largest),
            "next_seconds": self.seconds[min(above)] if above else None,
            "probes": {str(size): seconds for size, seconds in sorted(self.seconds.items())},
        }

    def _fits(self, size: int) -> bool:
        probes = [self.measure(size)]
        if self.objective_s / _CLEAR < probes[0] < self.objective_s * _CLEAR:
            probes += [self.measure(size) for _ in range(2)]
        self.seconds[size] = statistics.median(probes)
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
            raise context_too_short(model)
        objective_s, limit = 15.0, min(60, fitting)
        longest = 1200 + 110 * limit
    room = limit * longest
    engines = make_engines(model, settings.engine, MODES, room, KVPool(model, room))
    encoder = engines["prefix"]
    with console.status(f"The model writes the blocks of {limit} agents ..."):
        workload = generate_workload(encoder, timed_spec(settings, limit))
    title = f"most agents: within {objective_s:.0f} s, or within 1 GiB of KV"
    table = LiveTable(console, title, _COLUMNS)
    in_time: dict[str, int] = {}
    notes: list[str] = []

    def search(name: str, measure: Callable[[RoundWorkload], float]) -> None:
        sizes = Search(lambda size: measure(workload.head(size)), objective_s, limit)
        with console.status(f"{name}: looking for the largest round in time ..."):
            measure(workload.head(2))  # warms up
            in_time[name] = largest = sizes.largest()
        table.add(
            {
                "mode": name,
                **sizes.row(largest),
                "vs_vllm": _over(largest, in_time.get("vllm")),
                "vs_prefix": _over(largest, in_time.get("prefix")),
            }
        )

    with started_vllm(
        settings, console, model, notes, max_context=longest, num_tokens=room // 2
    ) as vllm:
        if vllm is not None:
            search("vllm", lambda part: vllm_round(vllm, encoder, part, ANSWER_TOKENS).seconds)
    for mode in MODES:
        search(mode, lambda part, llm=engines[mode]: _seconds(llm, part))  # type: ignore[misc]
    notes[:0] = [
        f"{mode} served all {limit} agents in time: the largest round that was tried."
        for mode, agents in in_time.items()
        if agents == limit
    ]

    in_memory: dict[str, int] = {mode: _most_in_budget(engines[mode], workload) for mode in MODES}
    if "vllm" in in_time:
        in_memory["vllm"] = _most_in_vllm_budget(encoder, workload)
    for name, agents in in_memory.items():
        vs_prefix = _over(agents, in_memory["prefix"])
        table.add({"mode": name, "limit": "1 GiB", "agents": agents, "vs_prefix": vs_prefix})
    headline: dict[str, float | None] = {
        "agents_vllm": in_time.get("vllm"),
        "agents_prefix": in_time["prefix"],
        "agents_pic": max(in_time["pic"], in_time["pic-batched"]),
        "agents_collective": in_time["collective"],
        "ratio_vs_vllm": _over(in_time["collective"], in_time.get("vllm")),
        "ratio_by_memory": _over(in_memory["collective"], in_memory["prefix"]),
    }
    return SuiteResult("capacity", settings.model, table.rows, headline, notes)


def _seconds(llm: LLM, workload: RoundWorkload) -> float:
    workload.warm(llm)
    return wall_seconds(run_checked(llm, workload.prompts(), ANSWER_TOKENS))


def _most_in_budget(llm: LLM, workload: RoundWorkload) -> int:
    """The most agents of a workload that an engine like `llm` admits together."""
    options = llm.engine.options
    num_pages = BUDGET_BYTES // llm.engine.page_bytes
    round_id = RoundId(0)

    def fits(size: int) -> bool:
        store = KVStore(PagePool(num_pages, options.page_size), options.max_reuse_rounds)
        planner = make_planner(options, llm.correction, store)
        allocator = Allocator(store)
        prompts = workload.head(size).encoded(llm)
        for start in planner.order(prompts, round_id):
            rules = planner.rules(
                in_round=True, isolated=False, publishes=True, owns_order=start.owns_order
            )
            prompt = prompts[start.index]
            plan = planner.plan(prompt, ANSWER_TOKENS, rules, round_id)
            if not allocator.can_allocate(plan):
                return False
            allocator.allocate(plan, prompt, round_id)
        return True

    return _bisect(fits, 0, len(workload.views) + 1)


def _most_in_vllm_budget(encoder: LLM, workload: RoundWorkload) -> int:
    """Likewise for vLLM, by counting its blocks: all but one, which it keeps for itself."""
    block_size = VLLMConfig().block_size
    budget = BUDGET_BYTES // (block_size * encoder.engine.kv_bytes_per_token) - 1

    def fits(size: int) -> bool:
        prompts = [prompt.token_ids.tolist() for prompt in workload.head(size).encoded(encoder)]
        return count_blocks(prompts, ANSWER_TOKENS, block_size) <= budget

    return _bisect(fits, 0, len(workload.views) + 1)


def _over(count: int, other: int | None) -> float | None:
    return count / other if other else None


def plot(result: SuiteResult, path: Path) -> None:
    """Draw agents by mode, a group of bars per limit."""
    title = f"Most agents, {result.model}"
    draw_bars(path, result.rows, "mode", "limit", "agents", title=title, y_label="agents")
