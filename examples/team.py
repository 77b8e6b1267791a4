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
DAYS = ("Saturday", "Sunday")
# Who, the tool, and what it finds for each of the days.
TEAM = {
    "Ann": (
        "forecast",
        ("It rains all day, with a cold wind from the north.", "It is sunny and warm."),
    ),
    "Bo": ("timetable", ("A train goes to the lake every hour.", "The only train goes at nine.")),
    "Cy": ("prices", ("The boats cost nine euros.", "The boats cost twelve euros, with lunch.")),
}


def ask(messages: list[Any], **fields: Any) -> dict[str, Any]:
    """What the server answers."""
    body = {"model": MODEL, "messages": messages, "max_tokens": 40, "temperature": 0, **fields}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{URL}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def look_up(name: str) -> tuple[list[Any], str]:
    """Let somebody call a tool; return the messages so far, and what was found."""
    tool, findings = TEAM[name]
    parameters = {
        "type": "object",
        "properties": {"day": {"enum": DAYS}},
        "required": ["day"],
        "additionalProperties": False,
    }
    messages = [
        {"role": "system", "content": f"You are {name}. You look at the {tool} for your friends."},
        {"role": "user", "content": "We want to go to the lake. Look up one of the days."},
    ]
    function = {"name": tool, "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    said = ask(messages, tools=tools, tool_choice="required", max_tokens=200)["choices"][0][
        "message"
    ]
    call = said["tool_calls"][0]
    day = json.loads(call["function"]["arguments"])["day"]
    found = f"{name} has looked at the {tool} of {day}: {findings[DAYS.index(day)]}"
    return [*messages, said, {"role": "tool", "tool_call_id": call["id"], "content": found}], found


def main() -> None:
    """Two rounds: tools, and a decision."""
    with ThreadPoolExecutor() as together:
        histories, found = zip(*together.map(look_up, TEAM), strict=True)
        print("\n".join(found))
        question = "\n".join(found) + "\nWhen shall we go? Answer in one short sentence."
        asked = [[*history, {"role": "user", "content": question}] for history in histories]
        for name, answer in zip(TEAM, together.map(ask, asked), strict=True):
            usage = answer["usage"]
            print(f"{name}: {answer['choices'][0]['message']['content'].strip()}")
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            print(f"    {cached} of {usage['prompt_tokens']} tokens were there already")


if __name__ == "__main__":
    with urllib.request.urlopen(f"{URL}/v1/models") as models:
        MODEL = json.load(models)["data"][0]["id"]
    main()
