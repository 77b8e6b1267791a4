"""The command line as a user meets it."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import torch

from tokendance.bench.settings import SUITES, BenchOutputs, BenchSettings
from tokendance.cli import main
from tokendance.commands.settings import RunSettings
from tokendance.options import EngineOptions
from tokendance.server.settings import ServerSettings

ROUND: dict[str, Any] = {
    "type": "round",
    "round": 4,
    "time": "noon",
    "shared": [{"agent": "Ann", "text": "Ann: hello"}, {"agent": "Bo", "text": "Bo: hi"}],
    "requests": [
        {"agent": "Ann", "private_history": "I", "task": "go", "recorded_output": "I go."},
        {"agent": "Bo", "private_history": "You know", "task": "go", "recorded_output": "I stay."},
    ],
}
AGENTS: list[dict[str, object]] = [
    {"type": "agent", "agent": "Ann", "system": "Ann"},
    {"type": "agent", "agent": "Bo", "persona": "Bo", "memories": ["one", "two"]},
]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def tokendance(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the command line in this process; white space is evened out."""
    # A line for each option. The console for help lasts as long as the process, so that this has
    # to be so whichever test asks for help first.
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*arguments: str) -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["tokendance", *arguments])
        threads = torch.get_num_threads()
        try:
            main()
            code: object = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            torch.set_num_threads(threads)
        captured = capfd.readouterr()
        assert isinstance(code, int)
        return Done(code, " ".join(captured.out.split()), " ".join(captured.err.split()))

    return run


@pytest.fixture(scope="session")
def model(model_folder: Callable[..., Path]) -> str:
    return str(model_folder("llama"))


def test_the_installed_command() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("tokendance"), "serve", "--config", "no-such-file.toml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot be read" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["cyclopts", "torch"])
def test_an_interrupt_while_modules_are_imported_is_a_word(module: str, tmp_path: Path) -> None:
    """At the start of the command line, and where a command imports what it needs."""
    interrupt = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(9): pass\n"
    (tmp_path / f"{module}.py").write_text(interrupt)
    done = subprocess.run(
        [sys.executable, "-m", "tokendance", "run"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "tokendance: Interrupted.\n")


def write_trace(path: Path, *lines: object) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_live_rounds(tokendance: Run, tmp_path: Path, model: str) -> None:
    trace = write_trace(tmp_path / "t.jsonl", *AGENTS)
    out = tmp_path / "out.json"
    done = tokendance(
        "run", trace, "--model", model, "--rounds", "2", "--max-tokens", "5", "--json", str(out),
        "--kv-budget", "8MiB", "--dtype", "float32", "--threads", "1", "--temperature", "0.5",
        "--correction", "edges:2+1", "--shadow", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "reuse collective, correction edges:2+1" in done.stdout
    assert "Round 2, 2 agents" in done.stdout
    assert "1 mirrors were computed again, exactly" in done.stdout
    assert "Prefix caching would have computed" in done.stdout
    document = json.loads(out.read_text())
    assert {"model", "reuse", "dtype", "threads", "rounds", "outputs"} <= set(document)
    assert (document["reuse"], document["dtype"], document["threads"]) == (
        "collective",
        "float32",
        1,
    )
    assert document["correction"] == "edges:2+1"
    assert [shadow["tokens"] for shadow in document["shadows"]] == [5]
    assert [one["round"] for one in document["rounds"]] == [1, 2]
    for one in document["rounds"]:
        assert one["agents"] == 2
        assert one["computed_tokens"] + one["reused_tokens"] == one["prompt_tokens"]
        assert one["kv_bytes"]["dense"] > 0
        assert one["kv_bytes"]["resident"] > 0
        assert min(one["prefill_s"], one["decode_s"]) >= 0
    assert [(o["round"], o["agent"]) for o in document["outputs"]] == [
        (1, "Ann"), (1, "Bo"), (2, "Ann"), (2, "Bo"),
    ]  # fmt: skip
    generated = sum(len(o["token_ids"]) for o in document["outputs"])
    assert generated == sum(one["generated_tokens"] for one in document["rounds"])


@pytest.mark.parametrize(("marks", "stop"), [(None, ("\n",)), (object(), ())])
def test_live_answers_are_one_line_but_for_thoughts(
    tokendance: Run, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch,
    marks: object, stop: tuple[str, ...],
) -> None:  # fmt: skip
    from tokendance.models.encoder import PromptEncoder
    from tokendance.session import Session

    asked: list[tuple[str, Any]] = []

    def ended(_: Session, task: str, params: Any, *__: Any) -> Any:
        asked.append((task, params))
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run", ended)
    monkeypatch.setattr(PromptEncoder, "thought_marks", marks)
    trace = write_trace(tmp_path / "t.jsonl", *AGENTS)
    done = tokendance("run", trace, "--model", model, "--temperature", "0.5")
    assert done.returncode == 130
    ((task, params),) = asked
    assert "one short sentence" in task
    assert {one.stop for one in params.values()} == {stop}
    assert {one.temperature for one in params.values()} == {0.5}
    assert len({one.seed for one in params.values()}) == 2


def test_recorded_rounds_are_replayed(tokendance: Run, tmp_path: Path, model: str) -> None:
    trace = write_trace(tmp_path / "t.jsonl", {"type": "meta"}, *AGENTS, ROUND)
    out = tmp_path / "out.json"
    done = tokendance(
        "run",
        trace,
        "--model",
        model,
        "--json",
        str(out),
        "--reuse",
        "prefix",
        "--dtype",
        "float32",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["rounds"][0]["round"] == 4
    assert [o["text"] for o in document["outputs"]] == ["I go.", "I stay."]


def test_an_agent_that_cannot_fit_is_named_before_anything_runs(
    tokendance: Run, tmp_path: Path, model: str
) -> None:
    long = [AGENTS[0], {**AGENTS[1], "persona": "x" * 600}]
    out = tmp_path / "out.json"
    out.write_text("of yesterday")
    trace = write_trace(tmp_path / "t.jsonl", *long)
    done = tokendance("run", trace, "--model", model, "--rounds", "1", "--json", str(out))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "The prompt of 'Bo' has" in done.stderr
    assert "context holds 512" in done.stderr
    assert out.read_text() == "of yesterday"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "--model", "no/such-model"], "no/such-model"),
        (["run", "no-such-file.jsonl"], "cannot be read"),
        (["run", "--agents", "99"], "99"),
        (["run", "--kv-budget", "lots", "--model", "MODEL"], "lots"),
        (["run", "--kv-budget", "1KiB", "--model", "MODEL"], "smaller than one page"),
        (["run", "--dtype", "float8", "--model", "MODEL"], "float8"),
        (["run", "--reuse", "some"], "some"),
        (["run", "--json", "/no/such/folder/x.json"], "cannot be written"),
        (["run", "--json", "/dev/full"], "No space left on device"),
        (["bench", "decode", "--json", "/dev/full"], "No space left on device"),
        (["run", "--reuse", "prefix", "--correction", "all"], "--reuse collective"),
        (["run", "--correction", "none", "--first-k", "2", "--model", "MODEL"], "first_k"),
        (["run", "--correction", "hkvd", "--model", "MODEL"], "'hkvd'"),
        (["run", "--correction", "target:0.01", "--model", "MODEL"], "tokendance calibrate"),
        (["run", "--fidelity-target", "0.01", "--model", "MODEL"], "tokendance calibrate"),
        (["run", "--fidelity-target", "0.1", "--first-k", "2"], "--fidelity-target"),
        (["run", "--fidelity-target", "0"], "above 0"),
        (["run", "--shadow", "0.5", "--reuse", "none"], "--shadow"),
        (["run", "--shadow", "2"], "shadow is 2.0. Give 0 to 1."),
        (["run", "--store-int8"], "--store"),
        (["run", "--store", "kv"], "--session"),
        (["run", "--temperature", "-1"], "temperature"),
        (["run", "--threads", "0"], "threads"),
        (["run", "--page-size", "x"], "page-size"),
        (["run", "--rounds"], "--rounds"),
        (["run", "--device", "nowhere", "--model", "MODEL"], "nowhere"),
        (["run", "--max-batch-tokens", "3"], "--max-num-batched-tokens"),
        (["serve", "--port", "99999"], "port is 99999"),
        (["serve", "--host", "0.0.0.0"], "--api-key"),
        (["serve", "--max-body", "big"], "big"),
        (["serve", "--drain", "nan"], "drain"),
        (["serve", "--config", "no-such-file.toml"], "no-such-file.toml"),
        (["bench", "speed"], "speed"),
        (["bench", "decode", "--repeats", "0"], "repeats"),
        (["bench", "decode", "--reuse", "none"], "--reuse"),
        (["calibrate", "no/such-model"], "no/such-model"),
        (["store", "ls"], "--store"),
        (["sing"], "sing"),
        (["models", "--prepare", "no/such-model"], "no/such-model"),
    ],
)
def test_mistakes_end_with_one_sentence(
    tokendance: Run, arguments: list[str], word: str, model: str
) -> None:
    done = tokendance(*[model if one == "MODEL" else one for one in arguments])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert word in done.stderr


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(tokendance: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = tokendance("serve", "--port", port, "--model", "no/such-model")
    assert done.returncode == 2
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in done.stderr
    done = tokendance("serve", "--host", "203.0.113.7", "--api-key", "x", "--model", "no/such")
    assert done.returncode == 2
    assert "cannot listen at 203.0.113.7" in done.stderr


def test_a_broken_line_is_named(tokendance: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(AGENTS[0]) + "\n{oops\n")
    done = tokendance("run", str(path))
    assert done.returncode == 2
    assert "line 2" in done.stderr


def test_help_and_models(tokendance: Run, model: str) -> None:
    listed = tokendance("models", model, "no/such-model")
    assert listed.returncode == 0
    assert "smollm2-135m" in listed.stdout
    assert "yes" in listed.stdout


def help_of(command: str, tokendance: Run) -> dict[str, str]:
    """The help of each option of a command, white space evened out."""
    text = tokendance(command, "--help").stdout
    entries = [line.split() for line in text.split("│") if line.strip().startswith("--")]
    return {name: " ".join(rest) for name, *rest in entries}


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("run", EngineOptions),
        ("serve", EngineOptions),
        ("run", RunSettings),
        ("serve", ServerSettings),
        ("bench", BenchSettings),
        ("bench", BenchOutputs),
    ],
)
def test_each_option_is_in_the_help_with_its_text_and_default(
    command: str, options: Any, tokendance: Run
) -> None:
    shown = help_of(command, tokendance)
    texts = {
        one.arg_name: one.description for one in docstring_parser.parse(options.__doc__).params
    }
    for field in dataclasses.fields(options):
        text = texts[field.name]
        assert text, f"{field.name} has no help"
        # An argument, what has a panel of its own, and what bench calls --engine vllm.
        if field.name in ("trace", "engine", "inside"):
            continue
        is_repeated = field.name in ("api_keys", "allowed_hosts", "cors_origins")
        name = field.name.removesuffix("s") if is_repeated else field.name
        entry = shown[f"--{name.replace('_', '-')}"]
        assert " ".join(text.replace("`", "").split()) in entry
        if field.default is None or is_repeated:
            assert "[default" not in entry
        else:
            assert entry.endswith(f"[default: {field.default}]")


def test_commands_that_run_a_model_take_what_makes_sense_there(tokendance: Run) -> None:
    common = {"--device", "--attention", "--max-num-batched-tokens", "--threads"}
    for command in ("bench", "calibrate"):
        shown = help_of(command, tokendance).keys()
        assert common <= shown
        assert not {"--reuse", "--kv-budget", "--store"} & shown
    assert "--dtype" in shown
    for suite in SUITES:
        assert f"{suite}:" in tokendance("bench", "--help").stdout


def test_a_suite_that_takes_no_engine_says_so(tokendance: Run) -> None:
    suite = ["bench", "attention", "--size", "tiny", "--repeats", "1", "--threads", "1"]
    done = tokendance(*suite)
    assert done.returncode == 0, done.stderr
    assert '"suite": "attention"' in done.stdout
    done = tokendance(*suite, "--attention", "torch")
    assert done.returncode == 2
    assert "--threads only" in done.stderr


def test_settings_come_from_the_command_line_the_environment_and_a_file(
    tokendance: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[str, EngineOptions, ServerSettings]] = []
    monkeypatch.setattr(
        "tokendance.commands.serve.serve", lambda *arguments: served.append(arguments[:3])
    )
    file = tmp_path / "serve.toml"
    file.write_text(
        'port = 1\nhost = "::1"\nmodel = "file"\ndrain = 2\nwindow-ms = 7.5\nstore-int8 = true\n'
        'store = "kv"\nkv-budget = "1GiB"\nreuse = "collective"\napi-key = ["a b", "c"]\n'
    )
    monkeypatch.setenv("TOKENDANCE_CONFIG", str(file))
    monkeypatch.setenv("TOKENDANCE_PORT", "2")
    monkeypatch.setenv("TOKENDANCE_MODEL", "environment")
    monkeypatch.setenv("TOKENDANCE_CACHE", str(tmp_path))  # is no option
    options = ["--model", "line", "--max-body", "1KiB", "--first-k", "2", "--no-store-int8"]
    assert tokendance("serve", *options).returncode == 0
    model, engine, server = served.pop()
    assert model == "line"
    assert (server.port, server.host, server.drain, server.window_ms) == (2, "::1", 2.0, 7.5)
    assert server.api_keys == ("a b", "c")
    assert server.max_body_bytes == 1024
    assert (engine.store, engine.store_int8, engine.first_k) == (Path("kv"), False, 2)
    assert engine.kv_bytes("cpu") == 2**30
    monkeypatch.setenv("TOKENDANCE_API_KEYS", "key-1 key-2")
    monkeypatch.setenv("TOKENDANCE_HOST", "0.0.0.0")
    assert tokendance("serve").returncode == 0
    model, engine, server = served.pop()
    assert (model, server.host, server.api_keys) == ("environment", "0.0.0.0", ("key-1", "key-2"))
    assert "key-1" not in repr(server)
    assert "key-1" not in tokendance("serve", "--help").stdout
    assert tokendance("serve", "--api-key", "x", "--api-key", "y").returncode == 0
    assert served.pop()[2].api_keys == ("x", "y")
    for text in ("port = ", "[engine]\nport = 1", "drain = 'x'"):
        file.write_text(text)
        done = tokendance("serve")
        assert done.returncode == 2
        assert "serve.toml" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_server_that_is_not_installed_is_a_sentence(
    tokendance: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tokendance.commands.serve", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = tokendance("serve")
    assert done.returncode == 2
    assert "fastapi" in done.stderr
    assert "pip install 'tokendance[serve]'" in done.stderr


def test_what_the_library_and_the_help_need() -> None:
    """Help comes without torch, and the library without what the command line is made of."""
    script = """
import sys
sys.modules.update(dict.fromkeys({blocked}))
{code}
"""
    for blocked, code in (
        (["torch", "transformers"], "from tokendance.cli import app; app(['serve', '--help'])"),
        (["cyclopts", "attrs", "rich", "pydantic", "fastapi"], "from tokendance import *"),
    ):
        text = script.format(blocked=blocked, code=code)
        subprocess.run([sys.executable, "-c", text], check=True, stdout=subprocess.DEVNULL)


def test_the_doctor_names_what_is_there_and_what_is_not(tokendance: Run) -> None:
    done = tokendance("doctor")
    assert done.returncode == 0
    for word in ("torch", "attention kernel", "huge pages", "smollm2-135m", "gemma3-270m", "vLLM"):
        assert word in done.stdout


def test_the_example_town_can_be_read() -> None:
    from tokendance.rounds.trace import example_trace, read_trace

    assert len(read_trace(example_trace()).agents) >= 10


def test_a_budget_that_is_too_small(tokendance: Run, tmp_path: Path, model: str) -> None:
    trace = write_trace(tmp_path / "t.jsonl", *AGENTS)
    done = tokendance("run", trace, "--model", model, "--kv-budget", "20KiB", "--rounds", "1")
    assert done.returncode == 2
    assert "Raise kv_budget" in done.stderr


def test_recorded_rounds_with_fewer_agents(tokendance: Run, tmp_path: Path, model: str) -> None:
    only_bo = {**ROUND, "round": 5, "requests": ROUND["requests"][1:]}
    empty = {**ROUND, "round": 6, "requests": [{**ROUND["requests"][0], "recorded_output": ""}]}
    trace = write_trace(tmp_path / "t.jsonl", *AGENTS, ROUND, only_bo, empty)
    out = tmp_path / "out.json"
    done = tokendance("run", trace, "--model", model, "--agents", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert [one["round"] for one in document["rounds"]] == [4, 6]
    assert [o["text"] for o in document["outputs"]] == ["I go.", ""]
    for options in (["--temperature", "1"], ["--rounds", "9"]):
        assert tokendance("run", trace, "--model", model, *options).returncode == 2


def test_an_interrupt_keeps_what_is_done(
    tokendance: Run, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokendance.session import Session

    run = Session.run

    def interrupted(self: Session, *arguments: Any) -> Any:
        if self.round == 1:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(Session, "run", interrupted)
    out = tmp_path / "out.json"
    trace = write_trace(tmp_path / "t.jsonl", *AGENTS)
    done = tokendance("run", trace, "--model", model, "--json", str(out), "--max-tokens", "3")
    assert done.returncode == 130
    assert "Interrupted after 1 rounds" in done.stdout
    assert len(json.loads(out.read_text())["rounds"]) == 1


@pytest.mark.parametrize("command", [["run"], ["models", "--prepare", "x"], ["calibrate", "x"]])
def test_an_interrupt_while_a_model_is_loaded_is_a_word(
    tokendance: Run, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for module in ("llm", "commands.models", "commands.calibrate"):
        monkeypatch.setattr(f"tokendance.{module}.load_model", interrupt)
    done = tokendance(*command)
    assert done.returncode == 130
    assert "nterrupted" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_while_a_round_is_saved_loses_nothing(
    tokendance: Run, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokendance.disk.records import SessionKey
    from tokendance.disk.store import DiskStore

    commit, interrupts = DiskStore.commit, iter([False, True])

    def interrupted(self: DiskStore, *arguments: Any, **named: Any) -> None:
        if next(interrupts, False):
            raise KeyboardInterrupt
        commit(self, *arguments, **named)

    monkeypatch.setattr(DiskStore, "commit", interrupted)
    trace = write_trace(tmp_path / "t.jsonl", *AGENTS)
    options = ["--model", model, "--max-tokens", "3", "--session", "town", "--rounds", "3"]
    done = tokendance("run", trace, *options, "--store", str(tmp_path / "s"))
    assert done.returncode == 130
    with DiskStore(tmp_path / "s", None) as store:
        session = store.session(SessionKey("", "town"))
        assert session is not None
        assert session.round == 2
        assert store.verify() == []
        store.check_integrity()
