"""`plain`: the engine without any reuse against transformers' own forward pass.

It says whether the ground that all modes stand on is sound: a few prompts of text, computed whole,
by `none` in one call and by transformers with SDPA prompt by prompt, without its cache and with
the last token's logits only, which is the fastest that it offers.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from tokendance.bench.arms import DTYPES, answer_params, load, make_engines
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, Row, SuiteResult, in_turn, ratio, spread
from tokendance.llm import LLM
from tokendance.models.loader import checkpoint_source, quiet
from tokendance.rounds.trace import example_trace, read_trace

_COLUMNS = {
    "mode": "mode",
    "dtype": "dtype",
    "tokens": "tokens",
    "median": "ms a token",
    "min": "min",
    "max": "max",
    "speedup": "speed-up",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    lengths = (30, 60) if settings.tiny else (300, 600, 900, 1200)
    table = LiveTable(console, "prompts computed whole", _COLUMNS)
    rows: list[Row] = []
    headline: dict[str, float | None] = {}
    for dtype in DTYPES:
        model = load(settings, dtype)
        with quiet():
            theirs = AutoModelForCausalLM.from_pretrained(
                checkpoint_source(settings.model), dtype=model.dtype, attn_implementation="sdpa"
            ).eval()
        ours = make_engines(model, settings.engine, ["none"], 2 * sum(lengths))["none"]
        prompts = _prompts(ours, lengths)
        times = in_turn(
            {
                "transformers": partial(_transformers_seconds, theirs, prompts),
                "none": partial(_our_seconds, ours, prompts),
            },
            settings.repeats,
        )
        speedup = ratio(times["transformers"], times["none"])
        headline[f"speedup_vs_transformers_{dtype}"] = speedup
        for mode, seconds in times.items():
            row = {"mode": mode, "dtype": dtype, "tokens": sum(lengths)}
            row |= spread([1000 * one / sum(lengths) for one in seconds])
            row["speedup"] = speedup if mode == "none" else None
            rows.append(row)
            table.add(row)
    notes = ["A tiny run: the figures mean nothing."] if settings.tiny else []
    return SuiteResult("plain", settings.model, rows, headline, notes)


def _prompts(llm: LLM, lengths: tuple[int, ...]) -> list[list[int]]:
    """Different stretches of the example town's text."""
    people = read_trace(example_trace()).agents.values()
    text = llm.encoder.text_ids("\n".join(person.system for person in people)).tolist()
    starts = [sum(lengths[:index]) % (len(text) // 2) for index in range(len(lengths))]
    return [(text + text)[at : at + size] for at, size in zip(starts, lengths, strict=True)]


def _our_seconds(llm: LLM, prompts: list[list[int]]) -> float:
    start = time.perf_counter()
    outputs = llm.generate(prompts, answer_params(1))
    seconds = time.perf_counter() - start
    assert all(output.error is None for output in outputs)
    return seconds


def _transformers_seconds(model: Any, prompts: list[list[int]]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


def plot(result: SuiteResult, path: Path) -> None:
    """Draw milliseconds per token, a group of bars per dtype."""
    bars: dict[str, dict[str, float]] = {}
    for row in result.rows:
        bars.setdefault(row["mode"], {})[row["dtype"]] = round(row["median"], 3)
    draw_bars(path, bars, title=f"Plain prefill, {result.model}", y_label="ms per token")
