"""How many rounds stay whole behind a router: asks for some, and counts who has answered.

    python examples/replicas.py http://127.0.0.1:8000 http://127.0.0.1:8001 http://127.0.0.1:8002

The first URL is the router's; the others are those of vLLM's servers behind it, whose metrics are
read. Needs nothing but Python. docs/scale.md has what comes out.
"""

import argparse
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

PEOPLE = ("Ann", "Bo", "Cy", "Dora", "Emil", "Fay")
PLACES = ("bridge", "mill", "weir")


def shared_text(name: str) -> str:
    """What all agents of a round read, and nobody has read before."""
    return "\n".join(
        f"{person}: In {name} I was at the {place}. By the end of {name} the water was higher."
        for person in PEOPLE
        for place in PLACES
    )


def ask(url: str, model: str, session: str, name: str, agent: int) -> int:
    """Ask for one agent; return how many tokens of its prompt were cached."""
    who = f"You are agent {agent} of {name}. " + "You have little time. " * agent
    messages = [
        {"role": "system", "content": who},
        {"role": "user", "content": f"{shared_text(name)}\nWhat do you do?"},
    ]
    body = {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if session:
        headers["X-Session-ID"] = session
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        details = json.load(answer)["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def count_answers(url: str) -> int:
    """Requests that a vLLM has answered so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    counts = re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.MULTILINE)
    return int(sum(map(float, counts)))


def main() -> None:
    """Play the rounds, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("router", help="URL of the router")
    parser.add_argument("replicas", nargs="+", help="URLs of vLLM's servers behind it")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--agents", type=int, default=6)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--no-session", action="store_true", help="send no X-Session-ID")
    options = parser.parse_args()

    num_whole, cached, used = 0, 0, set()
    before = list(map(count_answers, options.replicas))
    for number in range(options.rounds):
        name = f"round {number}"
        session = "" if options.no_session else name
        with ThreadPoolExecutor(options.agents) as pool:
            asked = [
                pool.submit(ask, options.router, options.model, session, name, agent)
                for agent in range(options.agents)
            ]
            cached += sum(one.result() for one in asked)
        after = list(map(count_answers, options.replicas))
        where = [replica for replica in range(len(after)) if after[replica] > before[replica]]
        assert sum(after) - sum(before) == options.agents, "somebody else asks, too"
        num_whole += len(where) == 1
        used.update(where)
        before = after
    print(
        f"{num_whole} of {options.rounds} rounds whole, {len(used)} of {len(options.replicas)}"
        f" replicas used, {cached} prompt tokens from a cache"
    )


if __name__ == "__main__":
    main()
