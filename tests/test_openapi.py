"""What /openapi.json says, tried out: requests made from it get the answers that it describes."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    ignored_auth,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from conftest import examples
from serving import serving
from tokendance import LLM
from tokendance.models.loader import LoadedModel
from tokendance.options import EngineOptions
from tokendance.server.openapi import DocumentedAPI

KEY = {"Authorization": "Bearer secret"}
OPERATIONS = [
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/rounds", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/responses/{response_id}", "GET"),
    ("/v1/responses/{response_id}", "DELETE"),
    ("/v1/responses/{response_id}/input_items", "GET"),
    ("/v1/embeddings", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/version", "GET"),
]
# Not among them: that all is accepted which fits the document, since it does not have all rules;
# and that nothing else is, since numbers are read from texts, too.
CHECKS = [
    content_type_conformance,
    ignored_auth,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def client(tiny: LoadedModel) -> Iterator[httpx.Client]:
    llm = LLM.from_loaded(tiny, EngineOptions(kv_budget=2**24))
    with serving(llm, api_keys=("secret",), default_max_tokens=4) as (client, server):
        client.headers.update(KEY)
        yield client
        assert server.admission.num_open == 0
        assert server.engine_thread.is_alive
    llm.engine.check_integrity()


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    """The document, with a name and a length that lead somewhere."""
    document: dict[str, Any] = client.get("/openapi.json").json()
    for schema in document["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if "object" in fields:  # an answer, which is held to what the document says
            continue
        if fields.keys() & {"messages", "prompt", "agents", "input", "tokens"}:
            fields["model"] = {"enum": ["tiny"]}
        for name in fields.keys() & {"max_tokens", "max_output_tokens"}:
            fields[name] = {"type": "integer", "minimum": 1, "maximum": 4}
    return document


def test_all_operations_are_tried(document: dict[str, Any]) -> None:
    found = {
        (path, method.upper())
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert found == set(OPERATIONS)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert ("401" in operation["responses"]) == (path not in ("/health", "/ready"))


def test_the_document_is_made_beside_the_event_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    make = DocumentedAPI.openapi

    def noted(self: DocumentedAPI) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return make(self)

    monkeypatch.setattr(DocumentedAPI, "openapi", noted)
    assert client.get("/openapi.json").status_code == 200
    assert [name.split()[0] for name in threads] == ["AnyIO"]


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        (*operation, mode)
        for operation in OPERATIONS
        for mode in GenerationMode
        # A request without a body has nothing that could be wrong.
        if mode is GenerationMode.POSITIVE or operation[1] == "POST"
    ],
)
def test_answers_are_what_the_document_says(
    client: httpx.Client,
    document: dict[str, Any],
    path: str,
    method: str,
    mode: GenerationMode,
) -> None:
    config = schemathesis.Config.from_dict({"base-url": str(client.base_url)})
    operation = schemathesis.openapi.from_dict(document, config=config)[path][method]

    @given(operation.as_strategy(mode))
    @settings(
        max_examples=examples(40) if method == "POST" else 3,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: "schemathesis.Case[Any]") -> None:
        case.call_and_validate(checks=CHECKS, headers=KEY, timeout=60)

    check()
