"""`plain`: the engine without any reuse against transformers' own forward pass.

It says whether the ground that all modes stand on is sound: a few prompts of text, computed whole,
by `none` in one call and by transformers with SDPA prompt by prompt, without its cache and with
the last token's logits only, which is the fastest that it offers.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from tokendance.bench.arms import DTYPES, generate_seconds, load, make_engine
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, in_turn, ratio, spread, timed
from tokendance.bench.workload import TOWN, read_people
from tokendance.llm import LLM
from tokendance.models.loader import checkpoint_source, quiet

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
    headline: dict[str, float | None] = {}
    for dtype in DTYPES:
        model = load(settings, dtype)
        with quiet():
            theirs = AutoModelForCausalLM.from_pretrained(
                checkpoint_source(settings.model), dtype=model.dtype, attn_implementation="sdpa"
            ).eval()
        ours = make_engine(model, settings.engine, "none", 2 * sum(lengths))
        prompts = _prompts(ours, lengths)
        times = in_turn(
            {
                "transformers": partial(_transformers_seconds, theirs, prompts),
                "none": partial(generate_seconds, ours, prompts, 1),
            },
            settings.repeats,
        )
        speedup = ratio(times["transformers"], times["none"])
        headline[f"speedup_vs_transformers_{dtype}"] = speedup
        for mode, seconds in times.items():
            row = {"mode": mode, "dtype": dtype, "tokens": sum(lengths)}
            row |= spread([1000 * run_s / sum(lengths) for run_s in seconds])
            table.add(row | {"speedup": speedup if mode == "none" else None})
    return SuiteResult("plain", settings.model, table.rows, headline)


def _prompts(llm: LLM, lengths: tuple[int, ...]) -> list[list[int]]:
    """Different stretches of the example town's text."""
    people = "\n".join(person.system for person in read_people(TOWN))
    text = llm.encoder.text_ids(people).tolist()
    starts = [sum(lengths[:index]) % (len(text) // 2) for index in range(len(lengths))]
    return [(text + text)[at : at + size] for at, size in zip(starts, lengths, strict=True)]


@torch.inference_mode()
def _transformers_seconds(model: Any, prompts: list[list[int]]) -> float:
    def work() -> None:
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt]), use_cache=False, logits_to_keep=1)

    return timed(work)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw milliseconds per token, a group of bars per dtype."""
    title = f"Plain prefill, {result.model}"
    draw_bars(path, result.rows, "mode", "dtype", "median", title=title, y_label="ms per token")
