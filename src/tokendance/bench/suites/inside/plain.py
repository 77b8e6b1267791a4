"""`plain --engine vllm`: what TokenDance inside vLLM costs where there are no rounds.

Prompts that have nothing in common, all at once, and a lone request; 32 tokens of answer each, and
nothing in the prefix cache.
"""

import random
from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import load, make_engine
from tokendance.bench.inside import INSIDE, PLAIN, started_pair, time_in_turn
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, ratio
from tokendance.bench.vllm import VLLM, VLLMResult

ANSWER_TOKENS = 32
_COLUMNS = {
    "prompts": "prompts",
    "mode": "engine",
    "computed_tokens": "computed",
    "median": "seconds",
    "min": "min",
    "max": "max",
    "vs_vllm": "of plain time",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    model = load(settings)
    lengths = [30, 60] if settings.tiny else [150 + 100 * index for index in range(10)]
    rng = random.Random(settings.seed)
    vocabulary = make_engine(model, settings.engine, "none", 64).model.shape.vocab_size
    kinds = {
        "a lone one": [lengths[-1]],
        "distinct": lengths,
    }
    table = LiveTable(console, "without rounds, inside vLLM", _COLUMNS)
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
        for kind, sizes in kinds.items():
            # Random tokens: no two prompts have any text in common.
            prompts = [[rng.randrange(10, vocabulary) for _ in range(size)] for size in sizes]

            def answer(vllm: VLLM, prompts: list[list[int]] = prompts) -> VLLMResult:
                vllm.reset()
                return vllm.run(prompts, ANSWER_TOKENS)

            timed = time_in_turn(engines, answer, settings.repeats)
            for name, runs in timed.items():
                share = ratio(runs.seconds, timed[PLAIN].seconds)
                table.add({"prompts": kind, "mode": name, **runs.row(), "vs_vllm": share})
            key = kind.removeprefix("a ").replace(" ", "_")
            headline[f"time_{key}"] = ratio(timed[INSIDE].seconds, timed[PLAIN].seconds)
    return SuiteResult("plain", settings.model, table.rows, headline, notes)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds, a group of bars for each kind of prompts."""
    title = f"Without rounds, inside vLLM, {result.model}"
    draw_bars(path, result.rows, "mode", "prompts", "median", title=title, y_label="seconds")
