"""What is asked and answered: an ASGI middleware for vLLM (`--middleware recording.Recorder`).

Each chat request becomes a line of the file that TEST_RECORDS names, when its answer is complete:

    {"arrived": SECONDS, "prompt": [token ids], "answer": [token ids], "cached": N, "chunks": N}

It asks vLLM for token ids and usage in the client's place, which gets what it has asked for.
"""

import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
RECORDS = os.environ.get("TEST_RECORDS", "")


class Recorder:
    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/v1/chat/completions":
            await self._app(scope, receive, send)
            return
        arrived = time.monotonic()
        received, body = await receive(), b""
        while True:
            body += received["body"]
            if not received.get("more_body"):
                break
            received = await receive()
        asked = {**json.loads(body), "return_token_ids": True}
        if asked.get("stream"):
            asked["stream_options"] = {"include_usage": True}
        body = json.dumps(asked).encode()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        answer = b""

        async def receive_changed() -> Message:
            return unread.pop() if unread else await receive()

        async def send_and_keep(message: Message) -> None:
            nonlocal answer
            part = message.get("body", b"")
            answer += part
            # Before the client can know that this was all.
            if b"data: [DONE]" in part or (part and not message.get("more_body")):
                with open(RECORDS, "a", encoding="utf-8") as file:
                    print(json.dumps({"arrived": arrived, **read(answer.decode())}), file=file)
            if b'"choices":[]' not in part:  # usage, in an event of its own
                await send(message)

        await self._app(scope, receive_changed, send_and_keep)


def read(text: str) -> dict[str, Any]:
    """What an answer, whole or as a stream of events, says of tokens."""
    is_stream = text.startswith("data: ")
    lines = [line.removeprefix("data: ") for line in text.splitlines()] if is_stream else [text]
    chunks = [json.loads(line) for line in lines if line not in ("", "[DONE]")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    usage = next(chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage"))
    details = usage["prompt_tokens_details"] or {}
    return {
        "prompt": next(ids for chunk in chunks if (ids := chunk.get("prompt_token_ids"))),
        "num_prompt": usage["prompt_tokens"],
        "answer": [token for choice in choices for token in choice.get("token_ids") or ()],
        "cached": details.get("cached_tokens") or 0,
        "chunks": sum(bool(choice.get("delta", {}).get("content")) for choice in choices),
    }
