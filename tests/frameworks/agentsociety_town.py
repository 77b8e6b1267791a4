"""AgentSociety: residents with memory and tools, asked at once, and EXTRA_BODY in each request."""

import asyncio
import json
import os
import tempfile
from pathlib import Path

from people import MAX_TOKENS, MODEL, OPENING, TEMPERATURE, Call, heard, read_call, tell

# A model that calls no tool to end its turn has said what it says.
LIMITS = {"max_react_turns": 1}


async def main(call: Call, folder: Path) -> None:
    # AgentSociety is configured by its environment, before it is imported.
    os.environ |= {
        "AGENTSOCIETY_HOME_DIR": str(folder),
        "AGENTSOCIETY_LLM_API_BASE": call.base_url,
        "AGENTSOCIETY_LLM_API_KEY": "none",
        "AGENTSOCIETY_LLM_MODEL": MODEL,
        "AGENTSOCIETY_LLM_THINKING": "off",
        "AGENTSOCIETY_LLM_EXTRA_BODY": json.dumps(
            {"enable_thinking": False, "max_tokens": MAX_TOKENS, "temperature": TEMPERATURE}
        ),
    }
    from agentsociety2 import PersonAgent, ReActRouter
    from agentsociety2.agent.service_proxy import build_service_proxy
    from agentsociety2.contrib.env import SimpleSocialSpace

    people = [(number, name) for number, name in enumerate(call.people, start=1)]
    world = ReActRouter([SimpleSocialSpace(agent_id_name_pairs=people)])
    services = build_service_proxy(world, run_dir=folder, trace=False, replay=False)
    residents = {}
    for number, (name, system) in enumerate(call.people.items(), start=1):
        home = folder / name
        PersonAgent.create(home, {"id": number, "name": name, "biography": system}, LIMITS)
        residents[name] = await PersonAgent.from_workspace(home, services)
    rounds: list[dict[str, str]] = []
    question = OPENING
    for _ in range(call.rounds):
        answers = await asyncio.gather(*(one.ask(question) for one in residents.values()))
        rounds.append(dict(zip(residents, answers, strict=True)))
        question = heard(rounds[-1])
    tell(rounds)


with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(read_call(), Path(folder)))
