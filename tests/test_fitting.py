"""What is heard fits the context: what is left out of prompts, and who is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import examples
from fake_executor import FakeExecutor
from serving import serving
from test_conversation import ENCODER, last_blocks, make_output
from tiny_models import SPECIALS, VOCAB
from tokendance import LLM, Agent, ContextError, PromptError, SamplingParams
from tokendance.conversation import Conversation
from tokendance.models.loader import LoadedModel
from tokendance.rounds.fitting import cut_evenly
from tokendance.rounds.prompts import Prompt

MakeLLM = Callable[..., LLM]
MARK = " […]\n"
NAMES = "abcdefgh"
CONTEXT = 512


@pytest.fixture
def make_small(fake: LoadedModel, make_llm: MakeLLM) -> Callable[[], LLM]:
    """Makes engines without a model, with a context of 512 tokens."""
    model = replace(fake, shape=replace(fake.shape, max_context=CONTEXT))
    return lambda: make_llm(model=model, executor=FakeExecutor(400 * 16, VOCAB, SPECIALS))


@given(st.lists(st.integers(0, 60), max_size=8), st.integers(0, 200), st.integers(1, 20))
def test_the_longest_give_way(lengths: list[int], room: int, least: int) -> None:
    kept = cut_evenly(lengths, room, least)
    assert sum(kept) <= room
    if sum(lengths) <= room:
        assert kept == lengths
        return
    cut = [have for have, length in zip(kept, lengths, strict=True) if 0 < have < length]
    whole = [have for have, length in zip(kept, lengths, strict=True) if have == length]
    assert all(have >= least for have in cut)
    assert max(cut, default=0) - min(cut, default=0) <= 1  # even
    assert max(whole, default=0) <= min(cut, default=100) + 1
    left_out = [length for have, length in zip(kept, lengths, strict=True) if have == 0 < length]
    assert all(length >= max(whole + cut, default=0) for length in left_out)
    if cut:
        assert sum(kept) == room  # no token is wasted
    if room >= least * len(lengths):
        assert all(have or not length for have, length in zip(kept, lengths, strict=True))


def test_blocks_of_which_too_little_would_be_left() -> None:
    assert cut_evenly([8, 2, 6, 5], 14, 3) == [4, 2, 4, 4]
    assert cut_evenly([50, 50, 50], 45, 10) == [15, 15, 15]
    assert cut_evenly([50, 50, 50], 25, 10) == [12, 13, 0]
    assert cut_evenly([50, 4, 50], 9, 10) == [0, 4, 0]
    assert cut_evenly([50], 0, 10) == [0]
    assert cut_evenly([], 0, 10) == []


def num_tokens(prompt: Prompt) -> int:
    return len(ENCODER.encode(prompt))


@settings(max_examples=examples(200))
@given(st.data())
def test_every_prompt_fits_with_its_answer_or_the_round_is_refused(data: st.DataObject) -> None:
    """Any lengths of texts, answers and contexts; and whoever hears something, hears the same."""
    max_context = data.draw(st.integers(40, 400))
    conversation = Conversation(ENCODER, max_context)
    for name in NAMES[: data.draw(st.integers(1, 4))]:
        conversation.join(Agent(name, "s" * data.draw(st.integers(0, 60))))
    names = [agent.name for agent in conversation.agents]
    for _ in range(data.draw(st.integers(1, 5))):
        params = {
            name: SamplingParams(max_tokens=data.draw(st.integers(1, max_context)))
            for name in names
        }
        tasks = {name: "t" * data.draw(st.integers(0, 60)) for name in names}
        before = json.dumps(conversation.state())
        whole = Conversation(ENCODER, 10**6)
        whole.load_state(json.loads(before), conversation.round)
        all_there_is = whole.ask(tasks, params).prompts
        sure = {name: min(params[name].max_tokens, max_context // 2) for name in names}
        try:
            asked = conversation.ask(tasks, params)
        except ContextError as error:
            (name,) = re.findall("prompt of '(.)'", str(error))
            (tokens, room, limit) = map(int, re.findall(r"\d+", str(error)))
            bare = Conversation(ENCODER, 10**6)
            bare.join(next(agent for agent in conversation.agents if agent.name == name))
            assert tokens == num_tokens(bare.ask(tasks[name]).prompts[0])
            assert (room, limit) == (sure[name], max_context)
            assert tokens + room > max_context
            assert json.dumps(conversation.state()) == before
            continue
        blocks = [last_blocks(prompt) for prompt in asked.prompts]
        assert all(others == blocks[0] for others in blocks)
        marks = sum(block.content[-len(MARK) :] == tuple(map(ord, MARK)) for block in blocks[0])
        for prompt, everything, remembered in zip(
            asked.prompts, all_there_is, asked.remembered, strict=True
        ):
            answer = (
                params[prompt.agent or ""].max_tokens if remembered else sure[prompt.agent or ""]
            )
            assert num_tokens(prompt) + answer <= max_context
            lost = num_tokens(everything) - num_tokens(prompt)
            assert prompt.dropped_tokens == lost + marks * len(MARK)
        if all(
            num_tokens(prompt) + params[prompt.agent or ""].max_tokens <= max_context
            for prompt in all_there_is
        ):
            assert [num_tokens(prompt) for prompt in asked.prompts] == [
                num_tokens(prompt) for prompt in all_there_is
            ]
            assert not any(prompt.dropped_tokens for prompt in asked.prompts)
        said = [data.draw(st.integers(0, params[name].max_tokens)) for name in names]
        conversation.hear(asked, [
            make_output(prompt, "w" * length)
            for prompt, length in zip(asked.prompts, said, strict=True)
        ])  # fmt: skip


def test_what_was_cut_stays_cut() -> None:
    """The prompt of the next round begins with this one, so that its KV is found."""
    conversation = Conversation(ENCODER, 200, params=SamplingParams(max_tokens=20))
    for name in "ab":
        conversation.join(Agent(name, "I."))
    asked = conversation.ask("x")
    conversation.hear(asked, [make_output(prompt, "w" * 120) for prompt in asked.prompts])
    cut = conversation.ask("y")
    assert cut.prompts[0].dropped_tokens > 0
    conversation.hear(cut, [make_output(prompt, "!") for prompt in cut.prompts])
    again = Conversation(ENCODER, 1000)
    again.load_state(json.loads(json.dumps(conversation.state())), conversation.round)
    for before, after in zip(cut.prompts, again.ask("z").prompts, strict=True):
        old, new = ENCODER.encode(before).token_ids, ENCODER.encode(after).token_ids
        assert new[: len(old)].tolist() == old.tolist()


def test_text_that_cannot_be_encoded_refuses_the_round(make_small: Callable[[], LLM]) -> None:
    session = make_small().session(agents=[Agent("Ann", "I am Ann."), Agent("Bo", "I am Bo.")])
    for _ in range(2):
        with pytest.raises(PromptError, match="half a character"):
            session.run({"Ann": "half: \ud800", "Bo": "x"})
        assert session.round in (0, 1)
        session.run("Go.").raise_for_errors()


def test_a_long_round_is_heard_in_part(make_small: Callable[[], LLM]) -> None:
    """Eight agents say more in one round than the context holds, again and again."""
    llm = make_small()
    session = llm.session(agents=[Agent(name, f"I am {name}.") for name in NAMES])
    dropped = []
    for max_tokens in (100, 200, 200, 50, 10, 10):
        result = session.run("Speak.", SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        result.raise_for_errors()
        assert all(len(output.token_ids) == max_tokens for output in result.outputs)
        assert all(output.prompt_tokens + max_tokens <= CONTEXT for output in result.outputs)
        dropped.append([output.dropped_tokens for output in result.outputs])
        assert result.stats.dropped_tokens == sum(dropped[-1])
        # What is left of the blocks is computed once.
        assert result.stats.computed_tokens < result.stats.prompt_tokens or session.round == 1
    assert dropped[0] == [0] * 8
    assert all(min(of_round) > 0 for of_round in dropped[1:])
    assert all(max(of_round) == min(of_round) for of_round in dropped[1:3])  # the blocks' own
    with pytest.raises(ContextError, match=r"'c' has 5\d\d tokens .* room for 10;.* holds 512"):
        session.run(
            {name: "x" * (480 if name == "c" else 1) for name in NAMES},
            SamplingParams(max_tokens=10),
        )
    assert session.round == 6


def ask(client: httpx.Client, max_tokens: int, **tasks: str) -> httpx.Response:
    agents: list[dict[str, Any]] = [
        {
            "agent": name,
            "system": f"I am {name}.",
            "task": tasks.get(name, "Speak."),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        for name in NAMES
    ]
    return client.post("/v1/rounds", json={"model": "tiny", "session": "town", "agents": agents})


def test_a_served_session_is_not_locked_out(
    tiny: LoadedModel, make_llm: MakeLLM, tmp_path: Path
) -> None:
    assert tiny.shape.max_context == CONTEXT
    for is_first in (True, False):  # before and after a restart
        llm = make_llm(model=tiny, executor=FakeExecutor(400 * 16, VOCAB, SPECIALS))
        llm.open_store(tmp_path / "store")
        with serving(llm) as (client, _):
            if is_first:
                agents = ask(client, 100).json()["agents"]
                assert [one["dropped_tokens"] for one in agents] == [0] * 8
                assert ask(client, 200).status_code == 200
            answer = ask(client, 200)
            assert answer.status_code == 200, answer.text
            agents = answer.json()["agents"]
            assert all(one["usage"]["completion_tokens"] == 200 for one in agents)
            assert all(one["dropped_tokens"] > 0 for one in agents)
            metrics = client.get("/metrics").text
            (total,) = re.findall(r"^tokendance_dropped_tokens_total (.*)$", metrics, re.MULTILINE)
            assert float(total) >= sum(one["dropped_tokens"] for one in agents)
            refused = ask(client, 200, d="x" * 400)
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert re.search(r"'d' has 4\d\d tokens .* for 200; .* holds 512", error["message"])
            assert ask(client, 50).json()["round"] == (4 if is_first else 6)
        llm.close()


def test_an_agent_of_a_lone_round_is_named(make_small: Callable[[], LLM]) -> None:
    agent = {"agent": "ann", "messages": [{"role": "user", "content": "x" * 600}]}
    with serving(make_small()) as (client, _):
        body = {"model": "tiny", "agents": [agent]}
        (entry,) = client.post("/v1/rounds", json=body).json()["agents"]
    assert "'ann' has 6" in entry["error"]["message"]
