"""llama.cpp beside us: its driver, what suites give it, and whether it says what we say."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from rich.console import Console

from tokendance.bench import rivals
from tokendance.bench.llamacpp import LLAMACPP_ENVIRONMENT, MODES, LlamaCpp, Mode, Prefilled
from tokendance.bench.rivals import LlamaCppPrompts, least_over_modes
from tokendance.bench.settings import BenchOutputs, BenchSettings
from tokendance.bench.worker import WORKER_MAIN, Environment
from tokendance.commands.bench import run_bench
from tokendance.errors import BaselineError
from tokendance.llm import LLM
from tokendance.models import demo
from tokendance.params import SamplingParams
from tokendance.rounds.segments import Salt, build_prompt

PYTHON = Path(sys.executable)
# An engine that answers with what it was asked, and prints besides.
ENGINE = """
class Engine:
    def answer(self, request):
        print("what engines print goes to stderr")
        match request["op"]:
            case "open":
                self.opened = request
                return {"kv_bytes": request["tokens"]}
            case "prefill":
                return {"seconds": 2.0, "computed_tokens": sum(request["cached"]),
                        "token_ids": [prompt[-1] for prompt in request["prompts"]]}
            case "step":
                return {"seconds": 0.5, "token_ids": [self.opened["sequences"]]}
            case "close":
                return {}

def start(request):
    open(request["files"] + "/weights", "w").close()
    return Engine(), {"version": "1.2", "bytes": {"bf16": 10, "q4_0": request["threads"]}}
"""


@pytest.fixture
def scripts(tmp_path: Path) -> list[Path]:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    return [WORKER_MAIN, script]


def test_the_driver_says_what_is_asked_and_returns_what_is_replied(scripts: list[Path]) -> None:
    with LlamaCpp(Path("model"), 3, python=PYTHON, scripts=scripts) as llama:
        assert "1.2" in llama.settings
        assert llama.weight_bytes == {"bf16": 10, "q4_0": 3}
        with llama.open(Mode("q4_0"), sequences=2, tokens=64) as context:
            assert context.kv_bytes == 64
            found = context.prefill([[1, 2], [3]], cached=[1, 0])
            assert found == Prefilled(2.0, 1, (2, 3))
            assert context.step() == (0.5, [2])
        files = Path(llama._files.name)
        assert (files / "weights").exists()
    assert not files.exists()


def test_what_goes_wrong_in_an_engine_is_said_and_its_files_are_gone(
    scripts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scripts[1].write_text(
        "def start(request):\n    open(request['files'] + '/a', 'w')\n    raise ValueError('no')\n"
    )
    with pytest.raises(BaselineError, match=r"(?s)llama\.cpp failed: ValueError: no.*Traceback"):
        LlamaCpp(Path("model"), python=PYTHON, scripts=scripts)
    assert not list(tmp_path.glob("tokendance-gguf-*"))


def test_an_error_is_told_and_not_what_follows_from_it(scripts: list[Path]) -> None:
    scripts[1].write_text(ENGINE.replace('case "step":', 'case "step":\n                1 / 0'))
    with (
        pytest.raises(BaselineError, match="ZeroDivisionError"),
        LlamaCpp(Path("model"), python=PYTHON, scripts=scripts) as llama,
        llama.open(Mode("bf16"), 1, 8) as context,
    ):
        context.step()


def test_a_request_that_cannot_be_answered_ends_the_worker(scripts: list[Path]) -> None:
    asked = '{"op": "step"}\n'
    done = subprocess.run(
        [PYTHON, "-P", *scripts], input=asked, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"error": "AssertionError: no start"}
    assert "Traceback" in done.stderr


def test_prompts_as_they_are_and_with_the_shared_text_in_front() -> None:
    def ids(*values: int) -> Any:
        return np.array(values, np.int32)

    prompts = [
        build_prompt(
            [(ids(own), False), (ids(7, 8), True), (ids(9), True), (ids(own, 5), False)], s
        )
        for own, s in ((1, Salt(b"s")), (2, Salt(b"s")))
    ]
    as_is = LlamaCppPrompts.of(prompts, Mode("bf16"))
    assert as_is == LlamaCppPrompts([[1, 7, 8, 9, 1, 5], [2, 7, 8, 9, 2, 5]], [1, 1], 0)
    moved = LlamaCppPrompts.of(prompts, Mode("bf16", in_front=True))
    assert moved == LlamaCppPrompts([[7, 8, 9, 1, 1, 5], [7, 8, 9, 2, 2, 5]], [0, 0], 3)


def test_the_fastest_mode_is_what_ours_is_compared_with() -> None:
    times = {"dense": 1.2, str(MODES[0]): 3.0, str(MODES[1]): 2.0, str(MODES[3]): 4.0}
    assert least_over_modes(times) == {"llamacpp": 2.0, "llamacpp_in_front": 4.0}
    assert least_over_modes({"dense": 1.2}) == {}


class FakeContext:
    """A step takes 4 s with 4 bits, 2 s less with the shared text in front; twice that else."""

    kv_bytes = 2**20

    def __init__(self, mode: Mode, sequences: int, tokens: int) -> None:
        self.mode, self.sequences, self.tokens = mode, sequences, tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prefill(
        self, prompts: Sequence[Sequence[int]], *, cached: Sequence[int] = (), in_front: int = 0
    ) -> Prefilled:
        assert len(prompts) == self.sequences
        assert max(map(len, prompts)) < self.tokens
        assert (in_front > 0) == self.mode.in_front
        assert len({tuple(prompt[:in_front]) for prompt in prompts}) == 1
        num_computed = in_front + sum(len(prompt) - in_front for prompt in prompts) - sum(cached)
        return Prefilled(self._seconds, num_computed, (1,) * len(prompts))

    def step(self) -> tuple[float, list[int]]:
        return self._seconds, [1] * self.sequences

    @property
    def _seconds(self) -> float:
        return (4000.0 if self.mode.weights == "q4_0" else 8000.0) - 2000.0 * self.mode.in_front


class FakeLlamaCpp:
    settings = "a fake"
    weight_bytes = {"bf16": 2 * 2**20, "q4_0": 2**20}  # noqa: RUF012

    def __init__(self, _: Path) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self, mode: Mode, sequences: int, tokens: int) -> FakeContext:
        return FakeContext(mode, sequences, tokens)


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> str:
    return str(model_folder("llama", max_position_embeddings=4096))


@pytest.mark.parametrize("suite", ["decode", "prefill"])
def test_suites_have_a_row_for_each_mode(
    suite: Any, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "LlamaCpp", FakeLlamaCpp)
    monkeypatch.setattr(Environment, "find", lambda _: PYTHON)
    settings = BenchSettings(model, "tiny", repeats=2, against="llamacpp")
    run_bench(suite, settings, BenchOutputs(), Console())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "a fake" in result["notes"]
    rows = {row["mode"]: row for row in result["rows"] if row["agents"] == 3}
    assert {str(mode) for mode in MODES} < set(rows)
    four, front = rows["llama.cpp Q4_0"], rows["llama.cpp Q4_0, shared in front"]
    if suite == "decode":
        assert four["step_ms"] == four["min_ms"] == 4e6
        assert (four["weights_mib"], rows["llama.cpp BF16"]["weights_mib"]) == (1.0, 2.0)
        shared_tokens = front["shared"]
        assert four["kv_mib"] - front["kv_mib"] == 2 * shared_tokens  # three copies, or one
        assert rows["dense"]["kv_mib"] > rows["collective"]["kv_mib"] > 0
        assert rows["dense"]["weights_mib"] == rows["collective"]["weights_mib"] > 0
    else:
        assert four["median"] == 4000.0
        assert front["prompt_tokens"] == four["prompt_tokens"] > front["computed_tokens"]
        assert four["vs_collective"] > front["vs_collective"] > 1.0


@pytest.mark.llamacpp
@pytest.mark.demo
@pytest.mark.skipif(
    LLAMACPP_ENVIRONMENT.find() is None, reason="llama.cpp is not installed (make llamacpp)"
)
def test_the_real_one_says_what_we_say() -> None:
    """The weights are converted as they are: greedy answers are the same, whatever was before."""
    folder, num_tokens = demo.checkpoint(), 12
    llm = LLM(str(folder), dtype="float32", reuse="none")
    texts = ("The capital of France is", "Water boils at a temperature of")
    prompts = [llm.encoder.text_ids(text).tolist() for text in texts]
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    expected = [list(output.token_ids) for output in llm.generate(prompts, params)]
    common = prompts[0]
    moved = [common, [*common, *prompts[1]]]
    with LlamaCpp(folder) as llama:

        def answers(mode: Mode, given: list[list[int]], **told: Any) -> list[list[int]]:
            with llama.open(mode, len(given), 128) as context:
                first = context.prefill(given, **told).token_ids
                steps = [context.step()[1] for _ in range(num_tokens - 1)]
            return [list(said) for said in zip(first, *steps, strict=True)]

        assert answers(Mode("bf16"), prompts) == expected
        assert answers(Mode("bf16"), prompts, cached=[2, 3]) == expected
        whole = answers(Mode("bf16"), moved)
        assert answers(Mode("bf16", in_front=True), moved, in_front=len(common) - 1) == whole
        four_bits = answers(Mode("q4_0"), prompts)
        assert len(four_bits) == 2
        assert llama.weight_bytes["q4_0"] < llama.weight_bytes["bf16"] / 2
