"""`plain --engine vllm`: what TokenDance inside vLLM costs where there are no rounds.

Prompts that have nothing in common, all at once, and lone requests, a short one and a long one; 32
tokens of answer each, and nothing in the prefix cache. Lone ones run four times as often.
"""

import random
from functools import partial
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import load
from tokendance.bench.inside import INSIDE, PLAIN, started_pair, time_in_turn
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, ratio
from tokendance.bench.vllm import VLLM, VLLMResult

ANSWER_TOKENS = 32
_COLUMNS = {
    "prompts": "prompts",
    "mode": "vLLM",
    "computed_tokens": "computed",
    "median": "seconds",
    "min": "min",
    "max": "max",
    "vs_plain": "of plain time",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    model = load(settings)
    lengths = [30, 60] if settings.tiny else [50 + 100 * index for index in range(10)]
    rng = random.Random(settings.seed)
    kinds = {"lone short": lengths[:1], "lone long": lengths[-1:], "distinct": lengths}
    headline: dict[str, float | None] = {}
    notes: list[str] = []
    with started_pair(
        settings.model,
        console,
        model,
        notes,
        max_context=lengths[-1] + 64,
        num_tokens=2 * (sum(lengths) + 64 * len(lengths)),
    ) as engines:
        table = LiveTable(console, "without rounds, inside vLLM", _COLUMNS)
        for kind, sizes in kinds.items():
            # Random tokens: no two prompts have any text in common.
            prompts = [rng.choices(range(10, model.shape.vocab_size), k=size) for size in sizes]
            repeats = settings.repeats if len(sizes) > 1 else 4 * settings.repeats
            with console.status(f"{kind}: in turn ..."):
                timed = time_in_turn(
                    {name: partial(_answer, vllm, prompts) for name, vllm in engines.items()},
                    repeats,
                )
            for name, runs in timed.items():
                share = ratio(runs.seconds, timed[PLAIN].seconds)
                table.add({"prompts": kind, "mode": name, **runs.row(), "vs_plain": share})
                if name == INSIDE:
                    headline[f"time_{kind.replace(' ', '_')}"] = share
    return SuiteResult("plain", settings.model, table.rows, headline, notes)


def _answer(vllm: VLLM, prompts: list[list[int]]) -> VLLMResult:
    vllm.reset()
    return vllm.run(prompts, ANSWER_TOKENS)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds, a group of bars for each kind of prompts."""
    title = f"Without rounds, inside vLLM, {result.model}"
    draw_bars(path, result.rows, "mode", "prompts", "median", title=title, y_label="seconds")
