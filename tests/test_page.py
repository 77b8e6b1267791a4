"""The page in a real Chromium: web/test has what it does there, and here is what it is shown."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from serving import listening
from tokendance import LLM, Agent, SamplingParams
from tokendance.view.document import read_document
from tokendance.view.page import whole_page
from tokendance.view.recording import Recording

MakeLLM = Callable[..., LLM]
DATA = Path(__file__).parent / "data"
WEB = Path(__file__).parent.parent / "web"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
TEN = SamplingParams(max_tokens=10, ignore_eos=True)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; CHROMIUM=/path names one"),
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no node"),
    pytest.mark.skipif(
        not (WEB / "node_modules" / "playwright-core").exists(),
        reason="playwright-core is not installed: make web",
    ),
]


def run_in_browser(script: str, **environment: str) -> None:
    assert CHROMIUM is not None
    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", f"test/{script}"],
        cwd=WEB,
        env={**os.environ, "CHROMIUM": CHROMIUM, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fail 0" in done.stdout
    assert "pass 0" not in done.stdout


def test_a_run_opened_from_disk(make_fake_llm: MakeLLM, tmp_path: Path) -> None:
    llm = make_fake_llm(num_pages=2000, correction="edges:3+1")
    recording = Recording(llm)
    evil = "</script><script>alert('it ran')</script> & "
    people = [
        Agent(name, evil + "very " * index + name)
        for index, name in enumerate(("Ann", "<b>Bo", "Cy"))
    ]
    session = llm.session(agents=people, params=TEN)
    for _ in range(3):
        session.run("Say something.").raise_for_errors()
    document = recording.document(with_text=True)
    (tmp_path / "run.json").write_text(json.dumps(document))
    (tmp_path / "run.html").write_text(whole_page(document))
    run_in_browser(
        "page.test.mjs", RUN_JSON=str(tmp_path / "run.json"), RUN_HTML=str(tmp_path / "run.html")
    )


def test_bars_of_a_recorded_run_look_as_they_did(tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    page.write_text(whole_page(read_document(DATA / "town_run.json")))
    run_in_browser("pixels.test.mjs", RUN_HTML=str(page), PICTURE=str(DATA / "town_bars_*.png"))


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_a_dashboard_follows_its_server(make_fake_llm: MakeLLM, keys: tuple[str, ...]) -> None:
    agents = [
        {
            "agent": name,
            "max_tokens": 8,
            "messages": [
                {"role": "system", "content": f"You are {name}."},
                {"role": "user", "content": "This is what all of them hear, again and again."},
            ],
        }
        for name in ("Ann", "Bo Longname")
    ]
    with listening(make_fake_llm(), api_keys=keys) as (port, _, _):
        run_in_browser(
            "live.test.mjs",
            DASHBOARD=f"http://127.0.0.1:{port}/dashboard",
            ROUND=json.dumps({"model": "tiny", "agents": agents}),
            **({"KEY": keys[0]} if keys else {}),
        )
