"""What a user chooses of `tokendance run`. Imported by the command line, so it imports little."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from tokendance.options import DEFAULT_MODEL, check_range

LIVE_ROUNDS = 3
LIVE_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The rounds of `tokendance run`; None leaves a choice to the kind of trace.

    Attributes:
        trace: personas are run live, recorded rounds are replayed with the recorded answers; the
            example town if left out.
        model: an alias, a folder, or a Hugging Face hub id.
        agents: use the first so many agents of the trace.
        rounds: rounds to run. Live rounds: 3 if left out; recorded: all.
        max_tokens: longest answer. Live rounds: 64 if left out; recorded: as long as recorded.
        temperature: 0 always takes the likeliest token.
        seed: of the random numbers, with a temperature.
        session: name of the session, with --store. Each round is on disk when it is shown, and the
            same name goes on where it stopped, in --rounds more rounds.
        json: write figures and answers to this file.
        record: write the run to this file, for `tokendance view`: who read and computed what, when,
            and in which memory.
        record_text: whether the texts of prompts and answers are in it.
        view: show the run in a browser of this machine while it goes on, and until Ctrl-C.
        quiet: leave out progress, and the bars of what each agent computed and read. Bars are in
            letters where there is no colour, and where the output is no terminal.
    """

    trace: Path | None = None
    _: KW_ONLY
    model: str = DEFAULT_MODEL
    agents: int | None = None
    rounds: int | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    session: str | None = None
    json: Path | None = None
    record: Path | None = None
    record_text: bool = True
    view: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_range(self, 1, "agents", "rounds", "max_tokens")
        check_range(self, 0, "temperature")
