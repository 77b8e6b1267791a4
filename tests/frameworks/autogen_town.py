"""AutoGen: a team that takes turns, or agents that are asked at once."""

import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient
from people import MAX_TOKENS, MODEL, NEXT, OPENING, TEMPERATURE, read_call, tell


async def in_turn(agents: list[AssistantAgent], rounds: int) -> list[dict[str, str]]:
    team = RoundRobinGroupChat(agents, max_turns=rounds * len(agents))
    result = await team.run(task=OPENING)
    said = [message for message in result.messages if message.source != "user"]
    return [
        {message.source: message.content for message in said[first : first + len(agents)]}
        for first in range(0, len(said), len(agents))
    ]


async def gathered(agents: list[AssistantAgent], rounds: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    said: list[TextMessage] = []
    question = OPENING
    for _ in range(rounds):
        host = TextMessage(content=question, source="host")
        results = await asyncio.gather(
            *(
                agent.run(task=[*(one for one in said if one.source != agent.name), host])
                for agent in agents
            )
        )
        said = [result.messages[-1] for result in results]
        question = NEXT
        found.append({message.source: message.content for message in said})
    return found


async def main() -> None:
    call = read_call()
    client = OpenAIChatCompletionClient(
        model=MODEL,
        base_url=call.base_url,
        api_key="none",
        model_info={
            "vision": False,
            "function_calling": True,
            "json_output": True,
            "structured_output": True,
            "family": "unknown",
        },
        max_tokens=MAX_TOKENS,
        temperature=TEMPERATURE,
    )
    agents = [
        AssistantAgent(name, model_client=client, system_message=system)
        for name, system in call.people.items()
    ]
    play = {"in-turn": in_turn, "gathered": gathered}[call.way]
    tell(await play(agents, call.rounds))
    await client.close()


asyncio.run(main())
