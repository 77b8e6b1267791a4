"""Sends what is in `hostile_schemas` to a server: `python schema_attacks.py`.

It is a process of its own, since it may die. For each attack it writes a JSON line with the status
and the message of the answer, and at last the longest pauses.
"""

import json
import re
import sys

import httpx

from fake_executor import FakeExecutor
from hostile_schemas import ORDINARY, as_format, as_tool, attacks, bodies
from serving import chat, serving
from tiny_models import SPECIALS, VOCAB, fake_model
from tokendance import LLM
from tokendance.options import EngineOptions


def tell(name: str, response: httpx.Response) -> None:
    """Write what was answered."""
    message = response.json().get("error", {}).get("message", "")
    document = {"name": name, "status": response.status_code, "message": message[:500]}
    print(json.dumps(document), flush=True)


def main() -> None:
    """Send all of it, and in between what others send."""
    num_pages = 400
    model = fake_model()
    page_bytes = model.shape.kv_bytes_per_token(model.dtype) * 16
    options = EngineOptions(kv_budget=num_pages * page_bytes)
    llm = LLM.from_loaded(model, options, executor=FakeExecutor(num_pages * 16, VOCAB, SPECIALS))
    # So many that all of them come as far as the limits of schemas.
    with serving(llm, max_body_objects=300_000) as (client, _):
        tell("ordinary", chat(client, **as_format(ORDINARY), max_tokens=50))
        for name, schema in attacks().items():
            tell(name, chat(client, **as_format(schema)))
            tell(f"{name}, tool", chat(client, **as_tool(schema)))
        for name, body in bodies().items():
            headers = {"content-type": "application/json"}
            tell(name, client.post("/v1/chat/completions", content=body, headers=headers))
        tell("ordinary", chat(client, **as_format(ORDINARY), max_tokens=50))
        text = client.get("/metrics").text
        pauses = re.findall(r"\ntokendance_(\w+)_longest_pause_seconds (\S+)", text)
        print(json.dumps({"pauses": {who: float(seconds) for who, seconds in pauses}}))


if __name__ == "__main__":
    sys.setrecursionlimit(20_000)  # to write what is nested deeply
    main()
