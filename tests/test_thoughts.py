"""Models that think: their thoughts, apart from what they say, over HTTP and in sessions."""

import itertools
import json
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scripted import LIKE_DEEPSEEK, LIKE_QWEN, scripted
from serving import HELLO, chat, events, serving
from tiny_models import TEMPLATE, VOCAB, make_tokenizer
from tokendance import Agent, Prompt, SamplingParams
from tokendance.models.encoder import PromptEncoder
from tokendance.models.thoughts import Said, Standing, ThoughtMarks, ThoughtParser
from tokendance.rounds.segments import make_salt

MARKS = ThoughtMarks("<think>", "</think>")
ANSWER = "<think>\nIs it late? < 5 </th\n</think>\n\nGood morning."
SAID = Said("Is it late? < 5 </th", "Good morning.")
TOOL = {"type": "function", "function": {"name": "walk", "parameters": {"type": "object"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes"]}}}


def read(pieces: list[str], standing: Standing, *, is_cut: bool = False) -> tuple[Said, Standing]:
    parser = ThoughtParser(MARKS, standing)
    said = [*map(parser.add, pieces), parser.finish(is_cut=is_cut)]
    whole = Said("".join(one.thought for one in said), "".join(one.text for one in said))
    return whole, parser.standing


@pytest.mark.parametrize(
    ("text", "standing", "expected"),
    [
        (ANSWER, Standing.BEFORE, SAID),
        ("\n" + ANSWER, Standing.BEFORE, SAID),
        (ANSWER.removeprefix("<think>"), Standing.INSIDE, SAID),
        ("Good <think>a</think>.", Standing.BEFORE, Said("", "Good <think>a</think>.")),
        ("<think>\n\n</think>\n\nYes.", Standing.BEFORE, Said("", "Yes.")),
        ("<thinking>", Standing.BEFORE, Said("", "<thinking>")),
        (" <thi", Standing.BEFORE, Said("", " <thi")),
        ("<think>a </thi", Standing.BEFORE, Said("a </thi", "")),
        ("a</think>b</think>c", Standing.INSIDE, Said("a", "b</think>c")),
        (" a<think>", Standing.BEHIND, Said("", " a<think>")),
    ],
)
def test_thoughts_are_told_apart(text: str, standing: Standing, expected: Said) -> None:
    assert read([text], standing)[0] == expected
    assert read(list(text), standing)[0] == expected


def test_what_is_cut_off_has_no_mark() -> None:
    for end in range(len(ANSWER) + 1):
        said, standing = read([ANSWER[:end]], Standing.BEFORE, is_cut=True)
        assert SAID.text.startswith(said.text)
        assert SAID.thought.startswith(said.thought)
        assert "<think>" not in said.thought + said.text
        assert (standing is Standing.BEHIND) == bool(said.text)


@given(
    fragments=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</thi", "\n", " ", "é🧀", "a", "nk>", "<t"]),
        max_size=8,
    ),
    cuts=st.lists(st.integers(0, 60), max_size=10),
    standing=st.sampled_from([Standing.BEFORE, Standing.INSIDE]),
    is_cut=st.booleans(),
)
@example(fragments=["a", "</thi", "nk>"], cuts=[4], standing=Standing.INSIDE, is_cut=False)
def test_the_pieces_in_which_it_comes_make_no_difference(
    fragments: list[str], cuts: list[int], standing: Standing, is_cut: bool
) -> None:
    text = "".join(fragments)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert read(pieces, standing, is_cut=is_cut) == read([text], standing, is_cut=is_cut)


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (LIKE_QWEN, MARKS),
        (LIKE_DEEPSEEK, MARKS),
        (TEMPLATE, None),
        (TEMPLATE + "{# [THINK] and [/THINK] #}", ThoughtMarks("[THINK]", "[/THINK]")),
        (TEMPLATE + "{{ '</seed:think>' if 0 }}", ThoughtMarks("<seed:think>", "</seed:think>")),
        (TEMPLATE + "{# </thinkers> </tool_call> #}", None),
    ],
)
def test_marks_are_those_of_the_chat_template(template: str, marks: ThoughtMarks | None) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert PromptEncoder(tokenizer, VOCAB, make_salt()).thought_marks == marks


def test_marks_that_no_text_has_are_none() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["</think>"], special_tokens=True)
    tokenizer.chat_template = LIKE_QWEN
    assert PromptEncoder(tokenizer, VOCAB, make_salt()).thought_marks is None


@pytest.mark.parametrize("template", [LIKE_QWEN, LIKE_DEEPSEEK])
@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL]}, {"n": 2}])
def test_thoughts_stand_apart(template: str, fields: dict[str, Any]) -> None:
    answer = ANSWER if template is LIKE_QWEN else ANSWER.removeprefix("<think>\n")
    llm, _ = scripted(lambda _: answer, template)
    fields = {"max_tokens": 90, **fields}
    with serving(llm) as (client, _):
        document = chat(client, **fields).json()
        usage = document["usage"]
        count = len(answer.partition("</think>")[0]) + len("</think>")
        details = {"reasoning_tokens": count * len(document["choices"])}
        assert usage["completion_tokens_details"] == details
        for choice in document["choices"]:
            thought, text = SAID
            message = {"content": text, "reasoning_content": thought, "reasoning": thought}
            assert choice["message"] == {"role": "assistant", **message}
            assert choice["finish_reason"] == "stop"
        options = {"stream_options": {"include_usage": True}}
        *stream, last = events(chat(client, stream=True, logprobs=True, **options, **fields))
        assert last["usage"]["completion_tokens_details"] == details
        deltas = [one["choices"][0]["delta"] for one in stream if not one["choices"][0]["index"]]
        for name, expected in zip(("reasoning_content", "content"), SAID, strict=True):
            assert "".join(delta.get(name, "") for delta in deltas) == expected
        kinds = [[name for name, value in delta.items() if value] for delta in deltas]
        firsts = [kind[0] for kind in kinds if kind and kind != ["role"]]
        assert firsts == sorted(firsts, reverse=True)  # no thought behind the text
        assert sum(firsts.count(name) for name in ("reasoning_content", "content")) > 20
        tokens = [
            one["choices"][0]["logprobs"]["content"]
            for one in stream
            if one["choices"][0].get("logprobs") and not one["choices"][0]["index"]
        ]
        assert sum(map(len, tokens)) == len(answer)
        # Where they are shared they stay in the text, which has both marks.
        shared = chat(client, share_reasoning=True, **fields).json()["choices"][0]["message"]
        assert shared == {"role": "assistant", "content": ANSWER}


def test_an_answer_that_is_cut_off_in_thought() -> None:
    llm, _ = scripted(lambda _: ANSWER, LIKE_QWEN)
    with serving(llm) as (client, _):
        document = chat(client, max_tokens=30).json()
        (choice,) = document["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == ""
        assert SAID.thought.startswith(choice["message"]["reasoning"])
        assert document["usage"]["completion_tokens_details"] == {"reasoning_tokens": 30}


def test_who_is_told_not_to_think_does_not() -> None:
    nothing = "<think>\n\n</think>\n\n"  # which the template has written
    llm, executor = scripted(lambda _: nothing + "<think> is a mark.", LIKE_QWEN)
    with serving(llm) as (client, _):
        document = chat(client, enable_thinking=False, max_tokens=40).json()
        assert document["choices"][0]["message"]["content"] == "<think> is a mark."
        assert document["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert executor.prompts == []  # it began behind empty thoughts


@pytest.mark.parametrize("template", [LIKE_QWEN, LIKE_DEEPSEEK])
@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("fields", [{"response_format": FORMAT}, {"tools": [TOOL]}])
@pytest.mark.parametrize("marks_are_tokens", [False, True])
def test_what_is_wanted_comes_behind_thoughts(
    template: str, thinks: bool, fields: dict[str, Any], marks_are_tokens: bool
) -> None:
    opens = template is LIKE_DEEPSEEK
    if opens and not thinks:
        pytest.skip("its template always thinks")
    call = '<tool_call>\n{"name": "walk", "arguments": {}}\n</tool_call>'
    thought = "Hm <tool_call> {1}."
    end = '"yes"' if "tools" not in fields else call
    begin = "" if opens else "<think>\n"
    script = f"{begin}{thought}</think>\n\n{end}" if thinks else end
    llm, _ = scripted(lambda _: script, template, marks_are_tokens=marks_are_tokens)
    if "tools" in fields:
        fields = {**fields, "tool_choice": "required"}
    with serving(llm) as (client, _):
        for stream in (False, True):
            response = chat(client, max_tokens=200, stream=stream, n=2, **fields)
            message = _message(response, stream=stream)
            assert message.get("reasoning_content", "") == (thought if thinks else "")
            if "tools" in fields:
                assert message["tool_calls"][0]["function"]["name"] == "walk"
                assert not message["content"]
            else:
                assert json.loads(message["content"]) == "yes"


def _message(response: httpx.Response, *, stream: bool) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    if not stream:
        message: dict[str, Any] = response.json()["choices"][1]["message"]
        return message
    choices = [event["choices"][0] for event in events(response)]
    deltas = [choice["delta"] for choice in choices if choice["index"] == 1]
    texts = {
        name: "".join(delta.get(name, "") for delta in deltas)
        for name in ("reasoning_content", "content")
    }
    return texts | {
        "tool_calls": [call for delta in deltas for call in delta.get("tool_calls", ())]
    }


def test_an_answer_that_never_stops_thinking_has_to() -> None:
    """What was asked for is missing, so it may not end, and has room in the end."""
    llm, _ = scripted(lambda _: "<think>Hm", LIKE_QWEN)
    with serving(llm) as (client, _):
        choice = chat(client, response_format=FORMAT, max_tokens=60).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == '"yes"'
        assert choice["message"]["reasoning"].startswith("Hm")
        assert chat(client, max_tokens=20).json()["choices"][0]["finish_reason"] == "stop"


HISTORY: list[dict[str, Any]] = [
    {"content": "Yes.", "reasoning_content": "Hm."},
    {"content": "Yes.", "reasoning": "Hm.", "reasoning_details": [{"type": "x"}]},
    {"content": [{"type": "thinking", "thinking": "Hm.", "signature": "a"},
                 {"type": "text", "text": "Yes."}]},
    {"content": [{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "Yes."}]},
    {"content": "<think>\nHm.\n</think>\n\nYes."},
    {"content": "Hm.\n</think>\nYes."},
]  # fmt: skip


@pytest.mark.parametrize("said", HISTORY)
def test_thoughts_in_a_history_go_the_way_of_the_template(said: dict[str, Any]) -> None:
    """One template writes those of the last answer; all else is left out."""
    earlier = {"role": "assistant", **said}
    for template in (LIKE_QWEN, LIKE_DEEPSEEK):
        llm, executor = scripted(lambda _: "a", template)
        begins = "<think>\n" if template is LIKE_DEEPSEEK else ""
        with serving(llm) as (client, _):
            for messages in ([*HELLO, earlier, *HELLO], [*HELLO, earlier]):
                assert chat(client, messages).status_code == 200
        written = "<think>\nHm.\n</think>\n\n" if template is LIKE_QWEN else ""
        hello = "<|start|>user\nhello there<|end|>\n"
        answer = "<|start|>assistant\n"
        assert executor.prompts == [
            f"{hello}{answer}Yes.<|end|>\n{hello}{answer}{begins}",
            f"{hello}{answer}{written}Yes.<|end|>\n{answer}{begins}",
        ]


def test_a_template_that_knows_no_thoughts_hears_none() -> None:
    llm, executor = scripted(lambda _: "a", TEMPLATE)
    with serving(llm) as (client, _):
        for said in HISTORY[:4]:
            assert chat(client, [*HELLO, {"role": "assistant", **said}, *HELLO]).status_code == 200
    assert len(set(executor.prompts)) == 1
    assert "Hm" not in executor.prompts[0]


def script_of_town(prompt: str) -> str:
    """Everybody thinks of a secret, and says a name."""
    name = prompt.partition("You are ")[2].partition(".")[0]
    return f"<think>\nsecret of {name}\n</think>\n\nI am {name}."


@pytest.mark.parametrize("shares", [None, False, True])
def test_agents_of_a_session_hear_no_thoughts(shares: bool | None) -> None:
    for is_http in (False, True):
        llm, executor = scripted(script_of_town, LIKE_QWEN)
        if is_http:
            with serving(llm) as (client, _):
                for number in range(2):
                    answers = _round(client, session="town", share_reasoning=shares)
                    for name, answer in zip(("Ann", "Bob"), answers, strict=True):
                        expected: dict[str, Any] = {"role": "assistant", "content": f"I am {name}."}
                        thought = f"secret of {name}"
                        if shares:
                            text = f"<think>\n{thought}\n</think>\n\nI am {name}."
                            expected["content"] = text
                        else:
                            expected |= {"reasoning_content": thought, "reasoning": thought}
                        assert answer["message"] == expected, number
                        details = answer["usage"]["completion_tokens_details"]
                        assert details == {"reasoning_tokens": len(f"<think>\n{thought}\n</think>")}
        else:
            agents = [Agent(name, f"You are {name}.") for name in ("Ann", "Bob")]
            session = llm.session(agents=agents, share_reasoning=shares)
            params = SamplingParams(max_tokens=60)
            for _ in range(2):
                session.run("Speak.", params).raise_for_errors()
        second = executor.prompts[2:]
        assert len(second) == 2
        for prompt in second:
            assert all(f"{name}: " in prompt for name in ("Ann", "Bob"))
            if shares:
                for name in ("Ann", "Bob"):
                    assert f"{name}: <think>\nsecret of {name}\n</think>\n\nI am {name}." in prompt
                assert prompt.count("secret") == 3
            else:
                assert "Ann: I am Ann.\nBob: I am Bob.\n" in prompt
                assert "secret" not in prompt
                assert "think" not in prompt


def test_what_is_still_thought_is_not_heard() -> None:
    llm, executor = scripted(lambda _: "secret and more</think>word", LIKE_DEEPSEEK)
    session = llm.session(agents=[Agent("Ann", "You are Ann.")])
    for most in (6, 60, 60):
        session.run("Speak.", SamplingParams(max_tokens=most)).raise_for_errors()
    assert "secret" not in "".join(executor.prompts)
    assert "Ann: \n" in executor.prompts[1]
    assert "Ann: word\n" in executor.prompts[2]


def _round(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    agents = [
        {"agent": name, "system": f"You are {name}.", "task": "Speak.", "max_tokens": 60}
        for name in ("Ann", "Bob")
    ]
    response = client.post("/v1/rounds", json={"model": "tiny", "agents": agents, **fields})
    assert response.status_code == 200, response.text
    answers: list[dict[str, Any]] = response.json()["agents"]
    return answers


def test_a_round_without_a_session_has_thoughts_apart() -> None:
    llm, _ = scripted(lambda _: ANSWER, LIKE_QWEN)
    agents = [{"agent": "Ann", "messages": HELLO, "max_tokens": 90}]
    with serving(llm) as (client, _):
        for shares, expected in ((False, SAID.text), (True, ANSWER)):
            body = {"model": "tiny", "agents": agents, "share_reasoning": shares}
            answer = client.post("/v1/rounds", json=body).json()["agents"][0]
            assert answer["message"]["content"] == expected
            assert answer["message"].get("reasoning") == (None if shares else SAID.thought)


def test_an_answer_is_continued() -> None:
    """A last message that is an assistant's is gone on with, its thoughts, too."""
    llm, executor = scripted(lambda _: "Good morning.", LIKE_QWEN)
    begun = {"role": "assistant", "content": "Good "}
    with serving(llm) as (client, _):
        answer = chat(client, [*HELLO, begun], max_tokens=40, continue_final_message=True)
        assert answer.json()["choices"][0]["message"]["content"] == "morning."
        new_turn = chat(client, [*HELLO, begun], max_tokens=40).json()["choices"][0]["message"]
        assert new_turn["content"] == "Good morning."
        assert executor.prompts[-1].endswith("Good <|end|>\n<|start|>assistant\n")
        no_turn = chat(client, HELLO, add_generation_prompt=False).json()
        assert no_turn["usage"]["prompt_tokens"] == len("Suser\nhello thereE\n")
        for messages, fields in ((HELLO, {}), ([*HELLO, begun], {"add_generation_prompt": True})):
            refused = chat(client, messages, continue_final_message=True, **fields)
            assert refused.status_code == 400
            assert "add_generation" in refused.text or "no answer to go on with" in refused.text
    llm, _ = scripted(lambda _: ANSWER, LIKE_QWEN)
    begun["content"] = ANSWER[:20]
    with serving(llm) as (client, _):
        answer = chat(client, [*HELLO, begun], max_tokens=90, continue_final_message=True)
        message = answer.json()["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == (ANSWER[20:28], SAID.text)


def test_prompts_of_the_library_end_as_they_are_told() -> None:
    llm, _ = scripted(lambda _: "Good morning.", LIKE_QWEN)
    begun = [*HELLO, {"role": "assistant", "content": "Good "}]
    (output,) = llm.generate([Prompt(begun, ending="continue")], SamplingParams(max_tokens=20))
    assert output.text == "morning."
