"""The SDK of OpenAI reads answers and streams of /v1/responses, by its own types."""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

from openai import APIStatusError, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


class Place(BaseModel):
    where: Literal["pub", "park"]


TOOL: Any = {
    "type": "function",
    "name": "walk",
    "parameters": {**Place.model_json_schema(), "additionalProperties": False},
    "strict": True,
}


def strictly(document: BaseModel) -> None:
    """Check all fields, which the SDK does not when it reads an answer."""
    Response.model_validate(document.model_dump(), strict=True)


def refusal(ask: Callable[[], object], status: int) -> str:
    """What the SDK says of a request that is refused."""
    try:
        ask()
    except APIStatusError as error:
        if error.status_code == status:
            return str(error.message)
        raise
    raise SystemExit("it was not refused")


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    asked: Any = {"model": "tiny", "temperature": 0, "max_output_tokens": 100}
    plain = client.responses.create(input="hello", instructions="Be brief.", **asked)
    strictly(plain)
    assert plain.output_text
    assert plain.usage is not None
    assert plain.usage.input_tokens_details.cached_tokens >= 0

    for event in client.responses.create(input="hello", stream=True, **asked):
        EVENTS.validate_python(event.model_dump(), strict=True)

    with client.responses.stream(input="hello", text_format=Place, **asked) as stream:
        stream.until_done()
        final = stream.get_final_response()
    assert final.output_parsed == Place.model_validate_json(final.output_text)

    parsed = client.responses.parse(input="hello", text_format=Place, **asked)
    assert parsed.output_parsed is not None

    with client.responses.stream(
        input="hello", tools=[TOOL], tool_choice="required", **asked
    ) as stream:
        snapshot = ""
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                snapshot = event.snapshot
        final = stream.get_final_response()
    call = final.output[-1]
    assert call.type == "function_call"
    assert snapshot == call.arguments
    answered: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    after = client.responses.create(
        input=[answered], previous_response_id=final.id, tools=[TOOL], **asked
    )
    strictly(after)
    assert after.previous_response_id == final.id
    replayed = client.responses.create(
        input=[{"role": "user", "content": "hello"}, *final.output, answered],
        tools=[TOOL],
        store=False,
        **asked,
    )
    assert replayed.output_text == after.output_text
    assert client.responses.retrieve(after.id).output_text == after.output_text
    client.responses.delete(after.id)
    assert "not found" in refusal(lambda: client.responses.retrieve(after.id), 404)
    search: Any = [{"type": "web_search"}]
    ask = functools.partial(client.responses.create, input="hello", tools=search, **asked)
    assert "web_search" in refusal(ask, 400)
    print(json.dumps("all is well"))


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
