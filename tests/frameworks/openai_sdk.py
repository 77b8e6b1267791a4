"""The SDK of OpenAI: a thread for each agent, coroutines, streams in coroutines, or a loop."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import AsyncOpenAI, OpenAI
from people import MAX_TOKENS, MODEL, NEXT, OPENING, TEMPERATURE, Call, heard, read_call, tell

SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": MAX_TOKENS,
    "temperature": TEMPERATURE,
}
Messages = list[dict[str, str]]
Said = list[dict[str, str]]  # what everybody said, round by round


class Town:
    """Everybody's conversation. What all have said is one message for all."""

    def __init__(self, people: dict[str, str]) -> None:
        self.conversations: dict[str, Messages] = {
            name: [{"role": "system", "content": system}] for name, system in people.items()
        }
        self.rounds: Said = []
        self._all_hear(OPENING)

    def take(self, answers: Iterable[str]) -> None:
        said = dict(zip(self.conversations, answers, strict=True))
        for name, text in said.items():
            self.conversations[name].append({"role": "assistant", "content": text})
        self._all_hear(heard(said))
        self.rounds.append(said)

    def _all_hear(self, text: str) -> None:
        for messages in self.conversations.values():
            messages.append({"role": "user", "content": text})


def in_threads(call: Call) -> Said:
    client = OpenAI(base_url=call.base_url, api_key="none")
    town = Town(call.people)

    def ask(messages: Messages) -> str:
        answer = client.chat.completions.create(messages=messages, **SETTINGS)
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(len(call.people)) as pool:
        for _ in range(call.rounds):
            town.take(pool.map(ask, town.conversations.values()))
    return town.rounds


def in_turn(call: Call) -> Said:
    """A loop, as most scripts begin: everybody hears what was said since they spoke last."""
    client = OpenAI(base_url=call.base_url, api_key="none")
    conversations: dict[str, Messages] = {
        name: [{"role": "system", "content": system}] for name, system in call.people.items()
    }
    unheard: dict[str, list[str]] = {name: [OPENING] for name in call.people}
    rounds: Said = []
    for _ in range(call.rounds):
        rounds.append({})
        for name, messages in conversations.items():
            messages.append({"role": "user", "content": "\n".join([*unheard[name], NEXT])})
            answer = client.chat.completions.create(messages=messages, **SETTINGS)
            text = answer.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": text})
            unheard[name] = []
            for other in call.people.keys() - {name}:
                unheard[other].append(f"{name}: {text}")
            rounds[-1][name] = text
    return rounds


async def at_once(call: Call, *, stream: bool) -> Said:
    client = AsyncOpenAI(base_url=call.base_url, api_key="none")
    town = Town(call.people)

    async def ask(messages: Messages) -> str:
        answer = await client.chat.completions.create(messages=messages, **SETTINGS)
        return answer.choices[0].message.content or ""

    async def listen(messages: Messages) -> str:
        text = ""
        chunks = await client.chat.completions.create(messages=messages, stream=True, **SETTINGS)
        async for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
        return text

    for _ in range(call.rounds):
        answers = map(listen if stream else ask, town.conversations.values())
        town.take(await asyncio.gather(*answers))
    return town.rounds


WAYS: dict[str, Callable[[Call], Said]] = {
    "threads": in_threads,
    "gathered": lambda call: asyncio.run(at_once(call, stream=False)),
    "streams": lambda call: asyncio.run(at_once(call, stream=True)),
    "in-turn": in_turn,
}


def main() -> None:
    call = read_call()
    tell(WAYS[call.way](call))


main()
