"""OpenAI's Agents SDK, with a tool and an output type: by responses, its default, or by chat."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    RunContextWrapper,
    Runner,
    TResponseInputItem,
    function_tool,
    set_default_openai_api,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from people import MODEL, OPENING, TEMPERATURE, Call, Place, Plan, heard, look, read_call, tell

Asked = tuple[str, list[TResponseInputItem]]  # an agent's answer, and its history
Looks = list[Place]  # where an agent has looked in this round; a look is enough


def look_around(context: RunContextWrapper[Looks], place: Place) -> str:
    """See how things stand at a place in the town."""
    context.context.append(place)
    return look(place)


async def main(call: Call) -> None:
    set_default_openai_client(AsyncOpenAI(base_url=call.base_url, api_key="none"))
    set_tracing_disabled(True)
    set_default_openai_api("responses" if call.way == "responses" else "chat_completions")
    agents = [
        Agent(
            name=name,
            instructions=system,
            model=MODEL,
            model_settings=ModelSettings(temperature=TEMPERATURE),
            tools=[function_tool(look_around, is_enabled=lambda run, _: not run.context)],
            output_type=Plan,
        )
        for name, system in call.people.items()
    ]

    async def ask(agent: Agent, history: list[TResponseInputItem]) -> Asked:
        if call.way == "chat-streams":
            streamed = Runner.run_streamed(agent, history, context=[])
            async for _ in streamed.stream_events():
                pass
            return streamed.final_output.told(), streamed.to_input_list()
        result = await Runner.run(agent, history, context=[])
        return result.final_output.told(), result.to_input_list()

    histories: list[list[TResponseInputItem]] = [[] for _ in agents]
    rounds: list[dict[str, str]] = []
    question = OPENING
    for _ in range(call.rounds):
        for history in histories:
            history.append({"role": "user", "content": question})
        answers = await asyncio.gather(*map(ask, agents, histories))
        rounds.append({agent.name: told for agent, (told, _) in zip(agents, answers, strict=True)})
        histories = [history for _, history in answers]
        question = heard(rounds[-1])
    tell(rounds)


asyncio.run(main(read_call()))
