"""The suites of `--engine vllm`, on engines that are none: what they ask, and what they make of it.

The last test asks the real vLLM, if it is there.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tiny_models import save_model
from tokendance.bench import inside
from tokendance.bench.settings import INSIDE_SUITES, BenchOutputs, BenchSettings
from tokendance.bench.vllm import VLLM, VLLM_ENVIRONMENT, VLLMConfig, VLLMResult
from tokendance.bench.worker import Environment
from tokendance.commands.bench import run_bench
from tokendance.errors import BaselineError

Tokens = Sequence[Sequence[int]]
PLAIN_S, INSIDE_S, TAGGED_S = 3.0, 1.0, 2.0  # of a round
STEP_S, INSIDE_STEP_S = 0.5, 0.25  # of a token of all answers
HEADLINES = {
    "plain": {"time_lone_short", "time_lone_long", "time_distinct"},
    "prefill": {
        f"{figure}_{kind}_{agents}"
        for figure in ("speedup", "blocks")
        for kind in ("inside", "tagged")
        for agents in (2, 3)
    }
    | {f"blocks_{kind}_{agents}_together" for kind in ("inside", "tagged") for agents in (2, 3)},
    "decode": {"speedup"},
    "capacity": {"agents_plain", "agents_inside", "ratio"},
    "fidelity": {
        f"{figure}_{kind}"
        for figure in ("kl", "kl_next", "top1")
        for kind in ("inside", "inside_tagged", "embedded", "embedded_tagged")
    },
}


PYTHON = VLLM_ENVIRONMENT.find()  # of the real one; tests with a fake one find another


class FakeVLLM:
    """Answers at once, says what time it took, and remembers what it was asked.

    Attributes:
        started: all, in their order.
    """

    started: ClassVar[list["FakeVLLM"]] = []
    settings = "vLLM 1.2.3"

    def __init__(self, model: Path, config: VLLMConfig) -> None:
        assert model.is_dir()
        self.config = config
        self.asked: list[tuple[Any, ...]] = []
        self.is_closed = False
        FakeVLLM.started.append(self)

    def __enter__(self) -> "FakeVLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    def reset(self) -> None:
        self.asked.append(("reset",))

    def run(self, prompts: Tokens, max_tokens: int, *, blocks: Tokens | None = None) -> VLLMResult:
        self.asked.append(("run", [list(prompt) for prompt in prompts], max_tokens, blocks))
        is_inside = self.config.plugin
        seconds = PLAIN_S if not is_inside else INSIDE_S if blocks is None else TAGGED_S
        seconds += (INSIDE_STEP_S if is_inside else STEP_S) * (max_tokens - 1)
        return VLLMResult(
            seconds=seconds * len(prompts),
            cached_tokens=tuple(
                len(prompt) - 1 if is_inside and index else 0
                for index, prompt in enumerate(prompts)
            ),
            token_ids=tuple(tuple(range(10, 10 + max_tokens)) for _ in prompts),
            computed_tokens=sum(map(len, prompts)) + (max_tokens - 1) * len(prompts),
            peak_blocks=5 if is_inside else 10,
        )

    def score(
        self, prompts: Tokens, answers: Tokens, *, blocks: Tokens | None = None
    ) -> tuple[VLLMResult, list[Tensor]]:
        result = self.run(prompts, len(answers[0]), blocks=blocks)
        assert list(result.token_ids) == list(answers)
        logits = torch.zeros(len(answers[0]), 300)
        logits[:, 7] = 3.0 if not self.config.plugin else 2.0 if blocks is None else 3.0
        return result, [torch.log_softmax(logits, dim=-1)] * len(prompts)


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> str:
    return str(model_folder("llama", max_position_embeddings=4096))


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeVLLM.started = []
    monkeypatch.setattr(inside, "VLLM", FakeVLLM)
    monkeypatch.setattr(Environment, "find", lambda _: Path("python"))


def run(
    suite: str, model: str, capsys: pytest.CaptureFixture[str], outputs: BenchOutputs | None = None
) -> dict[str, Any]:
    """Run a suite as the command does; return the JSON of its last line."""
    settings = BenchSettings(model, "tiny", repeats=2, inside="vllm")
    run_bench(suite, settings, outputs or BenchOutputs(), Console())  # type: ignore[arg-type]
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.parametrize("suite", INSIDE_SUITES)
def test_a_suite_prints_its_json_and_draws_its_plot(
    suite: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = BenchOutputs(tmp_path / "a.json", tmp_path / "a.svg")
    document = run(suite, model, capsys, outputs)
    assert document["suite"] == suite
    assert set(document["headline"]) == HEADLINES[suite]
    assert FakeVLLM.settings in document["notes"]
    assert json.loads((tmp_path / "a.json").read_text()) == document
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert len({tuple(row) for row in document["rows"]}) == 1  # of one kind


@pytest.mark.parametrize("suite", INSIDE_SUITES)
def test_both_engines_have_the_same_settings(
    suite: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(suite, model, capsys)
    for with_it, without in zip(FakeVLLM.started[::2], FakeVLLM.started[1::2], strict=True):
        assert with_it.config.plugin
        assert without.config == replace(with_it.config, plugin=False)
        assert with_it.is_closed
        assert without.is_closed


def test_rounds_are_timed_with_private_parts_cached_and_nothing_else(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    headline = run("prefill", model, capsys)["headline"]
    assert headline["speedup_inside_3"] == PLAIN_S / INSIDE_S
    assert headline["speedup_tagged_3"] == PLAIN_S / TAGGED_S
    assert headline["blocks_inside_3"] == 0.5
    assert headline["blocks_inside_3_together"] == 0.5
    for engine in FakeVLLM.started:
        num_together = 0
        while engine.asked:
            (reset, (_, private, one, blocks), (_, prompts, *_)) = engine.asked[:3]
            del engine.asked[:3]
            assert reset == ("reset",)
            assert one == 1
            # That nothing is shared is said: what system prompts have in common would be.
            assert blocks in (None, [[] for _ in private])
            num_together += blocks is None
            for beginning, prompt in zip(private, prompts, strict=True):
                assert prompt[: len(beginning)] == beginning
                assert len(prompt) > len(beginning)
        assert num_together == (4 if engine.config.plugin else 2)  # each kind, for both sizes


def test_who_names_blocks_names_what_all_read(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("prefill", model, capsys)
    asked = [one for one in FakeVLLM.started[0].asked if one[0] == "run"][1::2]  # warmed before
    tagged = [one for one in asked if one[-1] is not None]
    assert len(tagged) == 2 * (1 + 2 + 2)  # for both sizes: warm-up, counted, blocks
    for _, prompts, _, blocks in tagged:
        texts = [
            [prompt[begin:end] for begin, end in zip(places[::2], places[1::2], strict=True)]
            for prompt, places in zip(prompts, blocks, strict=True)
        ]
        assert len(texts[0]) == len(prompts)
        assert all(text == texts[0] for text in texts)


def test_steps_are_what_a_longer_answer_takes_more(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run("decode", model, capsys)
    assert document["headline"]["speedup"] == pytest.approx(STEP_S / INSIDE_STEP_S)
    for row, step_s in zip(document["rows"], (STEP_S, INSIDE_STEP_S), strict=True):
        assert row["step_ms"] == pytest.approx(1000 * step_s * row["agents"])
        assert row["tokens_per_s"] == pytest.approx(1 / step_s)


def test_steps_in_which_prompts_are_computed_again_are_no_steps(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = FakeVLLM.run

    def forgetful(self: FakeVLLM, prompts: Tokens, max_tokens: int) -> VLLMResult:
        result = ask(self, prompts, max_tokens)
        return replace(result, computed_tokens=result.computed_tokens + 7 * (max_tokens > 1))

    monkeypatch.setattr(FakeVLLM, "run", forgetful)
    with pytest.raises(BaselineError, match="19 tokens in 4 steps of 3 agents"):
        run("decode", model, capsys)


def test_capacity_is_the_largest_round_in_time(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    round_s = 2 * (TAGGED_S + 31 * INSIDE_STEP_S)  # of two agents
    module = "tokendance.bench.suites.inside.capacity"
    monkeypatch.setattr(f"{module}.OBJECTIVE_S", 1.6 * round_s)
    headline = run("capacity", model, capsys)["headline"]
    assert headline["agents_inside"] == 3
    assert headline["agents_plain"] == 1
    assert headline["ratio"] == 3


def test_prompts_without_rounds_have_nothing_in_common(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run("plain", model, capsys)["rows"]
    assert {row["prompts"]: len(row["seconds"]) for row in rows} == {
        "lone short": 8, "lone long": 8, "distinct": 2,
    }  # fmt: skip
    for engine in FakeVLLM.started:
        assert [asked[0] for asked in engine.asked[::2]] == ["reset"] * (9 + 9 + 3)
        one, other = engine.asked[-1][1]
        assert all(one[at : at + 3] != other[at : at + 3] for at in range(len(one)))


def test_fidelity_is_about_those_who_read(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("fidelity", model, capsys)["rows"]
    of = {(row["mode"], row["dtype"]): row for row in rows if row["seed"] == 0}
    expected, found = (
        torch.log_softmax(torch.tensor([value] + 299 * [0.0]), dim=-1) for value in (3.0, 2.0)
    )
    kl = float((expected.exp() * (expected - found)).sum())
    for dtype in ("float32", "bfloat16"):
        told = of[inside.INSIDE, dtype]
        assert (told["mirrors"], told["top1"]) == (2, 1)  # of three
        assert told["kl"] == told["kl_next"] == pytest.approx(kl, rel=1e-3)
        assert of[inside.TAGGED, dtype]["kl"] == pytest.approx(0, abs=1e-6)
        assert of["embedded, tagged", dtype]["mirrors"] == 2
        assert of["embedded, tagged", dtype]["kl"] > 0


def test_without_vllm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "find", lambda _: None)
    with pytest.raises(BaselineError, match="make vllm"):
        run_bench("decode", BenchSettings(inside="vllm"), BenchOutputs(), Console())


@pytest.mark.vllm
@pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)")
def test_what_the_real_one_counts_and_says(tmp_path: Path) -> None:
    """Tokens of its passes are those of prompts that it found in no cache, and of answers."""
    save_model(tmp_path, "llama", hidden_size=128)  # heads of 32: vLLM has none of 16
    config = VLLMConfig(
        dtype="float32", max_context=512, kv_bytes=2**24, max_logprobs=-1, plugin=True
    )
    shared = list(range(20, 170))
    private = [list(range(170 + 40 * index, 180 + 53 * index)) for index in range(3)]
    prompts = [[*own, *shared, 11 + index] for index, own in enumerate(private)]
    blocks = [[len(own), len(own) + len(shared)] for own in private]
    answers = [[30 + index, 31, 32, 33] for index in range(3)]
    with VLLM(tmp_path, config, python=PYTHON) as engine:
        said, logprobs = engine.score(prompts, answers)
        assert [list(answer) for answer in said.token_ids] == answers
        for row in logprobs:
            assert row.shape == (4, 300)
            assert row.exp().sum(dim=-1) == pytest.approx(torch.ones(4), abs=1e-4)
        for tags in (None, blocks):
            engine.reset()
            result = engine.run(prompts, 4, blocks=tags)
            num_prompt, num_cached = sum(map(len, prompts)), sum(result.cached_tokens)
            # Of one block so long, the default corrects the first 16 and the last.
            assert result.cached_tokens == (0, len(shared) - 17, len(shared) - 17)
            assert result.computed_tokens == num_prompt - num_cached + 3 * (4 - 1)
