"""`prefill`: seconds and computed tokens of a round's prefill, by number of agents and mode.

Every agent's private part is in the store before the clock starts, and nothing else is; the answer
is one token. Two rows say how far down it could go: `floor` is the round with nothing corrected,
one packed pass of S + N t tokens in their contexts; `plain pass` is as many tokens without any
context, the run alone and each task alone, so without attention to private parts.
"""

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from rich.console import Console

from tokendance.bench.arms import (
    DTYPES,
    answer_params,
    load,
    make_engines,
    run_checked,
    started_vllm,
    timed_spec,
    vllm_round,
)
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult, between, in_turn, ratio, spread
from tokendance.bench.vllm import VLLM
from tokendance.bench.workload import RoundWorkload, generate_workload
from tokendance.errors import ConfigError
from tokendance.llm import LLM
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
    """One thing that is timed.

    Attributes:
        mode: its name.
        dtype: of the model.
        prompt_tokens: of the last run; likewise the next.
        computed_tokens: prompt tokens computed.
        seconds: of its counted runs.
        vs_collective: ratio to the runs of `collective` beside them, where each is in its faster
            dtype.
    """

    mode: str
    dtype: str
    prompt_tokens: int = 0
    computed_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    vs_collective: float | None = None


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    models = {dtype: load(settings, dtype) for dtype in DTYPES}
    small, large, notes = _sizes(settings, models["bfloat16"].shape.max_context)
    table = LiveTable(console, "prefill of a round, private parts cached", _COLUMNS)
    rows: list[Row] = []
    best_dtype: dict[str, str] = {}

    def show(size: int, arms: list[_Arm]) -> None:
        new = [_row(size, arm) for arm in arms]
        rows.extend(new)
        for row in new:
            table.add(row)

    room = small[-1] * _longest(small[-1])
    token_bytes = models["bfloat16"].shape.kv_bytes_per_token(models["bfloat16"].dtype)
    engines = {
        dtype: make_engines(model, settings.engine, MODES, room) for dtype, model in models.items()
    }
    with started_vllm(
        settings,
        console,
        max_context=_longest(small[-1]),
        num_tokens=2 * room,
        token_bytes=token_bytes,
    ) as vllm:
        if vllm is not None:
            notes.append(vllm.settings)
        for size in small:
            round_ = _Round.write(settings, size, engines, keep=True)
            with console.status(f"Rounds of {size} agents in turn ..."):
                arms = _time_in_turn(round_, _arms(size, {}), vllm, settings.repeats)
            show(size, arms)
            best_dtype = _fastest_dtypes(arms)
    del engines, round_
    for size in large:
        # Dense copies for so many agents fit into memory once.
        arms = _arms(size, best_dtype)
        used = [dtype for dtype in DTYPES if dtype in {arm.dtype for arm in arms}]
        big = {
            dtype: make_engines(
                models[dtype], settings.engine, MODES, size * _longest(size), one_memory=True
            )
            for dtype in used
        }
        round_ = _Round.write(settings, size, big, keep=False)
        with console.status(f"Rounds of {size} agents; this takes the better part of an hour ..."):
            _time_between(round_, arms)
        show(size, arms)
    return SuiteResult("prefill", settings.model, rows, _headline(rows), notes)


def _sizes(
    settings: BenchSettings, max_context: int
) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    """Numbers of agents that are timed in turn and those timed once, as far as the context goes.

    Returns:
        Both, and notes for the reader.

    Raises:
        ConfigError: if there is room for none.
    """
    notes = _notes(settings)
    if settings.tiny:
        return (2, 3), (4,), notes
    fitting = [size for size in (*SMALL, *LARGE) if _longest(size) <= max_context]
    if not fitting:
        raise ConfigError(
            f"The context of {settings.model} ({max_context} tokens) is too short for this suite."
        )
    for size in (*SMALL, *LARGE):
        if size not in fitting:
            notes.append(f"{size} agents are left out: the context holds {max_context} tokens.")
    return (
        tuple(size for size in SMALL if size in fitting),
        tuple(size for size in LARGE if size in fitting),
        notes,
    )


def _longest(agents: int) -> int:
    """Room for a prompt of a round: private part, what so many agents have said, the task."""
    return 1200 + 110 * agents


@dataclass(frozen=True, slots=True)
class _Round:
    """A round and the engines that compute it.

    Attributes:
        workload: the texts.
        engines: by dtype and mode.
        keep: whether engines keep the private parts between runs, having memory of their own.
    """

    workload: RoundWorkload
    engines: Mapping[str, Mapping[str, LLM]]
    keep: bool

    @classmethod
    def write(
        cls,
        settings: BenchSettings,
        agents: int,
        engines: Mapping[str, Mapping[str, LLM]],
        *,
        keep: bool,
    ) -> Self:
        """Let the model write the blocks."""
        writer = next(iter(engines.values()))["prefix"]
        return cls(generate_workload(writer, timed_spec(settings, agents)), engines, keep)


def _arms(agents: int, best_dtype: Mapping[str, str]) -> list[_Arm]:
    """What is timed at a size: all dtypes for few agents, each mode's faster one for many."""
    return [
        _Arm(mode, dtype)
        for mode in (*MODES, "floor", PLAIN_PASS)
        for dtype in DTYPES
        if (mode != "none" or (agents <= NONE_UP_TO and dtype == "bfloat16"))
        and (agents <= BOTH_DTYPES_UP_TO or dtype == best_dtype[mode])
    ]


def _time_in_turn(round_: _Round, arms: list[_Arm], vllm: VLLM | None, repeats: int) -> list[_Arm]:
    """Time arms in turn, vLLM among them if it is there; return all of them."""
    kinds = {arm: partial(_time, arm, round_) for arm in arms}
    if vllm is not None:
        theirs = _Arm("vllm", "bfloat16")
        kinds[theirs] = partial(_time_vllm, theirs, vllm, round_)
    for arm, seconds in in_turn(kinds, repeats).items():
        arm.seconds = seconds
    best_dtype = _fastest_dtypes(kinds)
    best = {arm.mode: arm for arm in kinds if best_dtype[arm.mode] == arm.dtype}
    for arm in best.values():
        arm.vs_collective = ratio(arm.seconds, best["collective"].seconds)
    return list(kinds)


def _time_between(round_: _Round, arms: list[_Arm]) -> None:
    """Time each arm once, between two runs of `collective`."""
    kinds = {arm: partial(_time, arm, round_) for arm in arms}
    ours = next(arm for arm in arms if arm.mode == "collective")
    found, ratios = between(kinds, ours)
    for arm in arms:
        arm.seconds, arm.vs_collective = found[arm], ratios[arm]


def _time(arm: _Arm, round_: _Round) -> float:
    """Seconds of one prefill, the private parts computed before."""
    engines, workload = round_.engines[arm.dtype], round_.workload
    if arm.mode == PLAIN_PASS:
        return _time_plain_pass(arm, engines["none"], workload)
    llm = engines[arm.mode]
    workload.warm(llm, keep=round_.keep)
    result = run_checked(llm, workload.prompts(), 1)
    arm.prompt_tokens = result.stats.prompt_tokens
    arm.computed_tokens = result.stats.computed_tokens
    return result.stats.prefill_s


def _time_plain_pass(arm: _Arm, llm: LLM, workload: RoundWorkload) -> float:
    """Seconds of S + N t tokens without anybody's context: the run alone, and each task alone."""
    llm.engine.forget()
    encoded = workload.encoded(llm)
    run = np.concatenate([part.token_ids for part in encoded[0].segments if part.shared])
    prompts = [run.tolist(), *(prompt.segments[-1].token_ids.tolist() for prompt in encoded)]
    start = time.perf_counter()
    outputs = llm.generate(prompts, answer_params(1))
    seconds = time.perf_counter() - start
    assert all(output.error is None for output in outputs)
    arm.prompt_tokens = arm.computed_tokens = sum(map(len, prompts))
    return seconds


def _time_vllm(arm: _Arm, vllm: VLLM, round_: _Round) -> float:
    llm = round_.engines["bfloat16"]["prefix"]
    result = vllm_round(vllm, llm, round_.workload, 1)
    arm.prompt_tokens = sum(map(len, round_.workload.encoded(llm)))
    arm.computed_tokens = arm.prompt_tokens - sum(result.cached_tokens)
    return result.seconds


def _fastest_dtypes(arms: Iterable[_Arm]) -> dict[str, str]:
    """The dtype in which each mode is fastest."""
    ranked = sorted(arms, key=lambda arm: -statistics.median(arm.seconds))
    return {arm.mode: arm.dtype for arm in ranked}  # the last, fastest, stays


def _row(agents: int, arm: _Arm) -> Row:
    return {
        "agents": agents,
        "mode": arm.mode,
        "dtype": arm.dtype,
        "prompt_tokens": arm.prompt_tokens,
        "computed_tokens": arm.computed_tokens,
        **spread(arm.seconds),
        "seconds": arm.seconds,
        "vs_collective": arm.vs_collective,
    }


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
        plain = found.get((agents, PLAIN_PASS))
        headline[f"plain_pass_ratio_{agents}"] = None if plain is None else 1 / plain
    headline["speedup_vs_vllm_10"] = found.get((10, "vllm"))
    return headline


def _notes(settings: BenchSettings) -> list[str]:
    notes = [
        "Computed tokens of pic and pic-batched are those computed in all layers; the first layer "
        "computes every token, and the second its queries, keys and values.",
        f"Rounds of more than {BOTH_DTYPES_UP_TO} agents: each mode in its faster dtype, one run "
        "between two of collective.",
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
