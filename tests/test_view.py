"""Recordings of runs: their figures are the engine's, within bounds, and pages hold them."""

import base64
import hashlib
import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from test_cli import AGENTS, ROUND, Run, model, tokendance, write_trace
from test_exactness import KEEP, random_ids, random_round
from tokendance import LLM, Agent, Prompt, SamplingParams, private, shared
from tokendance.collector.estimate import PrefixEstimate
from tokendance.collector.plan import Role
from tokendance.commands.view import PageServer
from tokendance.errors import ConfigError
from tokendance.view.document import Json, read_document, write_document
from tokendance.view.page import POLICY, asset, page, whole_page
from tokendance.view.recorder import RecordLimits
from tokendance.view.recording import Changes, Recording

__all__ = ["model", "tokendance"]  # fixtures
MakeLLM = Callable[..., LLM]
TEN = SamplingParams(max_tokens=10, ignore_eos=True)


def town(llm: LLM, agents: int = 4) -> Any:
    names = [f"agent {index}" for index in range(agents)]
    people = [
        Agent(name, "You are a " + "very " * index + name) for index, name in enumerate(names)
    ]
    return llm.session(agents=people, params=TEN)


def role_tokens(agent: Json, *roles: Role) -> int:
    return sum(stop - start for start, stop, role, *_ in agent["pieces"] if role in roles)


def test_figures_of_a_recording_are_those_of_the_rounds(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=2000)
    recording, session = Recording(llm), town(llm)
    estimate = PrefixEstimate(llm.engine.options.page_size)
    for _ in range(3):
        result = session.run("Say something.")
        result.raise_for_errors()
        stats = result.stats
        prefix = estimate.add_round([(o.prompt_token_ids, o.token_ids) for o in result.outputs])
        shown = recording.document(with_text=True)["rounds"][-1]
        assert shown["tokens"] == {
            "prompt": stats.prompt_tokens,
            "generated": stats.generated_tokens,
            "computed": stats.computed_tokens,
            "reused": stats.reused_tokens,
            "corrected": stats.corrected_tokens,
            "approximate": sum(output.approximate_tokens for output in result.outputs),
            "none": stats.prompt_tokens,
            "prefix": prefix,
        }
        assert shown["memory"]["dense"] == stats.kv_bytes.dense
        assert shown["memory"]["resident"] == stats.kv_bytes.resident
        assert shown["memory"]["stored"] == {
            "memory": llm.engine.status().stored_pages * llm.engine.page_bytes,
            "disk": None,
        }
        assert [agent["answer"] for agent in shown["agents"]] == [o.text for o in result.outputs]
        for agent, output in zip(shown["agents"], result.outputs, strict=True):
            edges = [edge for start, stop, *_ in agent["pieces"] for edge in (start, stop)]
            assert edges[0] == 0
            assert edges[-1] == output.prompt_tokens
            assert edges[1:-1:2] == edges[2::2]  # nothing is missing, nothing there twice
            assert role_tokens(agent, Role.PREFIX, Role.REUSED) == output.reused_tokens
            assert role_tokens(agent, Role.CORRECTED) == output.corrected_tokens
            assert agent["computed"] == output.computed_tokens
            assert agent["generated"] == len(output.token_ids)
        assert sum(step[2] for step in shown["steps"]) == stats.computed_tokens
        times = [agent["times"] for agent in shown["agents"]]
        for time in times:
            order = [time["first_step"], time["first_token"], time["finished"]]
            assert order == sorted(order)
        assert shown["stop_s"] == max(time["finished"] for time in times)
    assert [one["number"] for one in recording.document(with_text=True)["rounds"]] == [1, 2, 3]


def test_whoever_reads_a_run_names_it_and_its_owner(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    recording = Recording(llm)
    prompts = random_round(3)
    llm.run_round(prompts, TEN).raise_for_errors()
    document = recording.document(with_text=False)
    (run,) = document["runs"]
    agents = document["rounds"][0]["agents"]
    owner = next(agent for agent in agents if agent["agent"] == run["agent"])
    assert role_tokens(owner, Role.OWNED) == run["tokens"]
    of_run = {}
    for agent in agents:
        segments = {
            agent["parts"][part][1] for *_, part, number, _ in agent["pieces"] if number >= 0
        }
        assert all(number in (-1, run["run"]) for *_, number, _ in agent["pieces"])
        of_run[agent["agent"]] = segments
        first = next(start for start, _, kind in agent["parts"] if kind == "shared")
        for _, _, role, _, _, offset in agent["pieces"]:
            if role == Role.REUSED:
                assert offset == first - run["start"]
        assert [kind for *_, kind in agent["parts"]] == ["private", *["shared"] * 4, "task"]
    assert len({frozenset(segments) for segments in of_run.values()}) == 1


def test_who_said_what_is_found(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=2000)
    recording, session = Recording(llm), town(llm)
    session.run("Say something.")
    session.run("Go on.")
    document = recording.document(with_text=True)
    agent = document["rounds"][1]["agents"][0]
    blocks = [document["segments"][str(n)] for _, n, kind in agent["parts"] if kind == "shared"]
    assert [block["speaker"] for block in blocks] == [f"agent {index}" for index in range(4)]
    for block, said in zip(blocks, document["rounds"][0]["agents"], strict=True):
        assert said["answer"] in block["text"]


def test_text_is_in_it_only_if_it_may_be(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    recording, session = Recording(llm), town(llm)
    session.run("Say something of potatoes.")
    assert "potatoes" in json.dumps(recording.document(with_text=True))
    document = recording.document(with_text=False)
    assert not document["has_text"]
    assert "potatoes" not in json.dumps(document)
    assert {segment["text"] for segment in document["segments"].values()} == {None}
    assert {agent["answer"] for agent in document["rounds"][0]["agents"]} == {None}


def test_the_oldest_rounds_give_way_with_all_they_hold(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=4000)
    recording = Recording(llm, RecordLimits(max_rounds=3))
    for seed in range(8):
        llm.run_round(random_round(seed), TEN)
        document = recording.document(with_text=False)
    assert [one["number"] for one in document["rounds"]] == [6, 7, 8]
    assert document["dropped_rounds"] == 5
    assert len(document["segments"]) == 3 * (4 + 2 * 5)
    assert {run["round"] for run in document["runs"]} == {6, 7, 8}
    with recording.recorder.reading() as held:
        assert len(held.segments) == len(document["segments"])
    for limits in (
        RecordLimits(max_tokens=sum(s["tokens"] for s in document["segments"].values()) // 2),
        RecordLimits(max_pieces=2 * sum(len(a["pieces"]) for a in document["rounds"][0]["agents"])),
    ):
        small = Recording(llm, limits)
        for seed in range(4):
            llm.run_round(random_round(seed), TEN)
            assert len(small.document(with_text=False)["rounds"]) in (1, 2)


def test_events_that_nobody_reads_are_lost_and_counted(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    recording = Recording(llm, RecordLimits(max_events=10))
    llm.run_round(random_round(0), TEN)
    assert recording.document(with_text=False)["lost_events"] > 0
    llm.run_round(random_round(1, agents=1, blocks=1), SamplingParams(max_tokens=1))
    assert recording.document(with_text=False)["rounds"][-1]["stop_s"] is not None


def test_long_rounds_keep_a_bounded_number_of_steps(
    make_fake_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokendance.view.rounds.MAX_STEPS", 16)
    llm = make_fake_llm()
    recording = Recording(llm)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    result = llm.run_round(random_round(0), params)
    (shown,) = recording.document(with_text=False)["rounds"]
    assert 8 <= len(shown["steps"]) <= 16
    assert sum(step[2] for step in shown["steps"]) == result.stats.computed_tokens
    starts = [step[0] for step in shown["steps"]]
    assert starts == sorted(starts)


def test_an_agent_that_fails_is_shown_as_failed(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    recording = Recording(llm)
    fine = random_round(0, agents=2)
    result = llm.run_round([*fine, Prompt("", agent="nobody")], TEN)
    (shown,) = recording.document(with_text=True)["rounds"]
    assert shown["stop_s"] is not None
    failed = next(agent for agent in shown["agents"] if agent["agent"] == "nobody")
    assert failed["error"] == str(result.outputs[2].error)
    assert shown["tokens"]["prompt"] == result.stats.prompt_tokens
    # A round of which nothing could begin is none.
    llm.run_round([Prompt("", agent="nobody")], TEN)
    assert len(recording.document(with_text=True)["rounds"]) == 1


def test_shadows_are_figures_of_their_mirrors_and_no_rounds(make_llm: MakeLLM) -> None:
    llm = make_llm(correction="first:1", shadow=1.0)
    recording = Recording(llm)
    llm.run_round(random_round(14, agents=3), KEEP)
    reports = []
    while (report := llm.check_shadow()) is not None:
        reports.append(report)
    llm.generate([random_ids(np.random.default_rng(0), 9)], TEN)
    (shown,) = recording.document(with_text=False)["rounds"]
    by_agent = {agent["agent"]: agent["shadow"] for agent in shown["agents"]}
    assert len(reports) == 2
    for report in reports:
        assert by_agent.pop(report.agent) == {
            "tokens": report.tokens,
            "kl_next": report.kl_next,
            "kl": report.kl,
            "top1": report.top1,
        }
    assert list(by_agent.values()) == [None]  # the owner computed its own


def test_neutral_owners_are_told_apart(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(private="isolated")
    recording = Recording(llm)
    result = llm.run_round(random_round(2), TEN)
    (shown,) = recording.document(with_text=False)["rounds"]
    neutral = [agent for agent in shown["agents"] if agent["neutral"]]
    assert len(neutral) == 1
    assert role_tokens(neutral[0], Role.OWNED) == neutral[0]["prompt"]
    assert shown["tokens"]["computed"] == result.stats.computed_tokens
    assert shown["tokens"]["none"] == result.stats.prompt_tokens
    assert shown["stop_s"] is not None


def test_prefix_caching_of_bounded_size_forgets_what_is_not_used() -> None:
    rng = np.random.default_rng(0)
    estimate = PrefixEstimate(4, max_pages=6)
    first, second = (np.array(random_ids(rng, 12), np.int32) for _ in range(2))
    assert estimate.add_round([(first, ())]) == 12
    assert estimate.add_round([(second, ())]) == 12
    assert estimate.add_round([(first, ())]) == 1  # both fit
    third = np.array(random_ids(rng, 12), np.int32)
    assert estimate.add_round([(third, ())]) == 12
    assert estimate.add_round([(first, ())]) == 1
    assert estimate.add_round([(second, ())]) == 12  # it gave way to the third


def test_a_change_is_small_and_the_next_has_the_rest(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=4000)
    recording = Recording(llm)
    for number in range(5):
        llm.run_round(random_round(number), TEN)
    whole = recording.document(with_text=False)
    size = max(sum(len(agent["pieces"]) for agent in one["agents"]) for one in whole["rounds"])
    for max_pieces, per_change in ((1, 1), (2 * size, 2)):
        changes = Changes(recording, with_text=False, max_pieces=max_pieces)
        got: list[Json] = []
        while (change := changes.next()) is not None:
            assert 1 <= len(change["rounds"]) <= per_change + 1
            got += change["rounds"]
            assert changes.has_more == (len(got) < 5)
        assert got == whole["rounds"]


# -- on disk, and in pages ------------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><!-- & \u2028"


def recorded(make_fake_llm: MakeLLM) -> Json:
    llm = make_fake_llm()
    recording = Recording(llm)
    prompts = [
        Prompt(
            [private(EVIL + name), shared("Hello there, all of you."), private("Go.")], agent=name
        )
        for name in ("Ann", "<b>Bo")
    ]
    llm.run_round(prompts, TEN).raise_for_errors()
    return recording.document(with_text=True)


def test_a_page_holds_a_run_and_no_markup_of_it(make_fake_llm: MakeLLM) -> None:
    document = recorded(make_fake_llm)
    text = whole_page(document)
    embedded = re.search(r'<script type="application/json" id="run">(.*?)</script>', text, re.S)
    assert embedded is not None
    assert json.loads(embedded[1]) == json.loads(json.dumps(document))
    assert EVIL in json.loads(embedded[1])["segments"]["0"]["text"]
    assert text.count("</script>") == 2  # of the run and of the page, and no other
    assert not re.search(r"(src|href)=(?!\"data:)", text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    assert policy is not None
    for tag in ("script", "style"):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert len(inline) == 1
        digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert policy[1].startswith("default-src 'none'")
    assert "unsafe" not in policy[1] + POLICY


def test_the_command_line_records_and_shows(tokendance: Run, tmp_path: Path, model: str) -> None:
    trace = write_trace(tmp_path / "t.jsonl", *AGENTS)
    run, out, html = tmp_path / "run.json", tmp_path / "out.json", tmp_path / "run.html"
    arguments = (
        "run", trace, "--model", model, "--rounds", "2", "--max-tokens", "5", "--threads", "1",
        "--kv-budget", "8MiB", "--dtype", "float32", "--json", str(out), "--record", str(run),
    )  # fmt: skip
    done = tokendance(*arguments)
    assert done.returncode == 0, done.stderr
    document, figures = read_document(run), json.loads(out.read_text())
    for shown, told in zip(document["rounds"], figures["rounds"], strict=True):
        assert shown["tokens"]["computed"] == told["computed_tokens"]
        assert shown["tokens"]["prefix"] == told["prefix_caching_tokens"]
    assert document["engine"]["reuse"] == "collective"
    said = [agent["answer"] for one in document["rounds"] for agent in one["agents"]]
    assert said == [output["text"] for output in figures["outputs"]]
    done = tokendance("view", str(run), "--html", str(html))
    assert done.returncode == 0, done.stderr
    assert html.read_text() == whole_page(document)
    assert tokendance(*arguments, "--no-record-text").returncode == 0
    assert not read_document(run)["has_text"]


def test_a_recorded_trace_can_be_recorded(tokendance: Run, tmp_path: Path, model: str) -> None:
    trace = write_trace(tmp_path / "t.jsonl", *AGENTS, ROUND)
    run = tmp_path / "run.json"
    done = tokendance("run", trace, "--model", model, "--threads", "1", "--record", str(run))
    assert done.returncode == 0, done.stderr
    (shown,) = read_document(run)["rounds"]
    assert [agent["agent"] for agent in shown["agents"]] == ["Ann", "Bo"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no recorded run"),
        ('{"format": "tokendance-run", "version": 2}', "has version 2"),
        ('{"format": "tokendance-run", "version": 1}', "lacks engine, rounds, runs, segments"),
    ],
)
def test_what_is_no_run_is_refused(
    tokendance: Run, tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    done = tokendance("view", str(path))
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def served(run: Json | Recording) -> Iterator[PageServer]:
    with PageServer(run) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def opened(url: str, **headers: str) -> Iterator[http.client.HTTPResponse]:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=60)
    connection.request("GET", address.path, headers=headers)
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def get(url: str, **headers: str) -> tuple[int, bytes]:
    with opened(url, **headers) as answer:
        return answer.status, answer.read()


def test_a_run_is_served_to_whoever_knows_its_address(make_fake_llm: MakeLLM) -> None:
    document = recorded(make_fake_llm)
    with served(document) as server:
        assert server.server_address[0] == "127.0.0.1"
        with opened(server.url) as answer:
            assert (answer.status, answer.read().decode()) == (200, page("run.json"))
            assert answer.getheader("content-security-policy") == POLICY
            assert answer.getheader("x-content-type-options") == "nosniff"
        run = server.url + "run.json"
        assert json.loads(get(run)[1]) == json.loads(json.dumps(document))
        script = asset("view.js")
        assert script is not None
        assert get(server.url + "view.js")[1] == script.content
        assert get(server.url + "view.css")[0] == 200
        for name in ("nothing", "../__init__.py", "assets/view.js", "events"):
            assert get(server.url + name)[0] == 404
        root = f"http://127.0.0.1:{server.server_port}/"
        for guessed in (root, root + "run.json", root + "view.js", server.url[:-2] + "/"):
            assert get(guessed)[0] == 404
        assert get(run, Host="evil.example")[0] == 403
        with pytest.raises(OSError, match="in use"):
            PageServer(document, server.server_port)


def next_event(answer: http.client.HTTPResponse) -> Json:
    while not (line := answer.readline()).startswith(b"data: "):
        assert line, "the stream has ended"
    event: Json = json.loads(line.removeprefix(b"data: "))
    return event


def test_a_run_that_goes_on_is_streamed(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm()
    recording = Recording(llm)
    with served(recording) as server, opened(server.url + "events") as answer:
        assert answer.getheader("content-type") == "text/event-stream"
        assert next_event(answer)["rounds"] == []
        for number in (1, 2):
            llm.run_round(random_round(number), TEN)
            event = next_event(answer)
            while event["rounds"][-1]["stop_s"] is None:  # it may come in several
                event = next_event(answer)
            whole = recording.document(with_text=True)
            assert [one["number"] for one in event["rounds"]] == [number]  # and no other again
            assert event["rounds"][-1] == json.loads(json.dumps(whole))["rounds"][-1]
            assert event["segments"].items() <= whole["segments"].items()


def test_what_changes_is_told_once_and_what_is_dropped_is_forgotten(make_fake_llm: MakeLLM) -> None:
    llm = make_fake_llm(num_pages=4000)
    recording = Recording(llm, RecordLimits(max_rounds=2))
    changes = Changes(recording, with_text=False)
    first = changes.next()
    assert first is not None
    assert (first["rounds"], first["first_round"]) == ([], None)
    assert changes.next() is None
    for number in (1, 2, 3):
        llm.run_round(random_round(number), TEN)
        change = changes.next()
        assert change is not None
        assert [one["number"] for one in change["rounds"]] == [number]
        assert change["first_round"] == max(1, number - 1)
        assert changes.next() is None


def test_a_run_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--record"):
        write_document(tmp_path / "missing" / "run.json", {})
