"""The shortest JSON that a schema allows, and what more an answer may begin that has to be ended.

Both come of the schema alone. The shortest text of each of its parts is found by going over them
until none gets shorter: so it is where schemas refer to themselves, too. A grammar may say more
than is read here; then a text is not what it allows, which whoever uses it finds out.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from tokendance.server.schema_limits import DATA, PROPERTIES, names_in, resolve
from tokendance.server.short_texts import MOST_TEXT, Short, join, pattern_cost

Schema = Mapping[str, Any]

_TYPES = ("number", "string", "array", "object", "null", "boolean")
# Keywords that say what a value is, and in what ways one may be put together that are looked at.
_SAYING = {
    "$ref", "allOf", "anyOf", "oneOf", "type", "enum", "const", "properties", "required",
    "additionalProperties", "patternProperties", "items", "prefixItems", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf",
}  # fmt: skip
_MOST_ALTERNATIVES = 256
# Rounds over all parts of a schema: one is enough for each level that a text goes down.
_MOST_ROUNDS = 128
# Seconds for a schema; what is not known by then is taken to have no end.
_MOST_S = 0.2
# Bytes of a number with limits, and of a text with a format.
_LIMITED_NUMBER = 24
_FORMATTED = 48
_ORDER = attrgetter("order")
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


@dataclass(slots=True)
class Endings:
    """What answers may be ended with, and by how much an end may grow.

    Attributes:
        values: whole values, each as short as it can be.
        rests: ends of objects from a member on, likewise.
        members: a name and its value.
        choices: what one choice may begin, in place of something shorter.
        has_patterns: whether a text has to match something.
        is_endless: whether a choice may begin what has no end.
    """

    values: set[Short] = field(default_factory=set)
    rests: set[Short] = field(default_factory=set)
    members: set[Short] = field(default_factory=set)
    choices: set[Short] = field(default_factory=set)
    has_patterns: bool = False
    is_endless: bool = False


def shortest_of(schema: Schema, endings: Endings) -> Short | None:
    """The shortest text of a schema; None if it has none. Adds what ends its parts.

    Args:
        schema: within the limits of `schema_limits`.
        endings: of all schemas of an answer.
    """
    return _Shortening(schema).result(endings)


class _Shortening:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._names = names_in(root)
        self._nodes = list(self._reached())[::-1]  # inner ones first
        self._best: dict[int, Short] = {}
        self._ways: dict[int, list[list[Schema]]] = {}
        self._num_looks = 0

    def result(self, endings: Endings) -> Short | None:
        # What it computes, not what it waits: others keep the processor, too.
        until_s = time.thread_time() + _MOST_S

        def nodes() -> Iterator[Schema]:
            for node in self._nodes:
                if time.thread_time() > until_s:
                    endings.is_endless = True
                    return
                yield node

        for _ in range(_MOST_ROUNDS):
            if sum(map(self._improve, nodes())) == 0:
                break
        for node in nodes():
            self._note(node, endings)
        return self._of(self._root)

    def _reached(self) -> Iterator[Schema]:
        """The schema and all that it is made of, outer ones first."""
        left: list[Any] = [self._root]
        found: set[int] = set()
        while left:
            one = left.pop()
            if isinstance(one, list):
                left.extend(one)
            elif isinstance(one, dict) and id(one) not in found:
                found.add(id(one))
                yield one
                left.append(resolve(one.get("$ref"), self._root, self._names))
                for key, value in one.items():
                    if key in PROPERTIES and isinstance(value, dict):
                        left.extend(value.values())
                    elif key in _SAYING - DATA:
                        left.append(value)

    def _improve(self, node: Schema) -> bool:
        """Look for a shorter text of a schema, by those that are known; whether there is one."""
        found = min(self._shortest(node), key=_ORDER, default=None)
        known = self._best.get(id(node))
        if found is None or (known is not None and known.cost <= found.cost):
            return False
        self._best[id(node)] = found
        return True

    def _shortest(self, node: Schema) -> list[Short]:
        """The shortest text of each alternative of a schema, as far as they are known."""
        targets = self._targets(node)
        if targets is None:
            return [one for parts in self._alternatives(node) for one in self._kinds(parts)]
        return [one for one in map(self._of, targets) if one is not None]

    def _targets(self, node: Schema) -> list[Any] | None:
        """Schemas one of which a schema stands for; None if it says more than that."""
        says = [key for key in node if key in _SAYING]
        if says == ["$ref"] and isinstance(node["$ref"], str):
            target = resolve(node["$ref"], self._root, self._names)
            return [] if target is None else [target]
        if says in (["anyOf"], ["oneOf"]) or (says == ["allOf"] and len(_list(node, "allOf")) == 1):
            return [one for one in _list(node, says[0]) if one is not False]
        return None

    def _of(self, schema: Any) -> Short | None:
        if isinstance(schema, dict):
            return self._best.get(id(schema))
        return None if schema is False else Short.of("0")

    def _alternatives(self, schema: Schema) -> list[list[Schema]]:
        """Ways to fit a schema: each of them is schemas that all have to be fitted."""
        if id(schema) not in self._ways:
            self._num_looks = 0
            self._ways[id(schema)] = self._expand(schema, ())
        return self._ways[id(schema)]

    def _expand(self, schema: Any, above: tuple[int, ...]) -> list[list[Schema]]:
        """Ways to fit a schema; none that refers to one of those above it, by their ids."""
        self._num_looks += 1
        if not isinstance(schema, dict):
            return [] if schema is False else [[{}]]
        if id(schema) in above or self._num_looks > _MOST_ALTERNATIVES:
            return []
        above = (*above, id(schema))
        needed: list[list[list[Schema]]] = []
        if isinstance(schema.get("$ref"), str):
            target = resolve(schema["$ref"], self._root, self._names)
            needed.append([] if target is None else self._expand(target, above))
        needed += [self._expand(one, above) for one in _list(schema, "allOf")]
        for key in ("anyOf", "oneOf"):
            if several := _list(schema, key):
                needed.append([way for one in several for way in self._expand(one, above)])
        ways = itertools.islice(itertools.product(*needed), _MOST_ALTERNATIVES)
        return [[schema, *itertools.chain.from_iterable(way)] for way in ways]

    def _kinds(self, parts: Sequence[Schema]) -> list[Short]:
        """The shortest text of each type that schemas allow together; those that have one."""
        values = _values(parts)
        if values is not None:
            return [min(values, key=_ORDER)] if values else []
        found = [self._kind(kind, parts) for kind in _types(parts)]
        return [one for one in found if one is not None]

    def _kind(self, kind: str, parts: Sequence[Schema]) -> Short | None:
        match kind:
            case "string":
                return _string(parts)
            case "number":
                return _number(parts)
            case "array":
                return self._array(parts)
            case "object":
                members = self._members(parts)
                return None if members is None else join(["{", *_with_commas(members), "}"])
        return Short.of("null" if kind == "null" else "true")

    def _array(self, parts: Sequence[Schema]) -> Short | None:
        least = max((_int(part, "minItems") for part in parts), default=0)
        items: list[Short] = []
        for number in range(min(least, _num_items(parts))):
            one = self._of(_item(parts, number))
            if one is None:
                return None
            items.append(one)
        if least > len(items):
            items.append(_repeated(items[-1], least - len(items)))
        return join(["[", *_with_commas(items), "]"])

    def _members(self, parts: Sequence[Schema]) -> list[Short | str] | None:
        """The members that an object has to have, in order; None if one of them has no end."""
        required = _required(parts)
        listed = _properties(parts)
        members: list[Short | str] = []
        for name in [*listed, *sorted(required - set(listed))]:
            if name in required:
                value = self._of(listed.get(name, _additional(parts)))
                if value is None:
                    return None
                members.append(_member(name, value))
        return members

    def _note(self, node: Schema, endings: Endings) -> None:
        """Note what ends a schema's values, and what may be chosen in them."""
        choices, targets = endings.choices, self._targets(node)
        if targets is not None:
            known = self._shortest(node)
            endings.is_endless |= len(known) < len(targets)
            choices.update(known if len(targets) > 1 else ())
            return
        found = [(parts, self._kinds(parts)) for parts in self._alternatives(node)]
        if sum(len(kinds) for _, kinds in found) > 1:
            choices.update(itertools.chain.from_iterable(kinds for _, kinds in found))
        for parts, kinds in found:
            endings.values.update(kinds)
            if (values := _values(parts)) is not None:
                choices.update(values if len(values) > 1 else ())
                continue
            types = _types(parts)
            endings.is_endless |= len(kinds) < len(types)
            if "string" in types and any("pattern" in part or "format" in part for part in parts):
                endings.has_patterns = True
                choices.add(_string(parts))
            if "number" in types and any(limit in part for part in parts for limit in _LIMITS):
                choices.add(Short("", _LIMITED_NUMBER, is_whole=False))
            if "array" in types:
                self._note_items(parts, endings)
            if "object" in types:
                self._note_members(parts, endings)

    def _note_items(self, parts: Sequence[Schema], endings: Endings) -> None:
        for number in range(_num_items(parts)):
            if _item(parts, number) is not False:
                self._choose(self._of(_item(parts, number)), "", endings)

    def _note_members(self, parts: Sequence[Schema], endings: Endings) -> None:
        listed = _properties(parts)
        required = _required(parts)
        for name, schema in listed.items():
            value = self._of(schema)
            if value is not None:
                endings.members.add(_member(name, value))
            if name not in required and schema is not False:
                self._choose(value, name, endings)
        others = [one for part in parts for one in _dict(part, "patternProperties").items()]
        for pattern, schema in others:
            endings.has_patterns = True
            value = self._of(schema)
            bound = Short('"', pattern_cost(pattern), is_whole=False)
            endings.choices.add(join([bound, value or ""]))
            endings.is_endless |= value is None and schema is not False
        if _additional(parts) is not False:
            self._choose(self._of(_additional(parts)), "", endings)
        members = self._members(parts) or []
        rest = Short.of("}")
        for begun in range(len(members) - 1, -1, -1):
            rest = join([members[begun], ", " if begun < len(members) - 1 else "", rest])
            if not rest.is_whole:
                break  # it is ended member by member
            endings.rests.add(rest)
            if begun:
                endings.rests.add(join([", ", rest]))

    def _choose(self, value: Short | None, name: str, endings: Endings) -> None:
        """Note that a value may be begun which need not be."""
        if value is None:
            endings.is_endless = True
        else:
            endings.choices.add(join([", ", _member(name, value)]))


def _member(name: str, value: Short) -> Short:
    return join([f"{_dump(name)}: ", value])


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _repeated(one: Short, count: int) -> Short:
    """A text so many times, with commas between."""
    num_known = min(count, MOST_TEXT // (len(one.text) + 2) + 1) if one.is_whole else 1
    cost = count * one.cost + (count - 1) * 2
    text = ", ".join([one.text] * num_known)
    return Short(text, cost, is_whole=one.is_whole and num_known == count)


def _with_commas(members: Sequence[Short | str]) -> Iterator[Short | str]:
    for number, member in enumerate(members):
        if number:
            yield ", "
        yield member


def _values(parts: Sequence[Schema]) -> list[Short] | None:
    """The values that schemas list; None if they list none."""
    listed = [[part["const"]] for part in parts if "const" in part]
    listed += [_list(part, "enum") for part in parts if isinstance(part.get("enum"), list)]
    if not listed:
        return None
    texts = [[_dump(value) for value in values] for values in listed]
    return [Short.of(text) for text in texts[0] if all(text in others for others in texts[1:])]


def _types(parts: Sequence[Schema]) -> list[str]:
    """The types that schemas allow together."""
    kinds = set(_TYPES)
    for part in parts:
        if (named := part.get("type")) is not None:
            listed = named if isinstance(named, list) else [named]
            kinds &= {
                "number" if one == "integer" else one for one in listed if isinstance(one, str)
            }
    return [kind for kind in _TYPES if kind in kinds]


def _string(parts: Sequence[Schema]) -> Short:
    least = max((_int(part, "minLength") for part in parts), default=0)
    patterns = [part["pattern"] for part in parts if isinstance(part.get("pattern"), str)]
    if patterns:
        return Short('"', least + sum(map(pattern_cost, patterns)), is_whole=False)
    if any("format" in part for part in parts):
        return Short('"', least + _FORMATTED, is_whole=False)
    if least > MOST_TEXT:
        return Short('"', least + 2, is_whole=False)
    return Short.of(f'"{"a" * least}"')


def _number(parts: Sequence[Schema]) -> Short:
    limits: dict[str, float] = {
        key: value
        for part in parts
        for key in _LIMITS
        if isinstance(value := part.get(key), int | float) and math.isfinite(value)
    }
    if not limits:
        return Short.of("0")
    least = max(limits.get("minimum", -math.inf), limits.get("exclusiveMinimum", -math.inf))
    most = min(limits.get("maximum", math.inf), limits.get("exclusiveMaximum", math.inf))
    step = limits.get("multipleOf") or 1
    tried: list[float] = [0]
    if math.isfinite(least):
        tried += [(math.ceil(least / step) + more) * step for more in (0, 1)]
    if math.isfinite(most):
        tried += [(math.floor(most / step) - more) * step for more in (0, 1)]
    for number in sorted(tried, key=lambda one: len(_dump(one))):
        above = least <= number and number != limits.get("exclusiveMinimum")
        if above and number <= most and number != limits.get("exclusiveMaximum"):
            return Short.of(_dump(number))
    return Short("", _LIMITED_NUMBER, is_whole=False)


def _num_items(parts: Sequence[Schema]) -> int:
    """Items of a list that have a schema of their own; all behind them are like the last."""
    return 1 + max((len(_list(part, "prefixItems")) for part in parts), default=0)


def _item(parts: Sequence[Schema], number: int) -> Any:
    """The schema of an item of a list."""
    for part in parts:
        listed = _list(part, "prefixItems")
        if number < len(listed):
            return listed[number]
    return next((part["items"] for part in parts if "items" in part), True)


def _properties(parts: Sequence[Schema]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        for name, schema in _dict(part, "properties").items():
            found.setdefault(name, schema)
    return found


def _required(parts: Sequence[Schema]) -> set[str]:
    return {one for part in parts for one in _list(part, "required") if isinstance(one, str)}


def _additional(parts: Sequence[Schema]) -> Any:
    """The schema of members that are not listed."""
    given = [part["additionalProperties"] for part in parts if "additionalProperties" in part]
    return False if False in given else next(iter(given), True)


def _dict(schema: Schema, key: str) -> dict[str, Any]:
    value = schema.get(key)
    return value if isinstance(value, dict) else {}


def _list(schema: Schema, key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _int(schema: Schema, key: str) -> int:
    value = schema.get(key)
    return int(value) if isinstance(value, int | float) and 0 <= value < 1e9 else 0
