"""What a user chooses of the suites. Imported by the command line, so it imports little itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tokendance.options import DEFAULT_MODEL, EngineOptions, check_range

SuiteName = Literal[
    "attention",
    "plain",
    "prefill",
    "decode",
    "storage",
    "restore",
    "capacity",
    "fidelity",
    "corrections",
    "rounds",
    "weights",
    "leak",
    "serve",
    "view",
]
SUITES: tuple[SuiteName, ...] = get_args(SuiteName)
Rival = Literal["vllm", "llamacpp"]
# The suites that have a place for another engine.
RIVAL_SUITES: Mapping[Rival, tuple[SuiteName, ...]] = {
    "vllm": ("prefill", "decode", "capacity"),
    "llamacpp": ("prefill", "decode"),
}
INSIDE_SUITES: tuple[SuiteName, ...] = ("plain", "prefill", "decode", "capacity", "fidelity")
Size = Literal["tiny", "full"]


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What a user chooses of a suite.

    Attributes:
        model: an alias, a folder, or a Hugging Face hub id.
        size: full is what docs/benchmarks.md shows; tiny runs every line in seconds, and its
            figures mean nothing.
        repeats: counted runs of each kind in prefill, plain and view; in fidelity, corrections
            and rounds, workloads of other seeds; in leak, times 28 trials of each kind.
        seed: of texts, lengths and orders.
        source: of private texts and what agents say, in prefill, capacity, fidelity,
            corrections and rounds: town, the example, or a trace with personas.
        against: measure this engine too, in its own environment (make vllm, make llamacpp), where
            a suite has a place for it.
        inside: measure TokenDance inside this engine, against the same one without it.
        engine: what all engines of a suite have in common; it sets the rest itself.
    """

    model: str = DEFAULT_MODEL
    size: Size = "full"
    repeats: int = 3
    seed: int = 0
    source: str = "town"
    against: Rival | None = None
    inside: Literal["vllm"] | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        check_range(self, 1, "repeats")

    @property
    def tiny(self) -> bool:
        """Whether only the shape of the results counts."""
        return self.size == "tiny"


@dataclass(frozen=True, slots=True)
class BenchOutputs:
    """Where the results go, besides the screen.

    Attributes:
        json: write the JSON line to this file.
        plot: draw the figures into this SVG file.
        out: folder for JSON, plots and the report of all suites, with `all`.
    """

    json: Path | None = None
    plot: Path | None = None
    out: Path | None = None
