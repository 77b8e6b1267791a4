"""What `tokendance run` prints and writes."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokendance.fidelity.shadow import ShadowReport
from tokendance.llm import LLM
from tokendance.outputs import RoundResult, RoundStats


@dataclass(frozen=True, slots=True)
class DoneRound:
    """A round that was run, and what prefix caching would have computed for it."""

    number: int
    result: RoundResult
    prefix_tokens: int


def print_words(result: RoundResult, console: Console) -> None:
    """Print what each agent said, or why it said nothing."""
    for output in result.outputs:
        if output.error is None:
            words = escape(output.text.strip())
        else:
            words = f"[red]{escape(str(output.error))}[/red]"
        console.print(f"[bold]{escape(output.agent)}[/bold]: {words}", highlight=False)


# Headings of two lines: the table fits 80 columns.
_COLUMNS: dict[str, Callable[[RoundStats], str]] = {
    "prompt\ntokens": lambda s: f"{s.prompt_tokens:,}",
    "\ncomputed": lambda s: f"{s.computed_tokens:,}",
    "\nreused": lambda s: f"{s.reused_tokens:,}",
    "\ncorrected": lambda s: f"{s.corrected_tokens:,}",
    "\ngenerated": lambda s: f"{s.generated_tokens:,}",
    "prefill\nseconds": lambda s: f"{s.prefill_s:.2f}",
    "decode\nseconds": lambda s: f"{s.decode_s:.2f}",
    "KV MiB\ndense": lambda s: f"{s.kv_bytes.dense / 2**20:,.1f}",
    "KV MiB\nresident": lambda s: f"{s.kv_bytes.resident / 2**20:,.1f}",
}


def print_table(done: Sequence[DoneRound], console: Console) -> None:
    """Print tokens, seconds and KV memory of each round."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("\nround", *_COLUMNS):
        table.add_column(name, justify="right", no_wrap=True)
    for done_round in done:
        stats = done_round.result.stats
        table.add_row(str(done_round.number), *(show(stats) for show in _COLUMNS.values()))
    console.print()
    console.print(table)
    console.print()


def print_summary(done: Sequence[DoneRound], llm: LLM, console: Console) -> None:
    """Print what was computed, and what prefix caching would have computed."""
    prompt = sum(done_round.result.stats.prompt_tokens for done_round in done)
    computed, prefix = _sums(done)
    console.print(
        f"Of {prompt:,} prompt tokens {computed:,} were computed ({reuse_name(llm)}). "
        f"Prefix caching would have computed {prefix:,} for the same rounds, "
        f"{prefix / max(computed, 1):.1f} times as many."
    )
    computed, prefix = _sums(done[1:])
    if computed:
        console.print(
            f"Without the first round, in which nobody has heard anybody yet: {prefix:,} against "
            f"{computed:,}, {prefix / computed:.1f} times as many."
        )


def _sums(done: Sequence[DoneRound]) -> tuple[int, int]:
    """Tokens that were computed, and that prefix caching would have computed."""
    computed = sum(done_round.result.stats.computed_tokens for done_round in done)
    return computed, sum(done_round.prefix_tokens for done_round in done)


def print_shadows(reports: Sequence[ShadowReport], num_dropped: int, console: Console) -> None:
    """Print how far some mirrors were from exact computation."""
    if not reports:
        console.print("No mirror was drawn to be computed again.")
        return
    kl = [report.kl for report in reports]
    kl_next = statistics.mean(report.kl_next for report in reports)
    top1 = statistics.mean(report.top1 for report in reports)
    dropped = f" ({num_dropped} more had to give way)" if num_dropped else ""
    console.print(
        f"{len(reports)} mirrors were computed again, exactly{dropped}: KL divergence of the next "
        f"token {kl_next:.4f}, over the answers' first tokens {statistics.mean(kl):.4f} "
        f"(worst {max(kl):.4f}); the same token first in {top1:.1%}."
    )


def document(
    llm: LLM, done: Sequence[DoneRound], shadows: Sequence[ShadowReport]
) -> dict[str, Any]:
    """Make the document of `--json`."""
    return {
        "model": llm.model.name,
        "reuse": llm.engine.options.reuse,
        "correction": _correction_name(llm),
        "dtype": llm.model.precision,
        "threads": torch.get_num_threads(),
        "rounds": [
            {
                "round": done_round.number,
                **asdict(done_round.result.stats),
                "prefix_caching_tokens": done_round.prefix_tokens,
            }
            for done_round in done
        ],
        "shadows": [asdict(report) for report in shadows],
        "outputs": [
            {
                "round": done_round.number,
                "agent": output.agent,
                "text": output.text,
                "token_ids": list(output.token_ids),
                "error": None if output.error is None else str(output.error),
            }
            for done_round in done
            for output in done_round.result.outputs
        ],
    }


def reuse_name(llm: LLM) -> str:
    """Say what is reused and corrected."""
    correction = _correction_name(llm)
    reuse = f"reuse {llm.engine.options.reuse}"
    return reuse if correction is None else f"{reuse}, correction {correction}"


def _correction_name(llm: LLM) -> str | None:
    """The spec of the correction; None where nothing is corrected."""
    return llm.correction.spec if llm.engine.options.reuse == "collective" else None
