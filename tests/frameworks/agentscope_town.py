"""AgentScope: agents in a message hub, asked by a fan-out, with either formatter."""

import asyncio

from agentscope.agent import ReActAgent
from agentscope.formatter import OpenAIChatFormatter, OpenAIMultiAgentFormatter
from agentscope.message import Msg
from agentscope.model import OpenAIChatModel
from agentscope.pipeline import MsgHub, fanout_pipeline
from people import MAX_TOKENS, MODEL, NEXT, OPENING, TEMPERATURE, Call, read_call, tell

FORMATTERS = {"chat": OpenAIChatFormatter, "multi-agent": OpenAIMultiAgentFormatter}


def resident(call: Call, name: str, system: str) -> ReActAgent:
    agent = ReActAgent(
        name=name,
        sys_prompt=system,
        model=OpenAIChatModel(
            model_name=MODEL,
            api_key="none",
            client_kwargs={"base_url": call.base_url},
            generate_kwargs={"max_tokens": MAX_TOKENS, "temperature": TEMPERATURE},
        ),
        formatter=FORMATTERS[call.way](),
    )
    agent.set_console_output_enabled(False)
    return agent


async def main() -> None:
    call = read_call()
    agents = [resident(call, name, system) for name, system in call.people.items()]
    rounds: list[dict[str, str]] = []
    async with MsgHub(agents, announcement=Msg("host", OPENING, "user")) as hub:
        for index in range(call.rounds):
            if index > 0:
                await hub.broadcast(Msg("host", NEXT, "user"))
            said = await fanout_pipeline(agents)
            rounds.append({message.name: message.get_text_content() or "" for message in said})
    tell(rounds)


asyncio.run(main())
