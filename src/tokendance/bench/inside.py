"""TokenDance inside vLLM, beside the same vLLM without it: what suites of `--engine vllm` share.

Both are real engines with the same settings, each in a process of its own. They take turns, so
neither computes while the other does. Prompts go in as token ids. Clients say nothing of rounds;
where suites have a row `TAGGED`, they name the blocks, as a client may.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokendance.bench.rivals import vllm_round
from tokendance.bench.suite import Row, in_turn, spread
from tokendance.bench.vllm import VLLM, VLLMConfig, VLLMResult
from tokendance.bench.workload import RoundWorkload
from tokendance.llm import LLM
from tokendance.models.loader import LoadedModel, checkpoint_source

if TYPE_CHECKING:
    from rich.console import Console

PLAIN, INSIDE, TAGGED = "plain", "inside", "tagged"


@dataclass(slots=True, eq=False)
class Timed:
    """Runs of one kind.

    Attributes:
        seconds: of each counted run.
        last: what the last run gave; the others computed as much.
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
    config = replace(
        config or VLLMConfig(),
        dtype=str(model.dtype).removeprefix("torch."),
        max_context=max_context,
        kv_bytes=num_tokens * model.shape.kv_bytes_per_token(model.dtype),
    )

    def start(kind: str, *, plugin: bool) -> VLLM:
        console.print(f"Starting vLLM, {kind}. It compiles the model: a minute, or two.")
        return VLLM(folder, replace(config, plugin=plugin))

    # That with TokenDance first: it is refused where it does not fit.
    with start(INSIDE, plugin=True) as inside, start(PLAIN, plugin=False) as plain:
        notes.append(plain.settings)
        yield {PLAIN: plain, INSIDE: inside}


def rounds(
    engines: Mapping[str, VLLM],
    llm: LLM,
    workload: RoundWorkload,
    num_tokens: int,
    *,
    together: bool = False,
) -> dict[str, Callable[[], VLLMResult]]:
    """What runs a round, private parts cached, in each kind; `llm` encodes it.

    `together`: see `warm_vllm`.
    """

    def of(engine: str, *, tagged: bool = False) -> Callable[[], VLLMResult]:
        return partial(
            vllm_round, engines[engine], llm, workload, num_tokens, tagged=tagged, together=together
        )

    return {PLAIN: of(PLAIN), INSIDE: of(INSIDE), TAGGED: of(INSIDE, tagged=True)}


def time_in_turn(
    kinds: Mapping[str, Callable[[], VLLMResult]], repeats: int, warm_up: int = 1
) -> dict[str, Timed]:
    """Time kinds of runs in turn, after `warm_up` turns that do not count."""
    timed = {name: Timed() for name in kinds}

    def seconds(name: str) -> float:
        result = timed[name].last = kinds[name]()
        return result.seconds

    turns = {name: (lambda name=name: seconds(name)) for name in kinds}
    for name, values in in_turn(turns, repeats, warm_up).items():
        timed[name].seconds = values
    return timed
