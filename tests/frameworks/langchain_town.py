"""LangChain's `create_agent`: a tool, and a format by the provider's own strategy, streamed."""

import asyncio
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, wrap_model_call
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI
from people import MODEL, OPENING, TEMPERATURE, Call, Plan, heard, look, read_call, tell


async def looking_once(request: ModelRequest, handler: Any) -> Any:
    """Let an agent look around once in a round, before it answers."""
    has_looked = isinstance(request.messages[-1], ToolMessage)
    return await handler(request.override(tools=[]) if has_looked else request)


async def main(call: Call) -> None:
    model = ChatOpenAI(
        model=MODEL,
        base_url=call.base_url,
        api_key="none",
        temperature=TEMPERATURE,
        use_responses_api=call.way == "responses",
    )
    agents = {
        name: create_agent(
            model,
            tools=[look],
            system_prompt=system,
            response_format=ProviderStrategy(Plan),
            middleware=[wrap_model_call(looking_once)],
        )
        for name, system in call.people.items()
    }

    async def ask(name: str) -> dict[str, Any]:
        messages = [*histories[name], {"role": "user", "content": question}]
        state: dict[str, Any] = {}
        modes = ["messages", "values"]
        async for mode, part in agents[name].astream({"messages": messages}, stream_mode=modes):
            if mode == "values":
                state = part
        return state

    histories: dict[str, list[Any]] = {name: [] for name in agents}
    rounds: list[dict[str, str]] = []
    question = OPENING
    for _ in range(call.rounds):
        states = dict(zip(agents, await asyncio.gather(*map(ask, agents)), strict=True))
        histories = {name: state["messages"] for name, state in states.items()}
        rounds.append({name: state["structured_response"].told() for name, state in states.items()})
        question = heard(rounds[-1])
    tell(rounds)


asyncio.run(main(read_call()))
