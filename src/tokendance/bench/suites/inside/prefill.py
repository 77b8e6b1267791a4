"""`prefill --engine vllm`: seconds of a round's prefill, and the KV blocks that it holds.

Rounds are those of `prefill`: every agent's private part is in the prefix cache before the clock
starts, and nothing else is; the answer is one token. Clients say nothing of the round, or name its
blocks (`tagged`): then the edges of each are corrected, where discovery finds all of it as one.

KV blocks are those that are held at most while all agents answer with 32 tokens, in a round more.
As private parts are computed one by one here, what they have in common lies in the blocks of each.
Where agents begin together, as they do where nobody measures, it is found like all else that they
share: the blocks of such a round are counted, too (`together`).
"""

from pathlib import Path

from rich.console import Console

from tokendance.bench.arms import context_too_short, load, make_engine, timed_spec
from tokendance.bench.inside import INSIDE, PLAIN, TAGGED, rounds, started_pair, time_in_turn
from tokendance.bench.plots import draw_lines
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, ratio
from tokendance.bench.suites.capacity import ANSWER_TOKENS
from tokendance.bench.workload import generate_workload

SIZES = (10, 25)
TINY_SIZES = (2, 3)
_COLUMNS = {
    "agents": "agents",
    "mode": "vLLM",
    "prompt_tokens": "prompt",
    "computed_tokens": "computed",
    "median": "seconds",
    "min": "min",
    "max": "max",
    "vs_plain": "times faster",
    "blocks": "KV blocks",
    "blocks_together": "together",
}


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    model = load(settings)
    sizes = TINY_SIZES if settings.tiny else SIZES
    longest = 1200 + 110 * sizes[-1]
    if longest > model.shape.max_context:
        raise context_too_short(model)
    room = sizes[-1] * longest
    writer = make_engine(model, settings.engine, "prefix", room)
    headline: dict[str, float | None] = {}
    notes: list[str] = []
    with started_pair(
        settings.model, console, model, notes, max_context=longest, num_tokens=2 * room
    ) as engines:
        table = LiveTable(console, "prefill of a round inside vLLM, private parts cached", _COLUMNS)
        for size in sizes:
            with console.status(f"{size} agents: the model writes their texts ..."):
                workload = generate_workload(writer, timed_spec(settings, size))
            with console.status(f"{size} agents: rounds in turn ..."):
                for warm_up in rounds(engines, writer, workload.head(2), 1).values():
                    warm_up()
                kinds = rounds(engines, writer, workload, 1)
                timed = time_in_turn(kinds, settings.repeats, warm_up=0)
                blocks, blocks_together = (
                    {
                        name: answer().peak_blocks
                        for name, answer in rounds(
                            engines, writer, workload, ANSWER_TOKENS, together=together
                        ).items()
                    }
                    for together in (False, True)
                )
            num_prompt = sum(map(len, workload.encoded(writer)))
            for name, runs in timed.items():
                faster = ratio(timed[PLAIN].seconds, runs.seconds)
                row = {"agents": size, "mode": name, "prompt_tokens": num_prompt, **runs.row()}
                held = {"blocks": blocks[name], "blocks_together": blocks_together[name]}
                table.add(row | {"vs_plain": faster} | held)
            for key, name in (("inside", INSIDE), ("tagged", TAGGED)):
                headline[f"speedup_{key}_{size}"] = ratio(timed[PLAIN].seconds, timed[name].seconds)
                headline[f"blocks_{key}_{size}"] = blocks[name] / blocks[PLAIN]
                headline[f"blocks_{key}_{size}_together"] = (
                    blocks_together[name] / blocks_together[PLAIN]
                )
    return SuiteResult("prefill", settings.model, table.rows, headline, notes)


def plot(result: SuiteResult, path: Path) -> None:
    """Draw seconds by agents, a line per kind."""
    title = f"Prefill of a round inside vLLM, {result.model}"
    draw_lines(path, result.rows, "mode", "agents", "median", title=title, y_label="seconds")
