"""Agent frameworks as they are, against the server: everybody answers, and words are reused.

The clients in `frameworks/` are written as users of each framework write theirs. They run in an
environment of their own (make frameworks), and the model is the demo model. What is reused is
compared with an oracle that knows nothing of how the server finds what prompts have in common.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from framework_clients import PYTHON, count_tokens, play
from oracle import Asked
from tokendance.fidelity.shadow import ShadowReport
from tokendance.models import demo
from tokendance.models.loader import LoadedModel, load_model

pytestmark = [
    pytest.mark.demo,
    pytest.mark.frameworks,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-frameworks: run make frameworks"),
]

ROUNDS = 3
SHADOWS = 5  # answers of a small town that are compared with exact computation
Case = tuple[str, str, int]  # the client, its way, and how many agents
CASES: list[Case] = [
    (client, way, agents)
    for client, way in (
        ("openai_sdk", "threads"),
        ("openai_sdk", "gathered"),
        ("openai_sdk", "streams"),
        ("openai_sdk", "in-turn"),
        ("langgraph_town", "graph"),
        ("autogen_town", "gathered"),
        ("autogen_town", "in-turn"),
        ("agentscope_town", "chat"),
        ("agentscope_town", "multi-agent"),
    )
    for agents in (3, 10)
]


@dataclass(frozen=True)
class Town:
    """A town that a client has played.

    Attributes:
        said: in each round, by name.
        asked: in each round, in the order of arrival.
        shadows: how far some of the answers were from exact computation.
    """

    said: list[dict[str, str]]
    asked: list[list[Asked]]
    shadows: list[ShadowReport]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(demo.ALIAS)


@pytest.fixture(scope="module")
def town_of(model: LoadedModel) -> Callable[[Case], Town]:
    """Return a function that lets a client play its town, once for all tests."""
    played: dict[Case, Town] = {}

    def of(case: Case) -> Town:
        if case not in played:
            played[case] = play_town(model, *case)
        return played[case]

    return of


def play_town(model: LoadedModel, client: str, way: str, agents: int) -> Town:
    played = play(model, client, way, agents=agents, rounds=ROUNDS, shadow=float(agents == 3))
    assert len(played.asked) == agents * ROUNDS
    reports = [played.llm.check_shadow() for _ in range(SHADOWS)]
    return Town(
        played.said,
        [played.asked[first : first + agents] for first in range(0, agents * ROUNDS, agents)],
        [report for report in reports if report is not None],
    )


def name_of(case: Case) -> str:
    return "-".join(map(str, case))


def tell(capsys: pytest.CaptureFixture[str], case: Case, figures: str) -> None:
    """Show figures of a test that passes, too."""
    with capsys.disabled():
        print(f"\n{name_of(case)}: {figures} ", end="")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_everybody_hears_all_and_answers(
    case: Case, town_of: Callable[[Case], Town], model: LoadedModel
) -> None:
    town = town_of(case)
    assert len(town.said) == ROUNDS
    for said in town.said:
        assert len(said) == case[2]
        assert all(text.strip() for text in said.values()), said
    for before, asked in zip(town.said, town.asked[1:], strict=False):
        for request in asked:
            heard = model.tokenizer.decode(request.prompt)
            assert all(text.strip() in heard for text in before.values())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_can_be_reused_is_reused(
    case: Case, town_of: Callable[[Case], Town], capsys: pytest.CaptureFixture[str]
) -> None:
    """From the second round on, most of it: docs/clients.md has what is to be expected.

    Answers are drawn. Where people repeat each other's words, what they share falls into short
    pieces, and a town by itself may stay below what all towns have.
    """
    town = town_of(case)
    reused, could, prompts = count_tokens(town.asked)
    figures = map("{} / {} / {}".format, reused, could, prompts)
    tell(capsys, case, f"reused / reusable / prompt tokens {', '.join(figures)}")
    assert sum(reused[1:]) >= 0.6 * sum(could[1:])


def test_all_towns_together_reuse_four_fifths(town_of: Callable[[Case], Town]) -> None:
    towns = [count_tokens(town_of(case).asked) for case in CASES]
    reused = sum(sum(of_town[1:]) for of_town, _, _ in towns)
    assert reused >= 0.8 * sum(sum(of_town[1:]) for _, of_town, _ in towns)


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == 3], ids=name_of)
def test_answers_are_near_those_of_full_computation(
    case: Case, town_of: Callable[[Case], Town], capsys: pytest.CaptureFixture[str]
) -> None:
    reports = town_of(case).shadows
    assert len(reports) == SHADOWS
    kls = [report.kl for report in reports]
    tell(capsys, case, f"KL {statistics.mean(kls):.4f}, median {statistics.median(kls):.4f}")
    # Answers are drawn, and these are few: one of them may be far (docs/clients.md has the means).
    assert statistics.median(kls) < 0.25
