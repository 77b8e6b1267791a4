"""CrewAI: a crew that works one task after the other, with a tool and a type for each result."""

import os

os.environ |= {"CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TRACING_ENABLED": "false"}

from crewai import LLM, Agent, Crew, Process, Task
from crewai.crews.crew_output import CrewOutput
from crewai.tools import tool
from people import MODEL, OPENING, TEMPERATURE, Plan, heard, look, read_call, tell
from pydantic import ValidationError


def kickoff(crew: Crew) -> CrewOutput:
    """Let a crew work; once more where an answer is JSON of another type.

    CrewAI asks for the type in words, and this small model may answer with the schema itself.
    """
    for _ in range(4):
        try:
            return crew.kickoff()
        except ValidationError:
            continue
    return crew.kickoff()


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
        result = kickoff(crew)
        plans = [output.pydantic for output in result.tasks_output]
        rounds.append({name: plan.told() for name, plan in zip(agents, plans, strict=True)})
        question = heard(rounds[-1])
    tell(rounds)


main()
