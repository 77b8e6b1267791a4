"""What `tokendance run` prints and writes."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokendance.engine.shadow import ShadowReport
from tokendance.llm import LLM
from tokendance.models.loader import dtype_name
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
    for one in done:
        table.add_row(str(one.number), *(show(one.result.stats) for show in _COLUMNS.values()))
    console.print()
    console.print(table)
    console.print()


def print_summary(done: Sequence[DoneRound], llm: LLM, console: Console) -> None:
    """Print what was computed, and what prefix caching would have computed."""
    prompt = sum(one.result.stats.prompt_tokens for one in done)
    computed, prefix = _computed(done), sum(one.prefix_tokens for one in done)
    console.print(
        f"Of {prompt:,} prompt tokens {computed:,} were computed ({reuse_name(llm)}). "
        f"Prefix caching would have computed {prefix:,} for the same rounds, "
        f"{prefix / max(computed, 1):.1f} times as many."
    )
    later = done[1:]
    if _computed(later):
        prefix = sum(one.prefix_tokens for one in later)
        console.print(
            f"Without the first round, in which nobody has heard anybody yet: {prefix:,} against "
            f"{_computed(later):,}, {prefix / _computed(later):.1f} times as many."
        )


def _computed(done: Sequence[DoneRound]) -> int:
    return sum(one.result.stats.computed_tokens for one in done)


def print_shadows(reports: Sequence[ShadowReport], num_dropped: int, console: Console) -> None:
    """Print how far some mirrors were from exact computation."""
    if not reports:
        console.print("No mirror was drawn to be computed again.")
        return
    mean = statistics.mean
    dropped = f" ({num_dropped} more had to give way)" if num_dropped else ""
    console.print(
        f"{len(reports)} mirrors were computed again, exactly{dropped}: KL divergence of the next "
        f"token {mean(one.kl_next for one in reports):.4f}, over the answers' first tokens "
        f"{mean(one.kl for one in reports):.4f} (worst {max(one.kl for one in reports):.4f}); "
        f"the same token first in {mean(one.top1 for one in reports):.1%}."
    )


def document(
    llm: LLM, done: Sequence[DoneRound], shadows: Sequence[ShadowReport]
) -> dict[str, Any]:
    """Make the document of `--json`."""
    return {
        "model": llm.model.name,
        "reuse": llm.engine.config.reuse,
        "correction": _correction_name(llm),
        "dtype": dtype_name(llm.model.dtype),
        "threads": torch.get_num_threads(),
        "rounds": [
            {
                "round": one.number,
                "agents": one.result.stats.agents,
                "prompt_tokens": one.result.stats.prompt_tokens,
                "computed_tokens": one.result.stats.computed_tokens,
                "reused_tokens": one.result.stats.reused_tokens,
                "corrected_tokens": one.result.stats.corrected_tokens,
                "generated_tokens": one.result.stats.generated_tokens,
                "prefix_caching_tokens": one.prefix_tokens,
                "prefill_s": one.result.stats.prefill_s,
                "decode_s": one.result.stats.decode_s,
                "kv_bytes": {
                    "dense": one.result.stats.kv_bytes.dense,
                    "resident": one.result.stats.kv_bytes.resident,
                },
            }
            for one in done
        ],
        "shadows": [asdict(one) for one in shadows],
        "outputs": [
            {
                "round": one.number,
                "agent": output.agent,
                "text": output.text,
                "token_ids": list(output.token_ids),
                "error": None if output.error is None else str(output.error),
            }
            for one in done
            for output in one.result.outputs
        ],
    }


def reuse_name(llm: LLM) -> str:
    """Say what is reused and corrected."""
    correction = _correction_name(llm)
    reuse = f"reuse {llm.engine.config.reuse}"
    return reuse if correction is None else f"{reuse}, correction {correction}"


def _correction_name(llm: LLM) -> str | None:
    """The spec of the correction; None where nothing is corrected."""
    config = llm.engine.config
    return config.correction.spec if config.reuse == "collective" else None
