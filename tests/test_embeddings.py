"""Vectors of texts: against transformers, over HTTP, and on a thread of their own."""

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

from serving import HELLO, chat, held, serving
from tiny_models import VOCAB, make_tokenizer
from tokendance import LLM
from tokendance.errors import ConfigError, ModelNotFoundError
from tokendance.models.embedders import MeanEmbedder, OwnEmbedder, Vectors
from tokendance.models.loader import LoadedModel, load_model
from tokendance.options import EngineOptions
from tokendance.server.embedding_thread import EmbeddingThread

Array = npt.NDArray[np.float32]
TEXTS = ["The baker says that bread is out.", "Why?", "The ferry leaves at noon. " * 5]
# Greatest difference of a number in a vector of length 1, in float32: the order of sums.
CLOSE = 1e-5


def normal(vector: torch.Tensor) -> Array:
    found: Array = torch.nn.functional.normalize(vector.float(), dim=0).numpy()
    return found


def by_transformers(folder: Path, texts: Sequence[Sequence[int]]) -> list[Array]:
    """The means of the last hidden states, by the model's own attention, one text at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        states = [model.base_model(torch.tensor([text])).last_hidden_state[0] for text in texts]
    return [normal(state.mean(0)) for state in states]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral-window", "gemma3", "olmo3"])
def test_means_are_those_of_transformers(
    model_folder: Callable[..., Path], architecture: str
) -> None:
    folder = model_folder(architecture)
    llm = LLM.from_loaded(load_model(str(folder), "float32"), EngineOptions(kv_budget=2**22))
    embedder = MeanEmbedder(llm.model, llm.encoder)
    texts = [embedder.encode(text) for text in TEXTS]
    assert max(map(len, texts)) > 24  # than a window
    texts.append(texts[0][::-1])  # two of a length
    vectors = embedder.embed(texts)
    assert vectors.shape == (4, embedder.size)
    for vector, expected in zip(vectors, by_transformers(folder, texts), strict=True):
        np.testing.assert_allclose(vector, expected, atol=CLOSE)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=200, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(7)
    BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def pool(folder: Path, mode: str, kind: str = "Pooling") -> None:
    """What sentence-transformers writes of a model's pooling."""
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": f"sentence_transformers.models.{kind}", "path": "1_Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"word_embedding_dimension": 32, f"pooling_mode_{mode}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))


def test_a_model_of_its_own(bert: Path) -> None:
    model = AutoModel.from_pretrained(bert).eval()
    ways: list[tuple[str | None, Callable[[torch.Tensor], torch.Tensor]]] = [
        (None, lambda states: states.mean(0)),
        ("cls_token", lambda states: states[0]),
        ("lasttoken", lambda states: states[-1]),
        ("mean_tokens", lambda states: states.mean(0)),
    ]
    for mode, choose in ways:
        if mode is not None:
            pool(bert, mode)
        embedder = OwnEmbedder(str(bert), "float32")
        texts = [embedder.encode(text) for text in TEXTS]
        vectors = embedder.embed(texts)
        for vector, text in zip(vectors, texts, strict=True):
            with torch.inference_mode():
                states = model(torch.tensor([text])).last_hidden_state[0]
            np.testing.assert_allclose(vector, normal(choose(states)), atol=CLOSE)
    assert embedder.max_tokens == 200


def test_models_that_make_no_vectors_here(bert: Path) -> None:
    pool(bert, "max_tokens")
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens"):
        OwnEmbedder(str(bert))
    pool(bert, "mean_tokens", "Dense")
    with pytest.raises(ConfigError, match="'Dense'"):
        OwnEmbedder(str(bert))
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        OwnEmbedder(str(bert / "nothing"))


@pytest.fixture(scope="module")
def llm(tiny: LoadedModel) -> LLM:
    return LLM.from_loaded(tiny, EngineOptions(kv_budget=2**22))


@pytest.fixture
def client(llm: LLM) -> Iterator[httpx.Client]:
    with serving(llm, max_embedding_inputs=5, max_embedding_tokens=300) as (client, _):
        yield client


def ask(client: httpx.Client, given: Any, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "input": given, **fields}
    return client.post("/v1/embeddings", json=body)


def vectors_of(response: httpx.Response) -> Array:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.array([entry["embedding"] for entry in data], np.float32)


def test_all_forms_of_input(client: httpx.Client, llm: LLM) -> None:
    embedder = MeanEmbedder(llm.model, llm.encoder)
    token_ids = [embedder.encode(text) for text in TEXTS]
    expected = embedder.embed(token_ids)
    all_forms: list[Any] = [TEXTS, token_ids]
    for given in all_forms:
        response = ask(client, given)
        np.testing.assert_allclose(vectors_of(response), expected, atol=CLOSE)
        document = response.json()
        assert document["object"] == "list"
        count = sum(map(len, token_ids))
        assert document["usage"] == {"prompt_tokens": count, "total_tokens": count}
        assert document["model"] == "tiny-mean-pooled"
    for given in all_forms:
        np.testing.assert_allclose(vectors_of(ask(client, given[0])), expected[:1], atol=CLOSE)


def test_fewer_dimensions_and_base64(client: httpx.Client) -> None:
    whole = vectors_of(ask(client, TEXTS))
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=CLOSE)
    cut = vectors_of(ask(client, TEXTS, dimensions=10))
    expected = whole[:, :10] / np.linalg.norm(whole[:, :10], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=CLOSE)
    texts = [
        entry["embedding"] for entry in ask(client, TEXTS, encoding_format="base64").json()["data"]
    ]
    read = np.array([np.frombuffer(base64.b64decode(text), "<f4") for text in texts])
    np.testing.assert_allclose(read, whole, atol=CLOSE)
    neutral = {"user": "me", "encoding_format": None, "dimensions": None, "normalize": True}
    np.testing.assert_allclose(vectors_of(ask(client, TEXTS, **neutral)), whole, atol=CLOSE)


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"input": []}, "input", "1 to 5 are taken"),
        ({"input": ["a"] * 6}, "input", "There are 6 texts"),
        ({"input": ""}, "input", "A text is empty"),
        ({"input": ["a", ""]}, "input.1", "A text is empty"),
        ({"input": ["a", "b" * 301]}, "input.1", "at most 300 are taken"),
        ({"input": "b" * 1_000_000}, "input", "characters"),
        ({"input": [VOCAB]}, "input", "A token id lies between 0 and 299."),
        ({"input": [[1], [-1]]}, "input.1", "A token id lies between"),
        ({"input": "a", "dimensions": 65}, "dimensions", "A vector has 64 dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'base64'"),
        ({"input": "a", "normalize": False}, "normalize", "All vectors have the length 1."),
        ({"input": "a", "colour": 1}, "colour", "Leave it out."),
        ({"input": "\ud800"}, "input", "surrogate"),
        ({"input": [1, "a"]}, "input", "Give a text or token ids, or a list of either"),
        ({"input": {"a": 1}}, "input", "Give a text or token ids, or a list of either"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(
    client: httpx.Client, fields: dict[str, Any], param: str, text: str
) -> None:
    response = client.post(
        "/v1/embeddings",
        content=json.dumps({"model": "tiny", **fields}),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert text in response.json()["error"]["message"]


def test_who_makes_vectors_is_told(client: httpx.Client, tiny: LoadedModel, bert: Path) -> None:
    names = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert names == ["tiny", "tiny-mean-pooled"]
    card = client.get("/v1/models/tiny-mean-pooled").json()
    assert card["max_model_len"] == 300
    assert ask(client, "a", model="tiny-mean-pooled").status_code == 200
    other = ask(client, "a", model="text-embedding-3-small")
    assert other.status_code == 404
    assert "'tiny-mean-pooled'" in other.json()["error"]["message"]
    assert chat(client, model="tiny-mean-pooled").status_code == 404
    pool(bert, "mean_tokens")
    llm = LLM.from_loaded(tiny, EngineOptions(kv_budget=2**22))
    with serving(llm, embedding_model=str(bert)) as (client, _):
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [
            "tiny",
            str(bert),
        ]
        assert vectors_of(ask(client, TEXTS, model=str(bert))).shape == (3, 32)
        assert ask(client, "a").status_code == 404
        assert ask(client, "a" * 201, model=str(bert)).status_code == 400


def test_the_engine_is_not_needed(llm: LLM) -> None:
    """Its thread is held meanwhile, and what it runs afterwards is what it was before."""
    with serving(llm) as (client, server):
        before = chat(client, HELLO).json()["choices"]
        threads = []
        embed = server.embeddings.embedder.embed

        def noted(texts: Sequence[Sequence[int]]) -> Vectors:
            threads.append(threading.current_thread().name)
            return embed(texts)

        server.embeddings.embedder.embed = noted  # type: ignore[method-assign]
        with held(server):
            vectors_of(ask(client, TEXTS * 20))
        assert chat(client, HELLO).json()["choices"] == before
        assert set(threads) == {"embeddings"}
        assert server.admission.num_open == 0
        metrics = client.get("/metrics").text
        assert "tokendance_embedding_tokens_total" in metrics


class _Recorded:
    """An embedder that makes the vector [first token], and notes its passes."""

    name, size, max_tokens, vocab_size = None, 1, 10_000, 10_000

    def __init__(self) -> None:
        self.passes: list[list[int]] = []  # first tokens of their texts
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def embed(self, texts: Sequence[Sequence[int]]) -> Vectors:
        self.passes.append([text[0] for text in texts])
        self.began.set()
        assert self.may_go_on.wait(60)
        if texts[0][0] == 13:
            raise ValueError("thirteen")
        return np.array([[text[0]] for text in texts], np.float32)


def test_tenants_take_turns_and_who_has_gone_is_left_out() -> None:
    recorded = _Recorded()
    thread = EmbeddingThread(recorded)
    thread.start()

    async def run() -> None:
        long = [[0] * 600]
        first = asyncio.ensure_future(thread.embed("one", long))
        await asyncio.to_thread(recorded.began.wait, 60)
        # While it is computed: many of one tenant, one of another, and one that is taken back.
        many = asyncio.ensure_future(thread.embed("one", [[1] * 600, [2] * 600, [3], [4]]))
        gone = asyncio.ensure_future(thread.embed("one", [[5]]))
        more = asyncio.ensure_future(thread.embed("one", [[6], [7]]))
        other = asyncio.ensure_future(thread.embed("two", [[8], [9]]))
        wrong = asyncio.ensure_future(thread.embed("three", [[13]]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        recorded.may_go_on.set()
        assert (await first).tolist() == [[0]]
        assert (await other).tolist() == [[8], [9]]
        assert (await many).tolist() == [[1], [2], [3], [4]]
        assert (await more).tolist() == [[6], [7]]
        with pytest.raises(ValueError, match="thirteen"):
            await wrong

    asyncio.run(run())
    assert recorded.passes == [[0], [1], [8, 9], [13], [2], [3, 4, 6, 7]]
    thread.stop()

    async def late() -> None:
        await thread.embed("one", [[1]])

    with pytest.raises(Exception, match="stopping"):
        asyncio.run(late())


def test_who_waits_when_it_stops_is_told() -> None:
    recorded = _Recorded()
    thread = EmbeddingThread(recorded)
    thread.start()

    async def run() -> None:
        asked = [asyncio.ensure_future(thread.embed("", [[1]]))]
        await asyncio.to_thread(recorded.began.wait, 60)
        asked.append(asyncio.ensure_future(thread.embed("", [[2]])))
        await asyncio.sleep(0)
        stopping = asyncio.ensure_future(asyncio.to_thread(thread.stop))
        for future in asked:
            with pytest.raises(Exception, match="stopping"):
                await future
        recorded.may_go_on.set()
        await stopping

    asyncio.run(run())
