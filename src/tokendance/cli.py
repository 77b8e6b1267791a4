"""The command line: run rounds, serve, measure, calibrate, list models, examine what is here."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from tokendance.config import ReuseMode, parse_bytes
from tokendance.errors import ConfigError, TokenDanceError
from tokendance.server.settings import MAX_DRAIN_S, ServerSettings

BenchName = Literal[
    "attention",
    "plain",
    "prefill",
    "decode",
    "storage",
    "restore",
    "capacity",
    "fidelity",
    "serve",
    "all",
]

# Options that several commands have.
Model = Annotated[str, typer.Option(help="An alias, a folder, or a Hugging Face hub id.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if left out.")]
KVBudget = Annotated[
    str | None,
    typer.Option(help="Memory for KV, like 2GiB; a quarter of the machine's if left out."),
]
StoreBudget = Annotated[
    str | None,
    typer.Option(help="Most bytes of KV in the store, like 10GiB; without bound if left out."),
]
StoreInt8 = Annotated[
    bool, typer.Option("--store-int8", help="Write new KV to the store in half the bytes.")
]
StoreFolder = Annotated[Path, typer.Option("--store", help="Folder of the store.", file_okay=False)]
TextSeed = Annotated[int, typer.Option(help="Of texts, lengths and orders.")]

_SERVER = ServerSettings()  # its defaults

app = typer.Typer(
    help="Serve rounds of LLM agents that share the KV cache of what they all read.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def run(
    trace: Annotated[
        Path | None,
        typer.Argument(
            help="A trace: personas are run live, recorded rounds are replayed with the recorded "
            "answers. The example town if left out."
        ),
    ] = None,
    model: Model = "smollm2-135m",
    reuse: Annotated[
        ReuseMode,
        typer.Option(
            help="What KV is reused: nothing; equal beginnings; those and shared blocks wherever "
            "they stand, in place (collective), or by a corrected copy for each agent as other "
            "engines do it (pic, pic-batched)."
        ),
    ] = "collective",
    correction: Annotated[
        str | None,
        typer.Option(
            help="Which tokens of a reused block each agent computes afresh: edges:3+1 (the first "
            "3 and the last, the default), first:4, epic (the first 16), none, all, or "
            "target:0.01 (see --fidelity-target)."
        ),
    ] = None,
    first_k: Annotated[
        int | None,
        typer.Option(min=0, help="The same as --correction first:K."),
    ] = None,
    fidelity_target: Annotated[
        float | None,
        typer.Option(
            help="Correct as little as keeps the KL divergence from full computation below this, "
            "by what `tokendance calibrate` has measured; compute where nothing does."
        ),
    ] = None,
    shadow: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of mirrors to compute again, exactly, after the last round, to see how "
            "near the answers are.",
        ),
    ] = 0.0,
    agents: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many agents of the trace.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds to run. Live rounds: 3 if left out; recorded: all."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest answer. Live rounds: 64 if left out; recorded: as long as recorded.",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers, with a temperature.")] = 0,
    dtype: Dtype = "auto",
    threads: Threads = None,
    kv_budget: KVBudget = None,
    session: Annotated[
        str | None,
        typer.Option(
            help="With --store: name of the session. Each round is on disk when it is shown, and "
            "the same name goes on where it stopped, in --rounds more rounds."
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="With --session: folder in which sessions last.", file_okay=False),
    ] = None,
    store_budget: StoreBudget = None,
    store_int8: StoreInt8 = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write figures and answers to this file.")
    ] = None,
) -> None:
    """Run rounds of agents that hear each other, and show what it cost.

    [bold]tokendance run[/bold] lets a town of 12 talk; [bold]tokendance run --agents 4 --reuse
    prefix[/bold] does the same as an engine with prefix caching would.
    """
    from tokendance.commands.run import RunSettings, run_trace

    run_trace(
        RunSettings(
            trace=trace,
            model=model,
            reuse=reuse,
            correction=correction,
            first_k=first_k,
            fidelity_target=fidelity_target,
            shadow=shadow,
            agents=agents,
            rounds=rounds,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
            threads=threads,
            kv_budget=kv_budget,
            session=session,
            store=store,
            store_budget=store_budget,
            store_int8=store_int8,
            json_file=json_file,
        ),
        Console(),
    )


def _server_commands() -> ModuleType:
    """What `serve` runs.

    Raises:
        ConfigError: if the packages that it needs are not installed.
    """
    try:
        from tokendance.commands import serve as commands
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The server needs {error.name}, which is not installed. "
            "Run pip install 'tokendance[serve]'."
        ) from error
    return commands


def _use_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make a TOML file's values the defaults; options and environment go before it."""
    if path is not None:
        known = {parameter.name or "" for parameter in ctx.command.params} - {"config"}
        ctx.default_map = _server_commands().read_config(path, known)
    return path


@app.command()
def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_use_config,
            envvar="TOKENDANCE_CONFIG",
            help="A TOML file with options, named as here: port = 8000.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            envvar="TOKENDANCE_MODEL", help="An alias, a folder, or a Hugging Face hub id."
        ),
    ] = "smollm2-135m",
    served_name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; the same if left out."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            envvar="TOKENDANCE_HOST",
            help="Address to listen on. Beyond this machine an API key is needed.",
        ),
    ] = _SERVER.host,
    port: Annotated[
        int, typer.Option(min=0, max=65535, envvar="TOKENDANCE_PORT", help="Port to listen on.")
    ] = _SERVER.port,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="TOKENDANCE_API_KEYS",
            help="Who may ask; give it once per tenant. Tenants share nothing. Better in the "
            "environment (separated by blanks) than here, where other users of the machine see it.",
        ),
    ] = None,
    allow_public: Annotated[
        bool, typer.Option(help="Listen beyond this machine without a key.")
    ] = False,
    open_metrics: Annotated[
        bool, typer.Option(help="Show /metrics without a key, to whoever scrapes it.")
    ] = False,
    reuse: Annotated[
        ReuseMode, typer.Option(help="What KV is reused; see `tokendance run --help`.")
    ] = "collective",
    correction: Annotated[
        str | None,
        typer.Option(
            help="Which tokens of reused text are computed afresh; see `tokendance run --help`."
        ),
    ] = None,
    fidelity_target: Annotated[
        float | None,
        typer.Option(help="Correct as little as keeps the KL divergence below this."),
    ] = None,
    window_ms: Annotated[
        float,
        typer.Option(min=0, help="Requests that arrive this near to each other make a round."),
    ] = _SERVER.window_s * 1000,
    max_open_requests: Annotated[
        int,
        typer.Option(
            min=1, help="Requests, or agents of rounds, at a time; more are told to come back."
        ),
    ] = _SERVER.max_open_requests,
    max_body: Annotated[
        str, typer.Option(help="Largest body of a request; larger ones are refused.")
    ] = f"{_SERVER.max_body_bytes >> 20}MiB",
    max_body_objects: Annotated[
        int,
        typer.Option(
            min=1, help="Messages, parts, references and calls in a body; more are refused."
        ),
    ] = _SERVER.max_body_objects,
    max_messages: Annotated[
        int, typer.Option(min=1, help="Messages in a conversation; more are refused.")
    ] = _SERVER.max_messages,
    default_max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer where a request does not say.")
    ] = _SERVER.default_max_tokens,
    recent: Annotated[
        float,
        typer.Option(
            min=0,
            help="Agents may be asked one after another: text of prompts of so many seconds ago "
            "is reused, too. 0: only of those that arrive together.",
        ),
    ] = _SERVER.recent_s,
    drain: Annotated[
        float,
        typer.Option(
            min=0,
            max=MAX_DRAIN_S,
            help="What is under way when the server is stopped may take so many seconds.",
        ),
    ] = _SERVER.drain_s,
    shadow: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Compute this share of mirrors again when idle, exactly, and show in /metrics "
            "how far they were.",
        ),
    ] = 0.0,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder in which sessions last, over restarts too.", file_okay=False),
    ] = None,
    store_budget: StoreBudget = None,
    store_int8: StoreInt8 = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="A line for each request, as this.")
    ] = "text",
    dtype: Dtype = "auto",
    threads: Threads = None,
    kv_budget: KVBudget = None,
) -> None:
    """Serve a model to any client of OpenAI's API; requests that come together make a round.

    Nothing has to change in a client but its base_url. [bold]tokendance serve[/bold] serves the
    demo model on this machine. Ctrl-C finishes what is under way and stops; a second one ends that,
    too.
    """
    del config
    commands = _server_commands()
    settings = ServerSettings(
        host=host,
        port=port,
        served_name=served_name,
        api_keys=tuple(api_key or ()),
        allow_public=allow_public,
        open_metrics=open_metrics,
        max_body_bytes=parse_bytes(max_body),
        max_body_objects=max_body_objects,
        max_messages=max_messages,
        max_open_requests=max_open_requests,
        default_max_tokens=default_max_tokens,
        window_s=window_ms / 1000,
        recent_s=recent,
        drain_s=drain,
    )
    options = commands.EngineOptions(
        model=model,
        reuse=reuse,
        correction=correction,
        fidelity_target=fidelity_target,
        dtype=dtype,
        threads=threads,
        kv_budget=kv_budget,
        shadow=shadow,
        log_format=log_format,
        store=store,
        store_budget=store_budget,
        store_int8=store_int8,
    )
    commands.serve(options, settings, Console())


@app.command()
def bench(
    suite: Annotated[
        BenchName,
        typer.Argument(
            help="attention: one layer. plain: without reuse, against transformers. "
            "prefill: seconds of a round. decode: tokens per second. "
            "storage: bytes per agent. restore: from a stored session to the first token. "
            "capacity: most agents in a time or a memory. "
            "fidelity: how near the answers are to full computation. "
            "serve: what HTTP and finding shared text cost. "
            "all: everything, with a report."
        ),
    ],
    model: Model = "smollm2-135m",
    against: Annotated[
        Literal["vllm"] | None,
        typer.Option(help="Measure this engine too, in its own environment (make vllm)."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw the figures into this SVG file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for everything, with `all`.", file_okay=False)
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            help="A trace with personas, whose people make the rounds of prefill, capacity and "
            "fidelity; the example town if left out."
        ),
    ] = None,
    size: Annotated[
        Literal["full", "tiny"],
        typer.Option(help="tiny runs every line in seconds; its figures mean nothing."),
    ] = "full",
    repeats: Annotated[
        int,
        typer.Option(
            min=1, help="Counted runs in prefill and plain; in fidelity, workloads of other seeds."
        ),
    ] = 3,
    seed: TextSeed = 0,
    threads: Threads = None,
) -> None:
    """Measure: a table while it works, and one JSON line last.

    Ratios come from runs in turn in one process. [bold]tokendance bench prefill --size tiny[/bold]
    shows in seconds what a suite prints; [bold]tokendance bench all --out results[/bold] takes
    an hour or two.
    """
    from tokendance.bench.suite import BenchSettings
    from tokendance.commands.bench import BenchOutputs, run_bench

    run_bench(
        None if suite == "all" else suite,
        BenchSettings(model, size, repeats, seed, source or "town", against == "vllm"),
        BenchOutputs(json_file, plot_file, out),
        threads,
        Console(),
    )


@app.command()
def calibrate(
    model: Annotated[
        str, typer.Argument(help="An alias, a folder, or a Hugging Face hub id.")
    ] = "smollm2-135m",
    dtype: Dtype = "auto",
    size: Annotated[
        Literal["full", "tiny"],
        typer.Option(help="tiny measures next to nothing, to see that it works."),
    ] = "full",
    seed: TextSeed = 0,
    threads: Threads = None,
) -> None:
    """Measure how much correction a model needs, for --fidelity-target.

    The table goes into the cache folder (TOKENDANCE_CACHE, or the user's), one per model and dtype.
    """
    from tokendance.commands.calibrate import run_calibration

    run_calibration(model, dtype, size, seed, threads, Console())


@app.command()
def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Folders or hub ids to look at, besides those at hand."),
    ] = None,
    prepare: Annotated[
        str | None,
        typer.Option(help="Load this model once and say what it is; converts the demo weights."),
    ] = None,
) -> None:
    """List the models that can be loaded, and why others cannot."""
    from tokendance.commands.models import list_models, prepare_model

    if prepare is not None:
        prepare_model(prepare, Console())
    else:
        list_models(names or [], Console())


store_app = typer.Typer(
    help="Look at what sessions have left on disk, check it, and remove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")


@store_app.command()
def ls(store: StoreFolder) -> None:
    """List sessions, with what they take against one dense cache for each agent."""
    from tokendance.commands.store import list_sessions

    list_sessions(store, Console())


@store_app.command()
def show(name: str, store: StoreFolder) -> None:
    """Show a session: its agents, its files, and who refers to what."""
    from tokendance.commands.store import show_session

    show_session(store, name, Console())


@store_app.command()
def verify(store: StoreFolder) -> None:
    """Read everything and compare it with what was written; exit code 1 if it differs."""
    from tokendance.commands.store import verify_store

    verify_store(store, Console())


@store_app.command()
def gc(store: StoreFolder, store_budget: StoreBudget = None) -> None:
    """Remove what is past its time, left over, damaged, or more than the budget."""
    from tokendance.commands.store import collect_garbage
    from tokendance.config import parse_bytes

    budget = None if store_budget is None else parse_bytes(store_budget)
    collect_garbage(store, budget, Console())


@store_app.command()
def rm(name: str, store: StoreFolder) -> None:
    """Remove a session."""
    from tokendance.commands.store import remove_session

    remove_session(store, name, Console())


@app.command()
def doctor() -> None:
    """Say what this installation has, what it lacks, and what to do about it."""
    from tokendance.commands.doctor import examine

    examine(Console())


def main() -> None:
    """Run the command line; a user's mistake ends with one sentence and exit code 2."""
    try:
        app()
    except TokenDanceError as error:
        complain(error)
        sys.exit(2)


def complain(error: TokenDanceError) -> None:
    """Write an error to standard error, without markup of its own."""
    Console(stderr=True).print(Text.assemble(("tokendance: ", "bold red"), str(error)))
