"""Fields of requests that clients of vLLM send: what they do here."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from serving import chat, events, serving
from tiny_models import VOCAB
from tokendance import LLM, Agent, Prompt, SamplingParams
from tokendance.models.loader import LoadedModel, load_model
from tokendance.options import EngineOptions
from tokendance.server.context import ServerContext

TEXT = "The baker says that bread is out until noon."


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> LoadedModel:
    return load_model(str(model_folder("llama", max_position_embeddings=4096)), "float32")


@pytest.fixture(scope="module")
def served(model: LoadedModel) -> Iterator[tuple[httpx.Client, ServerContext]]:
    with serving(LLM.from_loaded(model, EngineOptions(kv_budget=2**24))) as both:
        yield both


@pytest.fixture(scope="module")
def client(served: tuple[httpx.Client, ServerContext]) -> httpx.Client:
    return served[0]


# Tokens that are no printable letters; a token of this tokenizer is a byte.
NO_LETTERS = {str(token): -100.0 for token in [*range(3), *range(97, VOCAB)]}


def complete(client: httpx.Client, prompt: Any = TEXT, **fields: Any) -> httpx.Response:
    defaults = {"temperature": 0, "max_tokens": 6, "logit_bias": NO_LETTERS}
    body = {"model": "tiny", "prompt": prompt, **defaults, **fields}
    return client.post("/v1/completions", json=body)


def choice_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


# -- prompts that are scored ----------------------------------------------------------------------


def true_logprobs(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """Of all tokens in each place, by transformers: (tokens - 1, vocabulary)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0, :-1], dim=-1)


@pytest.mark.parametrize("length", [1, 2, 100, 700])  # of several passes, too
def test_prompts_are_scored_as_the_model_scores_them(
    client: httpx.Client,
    model: LoadedModel,
    model_folder: Callable[..., Path],
    length: int,
) -> None:
    text = (TEXT * 20)[:length]
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    expected = true_logprobs(model_folder("llama", max_position_embeddings=4096), ids)
    complete(client, text)  # it is cached now, and is computed all the same
    for prompt, most in ((text, 0), (ids, 1)):
        fields = {"echo": True, "logprobs": 3, "prompt_logprobs": 2, "max_tokens": most}
        response = complete(client, prompt, **fields)
        choice = choice_of(response)
        logprobs = choice["logprobs"]
        assert response.json()["usage"]["completion_tokens"] == most
        assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert choice["finish_reason"] == "length"
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert choice["text"][:length] == text
        assert [len(one) for one in logprobs.values()] == [length + most] * 4
        assert logprobs["text_offset"][:length] == list(range(length))
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        targets = torch.tensor(ids[1:])[:, None]
        found = torch.tensor(logprobs["token_logprobs"][1:length])
        torch.testing.assert_close(found, expected.gather(1, targets)[:, 0], atol=1e-4, rtol=0)
        scored = choice["prompt_logprobs"]
        assert scored[0] is None
        for place, (token, entries) in enumerate(zip(ids[1:], scored[1:], strict=True)):
            row = expected[place]
            assert entries[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
            assert entries[str(token)]["rank"] == 1 + int((row > row[token]).sum())
            assert str(int(row.argmax())) in entries
            assert entries[str(token)]["decoded_token"] == text[place + 1]


def test_scoring_goes_by_what_was_asked_of_each(client: httpx.Client) -> None:
    prompts = [TEXT, "abc", [40, 41]]
    bodies = [complete(client, [one, one], echo=True, logprobs=1, max_tokens=0) for one in prompts]
    for prompt, response in zip(prompts, bodies, strict=True):
        for choice in response.json()["choices"]:
            assert len(choice["logprobs"]["tokens"]) == len(prompt)
    plain = choice_of(complete(client))["text"]
    assert choice_of(complete(client, echo=True))["text"] == TEXT + plain
    assert choice_of(complete(client, max_tokens=0))["text"] == ""
    stream = events(complete(client, echo=True, stream=True, logprobs=1))
    assert "".join(event["choices"][0]["text"] for event in stream) == TEXT + plain
    tokens = [event["choices"][0]["logprobs"] for event in stream]
    assert "".join(text for one in tokens if one for text in one["tokens"]) == TEXT + plain
    refused = complete(client, stream=True, prompt_logprobs=1)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt_logprobs"


def test_a_conversation_is_scored(client: httpx.Client) -> None:
    document = chat(client, prompt_logprobs=1, return_token_ids=True).json()
    assert len(document["prompt_logprobs"]) == len(document["prompt_token_ids"])
    for token, entries in zip(
        document["prompt_token_ids"][1:], document["prompt_logprobs"][1:], strict=True
    ):
        assert str(token) in entries


def test_the_library_scores_prompts(model: LoadedModel) -> None:
    llm = LLM.from_loaded(model, EngineOptions(kv_budget=2**22))
    (output,) = llm.generate([TEXT], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert (output.text, output.finish_reason) == ("", "length")
    scores = output.prompt_logprobs
    ids = output.prompt_token_ids.tolist()
    forced = SamplingParams(max_tokens=99, forced_tokens=tuple(ids[1:]), keep_logprobs=True)
    (again,) = llm.generate([Prompt(ids[:1])], forced)
    for token, score, logprobs in zip(ids[1:], scores, again.logprobs, strict=True):
        assert score.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        assert score.top == ()


# -- how an answer ends ---------------------------------------------------------------------------


def test_a_stop_text_may_be_part_of_the_answer(client: httpx.Client) -> None:
    whole = choice_of(complete(client, max_tokens=12, ignore_eos=True))["text"]
    stop = whole[4:6]
    end = whole.index(stop)
    for include, expected in ((False, whole[:end]), (True, whole[: end + 2])):
        fields = {"stop": stop, "include_stop_str_in_output": include, "max_tokens": 12}
        assert choice_of(complete(client, ignore_eos=True, **fields))["text"] == expected
        stream = events(complete(client, stream=True, ignore_eos=True, **fields))
        assert "".join(event["choices"][0]["text"] for event in stream) == expected


def test_a_stop_token_may_be_part_of_the_answer(client: httpx.Client) -> None:
    choice = choice_of(complete(client, return_token_ids=True, ignore_eos=True, max_tokens=8))
    end = choice["token_ids"][4]
    at = choice["token_ids"].index(end)
    for include in (False, True):
        fields = {"stop_token_ids": [end], "include_stop_str_in_output": include, "max_tokens": 8}
        text = choice_of(complete(client, ignore_eos=True, **fields))["text"]
        assert text == choice["text"][: at + include]


@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_ends_before_min_tokens(client: httpx.Client, stream: bool) -> None:
    whole = choice_of(complete(client, max_tokens=30, ignore_eos=True, return_token_ids=True))
    text, ids = whole["text"], whole["token_ids"]

    def ask(**fields: Any) -> str:
        fields = {"max_tokens": 30, "ignore_eos": True, **fields}
        response = complete(client, stream=stream, **fields)
        if not stream:
            return str(choice_of(response)["text"])
        return "".join(event["choices"][0]["text"] for event in events(response))

    for number in (2, 9):
        letter = text[number]
        first, later = text.index(letter), text.find(letter, 10)
        assert ask(stop=letter) == text[:first]
        assert ask(stop=letter, min_tokens=10) == (text if later < 0 else text[:later])
    biased = {**NO_LETTERS, str(ids[0]): 100.0}
    same = ask(logit_bias=biased, stop=text[0] * 2, min_tokens=7, include_stop_str_in_output=True)
    assert same == text[0] * 8  # the stop text has to end behind them


def test_a_grammar_ends_no_answer_before_min_tokens(client: httpx.Client) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    fields: dict[str, Any] = {"response_format": wanted, "max_tokens": 60, "temperature": 1}
    # Closing it at once is what it would like best.
    close = {"logit_bias": {str(token): 60.0 for token in bracket_ids(client)}}
    short = choice_of(chat(client, seed=1, **close, **fields))["message"]["content"]
    assert short == "[]"
    regex = {"structured_outputs": {"regex": "[ab]{1,40}"}, "temperature": 1}
    for least in (1, 10, 40):
        fields = {"max_tokens": 60, "min_tokens": least, "seed": 1, **regex}
        response = chat(client, **fields).json()
        content = response["choices"][0]["message"]["content"]
        assert re.fullmatch("[ab]{1,40}", content)
        assert len(content) >= least
    # Where it allows nothing else, it ends all the same.
    choice = {"structured_outputs": {"choice": ["ab"]}, "min_tokens": 10, "max_tokens": 20}
    assert choice_of(chat(client, **choice))["message"]["content"] == "ab"


def bracket_ids(client: httpx.Client) -> list[int]:
    ids = [choice_of(complete(client, one, max_tokens=1, return_token_ids=True)) for one in "[]"]
    return [one["prompt_token_ids"][0] for one in ids]


# -- what an answer looks like --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes/no", 'a "b"', "é\n"]}}, '(yes/no|a "b"|é\n)'),
        ({"guided_choice": ["yes", "no"]}, "(yes|no)"),
        ({"guided_regex": r"a/b\/[0-9]{2}\n\d\\"}, r"a/b/[0-9]{2}\n\d\\"),
        ({"structured_outputs": {"regex": "(yes|no) [a-z]{3}"}}, r"(yes|no) [a-z]{3}"),
        ({"guided_json": {"enum": ["a"]}}, '"a"'),
        ({"guided_json": '{"const": [1]}'}, r"\[1\]"),
        ({"structured_outputs": {"json": {"enum": [7]}, "regex": None}}, "7"),
        ({"structured_outputs": {"json_object": True}}, r"\{.*\}"),
    ],
)
def test_structured_outputs(client: httpx.Client, fields: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        common: dict[str, Any] = {"max_tokens": 400, "temperature": 1, "seed": seed, **fields}
        for text in (
            choice_of(chat(client, **common))["message"]["content"],
            choice_of(complete(client, **common))["text"],
        ):
            assert re.fullmatch(pattern, text, re.DOTALL), text


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"structured_outputs": {}}, 200),
        ({"structured_outputs": None, "guided_json": None, "guided_choice": []}, 200),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, 400),
        ({"structured_outputs": {"choice": ["a", ""]}}, 400),
        ({"structured_outputs": {"grammar": "root ::= a"}}, 400),
        ({"structured_outputs": {"regex": "a(?=b)"}}, 400),
        ({"structured_outputs": {"regex": "a" * 30_000}}, 400),
        ({"structured_outputs": {"json": "no"}}, 400),
        ({"guided_json": {"type": "string"}, "structured_outputs": {"regex": "a"}}, 400),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, 400),
        ({"guided_grammar": "root ::= a"}, 400),
        ({"skip_special_tokens": False}, 400),
    ],
)
def test_structured_outputs_that_cannot_be(
    client: httpx.Client, fields: dict[str, Any], status: int
) -> None:
    for response in (chat(client, **fields), complete(client, **fields)):
        assert response.status_code == status, response.text
        if status != 200:
            message = response.json()["error"]["message"]
            assert "Extra inputs" not in message
            assert message.endswith((".", "!"))


# -- tokens ---------------------------------------------------------------------------------------


def test_token_ids_are_returned(client: httpx.Client, model: LoadedModel) -> None:
    plain = choice_of(complete(client))
    assert "token_ids" not in plain
    choice = choice_of(complete(client, return_token_ids=True))
    assert model.tokenizer.decode(choice["token_ids"]) == choice["text"] == plain["text"]
    assert model.tokenizer.decode(choice["prompt_token_ids"]) == TEXT
    stream = events(complete(client, return_token_ids=True, stream=True))
    assert stream[0]["choices"][0]["prompt_token_ids"] == choice["prompt_token_ids"]
    sent = [event["choices"][0].get("token_ids", []) for event in stream]
    assert [token for tokens in sent for token in tokens] == choice["token_ids"]
    document = chat(client, return_token_ids=True).json()
    ids = document["choices"][0]["token_ids"]
    stream = events(chat(client, return_token_ids=True, stream=True))
    assert stream[0]["prompt_token_ids"] == document["prompt_token_ids"]
    sent = [event["choices"][0].get("token_ids", []) for event in stream]
    assert [token for tokens in sent for token in tokens] == ids


def test_a_cache_salt_shares_nothing(served: tuple[httpx.Client, ServerContext]) -> None:
    client, server = served
    messages = [{"role": "user", "content": TEXT * 3}]

    def cached(**fields: Any) -> int:
        response = chat(client, messages, **fields)
        assert response.status_code == 200, response.text
        count: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    for salt in (None, "", "a", "b"):
        first = cached(cache_salt=salt)
        assert first == 0 or not salt  # what came before without any may be found
        assert cached(cache_salt=salt) > 90
    assert len(server._encoders) <= 1  # salts are not remembered
    agents = [{"agent": "a", "messages": messages}]
    for salt, is_cached in (("c", False), ("c", True), ("d", False)):
        body = {"model": "tiny", "agents": agents, "cache_salt": salt}
        first = client.post("/v1/rounds", json=body).json()["agents"][0]["usage"]
        assert (first["prompt_tokens_details"]["cached_tokens"] > 0) == is_cached


def test_salts_get_no_more_than_their_tenant(
    served: tuple[httpx.Client, ServerContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many salts a client sends, the scheduler sees one tenant."""
    client, server = served
    seen: set[tuple[bytes, bytes]] = set()
    submit = server.engine_thread.submit

    def record(jobs: Any) -> None:
        seen.update((job.request.tenant, job.request.prompt.salt) for job in jobs)
        submit(jobs)

    monkeypatch.setattr(server.engine_thread, "submit", record)
    for salt in ("a", "b", None):
        assert chat(client, cache_salt=salt).status_code == 200
    assert len({tenant for tenant, _ in seen}) == 1
    assert len({salt for _, salt in seen}) == 3


def test_a_session_is_that_of_its_salt(served: tuple[httpx.Client, ServerContext]) -> None:
    client, _ = served
    rounds = []
    for salt in ("a", "b", None, "a"):
        agents = [{"agent": "ann", "system": "You are Ann.", "task": "Speak.", "max_tokens": 4}]
        body = {"model": "tiny", "session": "town", "agents": agents, "cache_salt": salt}
        rounds.append(client.post("/v1/rounds", json=body).json()["round"])
    assert rounds == [1, 1, 1, 2]


# -- exact answers within a round -----------------------------------------------------------------


@pytest.mark.parametrize("session", [None, "exact"])
def test_one_agent_of_a_round_is_computed_exactly(
    client: httpx.Client, session: str | None
) -> None:
    def ask(number: int) -> list[dict[str, Any]]:
        said = {"type": "shared", "text": f"{number}: {TEXT * 3}"}
        agents: list[dict[str, Any]] = []
        for name in ("ann", "bob", "cid"):
            agent: dict[str, Any] = {"agent": name, "max_tokens": 8, "temperature": 0}
            if session is None:
                intro = {"type": "text", "text": f"You are {name * len(agents)}. "}
                agent["messages"] = [{"role": "user", "content": [intro, said]}]
            else:
                agent |= {"system": f"You are {name * 5}.", "task": f"{number} Speak."}
            agents.append(agent)
        agents[1]["reuse"] = "exact"
        body = {"model": "tiny", "agents": agents, "session": session}
        response = client.post("/v1/rounds", json=body)
        assert response.status_code == 200, response.text
        answers: list[dict[str, Any]] = response.json()["agents"]
        return answers

    answers = [ask(number) for number in range(2)][-1]
    details = [answer["usage"]["prompt_tokens_details"] for answer in answers]
    assert details[1] == {"cached_tokens": 0, "approximate_tokens": 0}
    assert details[2]["cached_tokens"] > 0


def test_an_overflow_without_an_agent_names_nobody(client: httpx.Client) -> None:
    long = [{"role": "user", "content": "a" * 5000}]
    message = chat(client, long).json()["error"]["message"]
    assert message.startswith("The prompt has ")
    named = chat(client, long, round={"id": "r", "agent": "Ann"}).json()["error"]["message"]
    assert named.startswith("The prompt of 'Ann' has ")


def test_scored_prompts_and_sessions_of_the_library_go_together(model: LoadedModel) -> None:
    llm = LLM.from_loaded(model, EngineOptions(kv_budget=2**22))
    session = llm.session(agents=[Agent("Ann", "You are Ann.")])
    (output,) = session.run("Speak.", SamplingParams(max_tokens=0, prompt_logprobs=1)).outputs
    assert len(output.prompt_logprobs) == output.prompt_tokens - 1
    assert json.dumps(output.text) == '""'
