"""What a schema may hold: counted without recursion, and references are followed."""

from typing import Any, Literal, Optional, Union

import pytest
from pydantic import BaseModel

from hostile_schemas import NAMED_LIMITS, ORDINARY, attacks, chain, nested
from tokendance.errors import ConfigError
from tokendance.server.schema_limits import SchemaTooLargeError, check_schemas
from tokendance.server.settings import ServerSettings

SETTINGS = ServerSettings()
ATTACKS = attacks()


class Place(BaseModel):
    street: str
    zip: Optional[str] = None  # noqa: UP045


class Person(BaseModel):
    name: str
    home: Place
    friends: list["Person"] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class Town(BaseModel):
    people: list[Person]
    pets: list[Union[Cat, Dog]]  # noqa: UP007
    tags: dict[str, float]


USUAL: list[dict[str, Any]] = [
    ORDINARY,
    Town.model_json_schema(),
    {"enum": [f"value {i}" for i in range(500)]},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(100)}},
    {"type": "string", "maxLength": 2000},
    # Every kind of value refers to every other.
    {
        "$defs": {
            f"k{i}": {"properties": {f"p{j}": {"$ref": f"#/$defs/k{j}"} for j in range(20)}}
            for i in range(20)
        },
        "$ref": "#/$defs/k0",
    },
]


@pytest.mark.parametrize("schema", USUAL)
def test_usual_schemas_pass(schema: dict[str, Any]) -> None:
    check_schemas([schema], SETTINGS)


@pytest.mark.parametrize(
    ("attack", "option"),
    NAMED_LIMITS.items(),
)
def test_the_limit_is_named(attack: str, option: str) -> None:
    with pytest.raises(SchemaTooLargeError, match=f"at most .*--max-schema-{option} raised"):
        check_schemas([ATTACKS[attack]], SETTINGS)


@pytest.mark.parametrize(
    ("settings", "at_most", "more"),
    [
        ({"max_schema_alternatives": 3}, {"anyOf": [{}, {}], "allOf": [{}]}, {"oneOf": [{}] * 4}),
        ({"max_schema_enum": 2}, {"enum": [1, 2]}, {"items": {"enum": [1, 2, 3]}}),
        ({"max_schema_definitions": 1}, {"$defs": {"a": {}}}, {"definitions": {"a": {}, "b": {}}}),
        (
            {"max_schema_properties": 2},
            {"properties": {"enum": {"type": "null"}, "b": {}}},
            {"properties": {"a": {"patternProperties": {"^b": {}, "^c": {}}}}},
        ),
        ({"max_schema_pattern": 3}, {"pattern": "a+b"}, {"patternProperties": {"abcd": {}}}),
        ({"max_schema_repeats": 9}, {"pattern": "a{9}b{2,}"}, {"pattern": "a{2,10}"}),
        ({"max_schema_repeats": 9}, {"pattern": "{a{9}"}, {"pattern": f"a{{{'9' * 600}}}"}),
        ({"max_schema_size": 100}, {"const": "a" * 80}, {"description": "a" * 100}),
        ({"max_schema_size": 100}, {"enum": [1] * 20}, {"enum": [1] * 60}),
        # References, of all kinds, count as what they name.
        ({"max_schema_depth": 4}, nested({}, 3), nested({}, 4)),
        ({"max_schema_depth": 5}, chain(3, lambda ref: ref), chain(4, lambda ref: ref)),
        (
            {"max_schema_depth": 4},
            {"$defs": {"a": nested({}, 2)}, "$ref": "#/$defs/a"},
            {"$defs": {"a": {"$anchor": "b", **nested({}, 3)}}, "items": {"$ref": "#b"}},
        ),
        (
            {"max_schema_depth": 4},
            {"prefixItems": [nested({}, 2), {"$ref": "#"}]},
            {"prefixItems": [{"$ref": "#/x~1~0%20y/0"}], "x/~ y": [nested({}, 2)]},
        ),
        # What nobody refers to is read, too.
        ({"max_schema_depth": 4}, {"$defs": {"a": nested({}, 3)}}, {"$defs": {"a": nested({}, 4)}}),
    ],
)
def test_what_is_counted(
    settings: dict[str, Any], at_most: dict[str, Any], more: dict[str, Any]
) -> None:
    limits = ServerSettings(**settings)
    check_schemas([at_most], limits)
    (name,) = settings
    with pytest.raises(SchemaTooLargeError, match=f"--{name.replace('_', '-')} raised"):
        check_schemas([more], limits)


def test_all_tools_count_together() -> None:
    limits = ServerSettings(max_schema_enum=5)
    check_schemas([{"enum": [1, 2]}] * 2, limits)
    with pytest.raises(SchemaTooLargeError, match="6 enum values"):
        check_schemas([{"enum": [1, 2]}] * 3, limits)


def test_data_is_no_schema() -> None:
    """A keyword's name in a value, or as the name of a property, is no keyword."""
    limits = ServerSettings(max_schema_enum=1, max_schema_depth=3)
    data = {"const": nested({"enum": [1, 2]}, 5), "default": [{"enum": [1, 2, 3]}]}
    check_schemas([data, {"properties": {"enum": {"type": "string"}}}], limits)


def test_nothing_that_is_no_schema_breaks_it() -> None:
    odd: list[Any] = [3, None, [], "a", [3], {"a": 3}, True]
    keys = ["$defs", "properties", "anyOf", "enum", "pattern", "$ref", "$id", "items", "type"]
    for value in odd:
        check_schemas([dict.fromkeys(keys, value)], SETTINGS)
    for reference in ("#/a/b", "#/enum/7", "#/enum/x", "no#/a", "#no", "", "%", "#/%zz"):
        check_schemas([{"$ref": reference, "enum": [1]}], SETTINGS)


def test_deep_values_are_refused() -> None:
    deep: Any = 1
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(SchemaTooLargeError, match="nested more than 100 deep"):
        check_schemas([{"const": deep}], SETTINGS)


@pytest.mark.parametrize("name", ["max_schema_depth", "schema_processes", "schema_timeout"])
def test_limits_are_checked(name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=name):
        ServerSettings(**wrong)
