"""The rooms of the package, and who may import whom."""

import ast
from pathlib import Path

import tokendance
from tokendance import errors

PACKAGE = Path(tokendance.__file__).parent
SEES_SERVER = {"cli.py", "serve.py"}  # the command line, and the suite that measures it
# A room may import the rooms named after it, and config and errors, which import none.
MAY_IMPORT = {
    "rounds": set(),
    "attention": set(),
    "store": {"rounds"},
    "disk": {"rounds", "store"},
    "models": {"rounds", "attention"},
    "collector": {"rounds", "store"},
    "executor": {"attention", "models", "store"},
    "engine": {"rounds", "store", "disk", "collector", "executor", "options", "outputs", "params"},
    "tier": {"rounds", "store", "disk", "engine"},
    # What measures wants a model with an engine around it (llm), and texts (bench).
    "fidelity": {
        "rounds",
        "store",
        "models",
        "collector",
        "engine",
        "executor",
        "llm",
        "options",
        "outputs",
        "params",
        "bench",
    },
}


def imported_rooms(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("tokendance.")}
    return found


def test_rooms_import_only_what_they_may() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name not in ("server", "commands") and path.name not in SEES_SERVER:
            assert "server" not in imported_rooms(path), path
    for room, allowed in MAY_IMPORT.items():
        for path in (PACKAGE / room).rglob("*.py"):
            extra = imported_rooms(path) - allowed - {room, "config", "errors"}
            assert not extra, f"{path.name} in {room} imports {extra}"
    assert imported_rooms(PACKAGE / "config.py") == {"errors"}


def test_scheduler_and_collector_touch_no_tensor() -> None:
    for path in [*(PACKAGE / "collector").glob("*.py"), *(PACKAGE / "store").glob("*.py")]:
        assert "torch" not in path.read_text().replace("no torch", ""), path
    assert "torch" not in (PACKAGE / "engine" / "scheduler.py").read_text()


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


def test_sessions_do_not_know_who_runs_their_rounds() -> None:
    for name in ("session.py", "conversation.py"):
        assert not imported_rooms(PACKAGE / name) & {"llm", "engine", "executor", "server"}, name
