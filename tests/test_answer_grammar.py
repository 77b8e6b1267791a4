"""What grammars let an answer be: followed at random, or by whoever wants it to go on for ever."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from enum import Enum
from typing import Any, Literal, Union

import numpy as np
import pytest
from pydantic import BaseModel, Field

from tokendance.models.loader import LoadedModel
from tokendance.server.answer_grammar import Calls, NamedSchema, Wanted
from tokendance.server.call_parser import Call, CallParser, join
from tokendance.server.errors import ApiError
from tokendance.server.grammar import Fitted, Grammars
from tokendance.server.schema_fit import fit_schema
from tokendance.server.settings import ServerSettings
from tokendance.server.tool_format import ToolFormat

MARKED = ToolFormat()
BARE = ToolFormat("", "", "parameters")
ANY: dict[str, Any] = {}

Choose = Callable[[Sequence[int], bytes], int]


@pytest.fixture(scope="module")
def grammars(fake: LoadedModel) -> Iterator[Grammars]:
    with closing(Grammars(fake, ServerSettings())) as made:
        made.start()
        yield made


def tool(name: str, schema: dict[str, Any], *, strict: bool = False) -> NamedSchema:
    return NamedSchema(name, schema, strict=strict, param="tools")


def answer_format(schema: dict[str, Any], *, strict: bool = False) -> NamedSchema:
    return NamedSchema("response_format", schema, strict=strict, param="response_format")


def at_random(seed: int) -> Choose:
    chooser = random.Random(seed)
    return lambda allowed, _: chooser.choice(allowed)


def following(fake: LoadedModel, wanted: str) -> Choose:
    """Say a text as far as it is allowed, and then whatever is."""
    end = min(fake.stop_ids)

    def choose(allowed: Sequence[int], so_far: bytes) -> int:
        rest = wanted.encode()[len(so_far) :]
        if not rest:
            return end if end in allowed else allowed[0]
        token = fake.tokenizer.convert_tokens_to_ids(fake.tokenizer.tokenize(chr(rest[0])))[0]
        return token if token in allowed else allowed[0]

    return choose


def preferring(fake: LoadedModel, characters: str) -> Choose:
    """Say these characters wherever they are allowed, and end only if nothing else is."""
    wanted = fake.tokenizer.convert_tokens_to_ids(fake.tokenizer.tokenize(characters))

    def choose(allowed: Sequence[int], _: bytes) -> int:
        liked = [token for token in wanted if token in allowed]
        others = [token for token in allowed if token not in fake.stop_ids]
        return (liked or others or list(allowed))[0]

    return choose


def follow(fake: LoadedModel, fitted: Fitted, choose: Choose, most: int = 3000) -> str | None:
    """The answer that is chosen token by token; None if it does not end."""
    constraint = fitted.constraint.copy()
    data = b""
    for _ in range(most):
        token = choose(np.flatnonzero(~constraint.forbidden()).tolist(), data)
        if token in fake.stop_ids:
            return data.decode(errors="replace")
        constraint.accept(token)
        assert constraint.failure() is None
        data += constraint.vocabulary.spell(token)
    return None


def calls_in(text: str, wanted: Wanted, tool_format: ToolFormat) -> tuple[str, list[Call]]:
    parser = CallParser(tool_format, [one.name for one in wanted.tools])
    return join([*parser.add(text), *parser.finish(is_cut=False)])


class Mood(Enum):
    GOOD = "good"
    BAD = "very bad"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    mood: Mood


class Node(BaseModel):
    mood: Mood
    below: list["Node"] = Field(max_length=1)


class Visit(BaseModel):
    mood: Mood
    pet: Union[Cat, Dog] = Field(discriminator="kind")  # noqa: UP007
    tree: Node


ALL_OF = {
    "type": "object",
    "properties": {"mood": {"allOf": [{"$ref": "#/definitions/Mood"}], "default": "good"}},
    "required": ["mood"],
    "additionalProperties": False,
    "definitions": {"Mood": {"enum": ["good", "very bad"]}},
}


def closed(schema: Any) -> Any:
    """A schema whose objects have no fields that it does not name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    return found | {"additionalProperties": False} if "properties" in found else found


@pytest.mark.parametrize("tool_format", [MARKED, BARE])
def test_references_of_each_tool_are_its_own(
    fake: LoadedModel, grammars: Grammars, tool_format: ToolFormat
) -> None:
    """Names of definitions may be the same, and what they are may not."""
    schemas = {
        "visit": closed(Visit.model_json_schema()),
        "grow": closed(Node.model_json_schema()),
        "feel": ALL_OF,
        "sing": {**ALL_OF, "definitions": {"Mood": {"enum": ["loud"]}}},
    }
    feelings, songs = [{"mood": "good"}, {"mood": "very bad"}], [{"mood": "loud"}]
    checks: dict[str, Callable[[Any], Any]] = {
        "visit": Visit.model_validate,
        "grow": Node.model_validate,
        "feel": feelings.index,
        "sing": songs.index,
    }
    wanted = Wanted(
        tuple(tool(name, schema) for name, schema in schemas.items()), Calls.REQUIRED, several=False
    )
    fitted = grammars.answer(wanted, tool_format)
    assert fitted.unheld == ()
    seen = set()
    for name in schemas:
        start = tool_format.begin + tool_format.head(name)
        for seed in range(3):
            chooser = at_random(seed)

            def choose(allowed: Sequence[int], so_far: bytes) -> int:
                if len(so_far) < len(start):  # noqa: B023
                    return following(fake, start)(allowed, so_far)  # noqa: B023
                return chooser(allowed, so_far)  # noqa: B023

            text = follow(fake, fitted, choose)
            assert text is not None
            _, (call,) = calls_in(text, wanted, tool_format)
            assert call.name == name
            checks[name](json.loads(call.arguments))
            seen.add(call.arguments)
    assert len(seen) > 6


WALK = tool("walk", {
    "type": "object", "properties": {"to": {"enum": ["pub", "park"]}}, "required": ["to"],
    "additionalProperties": False,
})  # fmt: skip
PLACE = {"enum": ["here", "there"]}


@pytest.mark.parametrize("tool_format", [MARKED, BARE])
def test_calls_or_what_the_format_says(
    fake: LoadedModel, grammars: Grammars, tool_format: ToolFormat
) -> None:
    wanted = Wanted((WALK,), Calls.ALLOWED, several=True, answer=answer_format(PLACE))
    fitted = grammars.answer(wanted, tool_format)
    call = tool_format.write("walk", {"to": "park"})
    for text in (call, '"there"', call + "\n" + tool_format.write("walk", {"to": "pub"})):
        is_several = "\n" + tool_format.begin in text[1:]
        if is_several and not tool_format.begin:
            continue
        assert follow(fake, fitted, following(fake, text)) == text
    for seed in range(20):
        text = follow(fake, fitted, at_random(seed)) or ""
        said, calls = calls_in(text, wanted, tool_format)
        assert (said == "") == bool(calls)
        assert calls or json.loads(said) in ("here", "there")


@pytest.mark.parametrize("tool_format", [MARKED, BARE])
@pytest.mark.parametrize("calls", list(Calls))
def test_one_call_is_one(
    fake: LoadedModel, grammars: Grammars, tool_format: ToolFormat, calls: Calls
) -> None:
    wanted = Wanted((WALK,), calls, several=False)
    fitted = grammars.answer(wanted, tool_format)
    call = tool_format.write("walk", {"to": "park"})
    again = tool_format.write("walk", {"to": "pub"})
    assert follow(fake, fitted, following(fake, f"{call}\n{again}\nand more")) == call


def test_a_call_that_repeats_the_one_before_is_the_last(
    fake: LoadedModel, grammars: Grammars
) -> None:
    call = MARKED.write("walk", {"to": "park"})
    for calls in Calls:
        fitted = grammars.answer(Wanted((WALK,), calls, several=True), MARKED)
        assert follow(
            fake, fitted, following(fake, f"{call}\n" * 9)
        ) == f"{call}\n{call}".removesuffix(MARKED.end)


NUMBERS = [ANY, {"type": "number"}, {"type": "integer"}, {"items": {"type": "number"}}]


@pytest.mark.parametrize("schema", NUMBERS)
@pytest.mark.parametrize("liked", ["9", "-9.", "9e"])
def test_numbers_end(
    fake: LoadedModel, grammars: Grammars, schema: dict[str, Any], liked: str
) -> None:
    """Digits before the point, behind it and of the exponent, for a model that likes digits."""
    one = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    arguments = MARKED.begin + MARKED.head("f") + '{"a": '
    bracket = "[" if "items" in schema else ""
    for wanted, start in (
        (Wanted(answer=answer_format(schema)), bracket),
        (Wanted((tool("f", one),), Calls.ALLOWED), f"I go {arguments}{bracket}"),
    ):
        prefer, begin = preferring(fake, liked[::-1]), following(fake, start)

        def choose(
            allowed: Sequence[int], so_far: bytes, prefer: Choose = prefer, begin: Choose = begin,
            length: int = len(start),
        ) -> int:  # fmt: skip
            return (begin if len(so_far) < length else prefer)(allowed, so_far)

        constraint = grammars.answer(wanted, MARKED).constraint.copy()
        data = b""
        for _ in range(len(start) + 60):
            token = choose(np.flatnonzero(~constraint.forbidden()).tolist(), data)
            if token in fake.stop_ids:
                break
            constraint.accept(token)
            data += constraint.vocabulary.spell(token)
        found = data.decode()[len(start) :]
        runs = re.findall("[0-9]+", re.sub('"[^"]*"?', "", found))
        assert 2 <= max(map(len, runs)) <= 20, found


def test_a_number_that_has_to_be_long_is(fake: LoadedModel, grammars: Grammars) -> None:
    digits = answer_format({"type": "string", "pattern": "^[0-9]{300}$"})
    text = follow(fake, grammars.answer(Wanted(answer=digits), MARKED), at_random(0))
    assert text is not None
    assert len(text) == 302


@pytest.mark.parametrize("blank", [" ", "\\n", "\\t"])
def test_blanks_end(fake: LoadedModel, grammars: Grammars, blank: str) -> None:
    fitted = grammars.answer(Wanted(answer=answer_format({"type": "string"})), MARKED)
    constraint = fitted.constraint.copy()
    wanted = '"' + blank * 400
    said = 0
    for character in wanted:
        (token,) = fake.tokenizer.convert_tokens_to_ids(fake.tokenizer.tokenize(character))
        if constraint.forbidden()[token]:
            break
        constraint.accept(token)
        said += 1
    assert 128 <= said // len(blank) <= 130
    spaces = answer_format({"const": " " * 300})
    text = follow(fake, grammars.answer(Wanted(answer=spaces), MARKED), at_random(0))
    assert text == json.dumps(" " * 300)


UNUSUAL: dict[str, dict[str, Any]] = {
    "format 'path'": {"type": "string", "format": "path"},
    "format 'binary'": {"type": "string", "format": "binary"},
    "uniqueItems": {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
    "not": {"enum": ["a", "b"], "not": {"const": "a"}},
    "if": {"enum": ["a", "b"], "if": {"const": "a"}, "then": {"const": "b"}},
    "contains": {"type": "array", "items": {"enum": ["a"]}, "contains": {"const": "a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "pattern": {"type": "string", "pattern": "^(?=.*a)[ab]{3}$"},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "minProperties": {"type": "object", "minProperties": 1},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "$ref 'https://a.b/c'": {"$ref": "https://a.b/c"},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "type 'any'": {"type": "any"},
    "patternProperties": {"type": "object", "patternProperties": {"(?!a)": {"type": "string"}}},
    "oneOf": {"oneOf": [{"type": "integer", "maximum": 9}, {"type": "number", "maximum": 9}]},
    # What nobody has foreseen.
    "all parameters": {"type": "array", "minItems": "2"},
}


@pytest.mark.parametrize("keyword", UNUSUAL)
def test_an_unusual_keyword_is_left_to_the_model(
    fake: LoadedModel, grammars: Grammars, keyword: str
) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good"]}, "odd": UNUSUAL[keyword]},
        "required": ["mood", "odd"],
    }
    tools = (WALK, tool("odd_one", schema))
    fitted = grammars.answer(Wanted(tools, Calls.REQUIRED), MARKED)
    assert any(one.startswith(f"odd_one: {keyword}") for one in fitted.unheld), fitted.unheld
    assert all(one.startswith("odd_one") for one in fitted.unheld)
    # The rest is held.
    start = MARKED.begin + MARKED.head("odd_one")
    if keyword != "all parameters":
        start += '{"mood": '
        text = follow(fake, fitted, following(fake, start + '"x'), most=len(start) + 3) or ""
        constraint = fitted.constraint.copy()
        for byte in (start + '"').encode():
            (token,) = fake.tokenizer.convert_tokens_to_ids(fake.tokenizer.tokenize(chr(byte)))
            assert not constraint.forbidden()[token]
            constraint.accept(token)
        allowed = np.flatnonzero(~constraint.forbidden()).tolist()
        assert [constraint.vocabulary.spell(token) for token in allowed] == [b"g"], text
    strict = (WALK, tool("odd_one", schema, strict=True))
    with pytest.raises(ApiError) as refused:
        grammars.answer(Wanted(strict, Calls.REQUIRED), MARKED)
    assert refused.value.status == 400
    assert "odd_one" in str(refused.value)
    if keyword not in ("all parameters",):
        assert keyword.split()[0] in str(refused.value)
        with pytest.raises(ApiError) as refused:
            grammars.answer(Wanted(answer=answer_format(schema, strict=True)), MARKED)
        assert keyword.split()[0] in str(refused.value)
        assert grammars.answer(Wanted(answer=answer_format(schema)), MARKED).unheld


def test_what_says_nothing_is_left_out_without_a_word(grammars: Grammars) -> None:
    schema = {
        "type": "OBJECT",
        "properties": {
            "a": {"type": ["STRING", "null"], "format": None, "pattern": None, "enum": None},
            "b": {"type": "array", "uniqueItems": False, "minItems": None, "items": None},
            "c": {"type": "integer", "format": "int64", "default": None},
            "d": {"const": None},
            "not": {"type": "string"},
        },
        "required": None,
        "dependentRequired": {},
        "minProperties": 0,
        "unevaluatedProperties": True,
        "propertyNames": {"type": "string"},
        "$defs": None,
    }
    for strict in (True, False):
        wanted = Wanted((tool("f", schema, strict=strict),), Calls.REQUIRED)
        assert grammars.answer(wanted, MARKED).unheld == ()
    fitted, _ = fit_schema(schema)
    assert fitted["properties"]["d"] == {"const": None}
    assert fitted["properties"]["not"] == {"type": "string"}
    assert fitted["type"] == "object"


def test_data_is_no_schema() -> None:
    schema = {"enum": [{"not": None, "format": "path"}], "default": {"uniqueItems": True}}
    assert fit_schema(schema) == (schema, [])


def test_thirty_tools_with_long_texts(grammars: Grammars) -> None:
    text = {"type": "string", "maxLength": 2000}
    schema = {"type": "object", "properties": {"a": text, "b": text}, "required": ["a", "b"]}
    tools = tuple(tool(f"tool_{number}", schema) for number in range(30))
    for calls in Calls:
        assert grammars.answer(Wanted(tools, calls), MARKED).unheld == ()
