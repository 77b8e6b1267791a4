"""The scripts of examples/ run, and show what was reused."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serving import serving
from tokendance import LLM
from tokendance.models import demo
from tokendance.models.loader import LoadedModel, load_model
from tokendance.options import EngineOptions

FOLDER = Path(__file__).parents[1] / "examples"
Play = Callable[[str, str], str]


@pytest.fixture
def play(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Play:
    """Return a function that runs a script with one argument, and returns what it prints."""

    def run(script: str, argument: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, argument])
        capsys.readouterr()
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.demo)])
def model(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> str:
    if request.param == "demo":
        return demo.ALIAS
    return str(model_folder("llama", max_position_embeddings=4096))


def test_a_debate(play: Play, model: str) -> None:
    printed = play("debate.py", model)
    figures = [
        (int(computed), int(prompt))
        for computed, prompt in re.findall(r"computed (\d+) of (\d+) tokens", printed)
    ]
    assert len(figures) == 2 * 4
    assert figures[0][0] == figures[0][1]  # nobody was there before
    reply = figures[4:]
    owner, *readers = sorted((computed for computed, _ in reply), reverse=True)
    assert max(readers) < owner
    assert sum(readers) < sum(prompt for _, prompt in reply) / 2
    for name in ("Ann", "Bo", "Cy", "Dora"):
        assert len(re.findall(f"^{name}: ", printed, re.MULTILINE)) == 2


def test_a_town(play: Play, model: str) -> None:
    printed = play("town.py", model)
    figures = re.findall(r"(\d+) tokens read, (\d+) of them computed now", printed)
    assert len(figures) == 3
    assert all(int(computed) < int(read) / 2 for read, computed in figures[1:])
    first, second, third = (
        re.findall(r"^(\w+):", text, re.MULTILINE) for text in printed.rstrip().split("\n\n")
    )
    assert first == ["Noor", "Tobias", "Hana", "Bram"]
    assert second == [*first, "Leo"]
    assert third == ["Noor", "Tobias", "Hana", "Leo"]


def test_a_team_with_tools(play: Play, model: str) -> None:
    loaded: LoadedModel = load_model(model, "float32")
    with serving(LLM.from_loaded(loaded, EngineOptions(kv_budget=2**27))) as (client, _):
        printed = play("team.py", str(client.base_url).rstrip("/"))
    for name, tool in (("Ann", "forecast"), ("Bo", "timetable"), ("Cy", "prices")):
        assert re.search(f"^{name} has looked at the {tool} of (Saturday|Sunday): ", printed, re.M)
        assert f"\n{name}: " in printed
    figures = re.findall(r"(\d+) of (\d+) tokens were there already", printed)
    assert len(figures) == 3
    assert sum(int(cached) > int(prompt) / 4 for cached, prompt in figures) >= 2
