"""What requests may say: fields that are taken, and refusals that tell what to do. No model."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from fake_executor import FakeExecutor
from serving import HELLO, asking, chat, events, serving, wait_until
from tiny_models import SPECIALS, VOCAB
from tokendance import LLM
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions
from tokendance.server.context import ServerContext

Served = tuple[httpx.Client, ServerContext]
IMAGE = {"type": "image_url", "image_url": {"url": "http://a.b/c.png"}}
# Longer than a page, so that there is something to reuse.
NEWS = "The baker says that bread is out until noon, so come back later. " * 3


@pytest.fixture(scope="module")
def served(fake: LoadedModel) -> Iterator[Served]:
    num_slots = 2000 * 16
    options = EngineOptions(kv_budget=num_slots * fake.shape.kv_bytes_per_token(fake.dtype))
    llm = LLM.from_loaded(fake, options, executor=FakeExecutor(num_slots, VOCAB, SPECIALS))
    with serving(llm) as both:
        yield both


@pytest.fixture
def client(served: Served) -> httpx.Client:
    return served[0]


def message_of(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    text: str = response.json()["error"]["message"]
    return text


def test_parts_that_are_no_text(client: httpx.Client) -> None:
    said = [{"role": "user", "content": [{"type": "text", "text": "see"}, IMAGE]}]
    response = chat(client, said)
    message = message_of(response)
    assert "'image_url'" in message
    assert "reads text only" in message
    assert response.json()["error"]["param"] == "messages.0.content"
    thought = [
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hello"}]},
        {"role": "user", "content": "go on"},
    ]  # fmt: skip
    plain = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "go on"}]
    with_thought, without = chat(client, thought).json(), chat(client, plain).json()
    assert with_thought["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]


def test_bodies_that_are_not_read(client: httpx.Client) -> None:
    url = "/v1/chat/completions"
    body = b'{"model": "tiny", "messages": []}'
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        assert "Content-Type: application/json" in message_of(
            client.post(url, content=body, headers=headers)
        )
    json = {"content-type": "application/json"}
    latin = '{"model": "tiny", "messages": [{"role": "user", "content": "é"}]}'.encode("latin-1")
    assert "not UTF-8" in message_of(client.post(url, content=latin, headers=json))


def test_paths_that_are_not_served(client: httpx.Client) -> None:
    for path, near in (
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/complete", "/v1/completions"),
        ("/v1/model", "/v1/models"),
    ):
        assert f"Did you mean {near}?" in message_of(client.post(path, json={}), 404)
    assert "is not served here. /docs" in message_of(client.get("/v1/audio/speech"), 404)
    assert "'gpt-5' is not served" in message_of(client.get("/v1/models/gpt-5"), 404)


def test_unknown_fields_are_refused_by_name(client: httpx.Client) -> None:
    assert message_of(chat(client, colour=3)) == "colour is not supported. Leave it out."
    assert chat(client, colour=None).status_code == 200


def test_a_round_that_overflows_names_its_agent(client: httpx.Client) -> None:
    def ask(text: str) -> str:
        agents = [{"agent": "ann", "messages": [{"role": "user", "content": text}]}]
        answer = client.post("/v1/rounds", json={"model": "tiny", "agents": agents}).json()
        return str(answer["agents"][0]["error"]["message"])

    assert "'ann'" in ask("a" * 5000)
    assert "'ann'" in ask("a" * 1_000_000)


def test_an_answer_that_cannot_be_as_long_says_so(client: httpx.Client) -> None:
    assert "x-tokendance-max-tokens" not in chat(client, max_tokens=8).headers
    response = chat(client, max_tokens=100_000, stop=["a", "b", "c"])
    assert response.status_code == 200
    prompt = response.json()["usage"]["prompt_tokens"]
    assert int(response.headers["x-tokendance-max-tokens"]) == 4096 - prompt
    stream = chat(client, max_completion_tokens=100_000, stop=["a", "b", "c"], stream=True)
    assert int(stream.headers["x-tokendance-max-tokens"]) == 4096 - prompt


def test_exact_answers_and_what_was_reused(served: Served) -> None:
    client, _ = served
    words = [{"role": "user", "content": NEWS}]

    def details(**fields: Any) -> dict[str, int]:
        response = chat(client, **fields)
        assert response.status_code == 200, response.text
        found: dict[str, int] = response.json()["usage"]["prompt_tokens_details"]
        return found

    system = [{"role": "system", "content": f"You are {name}."} for name in ("Ann", "Roberta")]
    assert details(messages=[system[0], *words])["cached_tokens"] < 32
    approximate = details(messages=[system[1], *words])
    assert approximate["approximate_tokens"] > 64
    assert approximate["approximate_tokens"] <= approximate["cached_tokens"]
    exact = details(messages=[system[1], *words], reuse="exact")
    assert exact["approximate_tokens"] == 0
    assert exact["cached_tokens"] < 32
    again = details(messages=[system[0], *words])
    assert again["cached_tokens"] > 64
    assert again["approximate_tokens"] == 0
    agents = [
        {"agent": name, "messages": [{"role": "system", "content": name}, *words], **fields}
        for name, fields in (("carol", {}), ("dan", {"reuse": "exact"}))
    ]
    answer = client.post("/v1/rounds", json={"model": "tiny", "agents": agents}).json()
    usages = [one["usage"]["prompt_tokens_details"] for one in answer["agents"]]
    assert usages[1]["approximate_tokens"] == 0
    assert usages[1]["cached_tokens"] < 32
    assert "reuse" in message_of(chat(client, reuse="always"))


def test_who_left_is_cancelled(make_fake_llm: Callable[..., LLM]) -> None:
    with serving(make_fake_llm(num_pages=2000)) as (client, server):
        said: dict[str, Any] = {"messages": HELLO, "max_tokens": 3000, "ignore_eos": True}
        with asking(client, stream=True, **said) as connection:
            assert connection.getresponse().read(10)

        def cancelled() -> bool:
            return 'requests_total{reason="cancelled"} 1.0' in server.metrics.text().decode()

        wait_until(server, cancelled)
        assert 'reason="error"' not in client.get("/metrics").text


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 0, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"min_tokens": 0, "stop_token_ids": [], "ignore_eos": False, "length_penalty": 1.0},
        {"skip_special_tokens": True, "spaces_between_special_tokens": True, "echo": False},
        {"include_stop_str_in_output": False, "early_stopping": False, "use_beam_search": False},
        {"add_generation_prompt": True, "continue_final_message": False, "bad_words": []},
        {"guided_json": None, "guided_regex": None, "guided_choice": None, "cache_salt": None},
        {"structured_outputs": None, "prompt_logprobs": None, "return_token_ids": False},
        {"best_of": 1, "suffix": ""},
        {"service_tier": "auto", "prompt_cache_key": "a", "prompt_cache_retention": "24h"},
        {
            "priority": 3,
            "safety_identifier": "a",
            "request_id": "b",
            "truncate_prompt_tokens": None,
        },
    ],
)
def test_what_changes_no_answer_is_taken(client: httpx.Client, fields: dict[str, Any]) -> None:
    answers = [chat(client, **fields), chat(client)]
    assert answers[0].status_code == 200, answers[0].text
    contents = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert contents[0] == contents[1]
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, **fields}
    assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"length_penalty": 2}, "Leave it out."),
        ({"guided_grammar": "a"}, "response_format"),
        ({"bad_words": ["a"]}, "logit_bias"),
        ({"echo": True}, "before the answer"),
        ({"skip_special_tokens": False}, "return_token_ids"),
    ],
)
def test_what_is_not_supported_says_what_to_do(
    client: httpx.Client, fields: dict[str, Any], advice: str
) -> None:
    (name,) = fields
    response = chat(client, **fields)
    message = message_of(response)
    assert message.startswith(f"{name} is not supported. ")
    assert advice in message
    assert response.json()["error"]["param"] == name


def test_values_that_cannot_be(client: httpx.Client) -> None:
    for fields in (
        {"min_p": 2}, {"repetition_penalty": 0}, {"min_tokens": -1}, {"stop_token_ids": [10**6]},
        {"min_tokens": 9, "max_tokens": 8}, {"frequency_penalty": 3},
    ):  # fmt: skip
        response = chat(client, **fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"].split(".")[0] in fields


def test_the_bytes_of_all_tokens_are_the_text(client: httpx.Client) -> None:
    """A token of this tokenizer is a byte, so characters have several."""
    wanted = {"enum": ["é🧀ß"]}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": wanted}}
    fields = {"response_format": schema, "logprobs": True, "max_tokens": 20}
    choice = chat(client, **fields).json()["choices"][0]
    text = choice["message"]["content"]
    entries = choice["logprobs"]["content"]
    assert text == '"é🧀ß"'
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
    chunks = events(chat(client, stream=True, **fields))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice["delta"].get("content", "") for choice in choices]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)
    sent = [entry for one in choices if one.get("logprobs") for entry in one["logprobs"]["content"]]
    assert bytes(byte for entry in sent for byte in entry["bytes"]).decode() == text


def test_completions_stream_their_log_probabilities(client: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "abc", "logprobs": 1, "max_tokens": 6, "temperature": 0}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    stream = events(client.post("/v1/completions", json={**body, "stream": True}))
    parts = [one["logprobs"] for chunk in stream for one in chunk["choices"] if one["logprobs"]]
    for key, value in whole.items():
        assert [one for part in parts for one in part[key]] == value


def test_tokens_that_end_an_answer(served: Served) -> None:
    client, server = served
    fields = {"max_tokens": 8, "ignore_eos": True}
    text: str = chat(client, **fields).json()["choices"][0]["message"]["content"]
    last = next(character for character in reversed(text) if character.isascii())
    (token,) = server.llm.encoder.text_ids(last).tolist()
    choice = chat(client, **fields, stop_token_ids=[token]).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == text[: text.index(last)]
