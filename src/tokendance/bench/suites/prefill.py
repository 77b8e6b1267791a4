"""`prefill`: seconds and computed tokens of a round's prefill, by number of agents and mode.

Every agent's private part is in the store before the clock starts, and nothing else is; the answer
is one token. Two rows say how far down it could go: `floor` is the round with nothing corrected,
one packed pass of S + N t tokens in their contexts; `plain pass` is as many tokens without any
context, the run alone and each task alone, so without attention to private parts.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from tokendance.bench.arms import (
    DTYPES,
    context_too_short,
    generate_seconds,
    load,
    make_engine,
    make_engines,
    run_checked,
    timed_spec,
)
from tokendance.bench.llamacpp import MODES as LLAMACPP_MODES
from tokendance.bench.llamacpp import Context, LlamaCpp, Mode
from tokendance.bench.plots import draw_lines
from tokendance.bench.rivals import (
    LlamaCppPrompts,
    least_over_modes,
    started_llamacpp,
    started_vllm,
    vllm_round,
)
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult, between, in_turn, ratio, spread
from tokendance.bench.vllm import VLLM
from tokendance.bench.workload import RoundWorkload, generate_workload
from tokendance.collector.correction import NO_CORRECTION
from tokendance.executor.kv_pool import KVPool
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel
from tokendance.options import ReuseMode

MODES: tuple[ReuseMode, ...] = ("none", "prefix", "pic", "pic-batched", "collective")
SMALL = (2, 5, 10)  # in turn, several times
LARGE = (50,)  # minutes each, so once
HEADLINE_AGENTS = (10, 50)
PLAIN_PASS = "plain pass"
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
    """One thing that is timed."""

    mode: str  # its name
    dtype: str  # of the model
    prompt_tokens: int = 0  # of the last run
    computed_tokens: int = 0  # of these, in the last run
    seconds: list[float] = field(default_factory=list)  # of its counted runs
    vs_collective: float | None = None  # over `collective` beside it, each in its faster dtype

    def row(self, agents: int) -> Row:
        """What the table and the JSON line have of it."""
        return {
            "agents": agents,
            "mode": self.mode,
            "dtype": self.dtype,
            "prompt_tokens": self.prompt_tokens,
            "computed_tokens": self.computed_tokens,
            **spread(self.seconds),
            "seconds": self.seconds,
            "vs_collective": self.vs_collective,
        }


@dataclass(frozen=True, slots=True)
class _Round:
    """A round and the engines that compute it."""

    workload: RoundWorkload
    engines: Mapping[str, Mapping[str, LLM]]  # by dtype and mode
    keep: bool  # whether engines keep the private parts between runs, having memory of their own

    def time(self, arm: _Arm) -> float:
        """Seconds of one prefill, the private parts computed before."""
        if arm.mode == PLAIN_PASS:
            return self._time_plain_pass(arm)
        llm = self.engines[arm.dtype][arm.mode]
        self.workload.warm(llm, keep=self.keep)
        stats = run_checked(llm, self.workload.prompts(), 1).stats
        arm.prompt_tokens, arm.computed_tokens = stats.prompt_tokens, stats.computed_tokens
        return stats.prefill_s

    def _time_plain_pass(self, arm: _Arm) -> float:
        """Seconds of S + N t tokens without context: the run alone, and each task alone."""
        llm = self.engines[arm.dtype]["none"]
        llm.engine.forget()
        encoded = self.workload.encoded(llm)
        run = np.concatenate([part.token_ids for part in encoded[0].segments if part.shared])
        prompts = [run.tolist(), *(prompt.segments[-1].token_ids.tolist() for prompt in encoded)]
        arm.prompt_tokens = arm.computed_tokens = sum(map(len, prompts))
        return generate_seconds(llm, prompts, 1)

    def time_llamacpp(self, arm: _Arm, context: Context, mode: Mode) -> float:
        """The same by llama.cpp; with the shared text in front nothing is computed before."""
        prompts = LlamaCppPrompts.of(self.workload.encoded(self.engines["bfloat16"]["none"]), mode)
        result = context.prefill(
            prompts.token_ids, cached=prompts.cached, in_front=prompts.in_front
        )
        arm.prompt_tokens = sum(map(len, prompts.token_ids))
        arm.computed_tokens = result.computed_tokens
        return result.seconds

    def time_vllm(self, arm: _Arm, vllm: VLLM) -> float:
        """The same by vLLM."""
        llm = self.engines["bfloat16"]["prefix"]
        result = vllm_round(vllm, llm, self.workload, 1)
        arm.prompt_tokens = sum(map(len, self.workload.encoded(llm)))
        arm.computed_tokens = arm.prompt_tokens - sum(result.cached_tokens)
        return result.seconds


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    models = {dtype: load(settings, dtype) for dtype in DTYPES}
    notes = [
        "Computed tokens of pic and pic-batched are those computed in all layers; the first layer "
        "computes every token, and the second its queries, keys and values.",
        f"Rounds of more than {BOTH_DTYPES_UP_TO} agents: each mode in its faster dtype, one run "
        "between two of collective.",
    ]
    small, large = [2, 3], [4]
    if not settings.tiny:
        max_context = models["bfloat16"].shape.max_context
        small, large = (_fitting(sizes, max_context, notes) for sizes in (SMALL, LARGE))
        if not small:
            raise context_too_short(models["bfloat16"])
    table = LiveTable(console, "prefill of a round, private parts cached", _COLUMNS)
    best_dtype: dict[str, str] = {}
    longest = _longest(small[-1])
    engines = {dtype: _make_engines(model, settings, small[-1]) for dtype, model in models.items()}
    with (
        started_vllm(
            settings,
            console,
            models["bfloat16"],
            notes,
            max_context=longest,
            num_tokens=2 * small[-1] * longest,
        ) as vllm,
        started_llamacpp(settings, console, notes) as llama,
    ):
        for size in small:
            round_ = _write_round(settings, size, engines, keep=True)
            with (
                console.status(f"Rounds of {size} agents in turn ..."),
                _rival_runs(round_, vllm, llama, size, longest) as rivals,
            ):
                arms = _time_in_turn(round_, _arms(size, {}), rivals, settings.repeats)
            table.add(*(arm.row(size) for arm in arms))
            best_dtype = _fastest_dtypes(arms)
    del engines, round_
    for size in large:
        # Dense copies for so many agents fit into memory once.
        arms = _arms(size, best_dtype)
        used = [dtype for dtype in DTYPES if dtype in {arm.dtype for arm in arms}]
        big = {
            dtype: _make_engines(models[dtype], settings, size, one_memory=True) for dtype in used
        }
        round_ = _write_round(settings, size, big, keep=False)
        with console.status(f"Rounds of {size} agents; this takes the better part of an hour ..."):
            _time_between(round_, arms)
        table.add(*(arm.row(size) for arm in arms))
    return SuiteResult("prefill", settings.model, table.rows, _headline(table.rows), notes)


def _fitting(sizes: Sequence[int], max_context: int, notes: list[str]) -> list[int]:
    """Numbers of agents whose prompts the context holds; each of the others gets a note."""
    fitting = [size for size in sizes if _longest(size) <= max_context]
    notes += [
        f"{size} agents are left out: the context holds {max_context} tokens."
        for size in sizes
        if size not in fitting
    ]
    return fitting


def _longest(agents: int) -> int:
    """Room for a prompt of a round: private part, what so many agents have said, the task."""
    return 1200 + 110 * agents


def _make_engines(
    model: LoadedModel, settings: BenchSettings, agents: int, *, one_memory: bool = False
) -> dict[str, LLM]:
    """An engine for each mode, and one that is called "floor": nothing is corrected.

    A round of N agents then computes S + N t tokens in one packed pass, the least that shares all
    there is to share.
    """
    room = agents * _longest(agents)
    pool = KVPool(model, room) if one_memory else None
    engines = make_engines(model, settings.engine, MODES, room, pool)
    floor = make_engine(
        model, settings.engine, "collective", room, correction=NO_CORRECTION, pool=pool
    )
    return engines | {"floor": floor}


def _write_round(
    settings: BenchSettings, agents: int, engines: Mapping[str, Mapping[str, LLM]], *, keep: bool
) -> _Round:
    """Let the model write the blocks."""
    writer = next(iter(engines.values()))["prefix"]
    return _Round(generate_workload(writer, timed_spec(settings, agents)), engines, keep)


def _arms(agents: int, best_dtype: Mapping[str, str]) -> list[_Arm]:
    """What is timed at a size: all dtypes for few agents, each mode's faster one for many."""
    return [
        _Arm(mode, dtype)
        for mode in (*MODES, "floor", PLAIN_PASS)
        for dtype in DTYPES
        if (mode != "none" or (agents <= NONE_UP_TO and dtype == "bfloat16"))
        and (agents <= BOTH_DTYPES_UP_TO or dtype == best_dtype[mode])
    ]


@contextmanager
def _rival_runs(
    round_: _Round, vllm: VLLM | None, llama: LlamaCpp | None, agents: int, longest: int
) -> Iterator[dict[_Arm, Callable[[], float]]]:
    """Runs of the other engines that are there."""
    runs: dict[_Arm, Callable[[], float]] = {}
    with ExitStack() as stack:
        if vllm is not None:
            arm = _Arm("vllm", "bfloat16")
            runs[arm] = partial(round_.time_vllm, arm, vllm)
        if llama is not None:
            for mode in LLAMACPP_MODES:
                arm = _Arm(str(mode), mode.weights)
                context = stack.enter_context(llama.open(mode, agents, longest))
                runs[arm] = partial(round_.time_llamacpp, arm, context, mode)
        yield runs


def _time_in_turn(
    round_: _Round,
    arms: list[_Arm],
    rivals: Mapping[_Arm, Callable[[], float]],
    repeats: int,
) -> list[_Arm]:
    """Time arms in turn, and what other engines do; return all of them."""
    kinds = {arm: partial(round_.time, arm) for arm in arms} | dict(rivals)
    for arm, seconds in in_turn(kinds, repeats).items():
        arm.seconds = seconds
    best_dtype = _fastest_dtypes(kinds)
    best = {arm.mode: arm for arm in kinds if best_dtype[arm.mode] == arm.dtype}
    for arm in best.values():
        arm.vs_collective = ratio(arm.seconds, best["collective"].seconds)
    return list(kinds)


def _time_between(round_: _Round, arms: list[_Arm]) -> None:
    """Time each arm once, between two runs of `collective`."""
    ours = next(arm for arm in arms if arm.mode == "collective")
    seconds, ratios = between({arm: partial(round_.time, arm) for arm in arms}, ours)
    for arm in arms:
        arm.seconds, arm.vs_collective = seconds[arm], ratios[arm]


def _fastest_dtypes(arms: Iterable[_Arm]) -> dict[str, str]:
    """The dtype in which each mode is fastest."""
    ranked = sorted(arms, key=lambda arm: -statistics.median(arm.seconds))
    return {arm.mode: arm.dtype for arm in ranked}  # the last, fastest, stays


def _headline(rows: list[Row]) -> dict[str, float | None]:
    ratios = {
        (row["agents"], row["mode"]): row["vs_collective"]
        for row in rows
        if row["vs_collective"] is not None
    }
    headline: dict[str, float | None] = {}
    for agents in HEADLINE_AGENTS:
        for mode in ("prefix", "pic", "pic-batched"):
            headline[f"speedup_vs_{mode.replace('-', '_')}_{agents}"] = ratios.get((agents, mode))
        for name, mode in (("floor", "floor"), ("plain_pass", PLAIN_PASS)):
            below = ratios.get((agents, mode))
            headline[f"{name}_ratio_{agents}"] = None if below is None else 1 / below
    headline["speedup_vs_vllm_10"] = ratios.get((10, "vllm"))
    of_ten = {mode: times for (agents, mode), times in ratios.items() if agents == 10}
    for name, least in least_over_modes(of_ten).items():
        headline[f"speedup_vs_{name}_10"] = least
    return headline


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds by agents, a line per mode in its faster dtype."""
    rows = [row for row in result.rows if row["vs_collective"] is not None]
    title = f"Prefill of a round, {result.model}"
    draw_lines(path, rows, "mode", "agents", "median", title=title, y_label="seconds", log_y=True)
