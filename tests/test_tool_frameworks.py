"""Agent frameworks with what their users do by default: tools, types of answers, streams, a proxy.

Three people may look around, and say what they do as JSON of a nested type. Whether they look is
the model's own choice, so a round has as many requests as it has. Those of `test_frameworks.py`
speak only.
"""

import dataclasses
import re
from collections.abc import Callable

import pytest

from framework_clients import PYTHON, PYTHON_OPENAI_3, Played, count_tokens, play
from oracle import Asked
from tokendance.models import demo
from tokendance.models.loader import LoadedModel, load_model

pytestmark = [
    pytest.mark.demo,
    pytest.mark.frameworks,
    pytest.mark.skipif(
        not (PYTHON.is_file() and PYTHON_OPENAI_3.is_file()), reason="run make frameworks"
    ),
]

AGENTS, ROUNDS = 3, 2
NEXT = "You have heard what the others do."  # begins the question of the second round
CALL = "<tool_call>"  # begins a call of the demo model
# Frameworks that ask for text where tools may be called; this model rarely calls one then.
SILENT = {"agentsociety_town", "crewai_town"}
Case = tuple[str, str]  # the client, and its way
CASES: list[Case] = [
    ("openai_agents_town", "responses"),
    ("openai_agents_town", "chat"),
    ("openai_agents_town", "chat-streams"),
    ("pydantic_ai_town", "responses"),
    ("pydantic_ai_town", "chat"),
    ("pydantic_ai_town", "chat-streams"),
    ("langchain_town", "chat"),
    ("langchain_town", "responses"),
    ("litellm_proxy_town", "openai"),
    ("litellm_proxy_town", "hosted_vllm"),
    ("camel_town", "threads"),
    ("crewai_town", "in-turn"),
    ("agentsociety_town", "gathered"),
]


@dataclasses.dataclass(frozen=True)
class Town:
    """A town that a client has played.

    Attributes:
        said: in each round, by name.
        asked: in each round, in the order of arrival.
    """

    said: list[dict[str, str]]
    asked: list[list[Asked]]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(demo.ALIAS)


@pytest.fixture(scope="module")
def town_of(model: LoadedModel) -> Callable[[Case], Town]:
    """Return a function that lets a client play its town, once for all tests."""
    towns: dict[Case, Town] = {}

    def of(case: Case) -> Town:
        if case not in towns:
            towns[case] = town(model, play(model, *case, agents=AGENTS, rounds=ROUNDS))
        return towns[case]

    return of


def town(model: LoadedModel, played: Played) -> Town:
    """Tell the rounds apart: the second begins with whoever first hears its question."""
    prompts = [model.tokenizer.decode(request.prompt) for request in played.asked]
    second = next(index for index, prompt in enumerate(prompts) if NEXT in prompt)
    return Town(played.said, [played.asked[:second], played.asked[second:]])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_everybody_calls_hears_all_and_answers(
    case: Case, town_of: Callable[[Case], Town], model: LoadedModel
) -> None:
    played = town_of(case)
    assert len(played.said) == ROUNDS
    for said in played.said:
        assert len(said) == AGENTS
        assert all(text.strip() for text in said.values()), said
    first, second = played.asked
    prompts = [model.tokenizer.decode(request.prompt) for request in second]
    for text in played.said[0].values():
        # By its words: clients may quote it, or cut it after a while.
        words = re.findall("[A-Za-z]{3,}", text)[:6]
        assert sum(all(word in prompt for word in words) for prompt in prompts) >= AGENTS
    calls = [model.tokenizer.decode(one.answer).count(CALL) for one in (*first, *second)]
    assert sum(calls) > 0 or case[0] in SILENT


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_what_can_be_reused_is_reused(
    case: Case, town_of: Callable[[Case], Town], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second round most of it: docs/clients.md has what is to be expected.

    Answers are drawn. A model that calls a tool ten times in the same words leaves pieces that are
    too short to share, so a town by itself may stay far below what all towns have.
    """
    reused, could, prompts = count_tokens(town_of(case).asked)
    with capsys.disabled():
        requests = [len(asked) for asked in town_of(case).asked]
        shares = f"{reused[1] / could[1]:.2f} of the oracle's, {reused[1] / prompts[1]:.2f} of all"
        print(f"\n{'-'.join(case)}: {shares}, requests {requests} ", end="")
    assert reused[1] >= 0.5 * could[1]


def test_all_towns_together_reuse_four_fifths(town_of: Callable[[Case], Town]) -> None:
    towns = [count_tokens(town_of(case).asked) for case in CASES]
    assert sum(reused[1] for reused, _, _ in towns) >= 0.8 * sum(could[1] for _, could, _ in towns)
