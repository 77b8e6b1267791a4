"""What a schema may hold before anything is compiled of it.

A schema is small, and what a compiler makes of it is not: it follows references, and unrolls
repetitions. All that is counted here takes time in proportion to the schema, whatever it says, and
none of it recurses.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tokendance.server.settings import ServerSettings
from tokendance.units import format_bytes

Schema = Mapping[str, Any]

# Keywords whose values are schemas by names of their own, and those whose values are no schemas.
DEFINITIONS = {"$defs", "definitions"}
PROPERTIES = {"properties", "patternProperties", "dependentSchemas"}
DATA = {"enum", "const", "default", "examples", "example", "required", "type"}
_ALTERNATIVES = ("anyOf", "oneOf", "allOf")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_PATTERNS = ("pattern", "whitespace_pattern")
_NAMES = ("$anchor", "$dynamicAnchor", "$id", "id")

# Values within each other as JSON; llguidance reads no more than 127.
_MOST_NESTED = 100
_REPEATS = re.compile(r"\{(\d+)(?:,(\d*))?\}")


class SchemaTooLargeError(Exception):
    """A schema holds more than is taken; the message says of what, how much is, and what to do."""


@dataclass(slots=True)
class _Counts:
    definitions: int = 0
    alternatives: int = 0
    enum_values: int = 0
    properties: int = 0
    patterns: list[str] = field(default_factory=list)


def check_schemas(schemas: Sequence[Schema], settings: ServerSettings) -> None:
    """Refuse schemas that hold more than one request may have.

    Args:
        schemas: of one request. References in each are its own; all else is counted together.
        settings: with the limits.

    Raises:
        SchemaTooLargeError: naming the first limit that is exceeded.
    """
    _check_size(schemas, settings.max_schema_bytes)
    counts = _Counts()
    for schema in schemas:
        _count(schema, counts)
    patterns = counts.patterns
    for number, most, what, option in (
        (counts.definitions, settings.max_schema_definitions, "definitions", "definitions"),
        (counts.alternatives, settings.max_schema_alternatives,
         "alternatives in anyOf, oneOf and allOf", "alternatives"),
        (counts.enum_values, settings.max_schema_enum, "enum values", "enum"),
        (counts.properties, settings.max_schema_properties, "properties", "properties"),
        (max(map(len, patterns), default=0), settings.max_schema_pattern,
         "characters in a pattern", "pattern"),
        (max(map(_most_repeats, patterns), default=0), settings.max_schema_repeats,
         "repetitions of a part of a pattern", "repeats"),
        (max(map(_depth, schemas), default=0), settings.max_schema_depth,
         "levels, references followed", "depth"),
    ):  # fmt: skip
        if number > most:
            raise _too_large(f"{number} {what}", str(most), option)


def _too_large(has: str, most: str, option: str) -> SchemaTooLargeError:
    return SchemaTooLargeError(
        f"The schema has {has}, and at most {most} are taken. Simplify it, or have the server's "
        f"--max-schema-{option} raised."
    )


def _check_size(schemas: Sequence[Schema], most: int) -> None:
    """Refuse what is too large or nested too deeply to be written as JSON; looks at no more."""
    num_bytes = 0
    left: list[tuple[Any, int]] = [(schema, 1) for schema in schemas]
    while left:
        value, level = left.pop()
        if isinstance(value, str):
            num_bytes += len(value) + 2
        elif isinstance(value, dict | list):
            if level > _MOST_NESTED:
                raise SchemaTooLargeError(
                    f"The schema has values nested more than {_MOST_NESTED} deep. Give parts of it "
                    "names in $defs, and refer to them."
                )
            if isinstance(value, dict):
                num_bytes += sum(map(len, value)) + 6 * len(value)
                value = value.values()
            # Each has a byte at least: so many are too large before they are looked at.
            num_bytes += 2 + 2 * len(value)
            if num_bytes <= most:
                left.extend((one, level + 1) for one in value)
        else:
            num_bytes += len(str(value)) if value is not None else 4
        if num_bytes > most:
            raise _too_large(f"more than {format_bytes(most)}", format_bytes(most), "size")


def _count(schema: Schema, counts: _Counts) -> None:
    left: list[Schema] = [schema]
    while left:
        one = left.pop()
        left.extend(_parts(one, definitions=True))
        for key in _ALTERNATIVES:
            counts.alternatives += len(_as_list(one.get(key)))
        counts.enum_values += len(_as_list(one.get("enum")))
        for key in DEFINITIONS:
            counts.definitions += len(_as_dict(one.get(key)))
        for key in PROPERTIES:
            counts.properties += len(_as_dict(one.get(key)))
        counts.patterns += _as_dict(one.get("patternProperties"))
        counts.patterns += [text for key in _PATTERNS if isinstance(text := one.get(key), str)]


def _most_repeats(pattern: str) -> int:
    """The largest number in braces, as in `a{2,30}`."""
    numbers = (int(one[-9:]) for match in _REPEATS.findall(pattern) for one in match if one)
    return max(numbers, default=0)


def _parts(schema: Schema, *, definitions: bool) -> Iterator[Schema]:
    """Schemas right inside a schema, in order; its definitions among them or not."""
    for key, value in schema.items():
        if key in DATA or (key in DEFINITIONS and not definitions):
            continue
        if key in PROPERTIES or key in DEFINITIONS:
            yield from _dicts(_as_dict(value).values())
        else:
            yield from _dicts(value if isinstance(value, list) else [value])


def _dicts(values: Iterable[Any]) -> Iterator[Schema]:
    return (value for value in values if isinstance(value, dict))


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# -- depth through references -----------------------------------------------------------------


def _depth(root: Schema) -> int:
    """Levels that a compiler goes down at most, if it enters each schema once.

    Schemas may be recursive. So this walks as a compiler does, down each reference and into each
    schema the first time that it comes by, and notes how deep it stood.
    """
    names = names_in(root)
    entered: set[int] = set()
    deepest = 0
    # What is not referred to is compiled by nobody, but read.
    for start in (root, *_all_definitions(root)):
        if id(start) in entered:
            continue
        entered.add(id(start))
        path = [_next_schemas(start, root, names)]
        while path:
            deepest = max(deepest, len(path))
            below = next((one for one in path[-1] if id(one) not in entered), None)
            if below is None:
                path.pop()
            else:
                entered.add(id(below))
                path.append(_next_schemas(below, root, names))
    return deepest


def _next_schemas(schema: Schema, root: Schema, names: Mapping[str, Schema]) -> Iterator[Schema]:
    """Schemas that a schema refers to, and that are in it."""
    for key in _REFERENCES:
        target = resolve(schema.get(key), root, names)
        if target is not None:
            yield target
    yield from _parts(schema, definitions=False)


def _all_definitions(root: Schema) -> Iterator[Schema]:
    for schema in _walk(root):
        for key in DEFINITIONS:
            yield from _dicts(_as_dict(schema.get(key)).values())


def _walk(root: Schema) -> Iterator[Schema]:
    left = [root]
    while left:
        schema = left.pop()
        yield schema
        left.extend(_parts(schema, definitions=True))


def names_in(root: Schema) -> dict[str, Schema]:
    """Schemas that have a name of their own: an anchor or an id."""
    return {
        name.removeprefix("#"): schema
        for schema in _walk(root)
        for key in _NAMES
        if isinstance(name := schema.get(key), str)
    }


def resolve(reference: Any, root: Schema, names: Mapping[str, Schema]) -> Schema | None:
    """The schema that is referred to; None where there is none, of which the compiler complains."""
    if not isinstance(reference, str):
        return None
    document, _, fragment = reference.partition("#")
    found: Any = names.get(document, root) if document else root
    if fragment and not fragment.startswith("/"):
        found = names.get(fragment)
    elif fragment:
        for step in unquote(fragment[1:]).split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                index = int(step) if re.fullmatch("[0-9]{1,6}", step) else len(found)
                found = found[index] if index < len(found) else None
            else:
                found = _as_dict(found).get(step)
    return found if isinstance(found, dict) else None
