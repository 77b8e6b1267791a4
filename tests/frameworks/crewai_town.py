"""CrewAI: a crew that works one task after the other, with a tool and a type for each result."""

import os

os.environ |= {"CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TRACING_ENABLED": "false"}

from crewai import LLM, Agent, Crew, Process, Task
from crewai.tools import tool
from people import MODEL, OPENING, TEMPERATURE, Plan, heard, look, read_call, tell


def main() -> None:
    call = read_call()
    llm = LLM(
        model=MODEL,
        custom_openai=True,
        base_url=call.base_url,
        api_key="none",
        temperature=TEMPERATURE,
        max_tokens=160,
    )
    agents = {
        name: Agent(
            role=name,
            goal="Save the town from the flood.",
            backstory=system,
            llm=llm,
            tools=[tool("look")(look)],
            max_iter=3,
            verbose=False,
        )
        for name, system in call.people.items()
    }
    rounds: list[dict[str, str]] = []
    question = OPENING
    for _ in range(call.rounds):
        tasks = [
            Task(
                description=question,
                expected_output="What you do, where, and who can help.",
                agent=agent,
                output_pydantic=Plan,
            )
            for agent in agents.values()
        ]
        crew = Crew(
            agents=list(agents.values()), tasks=tasks, process=Process.sequential, verbose=False
        )
        result = crew.kickoff()
        plans = [output.pydantic for output in result.tasks_output]
        rounds.append({name: plan.told() for name, plan in zip(agents, plans, strict=True)})
        question = heard(rounds[-1])
    tell(rounds)


main()
