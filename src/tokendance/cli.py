"""The command line: run rounds, serve, measure, calibrate, list models, examine what is here.

Options are the fields of dataclasses, whose docstrings are the help: `EngineOptions`, and the
settings of each command. What commands do is in `commands/`, imported when it is needed.
"""

import contextlib
import re
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, ArgumentCollection, CycloptsError, Group, Parameter
from cyclopts.config import Dict, Env
from rich.console import Console
from rich.text import Text

from tokendance import __version__
from tokendance.bench.settings import BenchOutputs, BenchSettings, Size, SuiteName
from tokendance.commands.address import check_address
from tokendance.commands.settings import RunSettings
from tokendance.commands.streams import standard_streams
from tokendance.errors import ConfigError, TokenDanceError
from tokendance.interrupts import INTERRUPTED, importing
from tokendance.options import DEFAULT_MODEL, EngineOptions
from tokendance.server.settings import ServerSettings
from tokendance.units import parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine(EngineOptions):
    """The same, where in Python there may be numbers and objects, as texts."""

    correction: Annotated[str | None, Parameter(metavar="POLICY")] = None
    kv_budget: Annotated[str | None, Parameter(metavar="SIZE")] = None
    store: Annotated[Path | None, Parameter(metavar="FOLDER")] = None
    store_budget: Annotated[str | None, Parameter(metavar="SIZE")] = None


_SUITE = Group("Suite", sort_key=1)
_ENGINE = Group("Engine", sort_key=2)  # after what is the command's own


def _flat(group: str | Group, only: str = "") -> Parameter:
    """The fields of a dataclass as options in a panel of their own.

    `only` is a pattern for the names of those that are options, and of the parameter itself.
    """
    if isinstance(group, str):
        group = Group(group, sort_key=1)
    return Parameter(name="*", group=group, parse=re.compile(rf"^({only})$") if only else None)


Model = Annotated[str, Parameter(help="an alias, a folder, or a Hugging Face hub id.")]
Engine = Annotated[_Engine, _flat(_ENGINE)]
Store = Annotated[Path, Parameter(metavar="FOLDER", help="folder of the store.")]

app = App(
    name="tokendance",
    help="Serve rounds of LLM agents that share the KV cache of what they all read.",
    version=__version__,
    help_format="markdown",
    default_parameter=Parameter(negative_iterable=()),
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    print_error=False,
    result_action="return_value",
)
store_app = App(
    name="store", help="Look at what sessions have left on disk, check it, and remove it."
)
app.command(store_app)


@app.command
def run(
    settings: Annotated[RunSettings, _flat("Rounds")] = RunSettings(), *, engine: Engine = _Engine()
) -> None:
    """Run rounds of agents that hear each other, and show what it cost.

    `tokendance run` lets a town of 12 talk; `tokendance run --agents 4 --reuse prefix` does the
    same as an engine with prefix caching would.
    """
    with importing():
        from tokendance.commands.run import run_trace

    run_trace(settings, engine, Console())


@app.command
def view(
    file: Annotated[Path, Parameter(help="a run that `tokendance run --record` has written.")],
    /,
    *,
    html: Annotated[
        Path | None,
        Parameter(help="write one file for any browser, without a server.", metavar="FILE"),
    ] = None,
    port: Annotated[int, Parameter(help="on this machine; 0 takes any that is free.")] = 8001,
    browser: Annotated[bool, Parameter(help="open it in a browser.")] = False,
) -> None:
    """Show a recorded run: who read what, whence it came, in which time and memory.

    `tokendance view run.json` serves it to browsers of this machine; `tokendance view run.json
    --html run.html` writes one file to keep or to send.
    """
    from tokendance.commands.view import serve_page, write_page

    if html is not None:
        write_page(file, html, Console())
    else:
        serve_page(file, port, Console(), open_browser=browser)


def _read_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take what is still open from the TOML file of --config, if one is given."""
    for token in arguments["--config"].tokens:
        try:
            values = tomllib.loads(Path(token.value).read_text(encoding="utf-8"))
        except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(
                f"{token.value} cannot be read: {error}. Give --config a TOML file."
            ) from error
        # At the top level a key that is a command's name, such as `store`, would be passed over.
        Dict({commands[-1]: values}, source=token.value)(app, commands, arguments)


@app.command(config=(Env("TOKENDANCE_", command=False, show=False), _read_file))
def serve(
    *,
    model: Model = DEFAULT_MODEL,
    config: Annotated[
        Path | None, Parameter(help="a TOML file with options, named as here: port = 8000.")
    ] = None,
    server: Annotated[ServerSettings, _flat("Server")] = ServerSettings(),
    engine: Engine = _Engine(),
) -> None:
    """Serve a model to any client of OpenAI's API; requests that come together make a round.

    Nothing has to change in a client but its base_url. `tokendance serve` serves the demo model on
    this machine. Ctrl-C finishes what is under way and stops; a second one ends that, too.

    Options may also stand in the environment, as TOKENDANCE_PORT for --port, and in a TOML file.
    The command line goes before the environment, and that before the file.
    """
    del config  # _read_file has
    try:
        with importing():
            from tokendance.commands.serve import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The server needs {error.name}, which is not installed. "
            "Run pip install 'tokendance[serve]'."
        ) from error
    check_address(server.host, server.port)
    serve(model, engine, server, Console())


@app.command
def bench(
    suite: Annotated[
        Literal[SuiteName, "all"],
        Parameter(
            help="attention: one layer. plain: without reuse, against transformers. "
            "prefill: seconds of a round. decode: tokens per second. storage: bytes per agent. "
            "restore: from a stored session to the first token. "
            "capacity: most agents in a time or a memory. "
            "fidelity: how near the answers are to full computation. "
            "corrections: what corrections cost and buy, by the number of agents. "
            "rounds: how near answers stay over the rounds of a session. "
            "weights: what dtypes and weights in bytes cost in what the model says. "
            "leak: what an agent can learn of another's private text. "
            "serve: what HTTP and finding shared text cost. "
            "view: what recording rounds costs. all: everything, with a report."
        ),
    ],
    /,
    *,
    settings: Annotated[
        BenchSettings, _flat(_SUITE, only="(?!engine$|inside$).*")
    ] = BenchSettings(),
    inside: Annotated[
        Literal["embedded", "vllm"],
        Parameter(
            name="--engine",
            group=_SUITE,
            help="vllm: TokenDance inside vLLM against the same vLLM without it (make vllm), in "
            "plain, prefill, decode, capacity and fidelity.",
        ),
    ] = "embedded",
    outputs: Annotated[BenchOutputs, _flat("Results")] = BenchOutputs(),
    engine: Annotated[
        _Engine,
        _flat(_ENGINE, only="engine|device|weights|attention|max_num_batched_tokens|threads"),
    ] = _Engine(),
) -> None:
    """Measure: a table while it works, and one JSON line last.

    Ratios come from runs in turn in one process. `tokendance bench prefill --size tiny` shows in
    seconds what a suite prints; `tokendance bench all --out results` takes an hour or two.
    """
    with importing():
        from tokendance.commands.bench import run_bench

    settings = replace(settings, engine=engine, inside="vllm" if inside == "vllm" else None)
    run_bench(None if suite == "all" else suite, settings, outputs, Console())


@app.command
def calibrate(
    model: Model = DEFAULT_MODEL,
    /,
    *,
    size: Annotated[
        Size, Parameter(help="tiny measures next to nothing, to see that it works.")
    ] = "full",
    seed: Annotated[int, Parameter(help="of texts, lengths and orders.")] = 0,
    engine: Annotated[
        _Engine,
        _flat(_ENGINE, only="engine|dtype|weights|device|attention|max_num_batched_tokens|threads"),
    ] = _Engine(),
) -> None:
    """Measure how much correction a model needs, for the default and for --fidelity-target.

    The table goes into the cache folder (TOKENDANCE_CACHE, or the user's), one per model and dtype.
    """
    with importing():
        from tokendance.commands.calibrate import run_calibration

    run_calibration(model, size, seed, engine, Console())


@app.command
def models(
    *names: Annotated[str, Parameter(help="folders or hub ids to look at, besides those at hand.")],
    prepare: Annotated[
        str | None,
        Parameter(
            help="load this model once and say what it is; converts the demo weights.",
            metavar="MODEL",
        ),
    ] = None,
) -> None:
    """List the models that can be loaded, and why others cannot."""
    with importing():
        from tokendance.commands.models import list_models, prepare_model

    if prepare is not None:
        prepare_model(prepare, Console())
    else:
        list_models(names, Console())


@app.command
def doctor() -> None:
    """Say what this installation has, what it lacks, and what to do about it."""
    with importing():
        from tokendance.commands.doctor import examine

    examine(Console())


@store_app.command
def ls(*, store: Store) -> None:
    """List sessions, with what they take against one dense cache for each agent."""
    with importing():
        from tokendance.commands.store import list_sessions

    list_sessions(store, Console())


@store_app.command
def show(name: str, /, *, store: Store) -> None:
    """Show a session: its agents, its files, and who refers to what."""
    with importing():
        from tokendance.commands.store import show_session

    show_session(store, name, Console())


@store_app.command
def verify(*, store: Store) -> None:
    """Read everything and compare it with what was written; exit code 1 if it differs."""
    with importing():
        from tokendance.commands.store import verify_store

    verify_store(store, Console())


@store_app.command
def gc(
    *,
    store: Store,
    store_budget: Annotated[
        str | None,
        Parameter(
            help="most bytes of KV that stay, like 10GiB; without bound if left out.",
            metavar="SIZE",
        ),
    ] = None,
) -> None:
    """Remove what is past its time, left over, damaged, or more than the budget."""
    with importing():
        from tokendance.commands.store import collect_garbage

    budget = None if store_budget is None else parse_bytes(store_budget)
    collect_garbage(store, budget, Console())


@store_app.command
def rm(name: str, /, *, store: Store) -> None:
    """Remove a session."""
    with importing():
        from tokendance.commands.store import remove_session

    remove_session(store, name, Console())


def main() -> None:
    """Run the command line.

    A user's mistake ends with one sentence and exit code 2, an interrupt with code 130.
    """
    if code := _run():
        sys.exit(code)


def _run() -> int:
    """Run the command line; return its exit code."""
    try:
        with standard_streams():
            app(sys.argv[1:])
    except (TokenDanceError, CycloptsError) as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has read enough
        return 1
    return 0


def _complain(sentence: str) -> None:
    """Write a sentence to standard error, without markup of its own."""
    with contextlib.suppress(OSError):  # nobody can be told then
        Console(stderr=True).print(Text.assemble(("tokendance: ", "bold red"), sentence))
