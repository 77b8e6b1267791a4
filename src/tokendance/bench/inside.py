"""TokenDance inside vLLM, beside the same vLLM without it: what suites of `--engine vllm` share.

Both are real engines with the same settings, each in a process of its own. They take turns, so
neither computes while the other does. Clients say nothing of rounds: prompts go in as token ids.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tokendance.bench.suite import Row, in_turn, spread
from tokendance.bench.vllm import VLLM, VLLMConfig, VLLMResult
from tokendance.models.loader import LoadedModel, checkpoint_source

if TYPE_CHECKING:
    from rich.console import Console

PLAIN, INSIDE = "vllm", "vllm + tokendance"


@dataclass(slots=True, eq=False)
class Timed:
    """Runs of one engine; all figures but `seconds` are of the last.

    Attributes:
        seconds: of each counted run.
        last: what the last run gave.
    """

    seconds: list[float] = field(default_factory=list)
    last: VLLMResult | None = None

    def row(self) -> Row:
        """What tables and JSON lines have of it."""
        assert self.last is not None
        return {
            **spread(self.seconds),
            "seconds": self.seconds,
            "computed_tokens": self.last.computed_tokens,
            "peak_blocks": self.last.peak_blocks,
        }


@contextmanager
def started_pair(
    settings_model: str,
    console: "Console",
    model: LoadedModel,
    notes: list[str],
    *,
    max_context: int,
    num_tokens: int,
    config: VLLMConfig | None = None,
) -> Iterator[Mapping[str, VLLM]]:
    """Start vLLM twice, without TokenDance and with it; by the names `PLAIN` and `INSIDE`.

    Args:
        settings_model: as the user names it.
        console: for what takes minutes.
        model: loaded.
        notes: get vLLM's settings.
        max_context: longest prompt with its answer, in tokens.
        num_tokens: room for KV.
        config: further settings of both.

    Raises:
        BaselineError: if vLLM is not installed or does not start, or does not serve the model
            with TokenDance inside; it says why.
    """
    folder = Path(checkpoint_source(settings_model))
    dtype = str(model.dtype).removeprefix("torch.")
    config = replace(
        config or VLLMConfig(),
        dtype=dtype,
        max_context=max_context,
        kv_bytes=num_tokens * model.shape.kv_bytes_per_token(model.dtype),
    )
    # That with TokenDance first: it is refused where it does not fit.
    console.print("Starting vLLM twice; it compiles the model, which takes minutes.")
    with VLLM(folder, replace(config, plugin=True)) as inside, VLLM(folder, config) as plain:
        notes.append(plain.settings)
        yield {PLAIN: plain, INSIDE: inside}


def time_in_turn(
    engines: Mapping[str, VLLM], run: Callable[[VLLM], VLLMResult], repeats: int
) -> dict[str, Timed]:
    """Time what `run` does with each engine, in turn, after a turn that does not count."""
    timed = {name: Timed() for name in engines}

    def seconds(name: str) -> float:
        result = timed[name].last = run(engines[name])
        return result.seconds

    kinds = {name: (lambda name=name: seconds(name)) for name in engines}
    for name, values in in_turn(kinds, repeats).items():
        timed[name].seconds = values
    return timed
