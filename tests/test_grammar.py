"""Grammars are tried elsewhere before they come into the server's process."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hostile_schemas import NAMED_LIMITS, ORDINARY, as_format, as_tool, attacks, bodies
from serving import chat, serving
from tokendance import LLM
from tokendance.models.loader import LoadedModel
from tokendance.server import grammar, grammar_check, grammar_process
from tokendance.server.answer_grammar import NamedSchema, Wanted
from tokendance.server.errors import ApiError
from tokendance.server.grammar import Grammars
from tokendance.server.grammar_constraint import GrammarConstraint
from tokendance.server.settings import ServerSettings
from tokendance.server.tool_format import ToolFormat

# Followed at random for fewer tokens than that, it does no harm.
LATE = {"type": "string", "pattern": "^x{60}(a?){1000}a{1000}$"}


def constrain(grammars: Grammars, schema: dict[str, Any], tenant: str = "") -> GrammarConstraint:
    """An answer that fits a schema."""
    wanted = Wanted(answer=NamedSchema("a", schema, strict=False, param="response_format"))
    return grammars.answer(wanted, ToolFormat(), tenant).constraint


@pytest.fixture(scope="module")
def made(fake: LoadedModel) -> Iterator[Grammars]:
    with closing(Grammars(fake, ServerSettings())) as grammars:
        grammars.start()
        yield grammars


@pytest.fixture
def tried(made: Grammars, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grammars that were tried in another process."""
    found: list[str] = []
    try_one = made.checker._try

    def note(text: str) -> str | None:
        found.append(text)
        return try_one(text)

    monkeypatch.setattr(made.checker, "_try", note)
    return found


def test_attacks_end_one_request_each() -> None:
    """All of them once ended the server without a word, or held it up for seconds."""
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, str(folder / "schema_attacks.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *answers, last = map(json.loads, done.stdout.splitlines())
    messages = {answer["name"]: answer["message"] for answer in answers}
    statuses = {answer["name"]: answer["status"] for answer in answers}
    assert len(answers) == 2 + 2 * len(attacks()) + len(bodies())
    assert answers[0]["status"] == answers[-1]["status"] == 200
    for name, option in NAMED_LIMITS.items():
        for one in (name, f"{name}, tool"):
            assert statuses[one] == 400
            assert f"--max-schema-{option} raised" in messages[one]
    # Where the machine has much else to do, its time is over first.
    assert re.search("--schema-(memory|timeout)", messages["memory"])
    assert statuses["fuel"] == 400
    assert set(statuses.values()) == {200, 400}
    for name in bodies():
        where, levels = name.split()
        if where in ("schema", "tools", "const") and int(levels) > 90:
            assert "nested" in messages[name]
    # Today 10 s; there is room for a machine that has much else to do.
    assert last["pauses"]["engine"] < 1


def test_a_grammar_is_tried_once_for_each_tenant(made: Grammars, tried: list[str]) -> None:
    for tenant in ("one", "one", "two", "one"):
        constrain(made, ORDINARY, tenant)
    assert len(tried) == 2
    for _ in range(2):
        with pytest.raises(ApiError, match="lexer"):
            constrain(made, attacks()["fuel"], "one")
    assert len(tried) == 4


def test_what_is_known_has_a_bound(
    made: Grammars, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "_MAX_KNOWN", 2)
    for number in (1, 2, 1, 3, 1, 2):
        constrain(made, {"const": number})
    assert [text.partition('"const": ')[2][0] for text in tried] == ["1", "2", "3", "2"]


@pytest.mark.parametrize("name", ["memory", "fuel"])
def test_the_process_survives_what_it_tries(made: Grammars, name: str) -> None:
    constrain(made, {"const": name})
    assert made.checker._process is not None
    before = made.checker._process._process.pid
    with pytest.raises(ApiError) as caught:
        constrain(made, attacks()[name])
    assert (caught.value.status, caught.value.param) == (400, "response_format")
    assert "Simplify it" in str(caught.value)
    constrain(made, {"const": f"{name} again"})
    assert made.checker._process._process.pid == before


def test_time_is_limited(fake: LoadedModel) -> None:
    settings = ServerSettings(schema_timeout=0.05, schema_memory="4GiB")
    with closing(Grammars(fake, settings)) as grammars:
        for _ in range(2):
            with pytest.raises(ApiError, match=r"more than 0\.05 s \(--schema-timeout\)"):
                constrain(grammars, attacks()["memory"])


def test_memory_is_limited(fake: LoadedModel) -> None:
    with (
        closing(Grammars(fake, ServerSettings(schema_timeout=60))) as grammars,
        pytest.raises(ApiError, match="--schema-memory"),
    ):
        constrain(grammars, attacks()["memory"])


def test_a_stack_that_overflows_is_one_requests_trouble(fake: LoadedModel) -> None:
    """Where limits are raised beyond reason, the process that tries it dies, and no other."""
    wide = ServerSettings(max_schema_definitions=10**5, max_schema_depth=10**5)
    with closing(Grammars(fake, wide)) as grammars:
        grammars.checker._stack_bytes = 2**20
        with pytest.raises(ApiError, match="--schema-memory"):
            constrain(grammars, attacks()["definitions"])
        constrain(grammars, ORDINARY)


def test_a_process_that_was_killed_is_started_again(
    made: Grammars, caplog: pytest.LogCaptureFixture
) -> None:
    constrain(made, {"const": "before"})
    assert made.checker._process is not None
    killed = made.checker._process._process
    killed.kill()
    killed.wait()
    constrain(made, {"const": "after"})
    assert made.checker._process._process.pid != killed.pid
    assert "started again" in caplog.text


def test_a_tenant_leaves_room_for_others(made: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "_MAX_WAIT_S", 0.01)
    with made.checker._turn("one"):
        constrain(made, {"const": "room"}, "two")
        with pytest.raises(ApiError) as caught:
            constrain(made, {"const": "room"}, "one")
        assert caught.value.status == 503
        assert "Retry-After" in caught.value.headers
        with made.checker._turn("two"), pytest.raises(ApiError):
            constrain(made, {"const": "room"}, "three")
        constrain(made, {"const": "room"}, "two")  # it is known
    constrain(made, {"const": "room"}, "one")


def test_the_tokenizer_is_read_once(fake: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4)
    read: list[int] = []
    make = grammar_process.make_tokenizer

    def note(given: dict[str, Any]) -> Any:
        read.append(1)
        return make(given)

    monkeypatch.setattr(grammar, "make_tokenizer", note)
    with closing(Grammars(fake, ServerSettings())) as grammars, ThreadPoolExecutor(4) as pool:

        def ask(number: int) -> None:
            together.wait(60)
            constrain(grammars, {"const": number}, str(number))

        list(pool.map(ask, range(4)))
    assert len(read) == 1


def test_a_grammar_that_turns_out_bad_ends_its_answer_alone(
    make_fake_llm: Callable[..., LLM],
) -> None:
    with serving(make_fake_llm()) as (client, server), ThreadPoolExecutor(2) as pool:
        bad = pool.submit(chat, client, **as_format(LATE), max_tokens=100)
        good = pool.submit(chat, client, max_tokens=100, ignore_eos=True)
        refused = bad.result()
        assert refused.status_code == 400
        assert "cannot be followed" in refused.json()["error"]["message"]
        assert good.result().status_code == 200
        for fields in (as_format(ORDINARY), as_tool({"type": "object"})):
            assert chat(client, **fields, max_tokens=60).status_code == 200
        assert server.engine_thread.is_alive
        text = client.get("/metrics").text
        for name in ("engine", "event_loop"):
            assert f"tokendance_{name}_pause_seconds_count" in text
            assert f"tokendance_{name}_longest_pause_seconds" in text
