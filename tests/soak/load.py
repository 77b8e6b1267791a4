"""The clients of a soak: `python -m soak.load` asks a server for as long as it is told.

Each client is a loop of its own, and all run at once. It writes one JSON document a line to
standard output: progress now and then, and at last all that it has counted. The one whose requests
are small, and timed, is in a process of its own (`--canary`): hundreds of others in one event loop
would have it wait for themselves. The others leave the processor to the server, as clients on other
machines would. A request that its client did not abandon must be answered: with what was asked for,
or with an error in OpenAI's shape. Whatever else happens is a problem, and listed.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import h11
import httpx

from hostile_schemas import as_format, as_tool
from soak import bodies
from soak.bodies import Body
from soak.client import Leave, Reply, exchange
from soak.fuzz import mutated
from soak.judge import problem_of
from soak.loiter import Loiterers

# The longest answers have hundreds of tokens, and a small machine may have much else to do.
_DEADLINE_S = 240.0
_PROGRESS_S = 2.0
_MOST_PROBLEMS = 50
_BURST = 128
_BURST_EVERY_S = 8.0

# Nothing of one is in another, so each is computed by itself.
_CANARIES = [
    "Which bird sings in a coal mine?",
    "How deep do they dig for it, and for whom?",
    "What happens, once all is quiet down there?",
]
_CHAT = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"
_ROUNDS = "/v1/rounds"
_RESPONSES = "/v1/responses"
_EMBEDDINGS = "/v1/embeddings"
_TOKENIZE = "/tokenize"
_FUZZED = (200, 400, 404, 409, 413)


@dataclass(frozen=True, slots=True)
class Target:
    """The server as its clients know it.

    Attributes:
        port: of this machine.
        keys: of tenants.
        canary_key: of a tenant that shares its texts with nobody.
        loiterer_key: of a tenant that lets the server wait: it is not held back for what others
            have taken, so that its deadlines are its own.
        max_body_bytes: larger bodies are refused.
        max_messages: longer conversations are refused.
        max_context: tokens; longer prompts are refused.
        max_connections: at a time.
        deadlines: of connections, by the server's setting.
    """

    port: int
    keys: list[str]
    canary_key: str
    loiterer_key: str
    max_body_bytes: int
    max_messages: int
    max_context: int
    max_connections: int
    deadlines: dict[str, float]


@dataclass(slots=True)
class Tally:
    """What has been counted.

    Attributes:
        answers: by kind of request and status, or "left" where the client went away.
        slowest_s: the longest that any answer took, with its kind.
        canary_s: what each answer of a tenant took that asks for little, while others flood.
        problems: what was not as it has to be; the first ones.
        num_problems: all of them.
    """

    answers: dict[str, Counter[str]] = field(default_factory=dict)
    slowest_s: float = 0.0
    slowest: str = ""
    canary_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def document(self) -> dict[str, Any]:
        """All of it, as JSON says it."""
        return {name: getattr(self, name) for name in self.__slots__}

    def complain(self, kind: str, what: str) -> None:
        """Note a problem."""
        self.num_problems += 1
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(f"{kind}: {what}")


class Clients:
    """Clients of all kinds, each with random numbers of its own."""

    def __init__(self, target: Target, seconds: float, seed: int) -> None:
        self.target = target
        self.tally = Tally()
        self._seed = seed
        self._end = time.monotonic() + seconds
        self._rounds = itertools.count()

    async def run_canary(self, begin: Callable[[], None]) -> None:
        """Ask for little; call `begin` when the others may begin."""
        expected = [await self._canary(index) for index in range(len(_CANARIES))]
        begin()
        await self._canaries(expected)

    async def run(self) -> None:
        """Ask until the time is over, then wait for the last answers."""
        loops: list[tuple[Callable[[random.Random], Awaitable[None]], int]] = [
            (self._lone, 4),
            (self._completion, 2),
            (self._response, 2),
            (self._embedding, 1),
            (self._tokens, 1),
            (self._round_by_content, 2),
            (self._round_by_name, 2),
            (self._round_in_one_call, 1),
            (self._session, 2),
            (self._one_connection, 2),
            (self._leave_early, 2),
            (self._leave_waiting, 2),
            (self._leave_stream, 3),
            (self._leave_named_round, 1),
            (self._fuzzed, 4),
            (self._too_much, 2),
            (self._hostile_schema, 1),
            (self._no_request, 2),
            (self._operator, 1),
            (self._burst, 1),
            (self._loiterer("crowd"), 1),
            (self._loiterer("slow_head"), 10),
            (self._loiterer("slow_body"), 10),
            (self._loiterer("silent"), 10),
            (self._loiterer("unread"), 2),
            (self._loiterer("nonsense"), 1),
        ]
        tasks = [
            self._loop(client, random.Random(f"{self._seed} {client.__name__} {index}"))
            for client, count in loops
            for index in range(count)
        ]
        await asyncio.gather(*tasks)

    async def _loop(
        self, client: Callable[[random.Random], Awaitable[None]], rng: random.Random
    ) -> None:
        while time.monotonic() < self._end:
            await client(rng)
            await asyncio.sleep(rng.random() * 0.05)

    # -- one request --------------------------------------------------------------------------

    async def _ask(
        self,
        kind: str,
        path: str,
        body: Body | bytes,
        *,
        key: str,
        expected: Collection[int] = (200,),
        method: str = "POST",
        chunk: int | None = None,
        leave: Leave | None = None,
        content_type: str = "application/json",
        client: httpx.AsyncClient | None = None,
    ) -> Reply | None:
        """Ask; again after a while if the server says so. Judge the answer and count it."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": content_type, "authorization": f"Bearer {key}"}
        first = time.monotonic()
        # A crowd may take the place of a connection that is kept and has said nothing for long:
        # its client asks again on another, as often as OpenAI's own does.
        num_places = 2 if client is not None else 0
        while True:
            begun = time.monotonic()
            try:
                async with asyncio.timeout(_DEADLINE_S):
                    if client is not None:
                        found = await client.request(method, path, content=data, headers=sent)
                        reply: Reply | None = Reply(
                            found.status_code, dict(found.headers), found.content
                        )
                    else:
                        reply = await exchange(
                            self.target.port, method, path, data, sent, chunk=chunk, leave=leave
                        )
            except TimeoutError:
                self._count(kind, "hangs", begun)
                self.tally.complain(kind, f"no answer in {_DEADLINE_S} s to {data[:500]!r}")
                return None
            except (OSError, h11.RemoteProtocolError, httpx.HTTPError) as error:
                if num_places:
                    self._count(kind, "again", begun)
                    num_places -= 1
                    continue
                self._count(kind, "left" if leave is not None else "broken", begun)
                if leave is None:
                    self.tally.complain(kind, f"{error!r} after {data[:500]!r}")
                return None
            self._count(kind, "left" if reply is None else str(reply.status), begun)
            if reply is None:
                return None
            if problem := problem_of(reply, (*expected, 429)):
                self.tally.complain(kind, f"{problem}, after {method} {path} {data[:600]!r}")
            if reply.status != 429 or "retry-after" not in reply.headers:
                return reply
            if time.monotonic() - first > _DEADLINE_S:
                self.tally.complain(kind, f"not let in for {_DEADLINE_S} s")
                return None
            await asyncio.sleep(float(reply.headers["retry-after"]) * (0.5 + random.random()))

    def _count(self, kind: str, how: str, begun: float) -> None:
        self.tally.answers.setdefault(kind, Counter())[how] += 1
        took = time.monotonic() - begun
        if kind == "canary":
            self.tally.canary_s.append(took)
        if took > self.tally.slowest_s:
            self.tally.slowest_s, self.tally.slowest = took, kind

    def _key(self, rng: random.Random) -> str:
        return rng.choice(self.target.keys)

    # -- well-behaved clients -----------------------------------------------------------------

    async def _lone(self, rng: random.Random) -> None:
        await self._ask("lone", _CHAT, bodies.chat(rng), key=self._key(rng))

    async def _completion(self, rng: random.Random) -> None:
        await self._ask("completion", _COMPLETIONS, bodies.completion(rng), key=self._key(rng))

    async def _response(self, rng: random.Random) -> None:
        """An answer, and one that goes on from it; another tenant cannot."""
        key = self._key(rng)
        body = bodies.response(rng) | {"stream": False}
        reply = await self._ask("response", _RESPONSES, body, key=key)
        if reply is None or reply.status != 200:
            return
        first = json.loads(reply.body)["id"]
        others = [other for other in self.target.keys if other != key]
        more = bodies.response(rng) | {"previous_response_id": first, "max_output_tokens": 4}
        is_kept = body.get("store") is not False
        for asker, expected in [(key, 200 if is_kept else 400), *((one, 400) for one in others)]:
            # It may be forgotten by now, or what was said be too long.
            statuses = (expected, 400)
            await self._ask("response", _RESPONSES, more, key=asker, expected=statuses)
        url = f"{_RESPONSES}/{first}"
        method = rng.choice(["GET", "DELETE"])
        await self._ask("kept", url, b"", key=key, method=method, expected=(200, 404))

    async def _embedding(self, rng: random.Random) -> None:
        body = bodies.embedding(rng)
        await self._ask("embedding", _EMBEDDINGS, body, key=self._key(rng))

    async def _tokens(self, rng: random.Random) -> None:
        body = {"messages": bodies.chat(rng)["messages"]}
        reply = await self._ask("tokens", _TOKENIZE, body, key=self._key(rng))
        if reply is not None and reply.status == 200:
            found = {"tokens": json.loads(reply.body)["tokens"]}
            await self._ask("tokens", "/detokenize", found, key=self._key(rng))

    async def _round_by_content(self, rng: random.Random) -> None:
        await self._together("round found", rng, bodies.agents(rng, rng.randint(2, 10)))

    async def _round_by_name(self, rng: random.Random) -> None:
        found = bodies.agents(rng, rng.randint(2, 10))
        name = f"round {next(self._rounds)}"
        size = rng.choice([None, len(found), len(found) + 2])
        for body in found:
            body["round"] = {"id": name, "size": size}
            if rng.random() < 0.2:
                body["round"] |= {"agent": f"agent {rng.randrange(9)}", "session": name[:7]}
        await self._together("round named", rng, found)

    async def _together(self, kind: str, rng: random.Random, found: list[Body]) -> None:
        key = self._key(rng)
        await asyncio.gather(*(self._ask(kind, _CHAT, body, key=key) for body in found))

    async def _round_in_one_call(self, rng: random.Random) -> None:
        body = bodies.whole_round(rng, rng.randint(1, 12))
        await self._ask("round in one call", _ROUNDS, body, key=self._key(rng))

    async def _session(self, rng: random.Random) -> None:
        """A session has one round at a time; some go before theirs has ended."""
        leave = None
        if rng.random() < 0.4:
            leave = Leave(wait_s=rng.random() * 0.5, reset=rng.random() < 0.5)
            if rng.random() < 0.5:
                leave = Leave(received=rng.randint(1, 2000))
        body = bodies.session_round(rng)
        key = self._key(rng)
        await self._ask("session", _ROUNDS, body, key=key, expected=(200, 409), leave=leave)

    async def _one_connection(self, rng: random.Random) -> None:
        """One request after another, right and wrong, over a connection that is kept."""
        url = f"http://127.0.0.1:{self.target.port}"
        async with httpx.AsyncClient(base_url=url, timeout=_DEADLINE_S) as client:
            for _ in range(10):
                key = self._key(rng)
                body: Body | bytes = bodies.chat(rng)
                expected: tuple[int, ...] = (200,)
                wrong = rng.randrange(6)
                if wrong == 0:
                    key, expected = "wrong", (401,)
                elif wrong == 1:
                    body, expected = b" " * (self.target.max_body_bytes + 1), (413,)
                elif wrong == 2:
                    body, expected = mutated(rng, bodies.chat(rng)), _FUZZED
                await self._ask(
                    "one connection", _CHAT, body, key=key, expected=expected, client=client
                )

    async def _burst(self, rng: random.Random) -> None:
        await self._together("burst", rng, bodies.agents(rng, _BURST))
        await asyncio.sleep(max(0.0, min(_BURST_EVERY_S, self._end - time.monotonic())))

    async def _operator(self, rng: random.Random) -> None:
        for path in ("/health", "/ready", "/metrics", "/openapi.json", "/v1/models", "/"):
            await self._ask("operator", path, b"", key=self._key(rng), method="GET")
        await asyncio.sleep(1)

    # -- the canary ---------------------------------------------------------------------------

    async def _canary(self, index: int) -> str | None:
        """The answer to one of a few questions whose answers are certain."""
        body = {
            "model": bodies.MODEL,
            "messages": [{"role": "user", "content": _CANARIES[index]}],
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        }
        reply = await self._ask("canary", _CHAT, body, key=self.target.canary_key)
        if reply is None or reply.status != 200:
            return None
        text: str = json.loads(reply.body)["choices"][0]["message"]["content"]
        return text

    async def _canaries(self, expected: list[str | None]) -> None:
        """Whatever the others do, the answers stay what they were when nobody else was there."""
        while time.monotonic() < self._end:
            for index, text in enumerate(expected):
                found = await self._canary(index)
                if found != text:
                    self.tally.complain("canary", f"{found!r}, and once it was {text!r}")
            await asyncio.sleep(0.3)

    # -- clients that leave -------------------------------------------------------------------

    async def _leave_early(self, rng: random.Random) -> None:
        leave = Leave(rng.random(), rng.random() * 0.1, reset=rng.random() < 0.5)
        await self._ask("leave early", _CHAT, bodies.chat(rng), key=self._key(rng), leave=leave)

    async def _leave_waiting(self, rng: random.Random) -> None:
        leave = Leave(wait_s=rng.choice([0.0, 0.002, 0.01, 0.1]), reset=rng.random() < 0.5)
        path, body = rng.choice([
            (_CHAT, bodies.chat(rng)),
            (_COMPLETIONS, bodies.completion(rng)),
            (_ROUNDS, bodies.whole_round(rng, 6)),
            (_RESPONSES, bodies.response(rng)),
            (_EMBEDDINGS, bodies.embedding(rng)),
        ])  # fmt: skip
        await self._ask("leave waiting", path, body, key=self._key(rng), leave=leave)

    async def _leave_stream(self, rng: random.Random) -> None:
        leave = Leave(received=rng.randint(1, 3000), reset=rng.random() < 0.5)
        body = bodies.chat(rng) | {"stream": True, "max_tokens": 100, "ignore_eos": True}
        await self._ask("leave stream", _CHAT, body, key=self._key(rng), leave=leave)

    async def _leave_named_round(self, rng: random.Random) -> None:
        """Some of a round go, before it begins or later; the others are answered."""
        found = bodies.agents(rng, 6)
        key = self._key(rng)
        name = {"id": f"round {next(self._rounds)}", "size": 6}
        asked = []
        for body in found:
            leave = Leave(wait_s=rng.random() * 0.2) if rng.random() < 0.5 else None
            asked.append(
                self._ask("leave round", _CHAT, body | {"round": name}, key=key, leave=leave)
            )
        await asyncio.gather(*asked)

    # -- clients that do wrong ----------------------------------------------------------------

    async def _fuzzed(self, rng: random.Random) -> None:
        path, body = rng.choice([
            (_CHAT, bodies.chat(rng)),
            (_CHAT, bodies.agents(rng, 1)[0]),
            (_COMPLETIONS, bodies.completion(rng)),
            (_ROUNDS, bodies.whole_round(rng, 3)),
            (_ROUNDS, bodies.session_round(rng)),
            (_RESPONSES, bodies.response(rng)),
            (_EMBEDDINGS, bodies.embedding(rng)),
            (_TOKENIZE, {"messages": bodies.chat(rng)["messages"]}),
        ])  # fmt: skip
        data = mutated(rng, body)
        await self._ask(f"fuzz {path}", path, data, key=self._key(rng), expected=_FUZZED)

    async def _too_much(self, rng: random.Random) -> None:
        key = self._key(rng)
        body = bodies.chat(rng)
        kind = rng.randrange(5)
        if kind < 2:
            size = self.target.max_body_bytes * rng.choice([1.001, 1.5, 3, 20])
            chunk = rng.choice([None, 5000])
            data = json.dumps(body).encode().ljust(int(size))
            await self._ask("too large", _CHAT, data, key=key, expected=(413,), chunk=chunk)
        elif kind == 2:
            body["messages"] = body["messages"] * (self.target.max_messages + 1)
            await self._ask("too many messages", _CHAT, body, key=key, expected=(413,))
        elif kind == 3:
            body["messages"][0]["content"] = "a" * rng.choice([1, 2, 40]) * self.target.max_context
            await self._ask("too long", _CHAT, body, key=key, expected=(400,))
        else:
            # Each thing wrong with a body is an error of its own to whoever checks all of it.
            many = dict.fromkeys(map(str, range(self.target.max_body_bytes // 15)), 0)
            await self._ask("too many fields", _CHAT, body | many, key=key, expected=(400,))

    async def _hostile_schema(self, rng: random.Random) -> None:
        name, schema = rng.choice([*bodies.HOSTILE.items()])
        wanted = rng.choice([as_format, as_tool])(schema)
        body = bodies.chat(rng) | {"tools": None, "response_format": None, **wanted}
        key = self._key(rng)
        await self._ask(f"schema: {name}", _CHAT, body, key=key, expected=(200, 400, 413))
        await asyncio.sleep(rng.random())

    async def _no_request(self, rng: random.Random) -> None:
        key = self._key(rng)
        body = bodies.chat(rng)
        kind = rng.randrange(6)
        if kind == 0:
            await self._ask("no key", _CHAT, body, key="wrong", expected=(401,))
        elif kind == 1:
            data = b"x" * self.target.max_body_bytes
            await self._ask("no key", _CHAT, data, key="wrong", expected=(401,))
        elif kind == 2:
            await self._ask("no model", _CHAT, body | {"model": "x"}, key=key, expected=(404,))
        elif kind == 3:
            path = rng.choice(["/", "/v1", "/v1/images", f"{_CHAT}/", "/v1/models/%ff%00", "//"])
            expected = (200, 307, 404, 405)
            await self._ask("no path", path, body, key=key, expected=expected)
        elif kind == 4:
            method = rng.choice(["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"])
            await self._ask("no method", _CHAT, body, key=key, expected=(405,), method=method)
        else:
            given = rng.choice(["text/plain", "application/xml", "multipart/form-data", "a/b/c"])
            await self._ask("no JSON", _CHAT, body, key=key, expected=(400,), content_type=given)

    # -- clients that let the server wait ---------------------------------------------------------

    def _loiterer(self, kind: str) -> Callable[[random.Random], Awaitable[None]]:
        """A client of `Loiterers`, whose problems are noted."""
        target = self.target
        loiterers = Loiterers(
            target.port, target.loiterer_key, target.deadlines, target.max_connections
        )

        async def client(rng: random.Random) -> None:
            begun = time.monotonic()
            problem: str | None = None
            try:
                async with asyncio.timeout(max(0.0, self._end - begun)):
                    problem = await getattr(loiterers, kind)(rng)
            except (ConnectionError, TimeoutError):  # there are too many; the soak is over
                pass
            except (OSError, httpx.HTTPError) as error:
                problem = repr(error)
            self.tally.answers.setdefault(kind, Counter())["closed"] += 1
            if problem:
                self.tally.complain(kind, problem)

        client.__name__ = kind
        return client


# -- the process ------------------------------------------------------------------------------


async def _report(clients: Clients) -> None:
    begun = time.monotonic()
    while True:
        await asyncio.sleep(_PROGRESS_S)
        statuses = sum(clients.tally.answers.values(), Counter[str]())
        progress = {
            "seconds": time.monotonic() - begun,
            "statuses": statuses,
            "problems": clients.tally.num_problems,
        }
        print(json.dumps({"progress": progress}), flush=True)


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=lambda text: Target(**json.loads(text)), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--canary", action="store_true")
    given = parser.parse_args()
    clients = Clients(given.target, given.seconds, given.seed)
    if given.canary:
        await clients.run_canary(lambda: print(json.dumps({"begun": True}), flush=True))
    else:
        os.nice(10)
        reporting = asyncio.create_task(_report(clients))
        await clients.run()
        reporting.cancel()
    print(json.dumps({"result": clients.tally.document()}), flush=True)


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for crowds
    sys.setrecursionlimit(20_000)  # bodies that are nested deeply
    asyncio.run(_main())
