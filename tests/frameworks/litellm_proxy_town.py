"""OpenAI's SDK, a tool and a type, streamed, and LiteLLM as a proxy between it and the server."""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from openai import AsyncOpenAI, pydantic_function_tool
from people import MODEL, OPENING, TEMPERATURE, Call, Place, Plan, heard, look, read_call, tell
from pydantic import BaseModel

SERVED = "town"  # what the proxy calls the model
KEY = "sk-a-key-of-the-town"


class Look(BaseModel):
    """See how things stand at a place in the town."""

    place: Place


@contextmanager
def proxy(call: Call) -> Iterator[str]:
    """Run LiteLLM's proxy in front of the server; its base URL."""
    deployment = {"model": f"{call.way}/{MODEL}", "api_base": call.base_url, "api_key": "none"}
    config = {"model_list": [{"model_name": SERVED, "litellm_params": deployment}]}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(config))
        running = subprocess.Popen(
            [Path(sys.executable).parent / "litellm", "--config", path, "--port", str(port)],
            # Prices of models come with the package, and need not be fetched.
            env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with running:
            try:
                assert running.stdout is not None
                log = []
                for line in running.stdout:
                    log.append(line)
                    if "Uvicorn running" in line:
                        break
                else:
                    raise RuntimeError("".join(log))
                threading.Thread(target=running.stdout.read, daemon=True).start()
                yield f"http://127.0.0.1:{port}/v1"
            finally:
                running.terminate()


async def ask(client: AsyncOpenAI, messages: list[dict[str, Any]]) -> str:
    """Ask, and after a look once more; add what is answered, also by tools, to the messages."""
    for choice in ("auto", "none"):
        stream = client.chat.completions.stream(
            model=SERVED,
            messages=messages,
            tools=[pydantic_function_tool(Look, name="look")],
            tool_choice=choice,
            response_format=Plan,
            temperature=TEMPERATURE,
        )
        async with stream as events:
            async for _ in events:
                pass
            message = (await events.get_final_completion()).choices[0].message
        messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
        if not message.tool_calls:
            break
        for called in message.tool_calls:
            place = Look.model_validate_json(called.function.arguments).place
            messages.append({"role": "tool", "tool_call_id": called.id, "content": look(place)})
    plan: Plan = message.parsed
    return plan.told()


async def main(call: Call) -> None:
    conversations = {
        name: [{"role": "system", "content": system}] for name, system in call.people.items()
    }
    rounds: list[dict[str, str]] = []
    question = OPENING
    with proxy(call) as base_url:
        client = AsyncOpenAI(base_url=base_url, api_key=KEY)
        for _ in range(call.rounds):
            for messages in conversations.values():
                messages.append({"role": "user", "content": question})
            answers = await asyncio.gather(*(ask(client, one) for one in conversations.values()))
            rounds.append(dict(zip(conversations, answers, strict=True)))
            question = heard(rounds[-1])
    tell(rounds)


asyncio.run(main(read_call()))
