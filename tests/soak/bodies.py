"""What well-behaved clients send, drawn at random."""

import random
from typing import Any

from hostile_schemas import attacks

Body = dict[str, Any]

MODEL = "tiny"
_WORDS = [
    "the", "a", "river", "rises", "over", "bridge", "baker", "bread", "mayor", "ferry", "noon",
    "light", "house", "hill", "letter", "says", "asks", "now", "later", "why", "who", "<|end|>",
    "<TTSEP>", "été", "橋", "𝒳", '"{}"',
]  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad"]},
        "list": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["mood", "list"],
    "additionalProperties": False,
}
# Those that are no larger than a body may be.
HOSTILE = {
    name: schema for name, schema in attacks().items() if name not in ("all of", "enum", "numbers")
}
TOOLS: list[Body] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"To {name}.",
            "parameters": {"type": "object", "properties": {"where": {"enum": ["pub", "park"]}}},
        },
    }
    for name in ("walk", "run")
]


def sentence(rng: random.Random, words: int) -> str:
    """Some words; the first is one, since nothing is left of some of them alone."""
    return " ".join(["so", *rng.choices(_WORDS, k=words)])


def chat(rng: random.Random, words: int = 20) -> Body:
    """A conversation, with whatever its client likes to set."""
    messages: list[Body] = [{"role": "user", "content": sentence(rng, rng.randint(1, words))}]
    if rng.random() < 0.5:
        messages.insert(0, {"role": "system", "content": sentence(rng, 5)})
    if rng.random() < 0.3:
        messages.append({"role": "assistant", "name": "Bo", "content": sentence(rng, 5)})
        messages.append({"role": "user", "content": [{"type": "text", "text": "and now?"}]})
    body: Body = {"model": MODEL, "messages": messages, **sampling(rng)}
    kind = rng.random()
    if kind < 0.1:
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        body |= {"response_format": wanted, "max_tokens": 60}
    elif kind < 0.2:
        choice = rng.choice(["auto", "required", "none"])
        body |= {"tools": TOOLS, "tool_choice": choice, "max_tokens": 60}
    elif kind < 0.35:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)}
    return body


def response(rng: random.Random) -> Body:
    """A conversation as /v1/responses takes it."""
    body = chat(rng)
    same = ("temperature", "stream", "stop", "seed", "top_p", "top_k", "tool_choice")
    found = {name: body[name] for name in same if name in body}
    found |= {"model": MODEL, "max_output_tokens": body["max_tokens"]}
    messages: list[Body] = [dict(message) for message in body["messages"]]
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [{"type": "input_text", "text": "and now?"}]
    last = messages[-1]["content"]
    found["input"] = last if isinstance(last, str) and rng.random() < 0.3 else messages
    if "tools" in body:
        found["tools"] = [{"type": "function", **tool["function"]} for tool in TOOLS]
        found["input"] = [
            {"role": "user", "content": [{"type": "input_text", "text": sentence(rng, 3)}]},
            {"type": "function_call", "call_id": "1", "name": "walk", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": sentence(rng, 3)},
        ]
    if "response_format" in body:
        found["text"] = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    if rng.random() < 0.3:
        found |= {"instructions": sentence(rng, 5), "store": rng.random() < 0.5}
    if body.get("logprobs"):
        found |= {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    return found


def embedding(rng: random.Random) -> Body:
    """Texts to make vectors of, or token ids."""
    given: Any = [sentence(rng, rng.randint(1, 20)) for _ in range(rng.choice([1, 3, 30]))]
    if rng.random() < 0.3:
        given = [[rng.randrange(300) for _ in range(rng.randint(1, 100))] for _ in given]
    if rng.random() < 0.3:
        given = given[0]
    body: Body = {"model": MODEL, "input": given}
    if rng.random() < 0.5:
        body["encoding_format"] = rng.choice(["float", "base64"])
    if rng.random() < 0.3:
        body["dimensions"] = rng.randint(1, 16)
    return body


def completion(rng: random.Random) -> Body:
    """A text to go on with, or several, or token ids."""
    prompt: Any = sentence(rng, rng.randint(1, 20))
    if rng.random() < 0.3:
        prompt = [sentence(rng, 4) for _ in range(rng.randint(1, 3))]
    elif rng.random() < 0.3:
        prompt = [rng.randrange(300) for _ in range(rng.randint(1, 100))]
    body: Body = {"model": MODEL, "prompt": prompt, **sampling(rng)}
    if not body.get("stream") and rng.random() < 0.3:
        body["logprobs"] = rng.randint(0, 5)
    return body


def sampling(rng: random.Random) -> Body:
    """How an answer is chosen."""
    body: Body = {"max_tokens": rng.randint(1, 16), "temperature": rng.choice([0, 0.5, 1, 2, None])}
    if rng.random() < 0.4:
        body["stream"] = True
        if rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
    for chance, fields in (
        (0.2, {"n": rng.randint(2, 4)}),
        (0.2, {"stop": rng.choice(["e", ["a", "th"], "<|end|>"])}),
        (0.2, {"seed": rng.randrange(2**40)}),
        (0.1, {"top_p": 0.5, "top_k": 3}),
        (0.1, {"logit_bias": {"40": 5, "41": -100}}),
        (0.1, {"ignore_eos": True, "user": "someone", "metadata": {"a": "b"}}),
    ):
        if rng.random() < chance:
            body |= fields
    return body


def agents(rng: random.Random, count: int) -> list[Body]:
    """Requests of one round: each has words of its own, and all read the same, in any order."""
    blocks = [sentence(rng, rng.randint(8, 16)) for _ in range(rng.randint(1, 4))]
    bodies: list[Body] = []
    for index in range(count):
        news = rng.sample(blocks, len(blocks))
        messages = [
            {"role": "system", "content": f"You are number {index}. {sentence(rng, 4)}"},
            *({"role": "user", "content": block} for block in news),
            {"role": "user", "content": f"And you, {index}?"},
        ]
        bodies.append({"model": MODEL, "messages": messages, **sampling(rng), "n": 1})
    return bodies


def whole_round(rng: random.Random, count: int) -> Body:
    """A round in one call; one of its agents may ask for what is not there."""
    blocks = {f"b{index}": sentence(rng, rng.randint(8, 16)) for index in range(3)}
    listed: list[Body] = []
    for index in range(count):
        refs: list[Body] = [{"type": "block", "id": name} for name in blocks]
        if rng.random() < 0.1:
            refs.append({"type": "block", "id": "nothing"})
        refs.append({"type": "text", "text": sentence(rng, 4)})
        agent: Body = {"agent": f"agent {index}", "max_tokens": rng.randint(1, 12)}
        agent["temperature"] = rng.choice([0, 1])
        if rng.random() < 0.5:
            agent["segments"] = refs
        else:
            agent["messages"] = [
                {"role": "system", "content": sentence(rng, 4)},
                {"role": "user", "content": refs},
            ]
        listed.append(agent)
    return {"model": MODEL, "blocks": blocks, "agents": listed, "stream": rng.random() < 0.4}


def session_round(rng: random.Random) -> Body:
    """The next round of one of a few sessions, whose agents come and go.

    Some say so much that the next round does not fit the context, and hears a part of it.
    """
    names = rng.sample(["ann", "bo", "cy", "di", "ed"], rng.randint(1, 4))
    listed = [
        {
            "agent": name,
            "system": f"You are {name}.",
            "task": sentence(rng, 4),
            "max_tokens": 200 if rng.random() < 0.1 else rng.randint(1, 12),
            "temperature": rng.choice([0, 1]),
        }
        for name in names
    ]
    session = f"session {rng.randrange(6)}"
    return {"model": MODEL, "session": session, "agents": listed, "stream": rng.random() < 0.5}
