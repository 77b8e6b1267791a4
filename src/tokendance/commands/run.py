"""`tokendance run`: live or recorded rounds, with what they cost."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tokendance.collector.estimate import PrefixEstimate
from tokendance.commands.bars import Bars
from tokendance.commands.report import (
    DoneRound,
    document,
    print_shadows,
    print_summary,
    print_table,
    print_words,
    reuse_name,
)
from tokendance.commands.settings import LIVE_MAX_TOKENS, LIVE_ROUNDS, RunSettings
from tokendance.commands.view import shown_live
from tokendance.conversation import Agent
from tokendance.errors import ConfigError, RequestError
from tokendance.fidelity.shadow import ShadowReport
from tokendance.llm import LLM
from tokendance.options import EngineOptions
from tokendance.outputs import NotStoredError, RoundResult
from tokendance.outputs import Progress as ReportProgress
from tokendance.params import SamplingParams
from tokendance.results import check_writable, write_result
from tokendance.rounds.prompts import Prompt, private, shared
from tokendance.rounds.trace import Trace, TraceRequest, TraceRound, example_trace, read_trace
from tokendance.units import format_bytes
from tokendance.view.document import RECORD_ADVICE
from tokendance.view.recording import Recording

# A small model says something sensible to a plain question, begins as it is told, and repeats less
# of what it has heard if each round asks for something else (docs/log.md).
_HOW = "Answer in one short sentence. Begin with the words: "
TASKS = (
    f"There is a picnic on Sunday. What food will you bring? {_HOW}I will bring",
    f"It may rain on Sunday. What will you wear? {_HOW}I will wear",
    f"Which game will you play at the picnic? {_HOW}I will play",
    f"The picnic is over. What will you tell your friends about it? {_HOW}I will tell them",
)
_JSON_ADVICE = "Give --json another path."


def run_trace(settings: RunSettings, options: EngineOptions, console: Console) -> None:
    """Run a trace, print words and figures, and write the JSON file if one is asked for.

    Raises:
        TokenDanceError: for a mistake of the user, or at the end if an agent has failed.
        SystemExit: with code 130 if the user interrupts; rounds that are done are still shown.
    """
    trace = _first_agents(read_trace(settings.trace or example_trace()), settings.agents)
    _check_settings(settings, options, trace)
    console.soft_wrap = not console.is_terminal  # whoever reads a pipe breaks lines by itself
    loading = console.status(f"Loading {escape(settings.model)} ...")
    with nullcontext() if settings.quiet else loading:
        llm = LLM(settings.model, options)
    with closing(llm), _watched(llm, settings, console) as after_round:
        _play(llm, trace, settings, console, after_round)


@contextmanager
def _watched(llm: LLM, settings: RunSettings, console: Console) -> Iterator[Callable[[], None]]:
    """Record, draw, show and write a run as the settings say.

    Yields:
        What is to be called after each round.
    """
    if settings.quiet and settings.record is None and not settings.view:
        yield lambda: None
        return
    recording, bars = Recording(llm), Bars(console)

    def draw() -> None:
        with recording.recorder.reading() as recorded:
            bars.print_last(recorded)

    live = shown_live(recording, console, with_text=settings.record_text)
    with live if settings.view else nullcontext():
        try:
            yield recording.recorder.digest if settings.quiet else draw
        finally:
            # Whatever became of it: a run that was broken off is worth a look, too.
            if settings.record is not None and recording.has_rounds:
                recording.write(settings.record, with_text=settings.record_text)
                console.print(
                    f"The run is in {escape(str(settings.record))}; tokendance view shows it."
                )


def _play(
    llm: LLM,
    trace: Trace,
    settings: RunSettings,
    console: Console,
    after_round: Callable[[], None],
) -> None:
    """Run the rounds of a trace, and show and write what came of them."""
    options = llm.engine.options
    console.print(
        f"[bold]{escape(settings.model)}[/bold], {llm.model.precision}, "
        f"{torch.get_num_threads()} threads, {reuse_name(llm)}, "
        f"KV budget {format_bytes(llm.kv_bytes)}"
    )
    player = _replay if trace.rounds else _live
    estimate = PrefixEstimate(options.page_size)
    done: list[DoneRound] = []
    shadows: list[ShadowReport] = []
    try:
        for number, result in player(llm, trace, settings, console):
            prompts = [(o.prompt_token_ids, o.token_ids) for o in result.outputs if not o.error]
            done.append(DoneRound(number, result, estimate.add_round(prompts)))
            print_words(result, console)
            after_round()
        if options.shadow > 0:
            with console.status("Computing mirrors again, exactly ..."):
                # One by one, so that an interrupt loses one only.
                while (shadow := llm.check_shadow()) is not None:
                    shadows.append(shadow)
    except KeyboardInterrupt:
        console.print(f"Interrupted after {len(done)} rounds; nothing is left running.")
        sys.exit(130)
    finally:
        # Rounds that are done are written and shown, whatever became of the next. They are written
        # first: showing them fails where standard output is full, or nobody reads it any more.
        if settings.json is not None and done:  # else what was there before stays
            text = json.dumps(document(llm, done, shadows), ensure_ascii=False, indent=1)
            write_result(settings.json, text + "\n", _JSON_ADVICE)
        if done:
            print_table(done, console)
            print_summary(done, llm, console)
            if options.shadow > 0:
                print_shadows(shadows, llm.shadows.num_dropped, console)
        if settings.json is not None and done:
            console.print(f"Figures and answers are in {escape(str(settings.json))}.")
    outputs = [output for done_round in done for output in done_round.result.outputs]
    errors = [output.error for output in outputs if output.error is not None]
    if errors:
        raise RequestError(
            f"{len(errors)} requests could not be run; the others were not affected. "
            f"The first: {errors[0]}"
        )


def _check_settings(settings: RunSettings, options: EngineOptions, trace: Trace) -> None:
    """Refuse options that would have no effect, before the model is loaded."""
    if trace.rounds and settings.temperature > 0:
        raise ConfigError(
            "The answers of recorded rounds are replayed as recorded, so --temperature has no "
            "effect. Leave it out."
        )
    if trace.rounds and (settings.rounds or 0) > len(trace.rounds):
        raise ConfigError(
            f"The trace has {len(trace.rounds)} rounds, and --rounds asks for {settings.rounds}. "
            "Ask for fewer."
        )
    if (settings.session is None) != (options.store is None):
        raise ConfigError(
            "--session and --store go together: which session, and the folder in which it lasts. "
            "Give both, or none."
        )
    if trace.rounds and settings.session is not None:
        raise ConfigError(
            "Recorded rounds have all their text in the trace, so there is no session to go on "
            "with. Leave --session and --store out."
        )
    if settings.json is not None:
        check_writable(settings.json, _JSON_ADVICE)
    if settings.record is not None:
        check_writable(settings.record, RECORD_ADVICE)


def _first_agents(trace: Trace, count: int | None) -> Trace:
    if count is None:
        return trace
    if count > len(trace.agents):
        raise ConfigError(
            f"The trace has {len(trace.agents)} agents, and --agents asks for {count}. "
            "Ask for fewer, or give a trace with more."
        )
    kept = dict(list(trace.agents.items())[:count])
    dropped = trace.agents.keys() - kept.keys()
    rounds = [
        TraceRound(
            recorded.number,
            tuple(block for block in recorded.shared if block[0] not in dropped),
            tuple(request for request in recorded.requests if request.agent not in dropped),
        )
        for recorded in trace.rounds
    ]
    return Trace(kept, [recorded for recorded in rounds if recorded.requests])


def _live(
    llm: LLM, trace: Trace, settings: RunSettings, console: Console
) -> Iterator[tuple[int, RoundResult]]:
    """Run rounds in which the agents hear each other's answers."""
    session = llm.session(settings.session)
    if session.round:
        console.print(
            f"[bold]{escape(str(session.name))}[/bold] goes on with round {session.round + 1} and "
            f"{len(session.agents)} agents."
        )
    if not session.round or settings.trace is not None or settings.agents is not None:
        here = {agent.name for agent in session.agents}
        for person in trace.agents.values():
            if person.name not in here:
                session.join(Agent(person.name, person.system))
    limit = settings.max_tokens or LIVE_MAX_TOKENS
    # In the next line a small model speaks for others. Thoughts have lines, too.
    stop = ("\n",) if llm.encoder.thought_marks is None else ()
    first = session.round + 1
    for number in range(first, first + (settings.rounds or LIVE_ROUNDS)):
        task = TASKS[(number - 1) % len(TASKS)]
        params = {
            agent.name: replace(
                _params(settings, limit, number, index),
                top_p=0.9,
                frequency_penalty=0.3,  # against words in a loop
                stop=stop,
            )
            for index, agent in enumerate(session.agents)
        }
        with _progress(settings, console, f"Round {number}", len(params)) as report:
            try:
                result = session.run(task, params, report)
            except NotStoredError as error:
                yield number, error.result
                raise
            except KeyboardInterrupt:
                if session.round == number:  # it was heard, and the interrupt came while saving
                    session.save()
                raise
        yield number, result


def _replay(
    llm: LLM, trace: Trace, settings: RunSettings, console: Console
) -> Iterator[tuple[int, RoundResult]]:
    """Run recorded rounds: their prompts, and their answers forced token by token."""
    for recorded in trace.rounds[: settings.rounds]:
        prompts, params = [], []
        for index, request in enumerate(recorded.requests):
            answer = tuple(llm.encoder.text_ids(request.recorded_output).tolist())
            # An empty answer is the token that ends it.
            answer = answer or (min(llm.model.stop_ids, default=0),)
            limit = settings.max_tokens or len(answer)
            prompts.append(_recorded_prompt(trace, recorded, request))
            params.append(_params(settings, limit, recorded.number, index, forced=answer))
        with _progress(settings, console, f"Round {recorded.number}", len(prompts)) as report:
            result = llm.run_round(prompts, params, report)
        yield recorded.number, result


def _recorded_prompt(trace: Trace, recorded: TraceRound, request: TraceRequest) -> Prompt:
    content = [private(request.private_history + "\n\n")]
    content += [shared(text + "\n\n") for _, text in recorded.shared]
    content.append(private(request.task))
    system = private(trace.agents[request.agent].system)
    return Prompt(
        [{"role": "system", "content": [system]}, {"role": "user", "content": content}],
        agent=request.agent,
    )


def _params(
    settings: RunSettings,
    limit: int,
    number: int,
    index: int,
    forced: tuple[int, ...] | None = None,
) -> SamplingParams:
    return SamplingParams(
        max_tokens=limit,
        temperature=settings.temperature,
        seed=settings.seed + 1_000_000 * number + index,
        forced_tokens=forced,
    )


@contextmanager
def _progress(
    settings: RunSettings, console: Console, title: str, agents: int
) -> Iterator[ReportProgress]:
    """A heading, and a progress bar while a round runs on a terminal."""
    heading = f"{title}, {agents} agents"
    if console.is_terminal:
        console.rule(heading)
    else:
        console.print(heading)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    is_off = settings.quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=is_off) as bar:
        task = bar.add_task(f"{title}: prefill", total=agents)
        yield lambda phase, agents_done: bar.update(
            task, description=f"{title}: {phase}", completed=agents_done
        )
