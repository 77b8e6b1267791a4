"""The command line as a user meets it."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tokendance.cli import main

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
        [Path(sys.executable).with_name("tokendance"), "run", "no-such-file.jsonl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot be read" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


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


def test_a_prompt_that_is_too_long_harms_nobody(
    tokendance: Run, tmp_path: Path, model: str
) -> None:
    long = [AGENTS[0], {**AGENTS[1], "persona": "x" * 600}]
    out = tmp_path / "out.json"
    trace = write_trace(tmp_path / "t.jsonl", *long)
    done = tokendance("run", trace, "--model", model, "--rounds", "1", "--json", str(out))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "could not be run" in done.stderr
    ann, bo = json.loads(out.read_text())["outputs"]
    assert ann["error"] is None
    assert ann["token_ids"]
    assert "context holds 512" in bo["error"]


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
        (["run", "--reuse", "prefix", "--correction", "all"], "--reuse collective"),
        (["run", "--correction", "none", "--first-k", "2", "--model", "MODEL"], "first_k"),
        (["run", "--correction", "hkvd", "--model", "MODEL"], "'hkvd'"),
        (["run", "--correction", "target:0.01", "--model", "MODEL"], "tokendance calibrate"),
        (["run", "--fidelity-target", "0.01", "--model", "MODEL"], "tokendance calibrate"),
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
    text = tokendance("run", "--help").stdout
    for option in (
        "--model", "--reuse", "--correction", "--first-k", "--agents", "--rounds", "--max-tokens",
        "--temperature", "--seed", "--dtype", "--threads", "--kv-budget", "--json",
    ):  # fmt: skip
        assert option in text


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
