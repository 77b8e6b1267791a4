"""/tokenize and /detokenize, /version, the page at /, and paths that are asked in a wrong way."""

import base64
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serving import HELLO, chat, serving
from test_chat_calls import TOOLS
from test_responses_api import without_model
from tiny_models import VOCAB
from tokendance import __version__
from tokendance.models.loader import LoadedModel


@pytest.fixture(scope="module")
def client(fake: LoadedModel) -> Iterator[httpx.Client]:
    with serving(without_model(fake), max_messages=4) as (client, _):
        yield client


def tokens(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    assert document["count"] == len(document["tokens"])
    return document


def message_of(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def test_texts_become_tokens_and_come_back(client: httpx.Client) -> None:
    text = "The été at noon, 橋"
    found = tokens(client, prompt=text, model="tiny", return_token_strs=True)
    assert found["max_model_len"] == 4096
    assert len(found["token_strs"]) == found["count"]
    back = client.post("/detokenize", json={"tokens": found["tokens"], "model": "tiny"})
    assert back.json() == {"prompt": text}
    body = {"model": "tiny", "prompt": text, "max_tokens": 1}
    usage = client.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == found["count"]
    assert tokens(client, prompt=text, add_special_tokens=False)["tokens"] == found["tokens"]
    assert tokens(client, prompt="") == {
        "count": 0, "max_model_len": 4096, "tokens": [], "token_strs": None,
    }  # fmt: skip
    # What a text spells is no special token.
    spelled = tokens(client, prompt="<|end|>")["tokens"]
    assert len(spelled) == len("<|end|>")


def test_conversations_become_tokens(client: httpx.Client) -> None:
    for fields in ({}, {"tools": TOOLS}):
        found = tokens(client, messages=HELLO, **fields)
        asked = chat(client, HELLO, **fields, max_tokens=1)
        assert found["count"] == asked.json()["usage"]["prompt_tokens"]
    neutral = {"add_generation_prompt": True, "continue_final_message": False, "model": None}
    assert tokens(client, messages=HELLO, **neutral)["count"]


def test_refusals_of_tokens(client: httpx.Client) -> None:
    for path, body, text in (
        ("/tokenize", {}, "Give a prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "Give a prompt or messages"),
        ("/tokenize", {"messages": HELLO * 5}, "At most 4 messages"),
        ("/tokenize", {"prompt": "a" * 1_000_000}, "characters"),
        ("/tokenize", {"prompt": "a", "colour": 1}, "Leave it out"),
        ("/detokenize", {"tokens": [VOCAB]}, "A token id lies between 0 and 299."),
        ("/detokenize", {"tokens": [-1]}, "A token id lies between 0 and 299."),
        ("/detokenize", {"tokens": [1] * 4097}, "Send them in parts"),
        ("/detokenize", {"tokens": "a"}, "tokens: "),
        ("/detokenize", {}, "tokens: Field required"),
    ):
        assert text in message_of(client.post(path, json=body)), body
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert "is not served" in message_of(client.post(path, json=body | {"model": "x"}), 404)


def test_version(client: httpx.Client) -> None:
    assert client.get("/version").json() == {"version": __version__}


def test_the_page_runs_and_loads_nothing(client: httpx.Client, fake: LoadedModel) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    (style,) = re.findall("<style>(.*?)</style>", response.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    for nothing in ("<script", " style=", " src=", "http:", "https:", "onload"):
        assert nothing not in response.text
    assert "<code>tiny</code>" in response.text
    for link in re.findall('href="(.*?)"', response.text):
        assert client.get(link).status_code == 200
    # Who has no key learns how to ask, and not what is served.
    with serving(without_model(fake), api_keys=("one",), served_name="<b>secret") as (client, _):
        page = client.get("/").text
        assert "wants an API key" in page
        assert "secret" not in page
        assert client.get("/version").status_code == 401
    with serving(without_model(fake), served_name="<b>mine") as (client, _):
        assert "<code>&lt;b&gt;mine</code>" in client.get("/").text


def test_paths_that_are_asked_in_a_wrong_way(client: httpx.Client) -> None:
    for path, near in (
        ("/v1/response", "/v1/responses"),
        ("/v1/embedding", "/v1/embeddings"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/chat/complete", "/v1/chat/completions"),
    ):
        assert f"Did you mean {near}?" in message_of(client.post(path, json={}), 404)
    for path in ("/v1/responses", "/v1/embeddings", "/tokenize", "/v1/chat/completions"):
        wrong = client.get(path)
        assert message_of(wrong, 405) == "GET is not answered here. Send POST."
        assert wrong.headers["allow"] == "POST"
        assert "Content-Type: application/json" in message_of(client.post(path, content=b"{}"))
        latin = '{"model": "é"}'.encode("latin-1")
        headers = {"content-type": "application/json"}
        assert "not UTF-8" in message_of(client.post(path, content=latin, headers=headers))
