"""Items of an input as they are remembered: each with an id, and as OpenAI lists them."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from tokendance.server.errors import bad_request
from tokendance.server.ids import new_id
from tokendance.server.responses_api.bodies import (
    InputCall,
    InputCallOutput,
    InputMessage,
    InputReasoning,
    ReadItem,
    text_of,
)


class ItemList(BaseModel):
    """A page of the items of an input."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def documents_of(items: Iterable[ReadItem]) -> list[dict[str, Any]]:
    """Items as documents, each with its id, or a new one if it has none of its own."""
    documents: dict[str, dict[str, Any]] = {}
    for item in items:
        prefix, fields = _fields(item)
        is_own = item.id is not None and item.id not in documents
        item_id = item.id if is_own and item.id is not None else f"{prefix}_{new_id()}"
        documents[item_id] = {"id": item_id, "type": item.type, "status": "completed", **fields}
    return list(documents.values())


def _fields(item: ReadItem) -> tuple[str, dict[str, Any]]:
    """What an id of an item begins with, and what the item says."""
    match item:
        case InputMessage():
            is_answer = item.role == "assistant"
            kind: dict[str, Any] = {"type": "output_text" if is_answer else "input_text"}
            rest: dict[str, Any] = {"annotations": [], "logprobs": []} if is_answer else {}
            parts = [{**kind, "text": text, **rest} for text in text_of(item.content)]
            named = {} if item.name is None else {"name": item.name}
            return "msg", {"role": item.role, "content": parts, **named}
        case InputCall():
            called = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            return "fc", called
        case InputCallOutput():
            return "fco", {"call_id": item.call_id, "output": "".join(text_of(item.output))}
        case InputReasoning():
            summary = [{"type": "summary_text", "text": text} for text in text_of(item.summary)]
            content = [{"type": "reasoning_text", "text": text} for text in text_of(item.content)]
            return "rs", {"summary": summary, "content": content}


def page(
    documents: Sequence[dict[str, Any]],
    limit: int,
    order: Literal["asc", "desc"],
    after: str | None,
) -> ItemList:
    """Some of an input's items.

    Args:
        documents: of all of them, the first first.
        limit: so many at most.
        order: the first first, or the last.
        after: the id of the item that the page begins behind; None for its beginning.

    Raises:
        ApiError: if there is none of that id.
    """
    ordered = list(documents if order == "asc" else reversed(documents))
    if after is not None:
        ids = [document["id"] for document in ordered]
        if after not in ids:
            raise bad_request(f"There is no item {after[:64]!r} in this input.", "after")
        ordered = ordered[ids.index(after) + 1 :]
    data = ordered[:limit]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return ItemList(
        object="list", data=data, first_id=ends[0], last_id=ends[1], has_more=len(ordered) > limit
    )
