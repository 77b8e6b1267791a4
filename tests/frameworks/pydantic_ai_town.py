"""pydantic-ai, with a tool and a nested output type: by responses, its default, or by chat."""

import asyncio

from people import MODEL, OPENING, TEMPERATURE, Call, Plan, heard, look, read_call, tell
from pydantic_ai import Agent, RunContext, Tool
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition


async def first(context: RunContext[None], definition: ToolDefinition) -> ToolDefinition | None:
    """Let an agent look around once in a round, before it answers."""
    return definition if context.run_step == 1 else None


async def main(call: Call) -> None:
    kind = OpenAIResponsesModel if call.way == "responses" else OpenAIChatModel
    model = kind(MODEL, provider=OpenAIProvider(base_url=call.base_url, api_key="none"))
    agents = {
        name: Agent(
            model,
            instructions=system,
            tools=[Tool(look, prepare=first)],
            output_type=Plan,
            model_settings={"temperature": TEMPERATURE},
        )
        for name, system in call.people.items()
    }

    async def ask(name: str) -> tuple[str, list[ModelMessage]]:
        if call.way == "chat-streams":
            async with agents[name].run_stream(question, message_history=histories[name]) as result:
                async for _ in result.stream_output():
                    pass
                return (await result.get_output()).told(), result.all_messages()
        result = await agents[name].run(question, message_history=histories[name])
        return result.output.told(), result.all_messages()

    histories: dict[str, list[ModelMessage]] = {name: [] for name in agents}
    rounds: list[dict[str, str]] = []
    question = OPENING
    for _ in range(call.rounds):
        answers = await asyncio.gather(*map(ask, agents))
        histories = {name: history for name, (_, history) in zip(agents, answers, strict=True)}
        rounds.append({name: told for name, (told, _) in zip(agents, answers, strict=True)})
        question = heard(rounds[-1])
    tell(rounds)


asyncio.run(main(read_call()))
