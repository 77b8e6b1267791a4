"""A team with tools: each looks something up, then all decide on what everybody has found.

    tokendance serve &
    python examples/team.py              # or another URL than http://127.0.0.1:8000

Any client of OpenAI's API will do; this one needs nothing but Python. Who asks at the same time is
in one round, and the server finds what their prompts have in common.
"""

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
# Who, the tool, and what it finds for each day.
TEAM = {
    "Ann": ("forecast", {"Saturday": "It rains all day.", "Sunday": "It is sunny and warm."}),
    "Bo": ("timetable", {"Saturday": "A train every hour.", "Sunday": "One train, at nine."}),
    "Cy": ("prices", {"Saturday": "A boat is 9 euros.", "Sunday": "A boat is 12 euros."}),
}
HOW = "Answer in one short sentence. Begin with the words: I will bring"


def ask(name: str, question: str, **fields: Any) -> dict[str, Any]:
    """What the server answers somebody."""
    messages = [
        {"role": "system", "content": f"You are {name}, and you like picnics."},
        {"role": "user", "content": question},
    ]
    body = {"model": MODEL, "messages": messages, "max_tokens": 100, "seed": 2, **fields}
    headers = {"Content-Type": "application/json"}
    url = f"{URL}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def look_up(name: str) -> str:
    """Let somebody call the tool, and return what it finds."""
    tool, findings = TEAM[name]
    parameters = {
        "type": "object",
        "properties": {"day": {"enum": list(findings)}},
        "required": ["day"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": tool, "parameters": parameters}}]
    answer = ask(name, f"Look at the {tool}.", tools=tools, tool_choice="required")
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    day = json.loads(call["arguments"])["day"]
    return f"{name} has looked at the {tool} of {day}: {findings[day]}"


def main() -> None:
    """Two rounds: tools, and a decision."""
    with ThreadPoolExecutor() as together:
        found = "\n".join(together.map(look_up, TEAM))
        print(found)
        question = f"{found}\nThere is a picnic at the lake. What food will you bring? {HOW}"
        talk = {"temperature": 0.6, "top_p": 0.9, "stop": "\n"}
        answers = together.map(lambda name: ask(name, question, **talk), TEAM)
        for name, answer in zip(TEAM, answers, strict=True):
            print(f"{name}: {answer['choices'][0]['message']['content'].strip()}")
            usage = answer["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            print(f"    {cached} of {usage['prompt_tokens']} tokens were there already")


if __name__ == "__main__":
    with urllib.request.urlopen(f"{URL}/v1/models") as models:
        MODEL = json.load(models)["data"][0]["id"]
    main()
