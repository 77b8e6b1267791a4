"""What goes wrong inside the real vLLM: aborts, pauses, resets, preemption, little memory."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from test_vllm import (
    FINISH,
    NUM_AGENTS,
    PYTHON,
    ROUND,
    Scripts,
    vllm_engine,
)
from test_vllm import embedded as embedded
from test_vllm import model as model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed (make vllm)"),
]
Ask = Callable[[Scripts], dict[str, Any]]
# Owners and mirrors prefill for several steps, and a round has more agents than there are seats.
CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 48, "max_num_seqs": 4}
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "synchronous": ({"async_scheduling": False}, {}),
    "asynchronous": ({"async_scheduling": True}, {}),
    "V2": (
        {"async_scheduling": True},
        {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"},
    ),
}
RESET = {"call": ["reset_prefix_cache", {"reset_running_requests": True}]}
RESUME: dict[str, Any] = {"call": ["resume_scheduler", {}]}


def pause(mode: str, *, clear: bool = True) -> dict[str, Any]:
    return {"call": ["pause_scheduler", {"mode": mode, "clear_cache": clear}]}


@pytest.fixture(scope="module", params=ENGINES)
def ask(request: pytest.FixtureRequest, model: Path) -> Iterator[Ask]:
    engine, environment = ENGINES[request.param]
    with vllm_engine(model, engine={**CHUNKS, **engine}, **environment) as ask:
        yield ask


STAGES = [
    ["5", "in the window"],
    ["5", "waits for an owner"],
    ["0", "prefills", "owner"],
    ["4", "waits for a seat", "mirror"],
    ["4", "prefills", "mirror"],
    ["0", "decodes", "owner"],
    ["3", "decodes", "mirror"],
]
STAGE_NAMES = ["-".join(stage) for stage in STAGES]


def until(stage: list[str]) -> list[dict[str, Any]]:
    """Begin a round, and go on to a stage of one of its requests."""
    first_step = {"steps": 0 if stage[1] == "in the window" else 1}
    return [ROUND.add(), first_step, {"until": stage}]


def test_aborts_at_every_stage_harm_nobody(ask: Ask, embedded: list[list[int]]) -> None:
    scenarios = {
        name: [*until(stage), {"abort": [stage[0]]}, FINISH]
        for name, stage in zip(STAGE_NAMES, STAGES, strict=True)
    }
    results = ask(scenarios)
    for name, (gone, *_, role) in zip(STAGE_NAMES, STAGES, strict=True):
        assert results[name]["missing_blocks"] == 0, name
        for index in range(NUM_AGENTS):
            answer = results[name]["answers"].get(str(index), {"tokens": []})["tokens"]
            if str(index) == gone:
                assert len(answer) < 8, name
            elif role == "owner":  # another one computes what all read
                assert len(answer) == 8, name
            else:
                assert answer == embedded[index], name


def check_goes_on_as_vllm_would(ask: Ask, result: Mapping[str, Any]) -> None:
    """Assert that who ran at a call has said since what vLLM says to its prompt and answer."""
    assert result["missing_blocks"] == 0
    assert result["said"]
    requests = []
    for request in ROUND.add(extra={"reuse": "exact"})["add"]:
        num_said = result["said"].get(request["id"], 8)
        if num_said < 8:
            prompt = [*request["tokens"], *result["answers"][request["id"]]["tokens"][:num_said]]
            requests.append({**request, "tokens": prompt, "max_tokens": 8 - num_said})
    exact = ask({"exact": [{"add": requests}, FINISH]})["exact"]["answers"]
    for name, answer in exact.items():
        said = result["said"][name]
        assert result["answers"][name]["tokens"][said:] == answer["tokens"]


@pytest.mark.parametrize("stage", STAGES[2:], ids=STAGE_NAMES[2:])
@pytest.mark.parametrize("call", [RESET, pause("keep")], ids=["reset", "pause"])
def test_what_runs_when_caches_are_reset_is_computed_anew(
    call: dict[str, Any], stage: list[str], ask: Ask
) -> None:
    """Nothing of the KV from before is read, as when the model's weights have changed."""
    script = [*until(stage), call, RESUME, FINISH]
    check_goes_on_as_vllm_would(ask, ask({"reset": script})["reset"])
