"""Schemas, and bodies, that once ended the server or held it up."""

from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

ORDINARY: Schema = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}},
    "required": ["mood"],
    "additionalProperties": False,
}


def chain(length: int, link: Callable[[Schema], Schema]) -> Schema:
    """Definitions, each made by `link` of a reference to the next."""
    defs = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$defs": {**defs, f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def nested(schema: Schema, levels: int) -> Schema:
    """Lists of lists of what a schema says."""
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def attacks() -> dict[str, Schema]:
    """Schemas by what is wrong with them."""
    return {
        "definitions": chain(1300, lambda ref: {"items": ref}),
        "depth": chain(40, lambda ref: nested(ref, 50)),
        "all of": chain(40_000, lambda ref: {"allOf": [ref]}),
        "references": chain(2500, lambda ref: ref),
        "pattern": {"type": "string", "pattern": f"^{'a?' * 20_000}{'a' * 20_000}$"},
        "enum": {"enum": [f"value {i:08d} of an enum" for i in range(200_000)]},
        "properties": {"properties": {f"property {i}": {"type": "string"} for i in range(5000)}},
        # These pass what is counted, and die where they are tried.
        "memory": {"type": "integer", "multipleOf": 999_983},
        "fuel": {"type": "string", "pattern": "^(a?){1000}a{1000}$"},
        "optional": {"properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
        "endless": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        "doubling": chain(40, lambda ref: {"allOf": [ref, ref]}),
        "numbers": {"enum": [0.1] * 1_000_000},
    }


NAMED_LIMITS = {
    "definitions": "definitions",
    "depth": "depth",
    "all of": "size",
    "references": "definitions",
    "pattern": "pattern",
    "enum": "size",
    "numbers": "size",
    "properties": "properties",
}
"""Of some attacks, which of `--max-schema-*` refuses them."""


def as_format(schema: Schema) -> Schema:
    """As `response_format`."""
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return {"response_format": wanted}


def as_tool(schema: Schema) -> Schema:
    """As parameters of a tool."""
    function = {"name": "f", "parameters": schema}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def bodies() -> dict[str, bytes]:
    """Bodies that are nested deeply, in places where anything may be."""
    start = '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], '
    found = {}
    for levels in (90, 500, 5_000, 200_000):
        deep = '{"a":' * min(levels, 100_000) + "1" + "}" * min(levels, 100_000)
        lists = "[" * levels + "]" * levels
        wanted = '"response_format": {"type": "json_schema", "json_schema": {"schema": %s}}}'
        tools = '"tools": [{"type": "function", "function": {"name": "f", "parameters": %s}}]}'
        found[f"schema {levels}"] = start + wanted % deep
        found[f"tools {levels}"] = start + tools % deep
        found[f"const {levels}"] = start + wanted % f'{{"const": {lists}}}'
        found[f"metadata {levels}"] = start + f'"metadata": {{"a": {lists}}}}}'
        found[f"messages {levels}"] = f'{{"model": "tiny", "messages": {lists}}}'
    return {name: text.encode() for name, text in found.items()}
