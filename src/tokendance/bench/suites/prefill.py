"""`prefill`: seconds and computed tokens of a round's prefill, by number of agents and mode.

Every agent's private part is in the store before the clock starts, and nothing else is; the answer
is one token. The floor is a pass of as many tokens as any scheme must compute that shares all it
can: the shared tokens once, and each agent's task.
"""

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import (
    DTYPES,
    answer_params,
    make_engines,
    run_checked,
    started_vllm,
    vllm_round,
)
from tokendance.bench.plots import draw_lines
from tokendance.bench.suite import (
    BenchSettings,
    LiveTable,
    Row,
    SuiteResult,
    in_turn,
    ratio,
    spread,
)
from tokendance.bench.vllm import VLLM
from tokendance.bench.workload import RoundWorkload, WorkloadSpec, generate_workload
from tokendance.config import ReuseMode
from tokendance.llm import LLM
from tokendance.models.loader import load_model

MODES: tuple[ReuseMode, ...] = ("none", "prefix", "pic", "pic-batched", "collective")
HEADLINE_AGENTS = (10, 50)
# Computing everything for many agents takes many minutes and says nothing new.
NONE_UP_TO = 10
BOTH_DTYPES_UP_TO = 10
_COLUMNS = {
    "agents": "agents",
    "mode": "mode",
    "dtype": "dtype",
    "prompt_tokens": "prompt",
    "computed_tokens": "computed",
    "median": "seconds",
    "min": "min",
    "max": "max",
    "vs_collective": "x collective",
}


@dataclass(slots=True, eq=False)
class _Arm:
    """One thing that is timed.

    Attributes:
        mode: its name.
        dtype: of the model.
        prompt_tokens: of the last run; likewise the next.
        computed_tokens: prompt tokens computed.
        seconds: of its counted runs.
    """

    mode: str
    dtype: str
    prompt_tokens: int = 0
    computed_tokens: int = 0
    seconds: list[float] = field(default_factory=list)


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    sizes = (2, 3) if settings.tiny else (2, 5, 10, 20, 50)
    models = {dtype: load_model(settings.model, dtype) for dtype in DTYPES}
    longest = 300 if settings.tiny else 1100 + 100 * sizes[-1]
    shape = models["bfloat16"].shape
    token_bytes = shape.kv_bytes_per_token(models["bfloat16"].dtype)
    both = BOTH_DTYPES_UP_TO * (1100 + 100 * BOTH_DTYPES_UP_TO)
    engines = {
        "bfloat16": make_engines(models["bfloat16"], MODES, sizes[-1] * longest),
        "float32": make_engines(models["float32"], MODES, both),
    }
    writer = engines["bfloat16"]["none"]
    table = LiveTable(console, "prefill of a round, private parts cached", _COLUMNS)
    rows: list[Row] = []
    best_dtype: dict[str, str] = {}
    vllm_tokens = min(sizes[-1] * longest, 2 * both)
    with started_vllm(
        settings, console, max_context=longest, num_tokens=vllm_tokens, token_bytes=token_bytes
    ) as vllm:
        for size in sizes:
            with console.status(f"The model writes the blocks of {size} agents ..."):
                workload = generate_workload(writer, _spec(settings, size))
            kinds = {
                arm: partial(_time, arm, engines[arm.dtype], workload)
                for arm in _arms(size, best_dtype)
            }
            if vllm is not None and size <= BOTH_DTYPES_UP_TO:
                arm = _Arm("vllm", "bfloat16")
                kinds[arm] = partial(_time_vllm, arm, vllm, writer, workload)
            # The largest rounds take minutes each: no run is left uncounted there.
            small = size <= BOTH_DTYPES_UP_TO
            repeats, warm_up = (settings.repeats, 1) if small else (2, 0)
            with console.status(f"Rounds of {size} agents in turn ..."):
                times = in_turn(kinds, repeats, warm_up)
            for arm, seconds in times.items():
                arm.seconds = seconds
            if small:
                best_dtype = _fastest_dtypes(kinds)
            new = _rows(size, kinds, best_dtype)
            rows += new
            for row in new:
                table.add(row)
    return SuiteResult("prefill", settings.model, rows, _headline(rows), _notes(settings))


def _spec(settings: BenchSettings, agents: int) -> WorkloadSpec:
    if settings.tiny:
        return WorkloadSpec(agents, 40, (20, 40), seed=settings.seed)
    return WorkloadSpec(agents, seed=settings.seed)


def _arms(agents: int, best_dtype: Mapping[str, str]) -> list[_Arm]:
    """What is timed at a size: all dtypes for few agents, each mode's faster one for many."""
    return [
        _Arm(mode, dtype)
        for mode in (*MODES, "floor")
        for dtype in DTYPES
        if (mode != "none" or agents <= NONE_UP_TO)
        and (agents <= BOTH_DTYPES_UP_TO or dtype == best_dtype[mode])
    ]


def _time(arm: _Arm, engines: dict[ReuseMode, LLM], workload: RoundWorkload) -> float:
    """Seconds of one prefill, the private parts warmed before."""
    if arm.mode == "floor":
        return _time_floor(arm, engines["none"], workload)
    mode: ReuseMode = arm.mode  # type: ignore[assignment]
    workload.warm(engines[mode])
    result = run_checked(engines[mode], workload.prompts(), 1)
    arm.prompt_tokens = result.stats.prompt_tokens
    arm.computed_tokens = result.stats.computed_tokens
    return result.stats.prefill_s


def _time_floor(arm: _Arm, llm: LLM, workload: RoundWorkload) -> float:
    """Seconds of plain passes of S + N t tokens: the shared run, and every agent's task."""
    llm.engine.store.clear()
    encoded = [llm.encoder.encode(prompt) for prompt in workload.prompts()]
    shared = [i for segment in encoded[0].segments if segment.shared for i in segment.token_ids]
    tasks = [prompt.segments[-1].token_ids.tolist() for prompt in encoded]
    start = time.perf_counter()
    llm.generate([[int(token) for token in shared], *tasks], answer_params(1))
    arm.computed_tokens = len(shared) + sum(map(len, tasks))
    return time.perf_counter() - start


def _time_vllm(arm: _Arm, vllm: VLLM, llm: LLM, workload: RoundWorkload) -> float:
    prompts = workload.prompts()
    encoded = [llm.encoder.encode(prompt) for prompt in prompts]
    cached = [prompt.segments[0].token_ids.tolist() for prompt in encoded]
    result = vllm_round(vllm, llm, prompts, cached, 1)
    arm.prompt_tokens = sum(map(len, encoded))
    arm.computed_tokens = arm.prompt_tokens - sum(result.cached_tokens)
    return result.seconds


def _fastest_dtypes(arms: Iterable[_Arm]) -> dict[str, str]:
    """The dtype in which each mode is fastest."""
    ranked = sorted(arms, key=lambda arm: -statistics.median(arm.seconds))
    return {arm.mode: arm.dtype for arm in ranked}  # the last, fastest, stays


def _rows(agents: int, arms: Iterable[_Arm], best_dtype: Mapping[str, str]) -> list[Row]:
    """One row per arm; `vs_collective` compares each mode at its best dtype."""
    best = {arm.mode: arm for arm in arms if best_dtype[arm.mode] == arm.dtype}
    return [
        {
            "agents": agents,
            "mode": arm.mode,
            "dtype": arm.dtype,
            "prompt_tokens": arm.prompt_tokens or None,
            "computed_tokens": arm.computed_tokens,
            **spread(arm.seconds),
            "seconds": arm.seconds,
            "vs_collective": (
                ratio(arm.seconds, best["collective"].seconds) if best[arm.mode] is arm else None
            ),
        }
        for arm in arms
    ]


def _headline(rows: list[Row]) -> dict[str, float | None]:
    found = {
        (row["agents"], row["mode"]): row["vs_collective"]
        for row in rows
        if row["vs_collective"] is not None
    }
    headline: dict[str, float | None] = {}
    for agents in HEADLINE_AGENTS:
        for mode in ("prefix", "pic", "pic-batched"):
            key = f"speedup_vs_{mode.replace('-', '_')}_{agents}"
            headline[key] = found.get((agents, mode))
        floor = found.get((agents, "floor"))
        headline[f"floor_ratio_{agents}"] = None if floor is None else 1 / floor
    headline["speedup_vs_vllm_10"] = found.get((10, "vllm"))
    return headline


def _notes(settings: BenchSettings) -> list[str]:
    notes = [
        "Computed tokens of pic and pic-batched are those computed in all layers; the first two "
        "layers compute every token.",
        f"Rounds of more than {BOTH_DTYPES_UP_TO} agents: each mode in its faster dtype, two runs.",
    ]
    if settings.tiny:
        notes.append("A tiny run: the figures mean nothing.")
    return notes


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds by agents, a line per mode in its faster dtype."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        if row["vs_collective"] is not None:
            lines.setdefault(row["mode"], []).append((row["agents"], row["median"]))
    draw_lines(
        path,
        lines,
        title=f"Prefill of a round, {result.model}",
        x_label="agents",
        y_label="seconds",
        log_y=True,
    )
