"""Answers that have to look like something are whole before their tokens are used up."""

import copy
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from conftest import examples
from serving import chat
from test_answer_grammar import MARKED, Choose, answer_format, at_random, preferring, tool
from tokendance.models.loader import LoadedModel
from tokendance.models.thoughts import Standing, ThoughtMarks
from tokendance.server import closing
from tokendance.server.answer_grammar import Calls, Pattern, Wanted
from tokendance.server.call_parser import CallParser, join
from tokendance.server.closing import Closer
from tokendance.server.errors import ApiError
from tokendance.server.grammar import Grammars
from tokendance.server.grammar_constraint import AnswerConstraint
from tokendance.server.settings import ServerSettings
from tokendance.server.short_texts import Short, pattern_cost
from tokendance.server.shortest import Endings, shortest_of
from tokendance.server.thinking_constraint import ThinkingConstraint


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    age: int
    notes: list[str]
    height: float | None = None


class Tree(BaseModel):
    model_config = ConfigDict(extra="forbid")

    children: list["Tree"] = []
    word: str = Field(min_length=2)


class People(BaseModel):
    model_config = ConfigDict(extra="forbid")

    people: list[Person]


MODELS: list[type[BaseModel]] = [Person, Tree, People]
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "number"},
    {"type": "string"},
    {"type": "array", "items": {"type": "string"}},
    {"$ref": "#/$defs/L", "$defs": {"L": {"type": "array", "items": {"$ref": "#/$defs/L"}}}},
    {"type": "object"},
    {"type": "object", "additionalProperties": {"type": "array"}},
    *(model.model_json_schema() for model in MODELS),
]


@pytest.fixture(scope="module")
def grammars(fake: LoadedModel) -> Iterator[Grammars]:
    made = Grammars(fake, ServerSettings())
    yield made
    made.close()


@pytest.fixture(scope="module")
def large(fake: LoadedModel) -> Iterator[Grammars]:
    made = Grammars(with_large_tokens(fake), ServerSettings())
    yield made
    made.close()


def answered(fake: LoadedModel, constraint: AnswerConstraint, choose: Choose, most: int) -> str:
    """The answer that is chosen token by token, which has to end within `most` tokens."""
    texts = [fake.tokenizer.decode([token]) for token in range(fake.shape.vocab_size)]
    tokens: list[int] = []
    while True:
        allowed = np.flatnonzero(~constraint.forbidden()).tolist()
        assert allowed, fake.tokenizer.decode(tokens)
        token = choose(allowed, "".join(texts[one] for one in tokens).encode())
        if token in fake.stop_ids:
            return str(fake.tokenizer.decode(tokens))
        constraint.accept(token)
        assert constraint.failure() is None
        tokens.append(token)
        assert len(tokens) < most, fake.tokenizer.decode(tokens)


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
@pytest.mark.parametrize("liked", ["[", "{", "a", '"', "9", None])
def test_whatever_it_likes_it_ends_in_time(
    fake: LoadedModel, grammars: Grammars, number: int, liked: str | None
) -> None:
    schema = SCHEMAS[number]
    wanted = Wanted(answer=answer_format(schema))
    constraint = grammars.answer(wanted, MARKED).constraint
    choices = [preferring(fake, liked)] if liked else [at_random(seed) for seed in range(3)]
    for most in (160, 300):
        for choose in choices:
            text = answered(fake, constraint.copy(most), choose, most)
            found = json.loads(text)
            for model in MODELS:
                if schema == model.model_json_schema():
                    model.model_validate(found)
    if liked == "a" and schema == {"type": "string"}:
        assert len(text) > 300 - 20  # and not long before


def test_calls_end_in_time(fake: LoadedModel, grammars: Grammars) -> None:
    wanted = Wanted((tool("f", {"type": "object", "properties": {"a": {"type": "string"}}}),),
                    Calls.REQUIRED)  # fmt: skip
    constraint = grammars.answer(wanted, MARKED).constraint
    for liked in ("a", '"', "{", "<"):
        text = answered(fake, constraint.copy(150), preferring(fake, liked), 150)
        parser = CallParser(MARKED, ["f"])
        content, calls = join([*parser.add(text), *parser.finish(is_cut=False)])
        assert not content.strip()
        assert calls
        for call in calls:
            assert isinstance(json.loads(call.arguments), dict)


def test_a_regular_expression_ends_in_time(fake: LoadedModel, grammars: Grammars) -> None:
    wanted = Wanted(answer=Pattern.of_regex("(a+,)+;", "structured_outputs"))
    constraint = grammars.answer(wanted, MARKED).constraint
    assert answered(fake, constraint.copy(50), preferring(fake, "a"), 50).endswith("a,;")


def test_what_comes_behind_thoughts_has_what_they_leave(
    fake: LoadedModel, grammars: Grammars
) -> None:
    constraint = grammars.answer(
        Wanted(answer=answer_format({"type": "string"})), MARKED
    ).constraint
    marks = ThoughtMarks("<think>", "</think>")
    begin = "<think>Hm.</think>"
    for most in (40, 60):
        thinking = ThinkingConstraint(constraint.copy(), marks, Standing.BEFORE).copy(most)

        def choose(allowed: Any, so_far: bytes) -> int:
            rest = begin[len(so_far) :] or "a"
            (token,) = fake.tokenizer(rest[0]).input_ids
            return token if token in allowed else int(allowed[0])

        text = answered(fake, thinking, choose, most)
        assert text.startswith(begin)
        assert set(json.loads(text.removeprefix(begin))) <= set("a")
        assert len(text) > most - 20


def test_thoughts_leave_room(fake: LoadedModel, grammars: Grammars) -> None:
    """A model that would think for ever is stopped, so that it answers."""
    schema = {"type": "array", "items": {"enum": ["yes"]}, "minItems": 2}
    constraint = grammars.answer(Wanted(answer=answer_format(schema)), MARKED).constraint
    for begun in (Standing.BEFORE, Standing.INSIDE):
        thinking = ThinkingConstraint(constraint, ThoughtMarks("<think>", "</think>"), begun)
        begin = "<think>" if begun is Standing.BEFORE else ""
        for most in (60, 150):
            choose = following_with(fake, begin, "a</b")
            text = answered(fake, thinking.copy(most), choose, most)
            thought, mark, said = text.removeprefix(begin).partition("</think>")
            assert mark
            assert len(thought) > most - 60
            assert set(json.loads(said)) == {"yes"}


def following_with(fake: LoadedModel, begin: str, liked: str) -> Choose:
    """Say a text, then some characters by turns; something else where they are forbidden."""

    def choose(allowed: Any, so_far: bytes) -> int:
        place = len(so_far) - len(begin)
        wanted = begin[len(so_far)] if place < 0 else liked[place % len(liked)]
        (token,) = fake.tokenizer(wanted).input_ids
        return token if token in allowed else int(allowed[0])

    return choose


def test_what_cannot_be_closed_runs_on(fake: LoadedModel, grammars: Grammars) -> None:
    long = answer_format({"type": "string", "minLength": 2000})
    constraint = grammars.answer(Wanted(answer=long), MARKED).constraint.copy(50)
    for _ in range(50):
        token = int(np.flatnonzero(~constraint.forbidden())[0])
        assert token not in fake.stop_ids
        constraint.accept(token)


def test_ends_are_looked_for_now_and_then(
    fake: LoadedModel, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = []
    search = closing._Search

    def count(*arguments: Any) -> Any:
        searches.append(arguments)
        return search(*arguments)

    monkeypatch.setattr(closing, "_Search", count)
    constraint = grammars.answer(Wanted(answer=answer_format(SCHEMAS[3])), MARKED).constraint
    answered(fake, constraint.copy(2000), at_random(1), 2000)
    assert 1 <= len(searches) < 60


def test_others_have_their_turn_while_an_end_is_looked_for(grammars: Grammars) -> None:
    """However slow it is, the end is the same."""
    constraint = grammars.answer(Wanted(answer=answer_format(Person.model_json_schema())), MARKED)
    paths = []
    for seconds in (0.0, 0.004, 1.0):
        held = constraint.constraint.copy(60)
        now = 0.0

        def clock(step: float = seconds) -> float:
            nonlocal now
            now += step
            return now

        held._closer = Closer(held._ends, 60, clock)
        turns = 0
        while not held.is_ready:
            held.prepare()
            turns += 1
        assert held._closer is not None
        paths.append(held._closer.path)
        assert (turns > 1) == (seconds > 0.001), turns
    assert paths[0] == paths[1] == paths[2]


def random_schema(chooser: random.Random, level: int) -> dict[str, Any]:
    """A schema that may refer to R, S and T, and so to itself."""
    kinds = ["string", "number", "boolean", "null", "enum", "ref"]
    kind = chooser.choice(kinds + 2 * ["array", "object", "any", "ref"] if level else kinds)

    def inner() -> dict[str, Any]:
        return random_schema(chooser, level - 1)

    match kind:
        case "enum":
            return {"enum": chooser.sample(["a", "abc", "b" * 30, 7, None], chooser.randint(1, 4))}
        case "ref":
            return {"$ref": f"#/$defs/{chooser.choice('RST')}"}
        case "array":
            least = chooser.randint(0, 2)
            return {"type": "array", "items": inner(), "minItems": least}
        case "any":
            return {"anyOf": [inner() for _ in range(chooser.randint(1, 3))]}
        case "object":
            names = chooser.sample(["a", "ab", "c", "a_long_name"], chooser.randint(0, 4))
            required = [name for name in names if chooser.random() < 0.5]
            members = {name: inner() for name in names}
            return {"type": "object", "properties": members, "required": required,
                    "additionalProperties": False}  # fmt: skip
    return {"type": kind}


def fits(value: Any, schema: dict[str, Any], defs: dict[str, Any], seen: str = "") -> bool:
    """Whether a value is as a random schema says, of which so many definitions were followed."""
    if "$ref" in schema:
        name = schema["$ref"][-1]
        return name not in seen and fits(value, defs[name], defs, seen + name)
    if "enum" in schema:
        return value in schema["enum"]
    if "anyOf" in schema:
        return any(fits(value, one, defs, seen) for one in schema["anyOf"])
    match schema["type"]:
        case "array":
            long_enough = isinstance(value, list) and len(value) >= schema["minItems"]
            return long_enough and all(fits(one, schema["items"], defs) for one in value)
        case "object":
            members = schema["properties"]
            return (
                isinstance(value, dict)
                and set(schema["required"]) <= set(value) <= set(members)
                and all(fits(one, members[name], defs) for name, one in value.items())
            )
    types = {"string": str, "number": int | float, "boolean": bool, "null": type(None)}
    is_bool = isinstance(value, bool)
    return isinstance(value, types[schema["type"]]) and is_bool == (schema["type"] == "boolean")


def shortest(schema: dict[str, Any], lengths: dict[str, float]) -> float:
    """Characters of the shortest JSON of a random schema, if those of R, S and T are as long."""
    if "$ref" in schema:
        return lengths[schema["$ref"][-1]]
    if "enum" in schema:
        return min(len(json.dumps(value)) for value in schema["enum"])
    if "anyOf" in schema:
        return min(shortest(one, lengths) for one in schema["anyOf"])
    match schema["type"]:
        case "array":
            items = [shortest(schema["items"], lengths)] * schema["minItems"]
        case "object":
            items = [
                len(name) + 4 + shortest(schema["properties"][name], lengths)
                for name in schema["required"]
            ]
        case kind:
            return {"string": 2, "number": 1, "boolean": 4, "null": 4}[kind]
    return 2 + sum(items) + 2 * max(0, len(items) - 1)


KEYWORDS: list[dict[str, Any]] = [
    {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{3,10}-[0-9]{4}$"}},
    {"type": "array", "items": {"type": "string", "format": "uuid"}},
    {"type": "array", "items": {"type": "integer", "minimum": 1000000, "maximum": 1000050}},
    {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": 20}, "b": {"$ref": "#"}},
        "required": ["a"],
    },
    {"type": "array", "prefixItems": [{"type": "string"}, {"$ref": "#"}], "minItems": 1},
    {
        "allOf": [
            {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
            {
                "type": "object",
                "properties": {"y": {"type": "array", "items": {"$ref": "#"}}},
                "required": ["y"],
            },
        ]
    },
    {
        "type": "object",
        "additionalProperties": {"$ref": "#/$defs/P"},
        "$defs": {
            "P": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 5},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/P"}},
                },
                "required": ["name", "kids"],
            }
        },
    },
    {
        "type": "object",
        "patternProperties": {"^k[0-9]+$": {"$ref": "#"}},
        "additionalProperties": False,
    },
    {
        "anyOf": [
            {
                "type": "object",
                "properties": {"op": {"const": "add"}, "l": {"$ref": "#"}, "r": {"$ref": "#"}},
                "required": ["op", "l", "r"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"op": {"const": "num"}, "v": {"type": "number"}},
                "required": ["op", "v"],
                "additionalProperties": False,
            },
        ]
    },
    {"type": ["object", "null"], "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
    {"type": "number"},
    {"type": "string", "minLength": 300},
    {"enum": ["é\u2028", "日本語"]},
]


LARGE = ("[[[[", '{"a": {"a": {', '"}, {"', '": [', ', "a_long', "[0, [", '{"ab": [[')


def with_large_tokens(fake: LoadedModel) -> LoadedModel:
    """A model whose vocabulary has tokens that begin much at once."""
    tokenizer = copy.deepcopy(fake.tokenizer)
    tokenizer.add_tokens(list(LARGE))
    return replace(fake, tokenizer=tokenizer)


@settings(max_examples=examples(80), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_schema_ends_from_its_shortest_answer_on(large: Grammars, seed: int) -> None:
    """Whatever comes: tokens that begin much, and recursion through whatever is hard to end."""
    chooser = random.Random(seed)
    defs = {name: random_schema(chooser, 3) for name in "RST"}
    lengths = dict.fromkeys(defs, math.inf)
    for _ in range(10):
        lengths = {name: shortest(one, lengths) for name, one in defs.items()}
    schema = {"$ref": "#/$defs/R", "$defs": defs}
    if lengths["R"] > 400:
        return
    least = int(lengths["R"])
    try:
        constraint = large.answer(Wanted(answer=answer_format(schema)), MARKED).constraint
    except ApiError:  # of alternatives that refer to each other, and say nothing else
        return
    for more in (1, 2, 5, 13, 30, 80):
        liked = chooser.choice([*LARGE, *LARGE, "[", "{", ",", '"', "a", ""])
        choose = preferring(large._model, liked) if liked else at_random(chooser.randrange(999))
        text = answered(large._model, constraint.copy(least + more), choose, least + more)
        assert fits(json.loads(text), defs["R"], defs), (text, schema)


@pytest.mark.parametrize("schema", [*KEYWORDS, *SCHEMAS])
def test_it_ends_from_its_shortest_answer_on(large: Grammars, schema: dict[str, Any]) -> None:
    """Also where keywords bound texts and numbers, and where only a name tells what has no end."""
    model = large._model
    constraint = large.answer(Wanted(answer=answer_format(schema)), MARKED).constraint
    count = constraint.count_closing()
    assert count is not None
    least = count - closing._SPARE - closing._END
    for more in (1, 3, 13, 40):
        for number, liked in enumerate([*LARGE, "[", "{", ",", '"', "a", "9", "\\", None]):
            choose = preferring(model, liked) if liked else at_random(number)
            most = least + more
            json.loads(answered(model, constraint.copy(most), choose, most))


def test_required_calls_end_from_the_shortest_on(large: Grammars) -> None:
    wanted = Wanted((tool("f", KEYWORDS[8]), tool("long_name", KEYWORDS[0])), Calls.REQUIRED)
    model = large._model
    constraint = large.answer(wanted, MARKED).constraint
    shortest_call = MARKED.write("f", {"op": "num", "v": 0})
    for more in (1, 3, 13, 80):
        for liked in (*LARGE, "<", '"', None):
            choose = preferring(model, liked) if liked else at_random(more)
            most = len(shortest_call) + more
            text = answered(model, constraint.copy(most), choose, most)
            parser = CallParser(MARKED, ["f", "long_name"])
            content, calls = join([*parser.add(text), *parser.finish(is_cut=False)])
            assert not content.strip()
            assert all(isinstance(json.loads(call.arguments), dict | list) for call in calls)
            assert calls


@pytest.mark.parametrize(
    ("pattern", "least", "most"),
    [("^[a-z]{3,10}-[0-9]{4}$", 8, 40), ("(?:a{3}b){2}", 8, 40), ("[\\]]{5}", 5, 30), ("x*", 0, 4),
     ("(a|bcd){2,}", 2, 40), ("\\\\d{2}", 2, 30), ("a{1000}b{1000}", 2000, 5000)],
)  # fmt: skip
def test_what_a_pattern_may_take(pattern: str, least: int, most: int) -> None:
    assert least + 2 <= pattern_cost(pattern) <= most + 2


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_of_a_model_end_and_parse(client: httpx.Client, temperature: float) -> None:
    for number, schema in enumerate(SCHEMAS):
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        for most in (100, 160):
            fields = {"max_tokens": most, "temperature": temperature, "seed": number}
            document = chat(client, response_format=wanted, **fields).json()
            (choice,) = document["choices"]
            assert choice["finish_reason"] == "stop"
            json.loads(choice["message"]["content"])
            assert document["usage"]["completion_tokens"] < most


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from(["string", "object", "#", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["properties", "anyOf", "allOf", "items", "a"]), inner)
    ),
    max_leaves=10,
)
KEYS = [
    "$ref", "$defs", "allOf", "anyOf", "type", "enum", "const", "properties", "required", "pattern",
    "additionalProperties", "patternProperties", "items", "prefixItems", "minItems", "minLength",
    "minimum", "multipleOf", "format",
]  # fmt: skip


@settings(max_examples=examples(300))
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=5))
def test_what_is_no_schema_is_somebody_elses_to_refuse(schema: dict[str, Any]) -> None:
    shortest_of(schema, Endings())


def test_a_thousand_members_are_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends of an object are known as far as they are short; longer ones are members in a row."""
    # It takes 0.05 s, and a collection of all that other tests have left may take more than it has.
    monkeypatch.setattr("tokendance.server.shortest._MOST_S", 60.0)
    names = [f"name{number}" for number in range(1000)]
    properties = {name: {"type": "string"} for name in names}
    endings = Endings()
    shortest = shortest_of({"type": "object", "properties": properties, "required": names}, endings)
    assert shortest is not None
    assert shortest.cost == len(json.dumps(dict.fromkeys(names, "")))
    assert not shortest.is_whole
    assert len(endings.members) == 1000
    assert 0 < sum(len(one.text) for one in endings.rests) < 100_000


def test_what_no_grammar_takes_is_not_measured(client: httpx.Client) -> None:
    """A million brackets would take hours, in the event loop."""
    asked = chat(client, guided_regex="[" * 1_000_000)
    assert asked.status_code == 400
    assert "characters" in asked.json()["error"]["message"]
    asked = chat(client, guided_regex="[" * 10_000)
    assert asked.status_code == 400


def test_lists_of_a_thousand_millions_are_no_work(fake: LoadedModel, grammars: Grammars) -> None:
    """Their end is longer than any number that an array holds."""
    inner: dict[str, Any] = {"type": "null"}
    for _ in range(3):
        inner = {"type": "array", "items": inner, "minItems": 999_999_999}
    schema = {"type": "object", "properties": {"a": inner}}
    constraint = grammars.answer(Wanted(answer=answer_format(schema)), MARKED).constraint
    assert answered(fake, constraint.copy(30), preferring(fake, "{"), 30) == "{}"


def test_who_may_not_begin_keeps_nobody_from_the_rest() -> None:
    endings = Endings()
    words = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert shortest_of({"anyOf": [False, words]}, endings) == Short.of("{}")
    assert not endings.is_endless


@pytest.mark.parametrize("count", [1, 3, 2000])
def test_items_that_are_alike_are_counted(count: int) -> None:
    schema = {"type": "array", "items": {"type": "null"}, "minItems": count}
    shortest = shortest_of(schema, Endings())
    assert shortest is not None
    assert shortest.cost == len(json.dumps([None] * count))
    assert shortest.is_whole == (count < 100)
    assert json.dumps([None] * count).startswith(shortest.text)
