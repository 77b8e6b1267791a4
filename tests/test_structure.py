"""Public names, and what contracts of imports do not say: who reaches into the engine."""

import ast
from pathlib import Path

import tokendance
from tokendance import errors

PACKAGE = Path(tokendance.__file__).parent
# Of `LLM.engine`, the loop: all else is its own.
INSIDE_THE_ENGINE = {"_engine", "scheduler", "store", "executor", "runner"}
MAX_LINES = 450


def test_public_names() -> None:
    public_errors = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TokenDanceError)
    }
    assert set(tokendance.__all__) == {
        "LLM", "Agent", "KVBytes", "Output", "Part", "Prompt", "RoundResult", "RoundStats",
        "SamplingParams", "Session", "private", "shared", "strip_separator", "NotStoredError",
        *public_errors,
    }  # fmt: skip
    assert all(hasattr(tokendance, name) for name in tokendance.__all__)
    assert tokendance.StoreError is errors.StoreError
    for name in [*public_errors, "NotStoredError"]:
        assert name in (errors.__doc__ or "").split(), f"{name} is not in the tree"


def test_nobody_reaches_into_the_engine() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "engine":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                reaches = owner in ("engine", "_engine") and node.attr in INSIDE_THE_ENGINE
                assert not reaches, f"{path.name}:{node.lineno} reads {owner}.{node.attr}"


def test_files_can_be_read_in_a_sitting() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
