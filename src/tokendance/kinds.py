"""Checks that what a user gives is of the kind that its field is declared with."""

import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from tokendance.errors import ConfigError

# One, and several.
_WORDS: dict[object, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "truth values"),
    str: ("a text", "texts"),
    Path: ("a path", "paths"),
    NoneType: ("None", "None"),
}


def check_kinds(settings: Any) -> None:
    """Check every field of a dataclass by its annotation.

    Lists become tuples and numbers of numpy those of Python. Truth values do not count as numbers.
    Which of a few texts one is, is left to the dataclass.

    Raises:
        ConfigError: naming the first field that is something else.
    """
    kinds = _kinds_of(type(settings))  # type: ignore[arg-type]  # all classes can be hashed
    for name, kind in kinds.items():
        value = getattr(settings, name)
        if type(value) is kind:  # the usual case, and the quick one
            continue
        made = _plain(value, kind)
        if not _fits(made, kind):
            raise ConfigError(f"{name} is {reprlib.repr(value)}. Give {_say(kind)}.")
        if made is not value:
            object.__setattr__(settings, name, made)


def is_number(value: object) -> bool:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


@cache
def _kinds_of(settings: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(settings)
    return {field.name: hints[field.name] for field in fields(settings)}


def _choices(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union; of anything else, that kind alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _plain(value: object, kind: Any) -> object:
    """The same value without numpy, and with tuples in place of other lists that are wanted."""
    if isinstance(value, np.generic):
        return value.item()
    tuples = [choice for choice in _choices(kind) if get_origin(choice) is tuple]
    if not tuples or isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return value
    item_kind = get_args(tuples[0])[0]
    if isinstance(value, tuple) and _are_all(value, item_kind):
        return value
    try:
        return tuple(_plain(item, item_kind) for item in value)
    except TypeError:  # it only seemed that it could be iterated
        return value


def _are_all(values: tuple[object, ...], kind: Any) -> bool:
    """Whether all are of a kind itself; quick, where there are thousands."""
    return set(map(type, values)) <= {kind}


def _fits(value: object, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return isinstance(value, str)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is ...:
            return _are_all(value, arguments[0]) or all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return is_number(value)
    return isinstance(value, os.PathLike if kind is Path else kind)


def _say(kind: Any) -> str:
    return " or ".join(_say_one(choice) for choice in _choices(kind))


def _say_one(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is not tuple:
        return _WORDS.get(kind, (f"a {getattr(kind, '__name__', kind)}",))[0]
    item = get_args(kind)[0]
    if get_origin(item) is tuple:
        return f"a list of pairs of {' and '.join(map(_say_one, get_args(item)))}"
    return f"a list of {_WORDS[item][1]}"
