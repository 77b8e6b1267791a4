"""The driver of the baseline, without vLLM: scripts that speak its protocol, well or badly."""

import os
import select
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from tokendance.bench import worker
from tokendance.bench.vllm import (
    VLLM,
    VLLM_ENVIRONMENT,
    VLLMConfig,
    child_environment,
    count_blocks,
)
from tokendance.errors import BaselineError, TokenDanceError

PYTHON = Path(sys.executable)
CONFIG = VLLMConfig(threads=1)
# Answers `start`, and then does what the test adds for each further request.
WORKER = """
import json, os, subprocess, sys, time
def reply(**fields):
    print(json.dumps(fields), flush=True)
request = json.loads(sys.stdin.readline())
engine = request["engine"]
reply(version="1.2.3")
for line in sys.stdin:
    request = json.loads(line)
"""
RUN = """
num = len(request["prompts"])
if request["op"] == "run":
    reply(seconds=1.5, cached_tokens=[7] * num, computed_tokens=9, peak_blocks=3,
          token_ids=[prompt[:1] * request["max_tokens"] for prompt in request["prompts"]])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "worker.py"


def start(script: Path, body: str, head: str = WORKER) -> VLLM:
    """Start a driver on a worker that does `body` for each request after `start`."""
    script.write_text(head + textwrap.indent(textwrap.dedent(body), "    "))
    return VLLM(Path("model"), CONFIG, python=PYTHON, scripts=[script], start_timeout_s=60)


def is_running(pid: int) -> bool:
    try:
        # A zombie that nobody has waited for yet is dead all the same.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_blocks_of_equal_beginnings_are_counted_once() -> None:
    one, same_start = list(range(70)), list(range(40))
    assert count_blocks([one], 10, 32) == 3  # 80 tokens
    assert count_blocks([one, same_start], 10, 32) == 4  # the first block of 50 tokens is there
    assert count_blocks([one, list(range(1, 41))], 10, 32) == 5
    assert count_blocks([one], 0, 35) == 2


def test_run_returns_what_the_worker_replies(script: Path) -> None:
    with start(script, RUN) as engine:
        result = engine.run([[1, 2], [3]], max_tokens=2)
    assert engine.version == "1.2.3"
    assert result.seconds == 1.5
    assert result.cached_tokens == (7, 7)
    assert result.token_ids == ((1, 1), (3, 3))


def test_long_prompts_and_answers_pass_whole(script: Path) -> None:
    prompts = [list(range(100_000))]
    with start(script, RUN) as engine:
        assert engine.run(prompts, max_tokens=100_000).token_ids == ((0,) * 100_000,)


def test_settings_reach_the_engine(script: Path) -> None:
    body = "reply(error=json.dumps(engine)); sys.exit(1)"
    engine = start(script, body)
    with pytest.raises(BaselineError, match=r'"model": "model", "dtype": "bfloat16"'):
        engine.reset()


def test_an_error_reply_raises_with_the_last_lines_of_stderr(script: Path) -> None:
    body = """
    print("a line\\nand the reason", file=sys.stderr)
    reply(error="ValueError: no")
    sys.exit(1)
    """
    engine = start(script, body)
    with pytest.raises(BaselineError, match=r"(?s)ValueError: no.*status 1.*and the reason"):
        engine.run([[1]], 1)
    with pytest.raises(BaselineError, match="closed"):
        engine.run([[1]], 1)


def test_a_dying_worker_raises(script: Path) -> None:
    body = 'print("out of memory", file=sys.stderr, flush=True); os.kill(os.getpid(), 9)'
    with start(script, body) as engine, pytest.raises(BaselineError, match="out of memory"):
        engine.run([[1]], 1)


def test_half_a_reply_raises(script: Path) -> None:
    body = """sys.stdout.write('{"seconds": 1'); sys.stdout.flush(); os._exit(3)"""
    with start(script, body) as engine, pytest.raises(BaselineError, match="status 3"):
        engine.run([[1]], 1)


def test_a_worker_that_does_not_start_raises(script: Path) -> None:
    with pytest.raises(BaselineError, match="No module named 'nowhere'"):
        start(script, "pass", head="import nowhere\nif True:\n")


@pytest.mark.parametrize("line", ["garbage", "[1, 2]"])
def test_a_line_that_is_no_reply_raises(script: Path, line: str) -> None:
    with (
        start(script, f"print({line!r}, flush=True)") as engine,
        pytest.raises(BaselineError, match="cannot be read"),
    ):
        engine.run([[1]], 1)


def test_missing_figures_are_no_zeros(script: Path) -> None:
    with start(script, "reply(seconds=1)") as engine, pytest.raises(BaselineError, match="lacks"):
        engine.run([[1]], 1)


def test_short_answers_raise(script: Path) -> None:
    with (
        start(script, 'request["max_tokens"] = 1\n' + RUN) as engine,
        pytest.raises(BaselineError, match=r"gave \[1\]"),
    ):
        engine.run([[1]], 2)


def test_a_worker_that_hangs_is_killed(script: Path) -> None:
    engine = start(script, "time.sleep(60)")
    with pytest.raises(BaselineError, match=r"'run' within 0\.1 seconds"):
        engine.run([[1]], 1, timeout_s=0.1)
    assert not is_running(engine._worker.pid)


def test_close_ends_children_too(script: Path) -> None:
    body = """
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    reply(pid=child.pid)
    """
    engine = start(script, body)
    child = engine._worker.ask({"op": "child"}, 10)["pid"]
    ended = os.pidfd_open(child)
    assert is_running(child)
    engine.close()
    engine.close()
    assert not is_running(engine._worker.pid)
    assert select.select([ended], [], [], 60)[0]  # its end can be read
    os.close(ended)
    assert not is_running(child)


def test_an_interrupt_ends_the_worker(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(script, "time.sleep(60)")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("select.select", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.run([[1]], 1)
    assert not is_running(engine._worker.pid)


@pytest.mark.parametrize(
    ("said", "message"),
    [(["It runs as it is: windows."], "It runs as it is: windows"), ([], "make vllm")],
)
def test_vllm_that_runs_without_tokendance_inside_is_refused(
    script: Path, said: list[str], message: str
) -> None:
    head = WORKER.replace('version="1.2.3"', f'version="1.2.3", plugin=False, said={said}')
    script.write_text(head + "    pass\n")
    config = replace(CONFIG, plugin=True)
    with pytest.raises(BaselineError, match=message):
        VLLM(Path("model"), config, python=PYTHON, scripts=[script])


def test_blocks_that_clients_name_reach_the_worker(script: Path) -> None:
    body = RUN.replace("cached_tokens=[7] * num", 'cached_tokens=request["blocks"][0]')
    with start(script, body) as engine:
        assert engine.run([[1, 2, 3]], 1, blocks=[[1, 3]]).cached_tokens == (1, 3)


def test_python_that_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="make vllm"):
        VLLM(Path("model"), CONFIG, python=tmp_path / "python")


def test_find_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VLLM_ENVIRONMENT.variable, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "__file__", str(tmp_path / "a" / "b" / "c" / "d" / "worker.py"))
    assert VLLM_ENVIRONMENT.find() is None
    with pytest.raises(BaselineError, match="make vllm"):
        VLLM(Path("model"), CONFIG)

    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(PYTHON)
    assert VLLM_ENVIRONMENT.find() is None  # half of it
    (tmp_path / ".venv-vllm" / ".installed").touch()
    assert VLLM_ENVIRONMENT.find() == python

    monkeypatch.setenv(VLLM_ENVIRONMENT.variable, str(PYTHON))
    assert VLLM_ENVIRONMENT.find() == PYTHON
    monkeypatch.setenv(VLLM_ENVIRONMENT.variable, str(tmp_path / "nothing"))
    with pytest.raises(TokenDanceError, match="no such file"):
        VLLM_ENVIRONMENT.find()


def test_environment_of_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    found = child_environment(tmp_path / "bin" / "python", VLLMConfig(threads=3))
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert "PYTHONPATH" not in found
    assert "PYTHONPATH" in os.environ
    if sys.platform == "linux":
        assert found["LD_PRELOAD"].endswith(str(library))
