"""Makes schemas fit what grammars can hold: what they cannot is taken out, and named.

llguidance refuses a schema for a single keyword that it does not know. Most of these say little of
what an answer looks like (`format: path`), and the rest of the schema is worth having. What is
neutral (`uniqueItems: false`, null) is taken out without a word.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokendance.server.schema_limits import DATA, DEFINITIONS, PROPERTIES, names_in, resolve

# Keywords that no grammar holds, and what each says if it says nothing.
_UNHELD: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "not": (False,),
    "if": (True, {}),
    "then": (True, {}),
    "else": (True, {}),
    "contains": (),
    "minContains": (0,),
    "maxContains": (),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "$dynamicRef": (),
    "$recursiveRef": (),
    "$dynamicAnchor": (),
    "$recursiveAnchor": (True, False),
}
# Names for a place alone: without what refers to them they say nothing.
_SILENT = {"$dynamicAnchor", "$recursiveAnchor"}
_FORMATS = {
    "date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
    "unknown",
}  # fmt: skip
_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
# Of regular expressions: what looks around, and what refers back.
_LOOKS_AROUND = re.compile(
    r"(?<!\\)(?:\\\\)*(?:\(\?(?:=|!|<=|<!|>)|\(\?P=|\\(?:[1-9]|[bBAZzG]|k[<{']))"
)


@dataclass(frozen=True, slots=True)
class Unheld:
    """A keyword that a grammar does not hold.

    Attributes:
        keyword: with its value where that is short.
        place: the properties that lead to it; empty at the top.
    """

    keyword: str
    place: tuple[str, ...]

    def __str__(self) -> str:
        return self.keyword if not self.place else f"{self.keyword} of {'.'.join(self.place)!r}"


def fit_schema(schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[Unheld]]:
    """Take out of a schema what a grammar cannot hold.

    Args:
        schema: within the limits of `schema_limits`, which bound how deep it is.

    Returns:
        The rest of it, which allows all that the schema does, and what is no longer in it.
    """
    return _Fitting(schema).result()


class _Fitting:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._names = names_in(root)
        self._unheld: list[Unheld] = []

    def result(self) -> tuple[dict[str, Any], list[Unheld]]:
        fitted = self._fit(self._root, ())
        return fitted, self._unheld

    def _fit_any(self, value: Any, place: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return self._fit(value, place)
        if isinstance(value, list):
            return [self._fit_any(one, place) for one in value]
        return value

    def _fit(self, schema: Mapping[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
        fitted: dict[str, Any] = {}
        for key, value in schema.items():
            if value is None and key not in ("const", "default"):
                continue  # as if it were not there
            if reason := self._reason(schema, key, value):
                if reason != "nothing":
                    self._unheld.append(Unheld(reason, place))
            elif key == "type":
                fitted[key] = _lower(value)
            elif key == "patternProperties" and isinstance(value, dict):
                fitted[key] = dict(self._fit_patterns(value, place))
            elif key in PROPERTIES | DEFINITIONS and isinstance(value, dict):
                fitted[key] = {
                    name: self._fit_any(one, (*place, name)) for name, one in value.items()
                }
            elif key in DATA:
                fitted[key] = value
            else:
                fitted[key] = self._fit_any(value, place)
        return fitted

    def _fit_patterns(
        self, patterns: Mapping[str, Any], place: tuple[str, ...]
    ) -> Iterator[tuple[str, Any]]:
        for pattern, schema in patterns.items():
            if _LOOKS_AROUND.search(pattern):
                self._unheld.append(Unheld(f"patternProperties {pattern[:40]!r}", place))
            else:
                yield pattern, self._fit_any(schema, (*place, pattern))

    def _reason(self, schema: Mapping[str, Any], key: str, value: Any) -> str | None:
        """What cannot be held of a keyword; "nothing" if it says nothing; None if it is held."""
        if key in _UNHELD:
            says_nothing = key in _SILENT or any(
                value is one or value == one for one in _UNHELD[key]
            )
            return "nothing" if says_nothing else key
        match key:
            case "format" if isinstance(value, str):
                return (
                    None if value in _FORMATS or not _is_text(schema) else f"format {value[:40]!r}"
                )
            case "pattern" if isinstance(value, str):
                return f"pattern {value[:40]!r}" if _LOOKS_AROUND.search(value) else None
            case "type" if isinstance(value, str):
                return None if value.lower() in _TYPES else f"type {value[:40]!r}"
            case "$ref" if isinstance(value, str):
                document = value.partition("#")[0]
                is_here = not document or document in self._names
                target = resolve(value, self._root, self._names) if is_here else None
                return None if target is not None else f"$ref {value[:40]!r}"
            case "minProperties" | "maxProperties":
                if key == "minProperties" and value == 0:
                    return "nothing"
                listed, required = schema.get("properties"), schema.get("required")
                all_required = isinstance(required, list) and isinstance(listed, dict)
                is_held = all_required and set(listed or ()) <= set(map(str, required or ()))
                return None if is_held else key
        return None


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a schema may allow strings, of which formats say something."""
    kinds = schema.get("type", "string")
    return "string" in [_lower(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])]


def _lower(kind: Any) -> Any:
    """A type by its name in JSON Schema; some clients write it in capitals."""
    if isinstance(kind, list):
        return [_lower(one) for one in kind]
    if isinstance(kind, str) and kind.lower() in _TYPES:
        return kind.lower()
    return kind
